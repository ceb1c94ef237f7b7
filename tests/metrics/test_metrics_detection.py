"""COCO's numbers, equal to those of pycocotools; duplicates and hallucinations; any split over processes."""

import contextlib
import io
import json
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import run_ranks

from hf_bcd.data import load_dense_dataset
from hf_bcd.metrics import DetectionMetrics


NAMES = ("box_ap", "box_ap50", "box_ap75", "box_ap_small", "box_ap_medium", "box_ap_large")


def truth_of(boxes, labels=None, crowd=None, areas=None):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    count = len(boxes)
    return {
        "boxes": boxes,
        "labels": torch.tensor(labels if labels is not None else [0] * count, dtype=torch.int64),
        "iscrowd": torch.tensor(crowd if crowd is not None else [False] * count, dtype=torch.bool),
        "area": (boxes[:, 2:] - boxes[:, :2]).prod(1).double() if areas is None else torch.tensor(areas),
    }


def found_of(boxes, scores, labels=None):
    truth = truth_of(boxes, labels)
    return {"boxes": truth["boxes"], "labels": truth["labels"], "scores": torch.tensor(scores, dtype=torch.float32)}


def guesses(truth, num_labels, count, seed):
    """Jittered true boxes and noise, with scores that are often equal."""
    generator = np.random.default_rng(seed)
    boxes = truth["boxes"].numpy().astype(float)
    boxes = np.concatenate([boxes, boxes[generator.integers(0, len(boxes), len(boxes) // 2)]]) if len(boxes) else boxes
    labels = np.resize(truth["labels"].numpy(), len(boxes))
    noise = generator.uniform(0, 90, (count, 2))
    noise = np.concatenate([noise, noise + generator.uniform(3, 90, (count, 2))], 1)
    moved = boxes + generator.normal(0, 0.06, boxes.shape) * np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    scores = generator.random(len(moved) + count).round(1)
    labels = np.concatenate([labels, generator.integers(0, num_labels, count)])
    return found_of(np.concatenate([moved, noise]), scores, labels)


def pictures(count, num_labels, seed=0):
    generator, truths = np.random.default_rng(seed), []
    for _ in range(count):
        size = int(generator.integers(0, 9))
        corner, sides = generator.uniform(0, 90, (size, 2)), generator.uniform(3, 140, (size, 2))
        crowd, areas = generator.random(size) < 0.2, sides.prod(1) * generator.uniform(0.4, 1, size)
        labels = generator.integers(0, num_labels - 1, size)  # the last class never occurs
        truths.append(truth_of(np.concatenate([corner, corner + sides], 1), labels, crowd, areas))
    return [guesses(truth, num_labels, 12, seed) for seed, truth in enumerate(truths)], truths


def by_pycocotools(predictions, truths, num_labels):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def sides(boxes):
        boxes = boxes.double()
        return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()

    annotations, detections = [], []
    for image, (found, truth) in enumerate(zip(predictions, truths, strict=True), 1):
        rows = zip(sides(truth["boxes"]), *(truth[key].tolist() for key in ("labels", "iscrowd", "area")), strict=True)
        for box, label, crowd, area in rows:
            one = {"bbox": box, "category_id": label + 1, "iscrowd": int(crowd), "area": area, "image_id": image}
            annotations.append(one | {"id": len(annotations) + 1})
        rows = zip(sides(found["boxes"]), *(found[key].tolist() for key in ("labels", "scores")), strict=True)
        for box, label, score in rows:
            detections.append({"bbox": box, "category_id": label + 1, "score": score, "image_id": image})
    with contextlib.redirect_stdout(io.StringIO()):
        table = COCO()
        categories = [{"id": index + 1, "name": str(index)} for index in range(num_labels)]
        images = [{"id": image + 1} for image in range(len(truths))]
        table.dataset = {"images": images, "categories": categories, "annotations": annotations}
        table.createIndex()
        evaluation = COCOeval(table, table.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, 2]
    per_class = [column[column > -1].mean() if (column > -1).any() else -1 for column in precision.transpose(2, 0, 1)]
    return evaluation.stats, per_class


def scores_of(predictions, truths, num_labels):
    metric = DetectionMetrics(num_labels)
    metric.update(predictions, truths)
    return metric.compute()


def assert_equals_pycocotools(predictions, truths, num_labels):
    pytest.importorskip("pycocotools")
    result = scores_of(predictions, truths, num_labels)
    stats, per_class = by_pycocotools(predictions, truths, num_labels)
    found = [result[name] for name in NAMES] + [result["box_ar"]]
    assert np.nan_to_num(found, nan=-1) == pytest.approx(stats[[0, 1, 2, 3, 4, 5, 8]], abs=1e-6)
    assert np.nan_to_num(result["per_class_ap"], nan=-1) == pytest.approx(per_class, abs=1e-6)
    assert result["classes_averaged"] == sum(ap >= 0 for ap in per_class)
    return result


def test_generated_pictures_with_crowds_are_scored_as_by_pycocotools():
    predictions, truths = pictures(40, 5)
    result = assert_equals_pycocotools(predictions, truths, 5)
    assert 0.1 < result["box_ap"] < 0.9 and math.isnan(result["per_class_ap"][4]) and result["classes_averaged"] == 4
    assert result["num_instances"] == sum(int((~truth["iscrowd"]).sum()) for truth in truths)


def test_real_pictures_are_scored_as_by_pycocotools(shared_data):
    content = json.loads((shared_data / "coco_mini/annotations/instances_train.json").read_text())
    ids = sorted(category["id"] for category in content["categories"])
    truths = []
    for image in content["images"]:
        some = [one for one in content["annotations"] if one["image_id"] == image["id"]]
        boxes = [[left, top, left + width, top + height] for left, top, width, height in (one["bbox"] for one in some)]
        labels = [ids.index(one["category_id"]) for one in some]
        areas = [float(one["area"]) for one in some]
        truths.append(truth_of(boxes, labels, [bool(one["iscrowd"]) for one in some], areas))
    assert sum(int(truth["iscrowd"].sum()) for truth in truths) == 6
    predictions = [guesses(truth, 80, 30, seed) for seed, truth in enumerate(truths)]
    assert_equals_pycocotools(predictions, truths, 80)


def test_perfect_predictions_score_one_and_a_shift_by_eight_pixels_shows():
    data = load_dense_dataset("synthetic_detection", size=(96, 128), num_images={"test": 10})["test"]
    samples = [data[index] for index in range(len(data))]
    truths = [truth_of(sample["boxes"], sample["classes"], sample["crowd"], sample["areas"]) for sample in samples]
    results = []
    for shift in (0, 8):
        found = [
            found_of(truth["boxes"].numpy() + shift, [0.9] * len(truth["boxes"]), truth["labels"].tolist())
            for truth in truths
        ]
        results.append(scores_of(found, truths, 2))
    assert results[0]["box_ap"] == pytest.approx(1) and results[0]["box_ar"] == pytest.approx(1)
    assert results[0]["hallucinations"] == 0 and results[0]["duplicates"] < 0.2  # two persons overlap
    assert results[1]["box_ap"] < 0.15 and results[1]["hallucinations"] > 0.5
    # generated things are small
    assert results[0]["box_ap_small"] == pytest.approx(1) and math.isnan(results[0]["box_ap_large"])


def test_duplicates_and_hallucinations_are_counted_per_picture():
    truth = truth_of([[0, 0, 40, 40], [50, 0, 90, 90]], [0, 1], [False, True])
    boxes = [
        [0, 0, 40, 40],
        [1, 1, 40, 40],  # a duplicate
        [1, 1, 40, 40],  # of another class
        [2, 2, 40, 40],  # a duplicate, but not confident
        [60, 10, 64, 14],  # in a crowd
        [0, 60, 20, 80],  # nothing is there
        [0, 60, 20, 81],  # the same, and a duplicate
    ]
    scores, labels = [0.9, 0.8, 0.8, 0.4, 0.7, 0.6, 0.5], [0, 0, 1, 0, 1, 0, 0]
    empty = found_of([], []), truth_of([])
    result = scores_of([found_of(boxes, scores, labels), empty[0]], [truth, empty[1]], 2)
    assert (result["duplicates"], result["hallucinations"]) == (2 / 2, 2 / 2)


def test_nothing_to_score():
    for predictions, truths in (([], []), ([found_of([[0, 0, 9, 9]], [0.9])], [truth_of([])])):
        result = scores_of(predictions, truths, 3)
        assert math.isnan(result["box_ap"]) and result["classes_averaged"] == 0 and result["num_instances"] == 0
    result = scores_of([found_of([], [])], [truth_of([[0, 0, 9, 9]])], 3)
    assert result["box_ap"] == 0 and result["classes_averaged"] == 1
    metric = DetectionMetrics(3)
    metric.update([found_of([], [])], [truth_of([[0, 0, 9, 9]])])
    metric.reset()
    assert metric.compute()["num_instances"] == 0


def test_ten_thousand_boxes_in_one_picture(caplog):
    grid = np.stack(np.meshgrid(np.arange(100), np.arange(100)), -1).reshape(-1, 2) * 8.0
    truth = truth_of(np.concatenate([grid, grid + 6], 1))
    result = scores_of([found_of(truth["boxes"][:100].numpy(), np.linspace(1, 0.5, 100))], [truth], 1)
    assert result["box_ar"] == pytest.approx(0.01) and result["num_instances"] == 10_000
    assert "A picture has 10000 true objects, but at most 100 detections count" in caplog.text


def test_a_model_that_finds_hundreds_is_not_cut_off(caplog):
    grid = np.stack(np.meshgrid(np.arange(20), np.arange(15)), -1).reshape(-1, 2) * 8.0
    truth = truth_of(np.concatenate([grid, grid + 6], 1))
    result = scores_of([found_of(truth["boxes"].numpy(), np.linspace(1, 0.5, 300))], [truth], 1)
    assert result["box_ap"] == result["box_ar"] == pytest.approx(1) and not caplog.text


@pytest.mark.parametrize(
    ("predicted", "true", "message"),
    [
        (found_of([[0, 0, 9, 9]], [0.9], [3]), truth_of([]), r"class ids 3\.\.3, not in \[0, 3\)"),
        (found_of([[0, 0, 9, math.nan]], [0.9]), truth_of([]), "not finite"),
        (found_of([[0, 0, 9, 9]], [math.nan]), truth_of([]), "not finite"),
        (found_of([], []), truth_of([[0, 0, 9, 9]], [-1]), "true boxes of picture 0 have class ids -1"),
        (found_of([[0, 0, 9, 9]], [0.9, 0.8]), truth_of([]), r"must be \[N, 4\]"),
    ],
)
def test_wrong_boxes_are_refused(predicted, true, message):
    with pytest.raises(ValueError, match=message):
        scores_of([predicted], [true], 3)
    with pytest.raises(ValueError, match="1 predictions of 2 pictures"):
        scores_of([predicted], [true, true], 3)


def _score_share():
    dist.init_process_group("gloo")
    predictions, truths = pictures(7, 5)
    metric, rank = DetectionMetrics(5), dist.get_rank()
    metric.update(predictions[rank::2], truths[rank::2])
    metric.gather()
    return metric.compute()


@pytest.mark.slow
def test_two_processes_score_as_one(tmp_path):
    expected = scores_of(*pictures(7, 5), 5)
    for result in run_ranks(tmp_path, _score_share):
        assert result.keys() == expected.keys()
        assert all(np.array_equal(result[name], expected[name], equal_nan=True) for name in expected)
