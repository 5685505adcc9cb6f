"""Forecasting with a pretrained encoder of series: a linear head on the tokens of a window, frozen or fine-tuned.

The protocol of the ETT sets (Zhou et al., Informer, 2021; Nie et al., PatchTST, 2023): the series is split in time, and
standardised by its training part; a window of ``look_back`` steps forecasts the next ``horizon`` ones of each channel;
every window of a part counts, and one may look back into the part before. Errors are those of standardised values.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import Ridge
from torch import Tensor, nn
from tqdm.auto import tqdm

from mmssl.data import DataArguments, load_samples
from mmssl.evaluation.models import fresh, load_own, pick_modality
from mmssl.modalities.base import Batch
from mmssl.modalities.time_series import TimeSeries
from mmssl.modeling import MMSSLModel
from mmssl.randomness import keyed_generator

M = TypeVar("M", bound=nn.Module)

PENALTIES = (10.0, 100.0, 1e3, 1e4, 1e5)


@dataclass
class Forecast:
    """Errors of one row at one horizon.

    Attributes:
        row: "raw" window, "untrained" or "pretrained" encoder, with ", fine-tuned" where it was.
        horizon: steps that are forecast.
        mse: mean squared error on the test part, for each seed.
        mae: mean absolute error.
    """

    row: str
    horizon: int
    mse: list[float] = field(default_factory=list)
    mae: list[float] = field(default_factory=list)


@dataclass
class Windows:
    """All windows of a part of a series.

    Attributes:
        series: (T, C) the standardised series.
        first: the first steps that are forecast, one for each window.
    """

    series: Tensor
    first: Tensor
    look_back: int
    horizon: int

    def __len__(self) -> int:
        return len(self.first)

    def batches(self, size: int, order: Tensor | None = None) -> Iterator[tuple[Batch, Tensor]]:
        """What is seen, as the modality's batch, and what follows, (B, horizon, C)."""
        offsets = torch.arange(-self.look_back, self.horizon)
        first = self.first if order is None else self.first[order]
        for chosen in first.split(size):
            windows = self.series[chosen[:, None] + offsets]
            seen, future = windows.split([self.look_back, self.horizon], dim=1)
            yield batch_of(seen), future


def batch_of(series: Tensor) -> Batch:
    """(B, T, C) whole series as the modality's batch."""
    ones = torch.ones_like(series, dtype=torch.long)
    return dict(zip(TimeSeries.inputs, (series, ones, ones[..., 0]), strict=True))


class Forecaster(nn.Module):
    """A linear head, the same for all channels, on all tokens of a channel, or without a model on its window."""

    def __init__(self, modality: TimeSeries, model: MMSSLModel | None, coefficients: np.ndarray, intercept: np.ndarray):
        super().__init__()
        self.modality, self.model = modality, model
        self.head = nn.Linear(coefficients.shape[1], coefficients.shape[0])
        with torch.no_grad():
            self.head.weight.copy_(torch.from_numpy(coefficients))
            self.head.bias.copy_(torch.from_numpy(intercept))

    def forward(self, batch: Batch) -> Tensor:
        """(B, horizon, C)."""
        series = batch["series"]
        forecast = self.head(features(self.modality, self.model, batch))[:, None]
        forecast = self.modality.denormalize(forecast, batch)
        return forecast.reshape(len(series), series.shape[2], -1).transpose(1, 2)


def features(modality: TimeSeries, model: MMSSLModel | None, batch: Batch) -> Tensor:
    """(B * C, F) what the head reads of each channel: its tokens side by side, or its normalised values."""
    channels = len(batch["series"]) * batch["series"].shape[2]
    if model is None:
        series, known, _ = modality.read(batch)
        mean, std = modality.statistics(series, known)
        return ((series - mean) / std).transpose(1, 2).flatten(0, 1)
    own = model.adapters[modality.name]
    return model.encode(own, own.tokenize(batch)).tokens.reshape(channels, -1)


def forecast(
    checkpoints: Sequence[str | Path],
    data: DataArguments,
    horizon: Sequence[int] = (96,),
    look_back: int = 336,
    splits: Sequence[float] = (0.6, 0.8, 1.0),
    fine_tune_epochs: int = 0,
    learning_rate: float = 1e-4,
    batch_size: int = 64,
    modality: str | None = None,
) -> list[Forecast]:
    """Forecast a long series with checkpoints that differ in their seed alone, and beside them without a model.

    Args:
        checkpoints: folders or Hub names of pretrained models, one for each seed.
        data: one long series, such as a table with time down its rows.
        horizon: steps to forecast; each is measured by itself.
        look_back: steps that a forecast is made from.
        splits: where training, validation and test data end: shares of the series, or numbers of steps if above 1.
        fine_tune_epochs: train the encoder with the head for so many epochs too; the best by validation counts. 0: no.
        learning_rate: of fine-tuning, AdamW, falling to 0 as a cosine.
        batch_size: windows in a batch.
        modality: which modality of a model that has several.

    Raises:
        ValueError: several series, one with missing values, or one that is too short for the splits.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = [load_own(checkpoint) for checkpoint in checkpoints]
    name = pick_modality(models[0], modality)
    adapter = models[0].adapters[name]
    if not isinstance(adapter, TimeSeries):
        raise ValueError(f"modality: found {name}; expected one of series, time_series")
    samples = load_samples(data, adapter)
    if len(samples) != 1:
        raise ValueError(f"data: found {len(samples)} series; expected one long one, with time down the rows")
    try:
        whole = adapter.prepare(samples.values[0])["series"]
    except ValueError as error:
        raise ValueError(f"{samples.name(0)}: {error}") from error
    series = standardized(whole, splits, samples.name(0)).to(device)
    rows: dict[tuple[str, int], Forecast] = {}
    candidates: list[tuple[str, int, MMSSLModel | None]] = [("raw", 0, None)]
    candidates += [("untrained", seed, fresh(model, seed)) for seed, model in enumerate(models)]
    candidates += [("pretrained", seed, model) for seed, model in enumerate(models)]
    for steps in horizon:
        parts = windows(series, splits, look_back, steps)
        for row, seed, model in candidates:
            own = None if model is None else copy.deepcopy(model)
            forecaster = fit_head(adapter, own and own.eval(), parts, batch_size).to(device)
            found = [(row, forecaster)]
            if fine_tune_epochs and own is not None:
                tuned = fine_tune(forecaster, parts, fine_tune_epochs, learning_rate, batch_size, seed, row)
                found.append((f"{row}, fine-tuned", tuned))
            for label, each in found:
                mse, mae = errors(each, parts[2], batch_size)
                scores = rows.setdefault((label, steps), Forecast(label, steps))
                scores.mse.append(mse)
                scores.mae.append(mae)
    return list(rows.values())


def ends_of(length: int, splits: Sequence[float], name: str = "data") -> list[int]:
    """Where the three parts end, in steps."""
    ends = [round(end * length) if end <= 1 else round(end) for end in splits]
    if len(ends) != 3 or not 0 < ends[0] < ends[1] < ends[2] <= length:
        raise ValueError(f"splits: found {list(splits)}; expected three that rise, of the {length} steps of {name}")
    return ends


def standardized(series: Tensor, splits: Sequence[float], name: str) -> Tensor:
    """(T, C) by the mean and deviation of each channel in the training part."""
    if series.isnan().any():
        raise ValueError(f"{name}: found missing values; forecasting needs a series without: fill them in first")
    train = series[: ends_of(len(series), splits, name)[0]].double()
    std = train.std(dim=0, correction=0)
    return ((series - train.mean(dim=0)) / torch.where(std > 0, std, 1.0)).float()


def windows(series: Tensor, splits: Sequence[float], look_back: int, horizon: int) -> list[Windows]:
    """Training, validation and test windows; those of the latter two may look back into the part before."""
    ends = ends_of(len(series), splits)
    starts = [look_back, ends[0], ends[1]]
    for part, start, end in zip(("training", "validation", "test"), starts, ends, strict=True):
        if end - start < horizon or start < look_back:
            raise ValueError(
                f"splits: the {part} part has no window of {look_back} + {horizon} steps; found steps {start} to {end}"
            )
    return [
        Windows(series, torch.arange(start, end - horizon + 1, device=series.device), look_back, horizon)
        for start, end in zip(starts, ends, strict=True)
    ]


@torch.no_grad()
def fit_head(modality: TimeSeries, model: MMSSLModel | None, parts: Sequence[Windows], batch_size: int) -> Forecaster:
    """Ridge regression from features to the normalised future; the penalty that is best on validation data."""
    inputs, targets = [], []
    for batch, future in parts[0].batches(batch_size):
        inputs.append(features(modality, model, batch).cpu())
        mean, std = modality.statistics(*modality.read(batch)[:2])
        targets.append(((future - mean) / std).transpose(1, 2).flatten(0, 1).cpu())
    x, y = torch.cat(inputs).numpy(), torch.cat(targets).numpy()
    best: tuple[float, Forecaster | None] = (np.inf, None)
    for penalty in PENALTIES:
        ridge = Ridge(alpha=penalty, solver="cholesky").fit(x, y)
        forecaster = Forecaster(modality, model, ridge.coef_, ridge.intercept_).to(parts[0].series.device)
        best = min(best, (errors(forecaster, parts[1], batch_size)[0], forecaster), key=lambda pair: pair[0])
    assert best[1] is not None
    return best[1]


def fine_tune(
    forecaster: M,
    parts: Sequence[Windows],
    epochs: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    title: str,
) -> M:
    """Train all of a forecaster from where it is, and keep the epoch that is best on validation data."""
    tuned = copy.deepcopy(forecaster)
    best, least = copy.deepcopy(tuned), errors(tuned, parts[1], batch_size)[0]
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=learning_rate, weight_decay=1e-2)
    steps = -(-len(parts[0]) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    bar = tqdm(total=epochs * steps, desc=f"fine-tune {title} {seed}", unit="step", mininterval=5)
    for epoch in range(epochs):
        tuned.train()
        generator = keyed_generator(torch.device("cpu"), seed, "fine-tune", epoch)
        for batch, future in parts[0].batches(batch_size, torch.randperm(len(parts[0]), generator=generator)):
            loss = nn.functional.mse_loss(tuned(batch), future)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.update()
        error = errors(tuned, parts[1], batch_size)[0]
        bar.set_postfix_str(f"validation {error:.4f}")
        if error < least:
            best, least = copy.deepcopy(tuned), error
    bar.close()
    return best


@torch.inference_mode()
def errors(forecaster: nn.Module, part: Windows, batch_size: int) -> tuple[float, float]:
    """Mean squared and mean absolute error over all windows, steps and channels."""
    forecaster.eval()
    squared = absolute = count = 0.0
    for batch, future in part.batches(4 * batch_size):
        difference = (forecaster(batch) - future).double()
        squared += float(difference.square().sum())
        absolute += float(difference.abs().sum())
        count += difference.numel()
    return squared / count, absolute / count


def print_forecasts(forecasts: Sequence[Forecast], title: str) -> None:
    """A table with a line for each row and two columns for each horizon, errors with their spread over seeds."""
    horizons = list(dict.fromkeys(each.horizon for each in forecasts))
    table = Table(title=f"{title}\nerrors of standardised values on the test part", min_width=60)
    table.add_column("forecast from")
    for steps in horizons:
        table.add_column(f"MSE {steps}", justify="right")
        table.add_column(f"MAE {steps}", justify="right")
    labels = {"raw": "raw window", "untrained": "untrained encoder", "pretrained": "pretrained encoder"}

    def cell(values: Sequence[float]) -> str:
        spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
        return f"{np.mean(values):.3f}{spread}"

    for row in dict.fromkeys(each.row for each in forecasts):
        cells: list[Any] = []
        for steps in horizons:
            (found,) = [each for each in forecasts if (each.row, each.horizon) == (row, steps)]
            cells += [cell(found.mse), cell(found.mae)]
        kind, _, tuned = row.partition(",")
        table.add_row(labels.get(kind, kind) + ("," + tuned if tuned else ""), *cells)
    Console().print(table)
