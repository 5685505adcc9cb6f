"""Pretrain a recipe with several seeds, probe it beside raw features and untrained encoders, record the scores.

    python benchmarks/accuracy.py --config examples/recipes/mae_digits.yaml --name digits
    python benchmarks/accuracy.py --config examples/recipes/mae_cifar10.yaml --name cifar10 \
        --data "$MMSSL_DATA/images/cifar10_jpg/train.parquet" \
        --probe.source "$MMSSL_DATA/images/cifar10_jpg/train.parquet" --probe.max_samples 10000 \
        --test.source "$MMSSL_DATA/images/cifar10_jpg/test.parquet" --test.max_samples 2000

Other flags are those of ``mmssl pretrain``. Scores are appended to docs/results.jsonl; then make docs/results.md anew
with ``python benchmarks/results.py``.
"""

import json
import sys
from pathlib import Path

from results import append

from mmssl.cli import pretrain_parser, with_source
from mmssl.data import DataArguments
from mmssl.evaluation import evaluate, print_scores
from mmssl.evaluation.features import Pooling
from mmssl.training import pretrain
from mmssl.training.checkpoint import step_folders


def main() -> None:
    parser = pretrain_parser()
    parser.add_argument("--name", type=str, required=True, help="Plain name of the data: digits, cifar10, ...")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--protocol", nargs="+", default=None)
    parser.add_argument("--pooling", type=Pooling, default="mean", help="From tokens to samples.")
    parser.add_class_arguments(DataArguments, "probe", help="Labelled samples for the probes. Default: the data.")
    parser.add_class_arguments(DataArguments, "test", help="Labelled samples that the probes are tested on.")
    config = parser.parse_args(with_source(sys.argv[1:]))
    if config.also:
        sys.exit("accuracy.py measures one modality; for several that share an encoder there is benchmarks/joint.py")
    base, runs = config.train.output_dir, []
    for seed in config.seeds:
        config.train.seed, config.train.output_dir = seed, f"{base}/seed{seed}"
        # What an earlier call has left is gone on with, where it is of the same configuration.
        config.train.resume_from_checkpoint = "latest" if step_folders(Path(config.train.output_dir)) else None
        given = parser.instantiate(config)
        runs.append(pretrain(given.modality, given.objective, given.encoder, given.data, given.train))
    probe = given.probe if given.probe.source else given.data
    scores = evaluate(runs, probe, given.test, config.protocol, pooling=config.pooling)
    print_scores(scores, title=config.name)

    (modality,) = json.loads((runs[-1] / "run.json").read_text())["modality"]
    append(scores, runs, modality, config.name, Path(str(config.config[0])).stem, config.pooling)


if __name__ == "__main__":
    main()
