"""Data sets for dense prediction in one canonical form: `image` RGB, `label` class ids with 255 for void."""

from .cache import keep_in_memory
from .dataset import DenseDataset, DenseDatasets, check_one_size, check_sample, collate, joined
from .loading import load_dense_dataset
from .sources.catalog import CATALOG, DatasetSpec
from .streaming import DenseStream, TransformedStream
from .transforms import EvalTransform, TrainTransform


__all__ = [
    "CATALOG",
    "DatasetSpec",
    "DenseDataset",
    "DenseDatasets",
    "DenseStream",
    "EvalTransform",
    "TrainTransform",
    "TransformedStream",
    "check_one_size",
    "check_sample",
    "collate",
    "joined",
    "keep_in_memory",
    "load_dense_dataset",
]
