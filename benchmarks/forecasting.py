"""Forecast a long series with a pretrained encoder beside raw windows, untrained encoders, and transformers' PatchTST.

    python benchmarks/forecasting.py --name ETTh1 --config examples/recipes/patchtst_etth1_laptop.yaml \
        --data "$MMSSL_DATA/timeseries/forecasting/ETTh1.parquet" --splits [8640,11520,14400]

Encoders are pretrained on the training part alone. PatchTST has the encoder's sizes and is trained from scratch to
forecast, by the loop that fine-tunes the encoder, with as many steps as pretraining and fine-tuning have together; its
best epoch by validation counts. Other flags are those of ``mmssl pretrain`` and ``mmssl forecast``. Errors are appended
to docs/results.jsonl.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from results import append
from torch import Tensor, nn
from transformers import PatchTSTConfig, PatchTSTForPrediction

from mmssl.cli import pretrain_parser, with_source
from mmssl.data import load_samples
from mmssl.evaluation import Score
from mmssl.evaluation.forecasting import (
    Forecast,
    Windows,
    ends_of,
    errors,
    fine_tune,
    forecast,
    print_forecasts,
    standardized,
    windows,
)
from mmssl.modalities.base import Batch
from mmssl.training import pretrain


class PatchTST(nn.Module):
    """transformers' model behind the forward of a forecaster."""

    def __init__(self, config: PatchTSTConfig):
        super().__init__()
        self.model = PatchTSTForPrediction(config)

    def forward(self, batch: Batch) -> Tensor:
        return self.model(past_values=batch["series"]).prediction_outputs


def main() -> None:
    parser = pretrain_parser()
    parser.add_argument("--name", type=str, required=True, help="Plain name of the data: ETTh1.")
    parser.add_argument("--runs", nargs="+", default=[], help="Finished runs of these seeds, in place of pretraining.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_function_arguments(forecast, skip={"checkpoints", "data", "modality", "learning_rate"})
    parser.add_argument("--peer", type=bool, default=True, help="Train transformers' PatchTST too.")
    parser.add_argument("--fine_tune_learning_rate", type=float, default=1e-4)
    config = parser.parse_args(with_source(sys.argv[1:]))
    given = parser.instantiate(config)
    base, runs = Path(given.train.output_dir), [Path(run) for run in given.runs]
    whole = given.modality.prepare(load_samples(given.data, given.modality).values[0])["series"]
    training_part = base / "training_part"
    training_part.mkdir(parents=True, exist_ok=True)
    np.save(training_part / "series.npy", whole[: ends_of(len(whole), given.splits)[0]].T.numpy())
    for seed in given.seeds if not runs else ():
        train = replace(given.train, seed=seed, output_dir=str(base / f"seed{seed}"))
        data = replace(given.data, source=str(training_part))
        runs.append(pretrain(given.modality, given.objective, given.encoder, data, train))
    protocol = {"look_back": given.look_back, "splits": given.splits, "batch_size": given.batch_size}
    options = {"fine_tune_epochs": given.fine_tune_epochs, "learning_rate": given.fine_tune_learning_rate}
    found = forecast(runs, given.data, given.horizon, **protocol, **options)

    series = standardized(whole, given.splits, config.name)
    seen = given.train.max_train_steps * given.train.per_device_train_batch_size
    for steps in given.horizon if given.peer else ():
        parts = windows(series, given.splits, given.look_back, steps)
        epochs = given.fine_tune_epochs + round(seen / len(parts[0]))
        row = Forecast("PatchTST of transformers, from scratch", steps)
        for seed in given.seeds:
            mse, mae = supervised(given, parts, epochs, seed)
            row.mse.append(mse)
            row.mae.append(mae)
        found.append(row)
    print_forecasts(found, title=config.name)
    scores = []
    for each in found:
        fit, _, test = (len(part) for part in windows(series, given.splits, given.look_back, each.horizon))
        scores.append(Score(f"horizon {each.horizon}", each.row, each.mse, fit, test, "MSE of standardised values"))
    append(scores, runs, "time_series", config.name, Path(str(config.config[0])).stem)


def supervised(given, parts: list[Windows], epochs: int, seed: int) -> tuple[float, float]:
    """Test errors of a PatchTST of the encoder's sizes; the learning rate is chosen by validation."""
    patch, encoder = given.modality.patch_length, given.encoder
    config = PatchTSTConfig(
        num_input_channels=parts[0].series.shape[1],
        context_length=given.look_back,
        prediction_length=parts[0].horizon,
        patch_length=patch,
        patch_stride=given.modality.stride or patch,
        d_model=encoder.hidden_size,
        num_hidden_layers=encoder.num_hidden_layers,
        num_attention_heads=encoder.num_attention_heads,
        ffn_dim=encoder.intermediate_size,
        ff_dropout=encoder.hidden_dropout_prob,
        head_dropout=encoder.hidden_dropout_prob,
        scaling="std",
    )
    tuned = []
    for rate in (1e-3, 1e-4):
        torch.manual_seed(seed)
        tuned.append(fine_tune(PatchTST(config), parts, epochs, rate, given.batch_size, seed, "PatchTST"))
    best = min(tuned, key=lambda model: errors(model, parts[1], given.batch_size)[0])
    return errors(best, parts[2], given.batch_size)


if __name__ == "__main__":
    main()
