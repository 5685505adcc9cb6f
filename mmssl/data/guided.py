"""Batches whose samples come from different clusters, so that few of a sample's negatives are like it.

Chakraborty et al., "G-SimCLR", ICDM workshops 2020: cluster the features of some encoder by k-means, with as many
clusters as a batch has samples, and lay out batches with one sample of each cluster as long as clusters last.
"""

from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor
from torch.utils.data import Sampler

from mmssl.randomness import seed_of


class GuidedSampler(Sampler[int]):
    """An order of the samples for an epoch, in blocks without two samples of one cluster, the last blocks apart.

    Args:
        clusters: (n,) long, the cluster of each sample.
        repeat: how many times an epoch has each sample, as n more positions each time.
        seed: the order follows from it and the epoch.
    """

    def __init__(self, clusters: Tensor, repeat: int, seed: int):
        self.clusters, self.seed, self.epoch = clusters.repeat(repeat), seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.clusters)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, "guided", self.epoch))
        return iter(guided_order(self.clusters, generator).tolist())


def guided_order(clusters: Tensor, generator: torch.Generator) -> Tensor:
    """A permutation of 0 to n - 1: first one random sample of each cluster, then a second one of each, and so on.

    Clusters come in another order each time, so that a block of as many samples as there are clusters has each once as
    long as all of them last.
    """
    shuffled = torch.randperm(len(clusters), generator=generator)
    by_cluster = shuffled[clusters[shuffled].argsort(stable=True)]
    sizes = clusters.bincount()
    first = sizes.cumsum(0) - sizes
    turn = torch.arange(len(clusters)) - first[clusters[by_cluster]]  # which of its cluster's samples it is
    noise = torch.rand(len(clusters), generator=generator, dtype=torch.float64)
    return by_cluster[(turn + noise).argsort()]


def clusters_of(source: str, samples: int, count: int, seed: int) -> Tensor:
    """(samples,) long, the cluster of each sample by k-means on its embedding.

    Args:
        source: a file that ``mmssl embed`` wrote of these samples, in their order.
        samples: how many there are.
        count: how many clusters to find, the samples of a batch of all processes.
        seed: of the clusters' start values.

    Raises:
        ValueError: no such file, without embeddings, of other samples, or with values that are not finite.
    """
    path = Path(source)
    if not path.is_file() or path.suffix not in (".npz", ".parquet"):
        raise ValueError(f"data.guide: found {source}; expected a .npz or .parquet file that `mmssl embed` has written")
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            embeddings = arrays.get("embedding")
    else:
        table = datasets.Dataset.from_parquet(str(path))
        embeddings = np.array(table["embedding"]) if "embedding" in table.column_names else None
    if embeddings is None or embeddings.ndim != 2:
        raise ValueError(
            f"data.guide: {source} has no array or column (n, F) named 'embedding'; write it by `mmssl embed`"
        )
    if len(embeddings) != samples:
        raise ValueError(
            f"data.guide: {source} has {len(embeddings):,} embeddings for {samples:,} samples; expected one for each: "
            "call `mmssl embed` with the same data flags"
        )
    if not np.isfinite(embeddings).all():
        raise ValueError(f"data.guide: {source} has embeddings with NaN or infinity; write it anew")
    found = KMeans(min(count, samples), n_init=1, random_state=seed).fit_predict(embeddings)
    return torch.as_tensor(found, dtype=torch.long)
