"""How well features rank samples by their likeness: nothing is fitted."""

import numpy as np
from sklearn.preprocessing import normalize

from mmssl.probes.base import Points, Task, needs_classes

BLOCK, RANKS = 512, (1, 5)


def retrieval(task: Task) -> Points:
    """Each test sample asks for others of its class among all other test samples, by cosine: mAP and top-k, as in CMC.

    mAP is the mean over queries of the average precision; top-1 and top-5 say whether one of the first one or five is
    of its class (Zheng et al., 2015). Queries whose class has no other sample are left out. Samples that are equally
    like the query have no order: average precision takes all of them at once, as scikit-learn's does, and top-k is the
    probability over their random orders. So features that are all equal are worth the share of the class.
    """
    labels = task.test_labels
    needs_classes(labels)
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    queries = np.flatnonzero(counts[classes] > 1)
    if not len(queries):
        raise ValueError(f"found {len(labels)} test samples of as many classes; expected two of some class")
    features = normalize(task.test.astype(np.float64))
    points: Points = {"mAP": np.empty(len(queries))} | {f"top-{rank}": np.empty(len(queries)) for rank in RANKS}
    for start in range(0, len(queries), BLOCK):
        block = queries[start : start + BLOCK]
        rows = np.arange(len(block))
        alike = (features[block] @ features.T).round(10)  # so that ties are ties, whatever the order of the sum
        alike[rows, block] = -np.inf  # the query itself comes last, and counts as no match
        match = classes[block, None] == classes
        match[rows, block] = False
        order = np.argsort(-alike, axis=1)
        alike, match = (np.take_along_axis(each, order, axis=1) for each in (alike, match))
        where = slice(start, start + len(block))
        points["mAP"][where] = average_precision(alike, match)
        for rank in RANKS:
            points[f"top-{rank}"][where] = found_within(alike, match, rank)
    return points


def average_precision(alike: np.ndarray, match: np.ndarray) -> np.ndarray:
    """Of each row: at each match, the share of matches down to the last sample that is as alike; their mean.

    Args:
        alike: (queries, samples) cosines, falling.
        match: (queries, samples) whether the sample is of the class of the query.
    """
    last = np.arange(alike.shape[1])
    ends = np.where(np.diff(alike, axis=1, append=np.nan) == 0, len(last), last)
    ends = np.minimum.accumulate(ends[:, ::-1], axis=1)[:, ::-1]
    precision = np.take_along_axis(match.cumsum(axis=1), ends, axis=1) / (ends + 1)
    return (precision * match).sum(axis=1) / match.sum(axis=1)


def found_within(alike: np.ndarray, match: np.ndarray, rank: int) -> np.ndarray:
    """Of each row, the probability that one of the first ``rank`` is a match; arguments as of ``average_precision``."""
    rank = min(rank, alike.shape[1] - 1)
    above, tied = (compare(alike, alike[:, rank - 1 : rank]) for compare in (np.greater, np.equal))
    left, others = rank - above.sum(axis=1), (tied & ~match).sum(axis=1)
    missed = np.ones(len(alike))
    for drawn in range(rank):  # of those that are tied at this rank, as many are drawn as there are places left
        missed *= np.where(drawn < left, (others - drawn).clip(min=0) / (tied.sum(axis=1) - drawn).clip(min=1), 1.0)
    return np.where((above & match).any(axis=1), 1.0, 1 - missed)
