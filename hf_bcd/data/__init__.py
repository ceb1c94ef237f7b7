"""Data sets in one canonical form: `image` RGB with `label`, class ids with 255 for void; or with boxes and masks."""

from .cache import keep_in_memory
from .dataset import DenseDataset, DenseDatasets, check_one_size, check_sample, collate, joined
from .detection import BoxDataset, BoxSample, collate_boxes
from .loading import load_dense_dataset
from .sources.catalog import CATALOG, DatasetSpec
from .streaming import DenseStream, TransformedStream
from .transforms import BoxEvalTransform, BoxTrainTransform, EvalTransform, TrainTransform
from .unlabelled import holds_only_pictures, load_pictures


__all__ = [
    "CATALOG",
    "BoxDataset",
    "BoxEvalTransform",
    "BoxSample",
    "BoxTrainTransform",
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
    "collate_boxes",
    "holds_only_pictures",
    "joined",
    "keep_in_memory",
    "load_dense_dataset",
    "load_pictures",
]
