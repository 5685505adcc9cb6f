"""Pretrain an image encoder as a masked autoencoder, probe it, and draw what it reconstructs.

    accelerate launch examples/pretrain_image.py                      # scikit-learn's digits, a minute on a laptop
    accelerate launch examples/pretrain_image.py --config examples/recipes/mae_cifar10.yaml
    accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 examples/pretrain_image.py \
        --config examples/recipes/mae_vit_base_imagenet.yaml --data FOLDER_OF_IMAGES

The flags are those of ``mmssl pretrain``; ``--help`` lists them.
"""

from pathlib import Path

from mmssl.cli import clear_errors, parse_pretrain
from mmssl.evaluation import closing_words
from mmssl.training import load_objective, pretrain


def main() -> None:
    arguments = parse_pretrain(recipe=Path(__file__).parent / "recipes" / "mae_digits.yaml")
    run = pretrain(**arguments)
    closing_words(run, load_objective(run), arguments["data"])


if __name__ == "__main__":
    with clear_errors(Path(__file__).name):
        main()
