"""Pretrain a video encoder as VideoMAE does, and probe it.

    accelerate launch examples/pretrain_video.py                    # scikit-learn's digits, moving in eight directions
    accelerate launch examples/pretrain_video.py --config examples/recipes/vjepa_moving_digits.yaml
    accelerate launch examples/pretrain_video.py --config examples/recipes/videomae_vit_base.yaml --data FOLDER

The flags are those of ``mmssl pretrain``; ``--help`` lists them.
"""

from pathlib import Path

from mmssl.cli import clear_errors, parse_pretrain
from mmssl.evaluation import closing_words
from mmssl.training import load_objective, pretrain


def main() -> None:
    arguments = parse_pretrain(recipe=Path(__file__).parent / "recipes" / "videomae_moving_digits.yaml")
    run = pretrain(**arguments)
    closing_words(run, load_objective(run), arguments["data"])


if __name__ == "__main__":
    with clear_errors(Path(__file__).name):
        main()
