"""Pretrain a point cloud encoder as a masked autoencoder (Point-MAE), probe it, and draw the groups that it restores.

    accelerate launch examples/pretrain_point_cloud.py        # generated shapes of ten families, minutes on a laptop
    accelerate launch examples/pretrain_point_cloud.py --data FOLDER_OF_NPY_NPZ_PLY_OFF_OBJ_OR_XYZ
    accelerate launch examples/pretrain_point_cloud.py --config examples/recipes/point_mae.yaml --data FOLDER

The flags are those of ``mmssl pretrain``; ``--help`` lists them.
"""

from pathlib import Path

from mmssl.cli import clear_errors, parse_pretrain
from mmssl.evaluation import closing_words
from mmssl.training import load_objective, pretrain


def main() -> None:
    arguments = parse_pretrain(recipe=Path(__file__).parent / "recipes" / "point_mae_laptop.yaml")
    run = pretrain(**arguments)
    closing_words(run, load_objective(run), arguments["data"])


if __name__ == "__main__":
    with clear_errors(Path(__file__).name):
        main()
