"""Pretrain an encoder of tables as T-JEPA does, and probe it.

    accelerate launch examples/pretrain_tabular.py                  # scikit-learn's digits, a column for each pixel
    accelerate launch examples/pretrain_tabular.py --data FILE.csv --data.label_column TARGET
    accelerate launch examples/pretrain_tabular.py --config examples/recipes/tjepa_jannis.yaml --data FILE.parquet

The flags are those of ``mmssl pretrain``; ``--help`` lists them.
"""

from pathlib import Path

from mmssl.cli import clear_errors, parse_pretrain
from mmssl.evaluation import closing_words
from mmssl.training import load_objective, pretrain


def main() -> None:
    arguments = parse_pretrain(recipe=Path(__file__).parent / "recipes" / "tjepa_digits.yaml")
    run = pretrain(**arguments)
    closing_words(run, load_objective(run), arguments["data"])


if __name__ == "__main__":
    with clear_errors(Path(__file__).name):
        main()
