"""Embeddings of samples in a file, for whatever people do with them next."""

from pathlib import Path

import datasets
import numpy as np
import torch

from mmssl.data import DataArguments, PreparedSamples, load_samples
from mmssl.evaluation.features import Pooling, extract, pooled
from mmssl.evaluation.models import load_model, pick_modality
from mmssl.evaluation.splits import readable

ENDINGS = (".npz", ".parquet")


def embed(
    checkpoint: str | Path,
    data: DataArguments,
    output: str | Path = "embeddings.npz",
    modality: str | None = None,
    pooling: Pooling = "mean",
) -> Path:
    """Write an embedding of each sample to ``output``.

    Args:
        checkpoint: folder or Hub name of a pretrained model.
        data: the samples; with ``on_error="skip"``, unreadable ones are left out.
        output: a .npz or .parquet file, with arrays or columns "name", "label" (of the class, or a quantity; where
            there are labels) and "embedding", (n, F) float32.
        modality: which modality of a model that has several.
        pooling: from tokens to samples, as in ``evaluate``.

    Raises:
        ValueError: another ending, or samples that cannot be read.
    """
    output = Path(output)
    if output.suffix not in ENDINGS:
        raise ValueError(f"output: found {output}; expected a file that ends in {' or '.join(ENDINGS)}")
    if not output.parent.is_dir():
        raise ValueError(f"output: there is no folder {output.parent}; make it first")
    model = load_model(checkpoint)
    adapter = model.adapters[pick_modality(model, modality)]
    torch.nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    samples = readable(load_samples(data, adapter), data, adapter)
    (embeddings,) = extract(PreparedSamples(samples, adapter), [pooled(model, pooling)], model.device)
    columns = {"name": np.array([samples.name(i) for i in range(len(samples))])}
    if samples.labels is not None:
        columns["label"] = np.array(samples.classes)[samples.labels] if len(samples.classes) else samples.labels
    columns["embedding"] = embeddings
    if output.suffix == ".npz":
        np.savez(output, allow_pickle=False, **columns)
    else:
        datasets.Dataset.from_dict(columns).to_parquet(str(output))
    return output
