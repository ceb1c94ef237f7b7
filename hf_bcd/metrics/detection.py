"""Metrics of object detection over a data set: COCO's average precision, and boxes that are there twice or show nothing."""

import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch.distributed as dist
from torch import Tensor

from ..utils.distributed import is_distributed
from ..utils.masks import RLE, mask_areas, mask_ious


logger = logging.getLogger(__name__)

CONFIDENT = 0.5  # score from which a wrong box counts as a duplicate or a hallucination
DUPLICATE_IOU = 0.5
HALLUCINATION_IOU = 0.1
# of the twelve numbers that COCO's evaluator gives
STATS = {"ap": 0, "ap50": 1, "ap75": 2, "ap_small": 3, "ap_medium": 4, "ap_large": 5, "ar": 8}

Overlaps = Callable[[np.ndarray, list[Any], list[Any], np.ndarray], np.ndarray]


class Boxes(NamedTuple):
    """Predicted or true boxes of a picture: corners `[N, 4]`, class ids, and scores or areas; true ones may be crowds.

    Instances also have the run lengths of their masks, all of one size (height, width).
    """

    corners: np.ndarray
    labels: np.ndarray
    numbers: np.ndarray
    crowd: np.ndarray
    size: tuple[int, int] = (0, 0)
    runs: tuple[bytes, ...] = ()

    def masks(self, places: Iterable[int]) -> list[RLE]:
        """Masks as COCO's run-length encodings."""
        size = list(self.size)
        return [{"size": size, "counts": self.runs[place]} for place in places]


class DetectionMetrics:
    """Average precision of boxes as COCO defines it, by faster-coco-eval, and wrong boxes that a model is sure of.

    A record of each picture is kept, about 2.5 kB with 100 predictions, until `compute`.

    Args:
        num_labels: number of classes C.
    """

    def __init__(self, num_labels: int):
        self.num_labels = num_labels
        self.reset()

    def reset(self) -> None:
        """Forgets all pictures."""
        self._records: list[tuple[Boxes, Boxes]] = []
        self._gathered = False

    def update(self, predictions: Sequence[Mapping[str, Tensor]], truth: Sequence[Mapping[str, Tensor]]) -> None:
        """Adds pictures, whose boxes are corners in pixels of the same picture.

        Args:
            predictions: of each picture `boxes` `[K, 4]`, `scores` `[K]` and `labels` `[K]`; of each class the 100 best
                count, or all where K is more in some picture.
            truth: of each picture `boxes` `[N, 4]`, `labels` `[N]`, `iscrowd` `[N]` and `area` `[N]` in pixels, which
                decides on small, medium and large.

        Raises:
            ValueError: if the numbers of pictures or boxes differ, a class id is out of range, or a number is not finite.
        """
        if len(predictions) != len(truth):
            raise ValueError(f"{len(predictions)} predictions of {len(truth)} pictures.")
        for predicted, true in zip(predictions, truth, strict=True):
            of = f"boxes of picture {len(self._records)}"
            found = self.record(predicted, "scores", None, f"predicted {of}")
            self._records.append((found, self.record(true, "area", true["iscrowd"], f"true {of}")))

    def record(self, given: Mapping[str, Any], numbers: str, crowd: Tensor | None, name: str) -> Boxes:
        """What is kept of a picture's predictions or truth; `name` says which, for error messages."""
        boxes, labels, values = (_array(given[key]) for key in ("boxes", "labels", numbers))
        record = Boxes(
            boxes, labels, values, np.zeros(len(boxes), bool) if crowd is None else _array(crowd).astype(bool)
        )
        self._check(record, name)
        return record

    def gather(self) -> None:
        """Collects the pictures of all processes, which must all call this, and then `compute`, in the first one.

        If the n processes share a data set by every n-th sample, its order is restored, so that ties between scores of
        different pictures are broken as in a single process.
        """
        if not is_distributed():
            return
        parts: Any = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(self._records, parts)
        turns = itertools.zip_longest(*parts or ())
        self._records = [record for turn in turns for record in turn if record is not None]
        self._gathered = True

    def compute(self) -> dict[str, Any]:
        """Metrics over all pictures added so far; nan where there is no truth, of that size or class.

        Returns:
            `box_ap` (mean over classes, and IoU thresholds .5 to .95), `box_ap50`, `box_ap75`; `box_ap_small`,
            `box_ap_medium`, `box_ap_large` (areas below 32², to 96², above); `box_ar`, the recall of 100 boxes a picture;
            `per_class_ap`, a list of C values, and `classes_averaged`, how many of them are numbers; `duplicates`: boxes a
            picture with a score of at least 0.5 and an IoU above 0.5 with a better one of their class; `hallucinations`:
            those with an IoU below 0.1 with every true box; `num_instances`: true boxes, crowds left out.
        """
        if not self._gathered:
            return self._compute()
        result = [self._compute() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(result)
        return result[0]  # type: ignore[return-value]

    def _compute(self) -> dict[str, Any]:
        limit, most = detection_limit(self._records), max([0, *(len(true.labels) for _, true in self._records)])
        if most > limit:
            logger.warning(
                "A picture has %d true objects, but at most %d detections count: AP cannot be 1. Models of timm_detection give "
                "more by max_detections in their options.",
                most,
                limit,
            )
        stats, per_class = coco_evaluation(self._records, self.num_labels, "bbox")
        wrong = np.array([wrong_boxes(*record) for record in self._records]).reshape(-1, 2)
        duplicates, hallucinations = wrong.mean(axis=0).tolist() if len(wrong) else (np.nan, np.nan)
        return {
            **named_scores(stats, "box"),
            "per_class_ap": per_class.tolist(),
            "classes_averaged": int((~np.isnan(per_class)).sum()),
            "duplicates": duplicates,
            "hallucinations": hallucinations,
            "num_instances": sum(int((~truth.crowd).sum()) for _, truth in self._records),
        }

    def _check(self, boxes: Boxes, name: str) -> None:
        count = len(boxes.labels)
        if boxes.corners.shape != (count, 4) or boxes.numbers.shape != (count,) or boxes.crowd.shape != (count,):
            raise ValueError(
                f"{name}: boxes {boxes.corners.shape}, labels {boxes.labels.shape} and scores or areas "
                f"{boxes.numbers.shape} must be [N, 4], [N] and [N]."
            )
        if not np.isfinite(boxes.corners).all() or not np.isfinite(boxes.numbers).all():
            raise ValueError(f"{name} are not finite: the model has diverged, or the annotations are broken.")
        if count and not 0 <= boxes.labels.min() <= boxes.labels.max() < self.num_labels:
            raise ValueError(
                f"{name} have class ids {boxes.labels.min()}..{boxes.labels.max()}, not in [0, {self.num_labels}): "
                "num_labels must be the number of classes that the model predicts and the data have."
            )


def named_scores(stats: np.ndarray, kind: str) -> dict[str, float]:
    """The numbers of `STATS` by name, which begins with what was compared."""
    return {f"{kind}_{name}": float(stats[place]) for name, place in STATS.items()}


def coco_evaluation(
    records: Sequence[tuple[Boxes, Boxes]],
    num_labels: int,
    kind: Literal["bbox", "segm"],
    overlaps: Overlaps | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The twelve numbers of COCO's evaluator and the AP of each class `[C]`; nan where there is no truth.

    Args:
        records: predictions and truth of each picture.
        num_labels: number of classes C.
        kind: what is compared, `bbox` or `segm`.
        overlaps: gives another overlap of predictions and true objects of one class in a picture: of their own overlaps
            `[K, N]`, the masks of both, and which true ones are crowds.
    """
    from faster_coco_eval import COCO, COCOeval_faster  # takes a while to import

    class Evaluator(COCOeval_faster):
        def computeIoU(self, imgId: int, catId: int) -> Any:
            if kind == "bbox":
                return super().computeIoU(imgId, catId)
            theirs, true = (
                table.get_instances([imgId], [catId], True)[0][0] for table in (self.dt_dataset, self.gt_dataset)
            )
            best = np.argsort([-one["score"] for one in theirs], kind="mergesort")[: self.params.maxDets[-1]]
            masks, true_masks = (
                [theirs[place]["segmentation"] for place in best],
                [one["segmentation"] for one in true],
            )
            crowd = np.array([bool(one["iscrowd"]) for one in true])
            shared = mask_ious(masks, true_masks, crowd)
            return shared if overlaps is None else overlaps(shared, masks, true_masks, crowd)

    truth, found = (
        _annotations([one for _, one in records], "area", kind),
        _annotations([one for one, _ in records], "score", kind),
    )
    tables = []
    for annotations in (truth, found):
        table = COCO()
        table.dataset = {
            "images": [
                {"id": image, "height": true.size[0], "width": true.size[1]}
                for image, (_, true) in enumerate(records, 1)
            ],
            "categories": [{"id": index, "name": str(index)} for index in range(num_labels)],
            "annotations": annotations,
        }
        table.createIndex()
        tables.append(table)
    if not truth:
        return np.full(12, np.nan), np.full(num_labels, np.nan)
    evaluator = Evaluator(*tables, iouType=kind, print_function=lambda *_: None)
    evaluator.params.compute_rle = False  # masks are run lengths already
    evaluator.params.maxDets = [1, 10, detection_limit(records)]
    evaluator.run()
    stats = np.asarray(evaluator.stats[:12], float)
    precision = np.asarray(evaluator.eval["precision"])[:, :, :, 0, 2]  # of all areas, with 100 predictions
    counted = precision > -1
    with np.errstate(invalid="ignore"):
        per_class = np.where(counted, precision, 0).sum(axis=(0, 1)) / counted.sum(axis=(0, 1))
    return np.where(stats == -1, np.nan, stats), per_class


def detection_limit(records: Sequence[tuple[Boxes, Boxes]]) -> int:
    """How many detections of a class count in a picture: 100, as COCO counts, or more if a model gives more."""
    return max([100, *(len(found.labels) for found, _ in records)])


def wrong_boxes(predicted: Boxes, truth: Boxes) -> tuple[int, int]:
    """How many confident predictions are duplicates and how many are hallucinations; see `DetectionMetrics.compute`.

    The overlap with a crowd is the share of the prediction that lies in it.
    """
    order = np.argsort(-predicted.numbers, kind="stable")
    order = order[predicted.numbers[order] >= CONFIDENT]
    corners, labels = predicted.corners[order], predicted.labels[order]
    alike = np.triu((labels[:, None] == labels) & (box_ious(corners, corners) > DUPLICATE_IOU), 1)
    overlaps = box_ious(corners, truth.corners, truth.crowd)
    return int(alike.any(axis=0).sum()), int((overlaps < HALLUCINATION_IOU).all(axis=1).sum())


def box_ious(boxes: np.ndarray, others: np.ndarray, crowd: np.ndarray | None = None) -> np.ndarray:
    """IoU of all pairs of boxes `[N, 4]` and `[M, 4]`: `[N, M]`; with a crowd, the intersection over the first's area."""
    low, high = np.maximum(boxes[:, None, :2], others[:, :2]), np.minimum(boxes[:, None, 2:], others[:, 2:])
    shared = (high - low).clip(0).prod(axis=2)
    areas, other_areas = ((some[:, 2:] - some[:, :2]).prod(axis=1) for some in (boxes, others))
    union = areas[:, None] + other_areas - shared
    if crowd is not None:
        union = np.where(crowd, areas[:, None], union)
    return shared / np.maximum(union, np.finfo(np.float32).tiny)


def _annotations(pictures: Sequence[Boxes], number: str, kind: str) -> list[dict[str, Any]]:
    """COCO's annotations of all boxes or masks; `number` says what their numbers are."""
    if not pictures:
        return []
    corners, labels, numbers, crowd = (np.concatenate([one[field] for one in pictures]) for field in range(4))
    images = np.repeat(np.arange(1, len(pictures) + 1), [len(one.labels) for one in pictures])
    if kind == "segm":
        shapes: Sequence[Any] = [mask for one in pictures for mask in one.masks(range(len(one.runs)))]
        sizes = mask_areas(shapes)
    else:
        boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
        shapes, sizes = boxes.tolist(), boxes[:, 2:].prod(axis=1)
    areas = numbers if number == "area" else sizes
    names = ("image_id", "category_id", "area", number, "iscrowd")
    columns = (column.tolist() for column in (images, labels, areas, numbers, crowd.astype(int)))
    shape = "segmentation" if kind == "segm" else "bbox"
    return [
        {"id": index, shape: one, **dict(zip(names, row, strict=True))}
        for index, (one, *row) in enumerate(zip(shapes, *columns, strict=True), 1)
    ]


def _array(values: Tensor) -> np.ndarray:
    array = values.detach().cpu().numpy()
    return array.astype(np.float64) if array.dtype.kind == "f" else array
