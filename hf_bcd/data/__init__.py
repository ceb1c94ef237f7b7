"""Data sets for dense prediction in one canonical form: `image` RGB, `label` class ids with 255 for void."""

from .catalog import CATALOG, DatasetSpec
from .collators import SemanticCollator
from .dataset import DenseDataset, DenseDatasets
from .loading import load_dense_dataset
from .transforms import EvalTransform, TrainTransform


__all__ = [
    "CATALOG",
    "DatasetSpec",
    "DenseDataset",
    "DenseDatasets",
    "EvalTransform",
    "SemanticCollator",
    "TrainTransform",
    "load_dense_dataset",
]
