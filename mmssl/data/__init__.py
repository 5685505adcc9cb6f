"""From folders, parquet files, Hub data sets and what the packages bring to prepared samples."""

from mmssl.data.prepared import PreparedSamples
from mmssl.data.sources import DataArguments, load_samples
from mmssl.samples import Samples

__all__ = ["DataArguments", "PreparedSamples", "Samples", "load_samples"]
