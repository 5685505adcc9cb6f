"""Time series of any length and number of channels, with gaps, as patches (Nie et al., PatchTST, ICLR 2023)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from mmssl.drawings import Drawing, Lines
from mmssl.modalities.base import ORDERS, Batch, Modality, View, bin_of, block_order, reversed_rows, segment_orders
from mmssl.motifs import STATISTICS, discover_motifs, interval_statistics, match_motifs
from mmssl.positions import SinCosPositions
from mmssl.samples import Samples
from mmssl.series_files import TableForm, read_collection, read_series
from mmssl.signals import between, bridge, draw_lines, warp, without
from mmssl.tokens import Tokens, gather

EPSILON = 1e-5  # added to the variance of a series, where that of its channel in the training set is 1 (RevIN)
LARGEST = 1e15  # squares of larger values leave the range of single precision
MOST_FITTED = 5_000, 2**25  # series, and values, that are read to fill in open options
KNOTS = 6  # of the curve by which a view changes its speed
PLACES = 32  # bins of the place of a patch in its series


class TimeSeries(Modality):
    """Series cut into patches of equal length, one token each, with a flag for each step that is known.

    A sample is (T,) or (channels, T), and NaN marks a missing value. Of each series and channel the mean is subtracted
    and the rest divided by the standard deviation, over its known steps (Kim et al., RevIN, 2022).

    Args:
        patch_length: steps P of a patch, or of an interval.
        stride: steps from one patch to the next. None: as the patch length. Patches that overlap tell what is hidden.
        token_style: "patches", or VSFormer-style "values_and_shapes": statistics of intervals, and where motifs fit.
        channel_independent: each channel is a row of its own, with the same weights (PatchTST). Else the patches of
            all channels of a sample are one row, and read each other.
        instance_norm: normalise by the statistics of the series itself. Else by those of the training set.
        max_length: of a longer series training reads windows of so many steps, other ones in each epoch, and evaluation
            the last one. None: always the whole series.
        max_span: longest hidden span of the mask style "block", in patches.
        distance: "l2" (PatchTST) or "l1" error of a step.
        num_motifs: with "values_and_shapes", motifs K of each channel.
        motif_length: steps of a motif.
        motif_prior: attention prior: the scores of a motif's token fall by so many times its distance from the series.
        jitter: a view gets noise of this standard deviation, where that of a normalised series is 1.
        scale: a view multiplies each channel by a factor between these two; the instance norm takes it off again.
        time_warp: a view changes its speed smoothly; standard deviation of the logarithm of the speed.
        crop_scale: least and greatest share of the series that a view keeps.
        frequency_mask: share of the frequencies that a view sets to zero.
        time_column: of tables, the time stamps. None: the column of a date type, or called date, time or timestamp.
        series_column: of tables that hold several series, the one that says which. None: all rows are one series.
        channel_column: of tables in long form, the column that says which channel a row is of. None: wide form.
        value_columns: of tables, the columns of values. Empty: all others.
        num_channels: channels C of every series. None: found in the training set, like the four below.
        channel_mean: mean of each channel over the training set.
        channel_std: its standard deviation.
        raw_length: steps of the raw features; shorter and longer series are stretched to it.
        motifs: (C, K, motif_length) with "values_and_shapes", the shapes that recur most in each channel.
    """

    inputs: ClassVar = ("series", "observed_mask", "attention_mask")
    extensions: ClassVar = (".csv", ".npy", ".npz")
    columns: ClassVar = ("X", "x", "series", "values", "time_series")
    mask_styles: ClassVar = ("random", "block", "future")
    affine: ClassVar = True

    def __init__(
        self,
        patch_length: int = 16,
        stride: int | None = None,
        token_style: Literal["patches", "values_and_shapes"] = "patches",
        channel_independent: bool = True,
        instance_norm: bool = True,
        max_length: int | None = None,
        max_span: int = 4,
        distance: Literal["l1", "l2"] = "l2",
        num_motifs: int = 8,
        motif_length: int = 16,
        motif_prior: float = 0.0,
        jitter: float = 0.0,
        scale: Sequence[float] = (1.0, 1.0),
        time_warp: float = 0.0,
        crop_scale: Sequence[float] = (1.0, 1.0),
        frequency_mask: float = 0.0,
        time_column: str | None = None,
        series_column: str | None = None,
        channel_column: str | None = None,
        value_columns: Sequence[str] = (),
        num_channels: int | None = None,
        channel_mean: Sequence[float] | None = None,
        channel_std: Sequence[float] | None = None,
        raw_length: int | None = None,
        motifs: Sequence[Sequence[Sequence[float]]] | None = None,
    ):
        super().__init__()
        self.patch_length, self.stride, self.token_style = patch_length, stride, token_style
        self.channel_independent, self.instance_norm = channel_independent, instance_norm
        self.max_length, self.max_span, self.distance = max_length, max_span, distance
        self.num_motifs, self.motif_length, self.motif_prior = num_motifs, motif_length, motif_prior
        self.jitter, self.scale, self.time_warp = jitter, tuple(scale), time_warp
        self.crop_scale, self.frequency_mask = tuple(crop_scale), frequency_mask
        self.time_column, self.series_column, self.channel_column = time_column, series_column, channel_column
        self.value_columns = tuple(value_columns)
        self.num_channels, self.raw_length = num_channels, raw_length
        self.channel_mean = None if channel_mean is None else list(channel_mean)
        self.channel_std = None if channel_std is None else list(channel_std)
        self.motifs = None if motifs is None else [[list(motif) for motif in channel] for channel in motifs]
        for option, choices in (("token_style", ("patches", "values_and_shapes")), ("distance", ("l1", "l2"))):
            if getattr(self, option) not in choices:  # a config file is not checked against the types
                raise ValueError(f"{option}: found {getattr(self, option)!r}; expected one of {', '.join(choices)}")
        counts = ("patch_length", "stride", "max_span", "num_motifs", "motif_length", "num_channels", "raw_length")
        for option in counts:
            if (found := getattr(self, option)) is not None and found < 1:
                raise ValueError(f"{option}: found {found}; expected at least 1")
        if max_length is not None and max_length < self.shortest:
            raise ValueError(f"max_length: found {max_length}; expected {self.shortest} or more, one patch or motif")
        if min(jitter, time_warp) < 0 or not 0 <= frequency_mask < 1:
            raise ValueError("jitter, time_warp and frequency_mask must be at least 0, frequency_mask below 1")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale: found {scale}; expected least and greatest factor, above 0")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale: found {crop_scale}; expected least and greatest share, above 0, at most 1")
        if any(std <= 0 for std in self.channel_std or ()):
            raise ValueError(f"channel_std: found {min(self.channel_std or ())}; expected numbers above 0")
        lengths = {len(each) for each in (self.channel_mean, self.channel_std, self.motifs) if each is not None}
        if lengths - {num_channels}:
            raise ValueError(
                f"channel_mean, channel_std, motifs: found {max(lengths)} entries with num_channels={num_channels}; "
                "expected one for each channel"
            )

    @property
    def shortest(self) -> int:
        """Steps that a series must have."""
        return self.patch_length if self.token_style == "patches" else max(self.patch_length, self.motif_length)

    @property
    def size(self) -> int:
        """Numbers V in a token: the steps of a patch; or what is said of an interval, then what is said of a motif."""
        return self.patch_length if self.token_style == "patches" else STATISTICS + 2 + self.motif_length

    @property
    def content_shape(self) -> tuple[int, ...]:
        return (2, self.size)

    def build(self, width: int) -> Self:
        self.projection = nn.Linear(2 * self.size, width)
        return super().build(width)

    # Data side.

    @property
    def form(self) -> TableForm:
        return TableForm(self.time_column, self.series_column, self.channel_column, self.value_columns)

    def collection(self, source: str) -> Samples | None:
        return read_collection(source, self.form, self.columns)

    def fit(self, samples: Samples) -> None:
        """Number of channels, their means and deviations, the greatest length and the motifs of the training set.

        At most 5,000 random series are read, or 2**25 values; unreadable ones are left out.
        """
        open_motifs = self.token_style == "values_and_shapes" and self.motifs is None
        if not open_motifs and None not in (self.num_channels, self.channel_mean, self.channel_std, self.raw_length):
            return
        read, values, failure = list[Tensor](), 0, ""
        for i in np.random.RandomState(0).permutation(len(samples))[: MOST_FITTED[0]]:
            try:
                read.append(self.prepare(samples.values[i])["series"])
            except (ValueError, OSError) as error:
                failure = f"{samples.name(int(i))}: {error}"
                continue
            values += read[-1].numel()
            if values > MOST_FITTED[1]:
                break
        if not read:
            raise ValueError(f"none of {len(samples)} series could be read; {failure}")
        if self.num_channels is None:
            ((self.num_channels, _),) = Counter(series.shape[1] for series in read).most_common(1)
            read = [series for series in read if series.shape[1] == self.num_channels]
        if self.channel_mean is None or self.channel_std is None:
            steps = torch.cat(read).double()
            mean = steps.nanmean(dim=0).nan_to_num()
            std = (steps - mean).square().nanmean(dim=0).sqrt().nan_to_num()
            self.channel_mean = mean.tolist() if self.channel_mean is None else self.channel_mean
            # A channel that never changes, but for rounding, has no unit.
            std = torch.where(std > 1e-6 * mean.abs(), std, 1.0)
            self.channel_std = std.tolist() if self.channel_std is None else self.channel_std
        if self.raw_length is None:
            longest = max(len(series) for series in read)
            self.raw_length = min(longest, self.max_length or longest)
        if open_motifs:
            self.motifs = discover_motifs([self.normalized(each) for each in read], self.num_motifs, self.motif_length)

    def prepare(self, sample: Any) -> dict[str, Tensor]:
        """An array (T,) or (channels, T), a DataFrame (time down its rows), a dict with one of these as "x" or under
        another of the usual names, a path of a .csv, .parquet, .npy or .npz file, bytes, or a ``{"bytes", "path"}``
        record. Steps at the end at which no channel is known are padding, and cut off: (T, C) is left."""
        series = read_series(sample, self.form, self.columns)
        if series.ndim == 1:
            series = series[None]
        if series.ndim != 2 or not series.size:
            raise ValueError(f"found an array of shape {series.shape}; expected (T,) or (channels, T)")
        wrong = np.argwhere(np.abs(series) > LARGEST)
        if len(wrong):
            channel, step = wrong[0]
            raise ValueError(
                f"found {series[channel, step]} in channel {channel} at step {step}; expected values up to "
                f"{LARGEST:g}, and NaN where one is missing"
            )
        known = ~np.isnan(series).all(axis=0)
        if not known.any():
            raise ValueError("found nothing but NaN; expected a series with known values")
        series = series[:, : np.flatnonzero(known)[-1] + 1]
        channels, length = series.shape
        turned = " (is it (T, channels)? Then turn it round)" if channels > length else ""
        if self.num_channels is not None and channels != self.num_channels:
            raise ValueError(f"found {channels} channels; expected {self.num_channels}{turned}")
        if length < self.shortest:
            raise ValueError(
                f"found a series of {length} steps and {channels} channels; expected at least one patch or motif, "
                f"{self.shortest} steps{turned}: lower patch_length, or leave the series out"
            )
        return {"series": torch.from_numpy(series.T.astype(np.float32))}

    def excerpt(self, sample: dict[str, Tensor], generator: torch.Generator | None) -> dict[str, Tensor]:
        """A window of ``max_length`` steps: a random one in training, else the last."""
        series = sample["series"]
        if self.max_length is None or len(series) <= self.max_length:
            return sample
        last = len(series) - self.max_length
        start = last if generator is None else int(torch.randint(last + 1, (), generator=generator))
        return {"series": series[start : start + self.max_length]}

    def collate(self, samples: Sequence[dict[str, Tensor]]) -> Batch:
        """(B, T, C) series, 0 where a value is missing; which are observed; and (B, T) which steps are no padding."""
        series = [sample["series"] for sample in samples]
        channels = sorted({each.shape[1] for each in series})
        if len(channels) > 1:
            raise ValueError(
                f"found series of {', '.join(map(str, channels))} channels in one batch; expected the same number of "
                "channels in all: set num_channels to leave others out"
            )
        lengths = torch.tensor([len(each) for each in series])
        padded = nn.utils.rnn.pad_sequence(series, batch_first=True, padding_value=torch.nan)
        return {
            "series": padded.nan_to_num(0.0),
            "observed_mask": (~padded.isnan()).long(),
            "attention_mask": (torch.arange(padded.shape[1]) < lengths[:, None]).long(),
        }

    # Device side.

    def read(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Series (B, T, C), 0 where nothing is known; what is known (B, T, C) bool; lengths (B,)."""
        series, observed, attention = (batch[name] for name in self.inputs)
        if (
            series.dim() != 3
            or series.shape != observed.shape
            or series.shape[:2] != attention.shape
            or self.num_channels not in (None, series.shape[2])
        ):
            raise ValueError(
                f"series: found shape {tuple(series.shape)}, an observed_mask of {tuple(observed.shape)} and an "
                f"attention_mask of {tuple(attention.shape)}; expected (batch, T, {self.num_channels or 'channels'}) "
                "twice and (batch, T)"
            )
        if series.shape[1] < self.shortest:
            raise ValueError(f"series: found {series.shape[1]} steps; expected at least {self.shortest}")
        known = observed.bool() & attention.bool()[..., None] & ~series.isnan()
        return torch.where(known, series.float(), 0.0), known, attention.sum(dim=1)

    def unit(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (C,) of the channels in the training set; 0 and 1 before they are known."""
        zero = like.new_zeros(like.shape[-1])
        mean = zero if self.channel_mean is None else zero.new_tensor(self.channel_mean)
        return mean, zero + 1 if self.channel_std is None else zero.new_tensor(self.channel_std)

    def statistics(self, series: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1, C) what series (B, T, C) are normalised by: a mean to subtract, then a deviation to divide by.

        With ``instance_norm`` the mean over the known steps, and ``sqrt(var + 1e-5 * channel_std ** 2)`` with their
        biased variance.
        """
        mean, std = (each.expand(len(series), 1, -1) for each in self.unit(series))
        if not self.instance_norm:
            return mean, std
        count = known.sum(dim=1, keepdim=True).clamp(min=1)
        mean = (series * known).sum(dim=1, keepdim=True) / count
        # Once more, so that the mean of a constant series is that constant however large it is.
        mean = mean + ((series - mean) * known).sum(dim=1, keepdim=True) / count
        variance = ((series - mean) * known).square().sum(dim=1, keepdim=True) / count
        return mean, (variance + EPSILON * std.square()).sqrt()

    def normalized(self, series: Tensor) -> Tensor:
        """One prepared series (T, C), normalised."""
        known = ~series.isnan()
        mean, std = self.statistics(series.nan_to_num(0.0)[None], known[None])
        return (series - mean[0]) / std[0]

    def denormalize(self, patches: Tensor, batch: Batch) -> Tensor:
        """Patches (rows, N, P) of a batch, such as predictions, back in the units of its series."""
        series, known, _ = self.read(batch)
        mean, std = (each.transpose(1, 2)[..., None] for each in self.statistics(series, known))
        batched = patches.reshape(len(series), series.shape[2], -1, patches.shape[-1])
        return (batched * std + mean).view_as(patches)

    def tokenize(self, batch: Batch) -> Tokens:
        """Contents (rows, N, 2, V): normalised values, and 1 for those that are known, 0 for the others.

        Of L steps the first ``(L - P) % stride`` are left over. A patch of which no step is known is a valid token all
        the same, of zeros; it weighs nothing in the loss. Rows are the channels of all samples, one sample after the
        other, and the place of a token is its number among the patches; or if channels are read together, rows are
        samples, and places are (channel, number). With "values_and_shapes" a place says the kind of a token too.
        """
        series, known, length = self.read(batch)
        mean, std = self.statistics(series, known)
        values = torch.where(known, (series - mean) / std, 0.0).transpose(1, 2)
        known = known.transpose(1, 2)
        contents, flags, valid = self.cut(values, known, length)
        number = torch.arange(valid.shape[1], device=valid.device)
        kind, kinds = torch.zeros_like(number), 1
        if self.token_style == "values_and_shapes":
            contents, flags, valid = self.values_and_shapes(values, known, length, contents, flags, valid)
            shapes = torch.arange(valid.shape[1] - len(number), device=valid.device)
            kind, kinds = torch.cat([torch.ones_like(shapes), kind]), 2
            number = torch.cat([shapes, number])
        content = torch.stack([contents, flags.float()], dim=-2)  # (B, C, N, 2, V)
        (count, channels), device = content.shape[:2], content.device
        channel = torch.arange(channels, device=device)[:, None]
        lane, number = channel * kinds + kind, number.expand(channels, -1)  # (C, N)
        if not self.channel_independent:
            coords = torch.stack([lane, number], dim=-1).flatten(0, 1).float()
            valid = valid[:, None].expand(-1, channels, -1).flatten(1)
            content = content.flatten(1, 2)
            return Tokens(content, coords.expand(count, -1, -1), valid, prior=self.prior(content))
        coords = torch.stack([kind, number[0]], dim=-1)[:, -self.axes :].float()
        rows = count * channels
        sample = torch.arange(count, device=device).repeat_interleave(channels) if channels > 1 else None
        valid = valid.repeat_interleave(channels, dim=0)
        content = content.flatten(0, 1)
        return Tokens(content, coords.expand(rows, -1, -1), valid, sample=sample, prior=self.prior(content))

    def prior(self, content: Tensor) -> Tensor | None:
        """(rows, N, N) the attention prior of contents (rows, N, 2, V): 0 for intervals."""
        if self.token_style == "patches" or not self.motif_prior:
            return None
        distance = content[:, :, 0, STATISTICS]  # that of intervals is 0
        return -self.motif_prior * distance[:, None].expand(-1, content.shape[1], -1)

    @property
    def axes(self) -> int:
        return 1 if self.channel_independent and self.token_style == "patches" else 2

    def cut(self, values: Tensor, known: Tensor, length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Series (B, C, T) to patches (B, C, N, P), what is known of them, and which are no padding (B, N)."""
        size, stride, longest = self.patch_length, self.stride or self.patch_length, values.shape[2]
        count = (length - size) // stride + 1
        step = torch.arange((longest - size) // stride + 1, device=values.device)[:, None] * stride
        step = step + torch.arange(size, device=values.device)
        index = (length - size - (count - 1) * stride)[:, None, None] + step
        valid = torch.arange(len(step), device=values.device) < count[:, None]
        index = index.clamp(0, longest - 1).flatten(1)[:, None].expand(-1, values.shape[1], -1)
        known = known.gather(2, index).unflatten(2, step.shape) & valid[:, None, :, None]
        return torch.where(known, values.gather(2, index).unflatten(2, step.shape), 0.0), known, valid

    def values_and_shapes(
        self, values: Tensor, known: Tensor, length: Tensor, intervals: Tensor, flags: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As ``cut``, with V numbers in a token: first the motifs, then the intervals, in different places of the V."""
        if self.motifs is None:
            raise ValueError("motifs: they are not known; call fit on the training samples, or set them")
        motifs = values.new_tensor(self.motifs)
        wanted = values.shape[1], self.num_motifs, self.motif_length
        if motifs.shape != wanted:
            raise ValueError(f"motifs: found shape {tuple(motifs.shape)}; expected (channels, motifs, steps) {wanted}")
        shapes, found = match_motifs(values, known, length, motifs)
        statistics, told = interval_statistics(intervals, flags)
        pad = nn.functional.pad
        content = torch.cat([pad(shapes, (STATISTICS, 0)), pad(statistics, (0, shapes.shape[-1]))], dim=2)
        found = found[..., None].expand_as(shapes)
        flags = torch.cat([pad(found, (STATISTICS, 0)), pad(told, (0, shapes.shape[-1]))], dim=2)
        return content, flags, pad(valid, (self.num_motifs, 0), value=True)

    def embed(self, tokens: Tokens) -> Tensor:
        return self.projection(tokens.content.flatten(2).to(self.projection.weight.dtype))

    def positions(self, width: int) -> nn.Module:
        return SinCosPositions(width, self.axes)

    def raw_features(self, batch: Batch) -> Tensor:
        """(B, C * raw_length) the values as they are, channel after channel.

        Linear interpolation bridges missing steps and stretches series of other lengths to ``raw_length``.
        """
        series, known, length = self.read(batch)
        last = (self.raw_length or series.shape[1]) - 1
        # In whole numbers, so that a series of the right length stays as it is to the bit.
        place = torch.arange(last + 1, device=series.device) * (length - 1)[:, None]
        below, share = place // max(last, 1), place % max(last, 1) / max(last, 1)
        filled = bridge(series, known, self.unit(series)[0])
        return between(filled, below, share).transpose(1, 2).flatten(1)

    def hiding_order(self, tokens: Tokens, generator: torch.Generator, style: str) -> Tensor:
        """ "block": spans of time, in all channels of the row. "future": what comes last, which is then forecast."""
        if style == "random":
            return super().hiding_order(tokens, generator, style)
        if style == "future":
            return -tokens.coords[..., -1]
        return block_order(replace(tokens, coords=tokens.coords[..., -1:]), [self.max_span], generator)

    def region(
        self, tokens: Tokens, share: float | Tensor, generator: torch.Generator, allowed: Tensor | None = None
    ) -> Tensor:
        """A span of time, in all channels of the row; where it ends, a random part of them."""
        time = tokens.coords[..., -1:]
        tie = 0.1 * torch.rand(time.shape, generator=generator, device=time.device)
        return super().region(replace(tokens, coords=torch.cat([time, tie], dim=-1)), share, generator, allowed)

    @property
    def num_places(self) -> int:
        if self.token_style != "patches":
            raise ValueError("found token_style='values_and_shapes', whose shapes lie nowhere; expected 'patches'")
        return PLACES

    def places(self, tokens: Tokens) -> Tensor:
        """Bins of time, the same for all channels of a row."""
        number = tokens.coords[..., -1]
        last = number.masked_fill(~tokens.valid, 0.0).amax(dim=1, keepdim=True)
        return bin_of(number, last + 1, self.num_places)

    @property
    def pretexts(self) -> dict[str, int]:
        return {"order": len(ORDERS), "reverse": 2, "flip": 2}

    def transform(self, batch: Batch, pretext: str, number: Tensor) -> Batch:
        """Put three segments in one of six orders, cut between patches; go backwards; or turn upside down.

        Upside down is about the mean of the channel in the training set, so that normalised values change their sign.
        Segments of series of fewer than three patches are cut anywhere.
        """
        series, known, length = self.read(batch)
        steps = series.shape[1]
        if pretext == "flip":
            flipped = torch.where((number == 1)[:, None, None], 2 * self.unit(series)[0] - series, series)
            return {**batch, "series": torch.where(known, flipped, 0.0)}
        if pretext == "reverse":
            index = reversed_rows(length, steps, number == 1)
        elif pretext == "order":
            index, _ = segment_orders(length, steps, number, self.stride or self.patch_length)
        else:
            return super().transform(batch, pretext, number)
        return {**batch, "series": gather(series, index), "observed_mask": gather(known, index).long()}

    def reconstruction_head(self, width: int) -> nn.Module:
        return nn.Linear(width, self.size)

    def reconstruction_loss(self, prediction: Tensor, target: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        """Error of predicted values (B, N, V) where the target (B, N, 2, V) is known; a token weighs its known share.

        So the loss of a batch is the mean over its hidden, known steps.
        """
        value, known = target.float().unbind(dim=2)
        loss, count = super().reconstruction_loss(prediction, value, known.bool() & where[..., None])
        return loss, count / self.size

    def content_of(self, prediction: Tensor, tokens: Tokens) -> Tensor:
        return torch.stack([prediction, tokens.content[:, :, 1].to(prediction.dtype)], dim=2)

    def picture(self, tokens: Tokens) -> Tensor:
        """Lines, time to the right, 4 deviations up and down, channels one below the other; or the numbers in grey."""
        if self.token_style == "values_and_shapes":
            return (self.numbers(tokens) / 6 + 0.5).clamp(0, 1)[..., None].expand(-1, -1, -1, 3)
        return draw_lines(0.5 - self.lines(tokens) / 8)

    def drawings(self, tokens: Tokens) -> list[Drawing]:
        """A line for each channel, of the steps that are in patches: what is left over in front is in no token.

        In the units of the series without ``instance_norm``; else in deviations from the mean of the series, which is
        not in tokens. Intervals are straight lines of their mean and slope; where motifs fit is not drawn.
        """
        lines, steps = self.lines(tokens), self.steps(tokens).masked_fill(~tokens.valid[..., None], -1).amax(dim=(1, 2))
        sample = torch.arange(len(lines), device=lines.device) if tokens.sample is None else tokens.sample
        drawn: list[Drawing] = []
        for number in sample.unique():
            own = sample == number
            line = lines[own].flatten(0, 1)[:, : int(steps[own].max()) + 1]
            if not self.instance_norm:
                mean, std = self.unit(line.T)
                line = (line.T * std + mean).T
            named = self.channel_column is None and len(self.value_columns) == len(line)
            names = list(self.value_columns) if named else [f"channel {channel}" for channel in range(len(line))]
            drawn.append(Lines(line.numpy(force=True), names))
        return drawn

    def numbers(self, tokens: Tokens) -> Tensor:
        """(rows, N, V) what tokens hold, NaN where they are unknown, hidden or padding."""
        value, known = tokens.content.float().unbind(dim=2)
        return value.masked_fill(~(known > 0.5) | ~tokens.valid[..., None], torch.nan)

    def kind_and_lane(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """(rows, N) long: 1 for motifs, 0 for others; and the channel, of those in the row."""
        first = tokens.coords[..., 0].long() if self.axes == 2 else torch.zeros_like(tokens.valid, dtype=torch.long)
        kinds = 2 if self.token_style == "values_and_shapes" else 1
        return first % kinds, first // kinds

    def steps(self, tokens: Tokens) -> Tensor:
        """(rows, N, P) long, the steps of a patch or interval, from 0 for the first that is in one; of motifs -1."""
        kind, _ = self.kind_and_lane(tokens)
        step = torch.arange(self.patch_length, device=tokens.coords.device)
        step = tokens.coords[..., -1:].long() * (self.stride or self.patch_length) + step
        return step.masked_fill(kind[..., None] == 1, -1)

    def lines(self, tokens: Tokens) -> Tensor:
        """(rows, channels of a row, steps) what tokens say of each step, NaN where they say nothing.

        Where they overlap, it is the mean.
        """
        value, step, (_, lane) = self.numbers(tokens), self.steps(tokens), self.kind_and_lane(tokens)
        if self.token_style == "values_and_shapes":
            time = (torch.arange(self.patch_length, device=value.device) + 0.5) / self.patch_length - 0.5
            value = value[..., :1] + value[..., STATISTICS - 1 : STATISTICS].nan_to_num(0.0) * time
        # Motifs say nothing of a step: the statistics of an interval, which lie at the front, are unknown in them.
        lanes, steps = int(lane.max()) + 1, int(step.max()) + 1
        index = (lane[..., None] * steps + step.clamp(min=0)).flatten(1)
        total, count = value.new_zeros(2, len(value), lanes * steps)
        total = total.scatter_add(1, index, value.nan_to_num(0.0).flatten(1))
        count = count.scatter_add(1, index, (~value.isnan()).float().flatten(1))
        return (total / count).unflatten(1, (lanes, steps))

    def view(self, batch: Batch, generator: torch.Generator) -> View:
        """Crop, change the speed, set frequencies to zero, scale and add noise; missing steps stay missing."""
        series, known, length = self.read(batch)
        (count, _, channels), device = series.shape, series.device
        parameters = dict[str, Tensor]()

        def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
            return low + (high - low) * torch.rand(count, *shape, generator=generator, device=device)

        def normal(*shape: int) -> Tensor:
            return torch.randn(count, *shape, generator=generator, device=device)

        if self.crop_scale != (1.0, 1.0) or self.time_warp:
            kept = (
                (length * uniform(low=self.crop_scale[0], high=self.crop_scale[1]))
                .round()
                .long()
                .clamp(min=self.shortest)
                .minimum(length)
            )
            start = (uniform() * (length - kept + 1)).long().minimum(length - kept)
            parameters |= {"start": start, "kept": kept, "log_speed": self.time_warp * normal(KNOTS)}
            place = warp(parameters["log_speed"], kept)
            below, share = start[:, None] + place.floor().long(), place - place.floor()
            both = gather(known, below + (share > 0))
            series, known, length = between(series, below, share), gather(known, below) & both, kept
        inside = torch.arange(series.shape[1], device=device) < length[:, None]
        known = known & inside[..., None]
        if self.frequency_mask:
            bins = torch.arange(1, series.shape[1] // 2 + 1, device=device)
            there = bins <= (length // 2)[:, None]
            rank = uniform(len(bins)).masked_fill(~there, torch.inf).argsort(dim=1).argsort(dim=1)
            hidden = rank < (length // 2 * self.frequency_mask).round()[:, None]
            parameters["hidden_frequencies"] = nn.functional.pad(hidden, (1, 0))  # the mean stays
            series = without(bridge(series, known, self.unit(series)[0]), length, parameters["hidden_frequencies"])
        if self.scale != (1.0, 1.0):
            parameters["scale"] = uniform(channels, low=self.scale[0], high=self.scale[1])
            mean = self.unit(series)[0]
            series = mean + (series - mean) * parameters["scale"][:, None]
        if self.jitter:
            parameters["noise"] = self.jitter * normal(*series.shape[1:])
            series = series + parameters["noise"] * self.statistics(series, known)[1]
        series = torch.where(known, series, 0.0)
        return View(dict(zip(self.inputs, (series, known.long(), inside.long()), strict=True)), parameters)
