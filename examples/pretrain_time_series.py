"""Pretrain an encoder of time series as PatchTST does, and probe it.

    accelerate launch examples/pretrain_time_series.py              # outlines of arrow heads, from aeon
    accelerate launch examples/pretrain_time_series.py --data aeon:JapaneseVowels:train --modality.patch_length 2
    accelerate launch examples/pretrain_time_series.py --data SET_TRAIN.ts
    accelerate launch examples/pretrain_time_series.py --config examples/recipes/patchtst_etth1.yaml --data FILE.csv

The flags are those of ``mmssl pretrain``; ``--help`` lists them.
"""

from pathlib import Path

from mmssl.cli import clear_errors, parse_pretrain
from mmssl.evaluation import closing_words
from mmssl.training import load_objective, pretrain


def main() -> None:
    arguments = parse_pretrain(recipe=Path(__file__).parent / "recipes" / "patchtst_uea.yaml")
    run = pretrain(**arguments)
    closing_words(run, load_objective(run), arguments["data"])


if __name__ == "__main__":
    with clear_errors(Path(__file__).name):
        main()
