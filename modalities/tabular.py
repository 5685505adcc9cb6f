"""Tables: rows of numbers and categories, a token for each column (Gorishniy et al., FT-Transformer, NeurIPS 2021)."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers import initialization as init

from mmssl.drawings import Cells, Drawing
from mmssl.modalities.base import Batch, Modality, View, nearest
from mmssl.positions import IndexPositions, SinCosPositions
from mmssl.samples import Samples
from mmssl.table_columns import (
    EXACT,
    Category,
    Number,
    columns_of,
    examine,
    is_main_process,
    print_columns,
    reader_of,
    tells,
)
from mmssl.tokens import Mask, Tokens


class Tabular(Modality):
    """Rows of a table, a token for each column.

    Args:
        schema: what is read: a record for each column with its name, its kind, "numerical" or "categorical", and its
            statistics or its categories. None: found out from the training samples.
        ignore_columns: columns that are not to be read: identifiers, a target, what is known only after the fact.
        categorical_columns: columns of numbers that are codes of something, to be read as categories.
        max_categories: columns with more different values than this are hashed into so many buckets.
        numerical_scaling: numbers less their mean over their deviation, "standard"; from 0 to 1, "min_max" (T-JEPA); or
            to the normal distribution by their rank, "quantile". Statistics are those of the training samples.
        clip: scaled numbers are cut at this absolute value.
        distance: error of a scaled number, "l2" (squared) or "l1" (absolute).
        position_embedding: of a column's number: "learned", or "sincos" with a base of 100 (T-JEPA).
        alteration_ratio: share of a row's cells that alteration replaces (Bahri et al., SCARF, ICLR 2022: 0.6).
        corruption_ratio: share of the cells that a view replaces, in the same way (SCARF: 0.6).
        official_offset: as in T-JEPA's released code, put a learned token before the columns that is hidden, read and
            predicted like them, and never choose the last column. Leave out the class token then.
    """

    inputs: ClassVar = ("cells",)
    extensions: ClassVar = ()
    columns: ClassVar = ()

    def __init__(
        self,
        schema: list[dict[str, Any]] | None = None,
        ignore_columns: Sequence[str] = (),
        categorical_columns: Sequence[str] = (),
        max_categories: int = 100,
        numerical_scaling: Literal["standard", "min_max", "quantile"] = "standard",
        clip: float = 10.0,
        distance: Literal["l1", "l2"] = "l2",
        position_embedding: Literal["learned", "sincos"] = "learned",
        alteration_ratio: float = 0.6,
        corruption_ratio: float = 0.0,
        official_offset: bool = False,
    ):
        super().__init__()
        self.ignore_columns, self.categorical_columns = tuple(ignore_columns), tuple(categorical_columns)
        self.max_categories, self.numerical_scaling, self.clip = max_categories, numerical_scaling, float(clip)
        self.distance, self.position_embedding = distance, position_embedding
        self.alteration_ratio, self.corruption_ratio = alteration_ratio, corruption_ratio
        self.official_offset = official_offset
        for option, choices in (
            ("numerical_scaling", ("standard", "min_max", "quantile")),
            ("distance", ("l1", "l2")),
            ("position_embedding", ("learned", "sincos")),
        ):
            if getattr(self, option) not in choices:  # a config file is not checked against the types
                raise ValueError(f"{option}: found {getattr(self, option)!r}; expected one of {', '.join(choices)}")
        for option, given in (("ignore_columns", ignore_columns), ("categorical_columns", categorical_columns)):
            if isinstance(given, str):
                raise ValueError(f"{option}: found the text {given!r}; expected a list of names")
        for option in ("alteration_ratio", "corruption_ratio"):
            if not 0 <= getattr(self, option) <= 1:
                raise ValueError(f"{option}: found {getattr(self, option)}; expected a share from 0 to 1")
        if not 1 <= max_categories < EXACT:
            raise ValueError(f"max_categories: found {max_categories}; expected 1 to {EXACT - 1}")
        if not 0 < clip < math.inf:
            raise ValueError(f"clip: found {clip}; expected a number above 0")
        self.use(schema)

    def use(self, schema: list[dict[str, Any]] | None) -> None:
        """Take these columns, and lay out the rows of the embedding table and the outputs of the head for them."""
        self.schema = schema
        self.readers = [reader_of(record, self.numerical_scaling, self.clip) for record in schema or ()]
        names = [reader.name for reader in self.readers]
        if schema is not None and (not names or len(set(names)) < len(names)):
            raise ValueError(f"schema: found the columns {names}; expected at least one, and each name once")
        # For each token, the one before the columns too, if there is one: is it categorical, its first row of the
        # table, its first output of the head, its outputs. A category has one more row, for those never seen.
        kinds = [(0, 1)] * self.first + [(int(isinstance(r, Category)), r.outputs) for r in self.readers]
        categorical, outputs = np.array(kinds, dtype=np.int64).reshape(-1, 2).T
        rows = outputs + categorical
        self.layout = np.stack([categorical, rows.cumsum() - rows, outputs.cumsum() - outputs, outputs], axis=1)
        self.num_rows, self.num_outputs = int(rows.sum()), int(outputs.sum())

    @property
    def first(self) -> int:
        """The token of the first column."""
        return int(self.official_offset)

    @property
    def content_shape(self) -> tuple[int, ...]:
        return (2,)

    def build(self, width: int) -> Self:
        self.check_fitted()
        self.cell_tokens = nn.Parameter(torch.empty(self.num_rows, width))  # these names keep them from weight decay
        self.column_tokens = nn.Parameter(torch.empty(len(self.layout), width))
        self.missing_token = nn.Parameter(torch.empty(width))
        self.start_values()
        return super().build(width)

    def start_values(self, std: float = 0.02) -> None:
        """FT-Transformer's: uniform, by the width alone."""
        bound = len(self.missing_token) ** -0.5
        for tokens in (self.cell_tokens, self.column_tokens, self.missing_token):
            init.uniform_(tokens, -bound, bound)

    def check_fitted(self) -> None:
        if self.schema is None:
            raise ValueError(
                "schema: found none; columns are found out from a table: call fit(samples) first, as training does"
            )

    # Data side.

    def fit(self, samples: Samples) -> None:
        """Find out the columns, their kinds and their statistics, and print them.

        Left out are columns that never change, that are always missing, of text that differs in every row, and of
        values that are neither numbers, times, text nor yes or no. Warns where a single column tells the labels.

        Raises:
            ValueError: nothing is left to read, or an option names a column that is not there.
        """
        if self.schema is not None:
            return
        table = columns_of(samples.values)
        for option in ("ignore_columns", "categorical_columns"):
            if unknown := set(getattr(self, option)) - set(table):
                raise ValueError(f"{option}: found {', '.join(sorted(unknown))}; the table has {', '.join(table)}")
        schema: list[dict[str, Any]] = []
        lines: list[tuple[str, ...]] = []
        for name, cells in table.items():
            if name in self.ignore_columns:
                lines.append((name, "left out", "", "", "ignore_columns"))
                continue
            found = examine(name, cells, name in self.categorical_columns, self.max_categories, self.numerical_scaling)
            if isinstance(found, str):
                lines.append((name, "left out", "", "", found))
                continue
            record, line, codes = found
            schema.append(record)
            lines.append((name, *line))
            if samples.labels is not None and is_main_process() and tells(codes, samples.labels):
                warnings.warn(
                    f"the column {name} alone tells the labels: if it is the target left in, or follows from it, leave "
                    f"it out with ignore_columns",
                    stacklevel=2,
                )
        if is_main_process():
            print_columns(lines, len(samples), len(schema))
        if not schema:
            reasons = "; ".join(f"{name}: {reason}" for name, *_, reason in lines[:20])
            raise ValueError(f"found no column to learn from ({reasons})")
        self.use(schema)

    def prepare(self, sample: Any) -> dict[str, Tensor]:
        """A row as a dict: (columns,) scaled numbers and codes of categories, NaN where a cell is missing.

        Missing is what is None, NaN or empty text. A category that was not in the training samples has the code 0.
        Other columns than those of the schema are not looked at.
        """
        self.check_fitted()
        if not isinstance(sample, Mapping):
            raise ValueError(f"found {type(sample).__name__}; expected a row as a dict of a value for each column")
        try:
            cells = [reader.read(sample[reader.name]) for reader in self.readers]
        except KeyError as error:
            raise ValueError(
                f"found no column {error}, only {', '.join(map(str, list(sample)[:20]))}; set unknown ones to None"
            ) from error
        return {"cells": torch.from_numpy(np.array(cells, dtype=np.float32))}  # thrice as fast as torch.tensor

    def collate(self, samples: Sequence[dict[str, Tensor]]) -> Batch:
        return {"cells": torch.stack([sample["cells"] for sample in samples])}

    # Device side.

    def tokenize(self, batch: Batch) -> Tokens:
        """Contents (B, C, 2): scaled number or code, and 1 where it is known or 0; places: the column's number."""
        cells = batch["cells"].float()
        if cells.dim() != 2 or cells.shape[1] != len(self.readers):
            raise ValueError(f"cells: found shape {tuple(cells.shape)}; expected (batch, {len(self.readers)} columns)")
        cells = nn.functional.pad(cells, (self.first, 0), value=1.0)
        known = ~cells.isnan()
        column = torch.arange(cells.shape[1], device=cells.device, dtype=torch.float32)[None, :, None]
        return Tokens(
            content=torch.stack([torch.where(known, cells, 0.0), known.float()], dim=-1),
            coords=column.expand(len(cells), -1, -1),
            valid=torch.ones_like(known),
        )

    def column(self, tokens: Tokens) -> Tensor:
        """(B, N) long, what each token is of; tokens may be selected and in any order."""
        return tokens.coords[..., 0].round().long()

    def laid_out(self, column: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of each token, (B, N): whether it is categorical, its first row, its first output, its number of outputs."""
        categorical, row, output, outputs = torch.from_numpy(self.layout).to(column.device)[column].unbind(-1)
        return categorical.bool(), row, output, outputs

    def embed(self, tokens: Tokens) -> Tensor:
        """A number times its column's vector, or the vector of a category, or that of missing cells; plus the column's.

        Differentiable in a content: what is known by halves is the mean of the known cell and the missing one.
        """
        column, (value, known) = self.column(tokens), tokens.content.float().unbind(-1)
        categorical, row, _, outputs = self.laid_out(column)
        code = value.detach().round().long().clamp(min=0).minimum(outputs)
        cell = nn.functional.embedding(row + torch.where(categorical, code, 0), self.cell_tokens)
        # What another column's content may be in the place of a number is cut to what numbers can be.
        present = cell * torch.where(categorical, 1.0, value.clamp(-self.clip, self.clip))[..., None]
        known = known[..., None]
        return known * present + (1 - known) * self.missing_token + nn.functional.embedding(column, self.column_tokens)

    def positions(self, width: int) -> nn.Module:
        if self.position_embedding == "sincos":
            return SinCosPositions(width, axes=1, temperature=100.0)
        return IndexPositions(width, len(self.layout))

    def raw_features(self, batch: Batch) -> Tensor:
        """(B, F) scaled numbers, 0 where missing; categories one-hot; and whether a cell of a column is missing.

        The last ones are of columns with missing cells in the training samples.
        """
        tokens = self.tokenize(batch)
        value, known = tokens.content.unbind(-1)
        categorical, _, output, _ = self.laid_out(self.column(tokens))
        index = output + torch.where(categorical, value.long() - 1, 0).clamp(min=0)
        entry = known * torch.where(categorical, (value > 0).float(), value)
        features = value.new_zeros(len(value), self.num_outputs).scatter_add_(1, index, entry)[:, self.first :]
        gaps = [self.first + number for number, record in enumerate(self.schema or ()) if record.get("missing")]
        return torch.cat([features, 1 - known[:, gaps]], dim=1)

    def mask(self, tokens: Tokens, ratio: float | Tensor, generator: torch.Generator, style: str = "random") -> Mask:
        return super().mask(replace(tokens, valid=self.eligible(tokens)), ratio, generator, style)

    def region(
        self, tokens: Tokens, share: float | Tensor, generator: torch.Generator, allowed: Tensor | None = None
    ) -> Tensor:
        """Any random columns: none is nearer to one than to another."""
        eligible = self.eligible(tokens)
        noise = torch.rand(eligible.shape, generator=generator, device=eligible.device)
        return nearest(noise, eligible, share, eligible if allowed is None else allowed & eligible)

    def eligible(self, tokens: Tokens) -> Tensor:
        """(B, N) what masks and regions choose from: all, but for the last column with ``official_offset``."""
        return tokens.valid & (self.column(tokens) < len(self.readers)) if self.official_offset else tokens.valid

    def view(self, batch: Batch, generator: torch.Generator) -> View:
        """Replace a share of the cells by those of other rows of the batch, each column for itself (SCARF)."""
        cells = batch["cells"]
        if not self.corruption_ratio:
            return View(batch)
        column = torch.arange(cells.shape[1], device=cells.device).expand_as(cells)
        corrupted, source = corruption(column, torch.ones_like(column).bool(), self.corruption_ratio, generator)
        drawn = torch.where(corrupted, cells.flatten()[source], cells)
        return View({**batch, "cells": drawn}, {"corrupted": corrupted, "source": source // cells.shape[1]})

    def alter(self, tokens: Tokens, generator: torch.Generator) -> tuple[Tokens, Tensor]:
        """SCARF's corruption: cells get the content of the same column of another row. Returns which ones, (B, N)."""
        column = self.column(tokens)
        altered, source = corruption(column, tokens.valid & (column >= self.first), self.alteration_ratio, generator)
        content = torch.where(altered[..., None], tokens.content.flatten(0, 1)[source], tokens.content)
        return replace(tokens, content=content), altered

    def target(self, tokens: Tokens) -> Tensor:
        """(B, N, 3) the number or code, whether there is something to predict, and the column."""
        column, (value, known) = self.column(tokens), tokens.content.detach().unbind(-1)
        unseen = self.laid_out(column)[0] & (value < 1)
        return torch.stack([value, known * ~unseen * (column >= self.first), column.to(value.dtype)], dim=-1)

    def reconstruction_head(self, width: int) -> nn.Module:
        """One output for each column of numbers, one for each category of the others, in the order of the columns."""
        return nn.Linear(width, self.num_outputs)

    def of_own_column(self, prediction: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted numbers (B, N), and logits (B, N, outputs), -inf where they are of other columns."""
        _, _, output, outputs = self.laid_out(column)
        place = torch.arange(self.num_outputs, device=column.device) - output[..., None]
        others = (place < 0) | (place >= outputs[..., None])
        return prediction.gather(-1, output[..., None]).squeeze(-1), prediction.masked_fill(others, -torch.inf)

    def reconstruction_loss(self, prediction: Tensor, target: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        """Error of a number, cross-entropy of a category; missing cells and unseen categories weigh nothing."""
        value, known, column = target.float().unbind(-1)
        number, logits = self.of_own_column(prediction.float(), column.long())
        categorical, _, output, _ = self.laid_out(column.long())
        difference = number - torch.where(categorical, 0.0, value)
        error = difference.abs() if self.distance == "l1" else difference.square()
        code = torch.where(categorical, value.long() - 1, 0).clamp(min=0)
        entropy = -logits.log_softmax(dim=-1).gather(-1, (output + code)[..., None]).squeeze(-1)
        return torch.where(categorical, entropy, error), where * known

    def content_of(self, prediction: Tensor, tokens: Tokens) -> Tensor:
        """The predicted number, or the most probable category."""
        column = self.column(tokens)
        number, logits = self.of_own_column(prediction.float(), column)
        categorical, _, output, _ = self.laid_out(column)
        value = torch.where(categorical, (logits.argmax(dim=-1) - output + 1).float(), number)
        return torch.stack([value, torch.ones_like(value)], dim=-1)

    def picture(self, tokens: Tokens) -> Tensor:
        """(B, 1, N, 3) a row as a strip of cells: the larger a number the brighter, a colour for each category."""
        value, known = tokens.content.float().unbind(-1)
        grey = value if self.numerical_scaling == "min_max" else value / 6 + 0.5
        third = torch.arange(3, device=value.device) / 3
        hue = (0.618 * value[..., None] + third) * 2 * math.pi  # codes that follow each other differ much in colour
        categorical = self.laid_out(self.column(tokens))[0][..., None]
        colour = torch.where(categorical, 0.5 + 0.4 * hue.cos(), grey.clamp(0, 1)[..., None])
        return torch.where(known[..., None] > 0.5, colour, torch.nan)[:, None]

    def drawings(self, tokens: Tokens) -> list[Drawing]:
        """Rows in their own units: numbers, times as seconds since 1970, categories by name; or "missing".

        A number that was cut off, at ``clip`` or at the ends of the quantiles, stays cut off. "unseen" is a category
        that was not in the training samples, "bucket 3" any that is hashed there.
        """
        records = list(zip(self.readers, self.schema or (), strict=True))
        return [
            Cells(
                [reader.name for reader in self.readers],
                [
                    as_text(*record, value, known)
                    for record, (value, known) in zip(records, row[self.first :], strict=True)
                ],
            )
            for row in tokens.content.tolist()
        ]


def as_text(reader: Number | Category, record: dict[str, Any], value: float, known: float) -> str:
    """One cell in the words and units of its column: what its reader was given, as far as the content tells."""
    if math.isnan(known) or math.isnan(value):
        return ""
    if known < 0.5:
        return "missing"
    if isinstance(reader, Category):
        code = min(round(value), reader.outputs)
        if code < 1:
            return "unseen"
        return f"bucket {code}" if reader.buckets is not None else str(record["categories"][code - 1])
    if reader.knots:
        number, unit = float(np.interp(value, reader.scores, reader.knots)), reader.knots[-1] - reader.knots[0]
    else:
        number, unit = reader.shift + reader.scale * value, reader.scale
    # As many digits as single precision keeps of a scaled number; plus zero, so that none is -0.
    return f"{round(number, 5 - math.floor(math.log10(unit or 1.0))) + 0.0:.15g}"


def corruption(column: Tensor, valid: Tensor, ratio: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which tokens (B, N) are corrupted, and for each the one whose content it would get, a flat index (B, N).

    ``int(n * ratio)`` of n valid tokens are. The tokens of a column stand in a circle in random order, and each gets
    the content of the next one: any other one's, all equally likely.
    """

    def noise() -> Tensor:
        return torch.rand(valid.shape, generator=generator, device=valid.device)

    rank = noise().masked_fill(~valid, torch.inf).argsort(dim=1).argsort(dim=1)
    corrupted = rank < (valid.sum(dim=1, keepdim=True) * ratio + 1e-4).floor()
    group = torch.where(valid, column, -1).flatten()
    order = noise().flatten().argsort()
    order = order[group[order].argsort(stable=True)]
    group = group[order]
    place, begin = torch.arange(len(group), device=group.device), torch.searchsorted(group, group)
    last = torch.searchsorted(group, group, right=True) - 1
    source = torch.empty_like(order)
    source[order] = order[torch.where(place < last, place + 1, begin)]
    return corrupted, source.view_as(column)


# What fit finds out.
