"""What frozen features are worth: protocols, tables and pictures."""

from mmssl.evaluation.closing import closing_words
from mmssl.evaluation.embed import embed
from mmssl.evaluation.evaluate import evaluate
from mmssl.evaluation.pictures import draw_reconstructions
from mmssl.evaluation.scores import Score
from mmssl.evaluation.tables import print_scores
from mmssl.probes import PROTOCOLS

__all__ = [
    "PROTOCOLS",
    "Score",
    "closing_words",
    "draw_reconstructions",
    "embed",
    "evaluate",
    "print_scores",
]
