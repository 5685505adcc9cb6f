"""What frozen features are worth: protocols, tables and pictures."""

from mmssl.evaluation.embed import embed
from mmssl.evaluation.evaluate import Score, evaluate, print_scores
from mmssl.evaluation.pictures import draw_reconstructions
from mmssl.evaluation.report import report
from mmssl.probes import DEFAULT_PROTOCOLS, PROTOCOLS

__all__ = [
    "DEFAULT_PROTOCOLS",
    "PROTOCOLS",
    "Score",
    "draw_reconstructions",
    "embed",
    "evaluate",
    "print_scores",
    "report",
]
