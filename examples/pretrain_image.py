"""Pretrain an image encoder by masked reconstruction, probe it, and draw what it reconstructs.

    accelerate launch examples/pretrain_image.py                               # scikit-learn's digits, a minute on a laptop
    accelerate launch examples/pretrain_image.py --data PATH --config examples/recipes/mae_cifar10.yaml
    accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 examples/pretrain_image.py ...

The flags are those of ``mmssl pretrain``; ``--help`` lists them.
"""

from pathlib import Path

from accelerate import PartialState

from mmssl.cli import parse_pretrain
from mmssl.data import PreparedSamples, load_samples
from mmssl.evaluation import draw_reconstructions, evaluate, print_scores
from mmssl.training import load_objective, pretrain


def main() -> None:
    arguments = parse_pretrain(recipe=Path(__file__).parent / "recipes" / "mae_digits.yaml")
    run, data, modality = pretrain(**arguments), arguments["data"], arguments["modality"]
    if not PartialState().is_main_process:
        return
    print(f'The model is in {run}: import mmssl; AutoModel.from_pretrained("{run}")')

    samples = load_samples(data, modality)
    few = PreparedSamples(samples, modality, data.on_error)
    picture = draw_reconstructions(
        load_objective(run), few.collate([few[i] for i in range(8)])["inputs"], run / "reconstructions.png"
    )
    print(f"Originals, masked inputs and reconstructions are in {picture}")
    if samples.labels is not None:
        print_scores(evaluate([run], data), title=str(run))


if __name__ == "__main__":
    main()
