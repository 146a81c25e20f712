"""Pictures with classes, read at random by index, from the forms that large face sets come in.

The readers need Pillow (`pip install 'fused-losses[train]'`); see docs/datasets.md.
"""

from fused_losses.base.files import DataError
from fused_losses.datasets.base import ImageSet
from fused_losses.datasets.bin_sets import BinResult, BinSet, evaluate_bin, read_bin
from fused_losses.datasets.folders import ImageFolders
from fused_losses.datasets.recordio import Record, RecordIO, write_records
from fused_losses.datasets.sampler import Batch, EpochBatches, PrefetchReader
from fused_losses.datasets.webdataset import TarShards, stream_shards

__all__ = [
    "Batch",
    "BinResult",
    "BinSet",
    "DataError",
    "EpochBatches",
    "ImageFolders",
    "ImageSet",
    "PrefetchReader",
    "Record",
    "RecordIO",
    "TarShards",
    "evaluate_bin",
    "read_bin",
    "stream_shards",
    "write_records",
]
