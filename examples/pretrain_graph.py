"""Pretrain a graph encoder as GraphMAE does, and probe its nodes or its graphs.

    accelerate launch examples/pretrain_graph.py          # scikit-learn's digits, each joined to its nearest ones
    accelerate launch examples/pretrain_graph.py --config examples/recipes/graphmae_cora.yaml --data pyg:Planetoid:Cora
    accelerate launch examples/pretrain_graph.py --config examples/recipes/graphmae_tu.yaml --data pyg:TUDataset:MUTAG \
        --modality.num_features 7

The flags are those of ``mmssl pretrain``; ``--help`` lists them.
"""

from pathlib import Path

from mmssl.cli import clear_errors, parse_pretrain
from mmssl.evaluation import closing_words
from mmssl.training import load_objective, pretrain


def main() -> None:
    arguments = parse_pretrain(recipe=Path(__file__).parent / "recipes" / "graphmae_digits.yaml")
    run = pretrain(**arguments)
    closing_words(run, load_objective(run), arguments["data"])


if __name__ == "__main__":
    with clear_errors(Path(__file__).name):
        main()
