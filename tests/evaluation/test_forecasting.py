"""Tests of forecasting: which windows count, what the head is fitted to, and what an error is the error of."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from mmssl.cli import COMMANDS
from mmssl.data import DataArguments
from mmssl.evaluation.forecasting import PENALTIES, fit_head, forecast, standardized, windows
from mmssl.modalities.time_series import TimeSeries
from mmssl.modeling import MMSSLConfig, MMSSLModel

SPLITS = (0.6, 0.8, 1.0)
OPTIONS: dict[str, Any] = {"patch_length": 4, "num_channels": 2}


def waves(steps: int = 200) -> np.ndarray:
    """(steps, 2) sines of two periods, with a trend and noise."""
    time = np.arange(steps)
    rng = np.random.default_rng(0)
    values = np.stack([5 + np.sin(time / 3), 100 + 20 * np.cos(time / 7) + 0.05 * time], axis=1)
    return (values + 0.1 * rng.standard_normal(values.shape)).astype(np.float32)


@pytest.fixture
def table(tmp_path: Path) -> str:
    path = tmp_path / "waves.csv"
    np.savetxt(path, waves(), delimiter=",", header="a,b", comments="")
    return str(path)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    MMSSLModel(MMSSLConfig(modalities={"time_series": OPTIONS}, **shape)).save_pretrained(tmp_path / "run")
    return tmp_path / "run"


def test_the_windows_of_etth1_are_those_of_the_papers() -> None:
    """12, 4 and 4 months of hours: 8,209 + 2,785 + 2,785 windows for horizon 96 and a look-back of 336."""
    series = torch.zeros(17_420, 1)
    for part, expected in zip(windows(series, (8640, 11_520, 14_400), 336, 96), (8209, 2785, 2785), strict=True):
        assert len(part) == expected
    for part, first in zip(windows(series, (8640, 11_520, 14_400), 336, 96), (336, 8640, 11_520), strict=True):
        assert int(part.first[0]) == first


def test_standardised_by_the_training_part_alone() -> None:
    series = torch.from_numpy(waves())
    expected = (series - series[:120].mean(0)) / series[:120].std(0, correction=0)
    torch.testing.assert_close(standardized(series, SPLITS, "waves"), expected, atol=1e-5, rtol=1e-5)
    later = series.clone()
    later[120:] += 1000
    assert torch.equal(standardized(later, SPLITS, "waves")[:120], standardized(series, SPLITS, "waves")[:120])


def test_raw_row_is_ridge_regression_of_normalised_windows(checkpoint: Path, table: str) -> None:
    """Window by window and channel by channel, in NumPy."""
    (found, *_) = forecast([checkpoint], DataArguments(table), horizon=[6], look_back=12)
    series = waves().astype(np.float64)
    series = (series - series[:120].mean(0)) / series[:120].std(0)

    def pairs(first: int, end: int) -> list[tuple[np.ndarray, np.ndarray, float, float]]:
        every = []
        for start in range(first, end - 6 + 1):
            for channel in range(2):
                seen, future = series[start - 12 : start, channel], series[start : start + 6, channel]
                mean, std = seen.mean(), np.sqrt(seen.var() + 1e-5)
                every.append(((seen - mean) / std, future, mean, std))
        return every

    train, validation, test = pairs(12, 120), pairs(120, 160), pairs(160, 200)
    x = np.stack([seen for seen, *_ in train])
    y = np.stack([(future - mean) / std for _, future, mean, std in train])

    def error(ridge: Ridge, part: list) -> np.ndarray:
        return np.stack([ridge.predict(seen[None])[0] * std + mean - future for seen, future, mean, std in part])

    fitted = [Ridge(alpha=penalty).fit(x, y) for penalty in PENALTIES]
    best = min(fitted, key=lambda ridge: np.square(error(ridge, validation)).mean())
    assert found.row == "raw" and found.horizon == 6
    assert found.mse == pytest.approx([np.square(error(best, test)).mean()], rel=1e-3)
    assert found.mae == pytest.approx([np.abs(error(best, test)).mean()], rel=1e-3)


def test_the_head_reads_each_channel_alone() -> None:
    """Another value in channel 1 changes no forecast of channel 0: the order of rows and tokens is right."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = MMSSLModel(MMSSLConfig(modalities={"time_series": OPTIONS}, **shape)).eval()
    series = standardized(torch.from_numpy(waves()), SPLITS, "waves")
    parts = windows(series, SPLITS, 12, 6)
    forecaster = fit_head(TimeSeries(**OPTIONS), model, parts, 64)
    batch, future = next(parts[2].batches(8))
    changed = batch | {"series": batch["series"] + torch.tensor([0.0, 1.0]) * torch.randn(8, 12, 1)}
    with torch.no_grad():
        one, other = forecaster(batch), forecaster(changed)
    assert one.shape == future.shape
    assert torch.equal(one[..., 0], other[..., 0]) and not torch.allclose(one[..., 1], other[..., 1])


def test_fine_tuning_begins_with_the_head_and_never_gets_worse_on_validation(checkpoint: Path, table: str) -> None:
    found = forecast([checkpoint], DataArguments(table), [6], 12, fine_tune_epochs=3, learning_rate=1e-3)
    rows = [each.row for each in found]
    assert rows == ["raw", "untrained", "untrained, fine-tuned", "pretrained", "pretrained, fine-tuned"]
    mse = {each.row: each.mse[0] for each in found}
    assert mse["pretrained, fine-tuned"] != mse["pretrained"]
    # A linear head on a random encoder of a sum of sines forecasts better than the mean.
    assert all(value < 1.0 for value in mse.values())
    again = forecast([checkpoint], DataArguments(table), [6], 12, fine_tune_epochs=3, learning_rate=1e-3)
    assert [each.mse for each in again] == [each.mse for each in found]


def test_the_command_prints_and_writes_the_errors(checkpoint: Path, table: str, tmp_path: Path, capsys) -> None:
    output = tmp_path / "errors.json"
    flags = ["--data", table, "--horizon", "[4,6]", "--look_back", "12", "--output", str(output)]
    COMMANDS["forecast"]([str(checkpoint), *flags])
    printed = capsys.readouterr().out
    assert "raw window" in printed and "pretrained encoder" in printed and "MSE 6" in printed
    assert output.read_text().count('"horizon": 4') == 3


@pytest.mark.parametrize(
    ("splits", "look_back", "message"),
    [
        ((0.8, 0.6, 1.0), 12, r"splits: found \[0.8, 0.6, 1.0\]; expected three that rise, of the 200 steps"),
        ((0.6, 0.61, 1.0), 12, "splits: the validation part has no window of 12 . 6 steps; found steps 120 to 122"),
        ((0.6, 0.8, 1.0), 119, "splits: the training part has no window of 119 . 6 steps; found steps 119 to 120"),
        ((120, 160, 300), 12, "expected three that rise, of the 200 steps"),
    ],
)
def test_splits_that_leave_nothing(checkpoint: Path, table: str, splits, look_back: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        forecast([checkpoint], DataArguments(table), [6], look_back, splits)


def test_what_is_no_series_is_refused(tmp_path: Path, table: str) -> None:
    options: dict[str, Any] = {"image": {"image_size": 8, "patch_size": 4, "num_channels": 1}}
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    MMSSLModel(MMSSLConfig(modalities=options, **shape)).save_pretrained(tmp_path / "image")
    with pytest.raises(ValueError, match="modality: found image; expected one of series, time_series"):
        forecast([tmp_path / "image"], DataArguments(table))


def test_missing_values_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    values = waves()
    values[50, 1] = np.nan
    np.savetxt(tmp_path / "gap.csv", values, delimiter=",", header="a,b", comments="")
    with pytest.raises(ValueError, match="missing values; forecasting needs a series without"):
        forecast([checkpoint], DataArguments(str(tmp_path / "gap.csv")), [6], 12)


def test_a_series_that_does_not_fit_is_named(checkpoint: Path, tmp_path: Path) -> None:
    np.savetxt(tmp_path / "one.csv", waves()[:, :1], delimiter=",", header="a", comments="")
    with pytest.raises(ValueError, match=r"one\.csv.*: found 1 channels; expected 2"):
        forecast([checkpoint], DataArguments(str(tmp_path / "one.csv")), [6], 12)
