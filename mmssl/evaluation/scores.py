"""Scores of frozen features, and what paired tests say of two of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import ttest_rel


@dataclass
class Score:
    """One row of one metric of one protocol.

    Attributes:
        protocol: name of the protocol.
        row: "raw" features, "untrained" encoder or "pretrained" encoder; where several recipes are compared, with the
            name of the recipe after it.
        values: one for each seed; a single one for raw features, which have none.
        n_train: labelled samples, or tokens, that the probe was fitted on, with what it held out of them to choose on;
            0 where nothing is fitted on training samples.
        n_test: samples, or tokens, that it was tested on. In cross-validation all of them, each once.
        metric: what the values are: "accuracy", "R²" where labels are quantities, or what else the protocol measures.
        points: what each thing that was tested scores, the mean over seeds: for ``compare``.
    """

    protocol: str
    row: str
    values: list[float]
    n_train: int
    n_test: int
    metric: str = "accuracy"
    points: np.ndarray | None = field(default=None, repr=False, compare=False)

    @property
    def half_width(self) -> float:
        """Half of the 95 % interval of the score, as far as the choice of what was tested goes; NaN where unknown."""
        if self.points is None or len(self.points) < 2:
            return float("nan")
        return float(1.96 * self.points.std(ddof=1) / np.sqrt(len(self.points)))


@dataclass
class Comparison:
    """A paired t-test of two rows on the same test samples, queries or episodes.

    It says whether other test samples would tell the same; whether other seeds would, the spread tells.

    Attributes:
        protocol: name of the protocol.
        metric: what was measured.
        row: the one row.
        other: the other one.
        difference: of the scores, row less other.
        low: where its 95 % interval begins.
        high: where it ends.
        p_value: of no difference, two-sided.
    """

    protocol: str
    metric: str
    row: str
    other: str
    difference: float
    low: float
    high: float
    p_value: float


def compare(scores: Sequence[Score]) -> list[Comparison]:
    """Each pretrained encoder with its own baselines and with the others before it, on the same tested things."""
    found = []
    for number, score in enumerate(scores):
        if not score.row.startswith("pretrained"):
            continue
        beside = [other for other in scores[:number] if other.row.startswith("pretrained")]
        for other in [*baselines_of(score, scores), *beside]:
            same = (score.protocol, score.metric) == (other.protocol, other.metric)
            if same and (comparison := paired(score, other)):
                found.append(comparison)
    return found


def baselines_of(score: Score, scores: Sequence[Score]) -> list[Score]:
    """The rows of raw features and untrained encoders that have its name; where there are none, all of the kind."""
    name, found = score.row.partition(" ")[2], []
    for kind in ("raw", "untrained"):
        every = [other for other in scores if other.row.partition(" ")[0] == kind]
        found += [other for other in every if other.row.partition(" ")[2] == name] or every
    return found


def paired(score: Score, other: Score) -> Comparison | None:
    """The paired t-test of two scores; None where they are not of the same several things."""
    if score.points is None or other.points is None or len(other.points) != len(score.points) or len(score.points) < 2:
        return None
    difference = score.points - other.points
    low = high = difference.mean()
    p_value = float(low == 0)  # where all differ by the same, which is nearly always by nothing
    if np.ptp(difference) > 1e-9:
        test = ttest_rel(score.points, other.points)
        (low, high), p_value = test.confidence_interval(), test.pvalue
    rows = score.protocol, score.metric, score.row, other.row
    return Comparison(*rows, float(difference.mean()), float(low), float(high), float(p_value))
