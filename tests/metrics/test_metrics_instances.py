"""AP of masks as pycocotools', Boundary AP as the library's, connectivity of instances against a loop, any split over processes."""

import contextlib
import io
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from faster_coco_eval.core import mask as codec
from metrics_reference import reference_connectivity
from processes import run_ranks

from hf_bcd.metrics import DetectionMetrics, InstanceMetrics


KEYS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


def encoded(mask):
    return codec.encode(np.asfortranarray(mask, np.uint8))


def instances(masks, labels, **numbers):
    """Masks `[N, h, w]` with their boxes, as predictions (`scores`) or truth (`iscrowd`)."""
    runs = [encoded(mask) for mask in masks]
    boxes = np.array([codec.toBbox([run])[0] for run in runs]).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    given = {"boxes": torch.from_numpy(boxes), "labels": torch.tensor(labels, dtype=torch.int64), "masks": runs}
    if "scores" in numbers:
        return given | {"scores": torch.tensor(numbers["scores"], dtype=torch.float32)}
    crowd = torch.tensor(numbers.get("iscrowd", [False] * len(runs)), dtype=torch.bool)
    return given | {"iscrowd": crowd, "area": torch.tensor([float(mask.sum()) for mask in masks])}


def disc(size, y, x, radius):
    rows, columns = np.ogrid[: size[0], : size[1]]
    return (rows - y) ** 2 + (columns - x) ** 2 < radius**2


def picture(generator, num_labels, size=(90, 120)):
    """Discs with holes and cuts, some crowds, one of a pixel; predictions that are moved, cut, doubled or nowhere."""
    truths, guesses, scores, labels, guessed = [], [], [], [], []
    for _ in range(int(generator.integers(0, 7))):
        y, x, radius = generator.integers(0, 90), generator.integers(0, 120), generator.integers(4, 60)
        mask = disc(size, y, x, radius)
        if generator.random() < 0.4:
            mask &= ~disc(size, y, x, radius / 3)
        mask[y, x] = True
        truths.append(mask)
        labels.append(int(generator.integers(num_labels - 1)))
        for _ in range(int(generator.integers(0, 3))):
            moved = np.roll(mask, generator.integers(-1, 2, 2), (0, 1))
            moved[:, int(generator.integers(120))] = False
            guesses.append(moved)
            guessed.append(labels[-1] if generator.random() < 0.8 else int(generator.integers(num_labels)))
    guesses += [disc(size, *generator.integers(10, 80, 2), 9) for _ in range(3)]
    guessed += generator.integers(num_labels, size=3).tolist()
    scores = generator.random(len(guesses)).round(1)
    order = np.argsort(-scores, kind="stable")
    found = instances([guesses[i] for i in order], [guessed[i] for i in order], scores=scores[order])
    return found, instances(truths, labels, iscrowd=(generator.random(len(truths)) < 0.15).tolist())


def pictures(count, num_labels, seed=0):
    generator = np.random.default_rng(seed)
    predictions, truths = zip(*(picture(generator, num_labels) for _ in range(count)), strict=True)
    one_pixel = np.zeros((90, 120), bool)
    one_pixel[3, 4] = True
    return [*predictions, instances([one_pixel], [0], scores=[0.9])], [*truths, instances([one_pixel], [0])]


def scores_of(predictions, truths, num_labels):
    metric = InstanceMetrics(num_labels)
    metric.update(predictions, truths)
    return metric.compute()


def by_library(predictions, truths, num_labels, table, evaluator, kind, **options):
    annotations, detections = [], []
    for image, (found, truth) in enumerate(zip(predictions, truths, strict=True), 1):
        for place, mask in enumerate(truth["masks"]):
            x0, y0, x1, y1 = truth["boxes"][place].tolist()
            one = {"id": len(annotations) + 1, "image_id": image, "category_id": int(truth["labels"][place]) + 1}
            one |= {
                "iscrowd": int(truth["iscrowd"][place]),
                "area": float(truth["area"][place]),
                "segmentation": dict(mask),
            }
            annotations.append(one | {"bbox": [x0, y0, x1 - x0, y1 - y0]})
        for place, mask in enumerate(found["masks"]):
            one = {"image_id": image, "category_id": int(found["labels"][place]) + 1, "segmentation": dict(mask)}
            detections.append(one | {"score": float(found["scores"][place])})
    with contextlib.redirect_stdout(io.StringIO()):
        content = table()
        content.dataset = {
            "images": [{"id": image + 1, "height": 90, "width": 120} for image in range(len(truths))],
            "categories": [{"id": index + 1, "name": str(index)} for index in range(num_labels)],
            "annotations": annotations,
        }
        content.createIndex()
        evaluation = evaluator(content, content.loadRes(detections), kind, **options)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return np.asarray(evaluation.stats[:12])


def test_masks_are_scored_as_by_pycocotools():
    pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    predictions, truths = pictures(40, 4)
    result = scores_of(predictions, truths, 4)
    stats = by_library(predictions, truths, 4, COCO, COCOeval, "segm")
    found = [result[f"mask_{key}"] for key in (*KEYS, "ar")]
    assert np.nan_to_num(found, nan=-1) == pytest.approx(stats[[0, 1, 2, 3, 4, 5, 8]], abs=1e-6)
    assert 0.1 < result["mask_ap"] < 0.9 and math.isnan(result["per_class_mask_ap"][3])
    assert np.nanmean(result["per_class_mask_ap"]) == pytest.approx(result["mask_ap"])


@pytest.mark.parametrize("seed", [0, 1])
def test_boundaries_are_scored_as_by_the_library(seed):
    from faster_coco_eval import COCO, COCOeval_faster

    from hf_bcd.metrics.instances import coco_evaluation, lowered_to_boundaries

    predictions, truths = pictures(40, 4, seed)
    options = {"print_function": lambda *_: None, "boundary_cpu_count": 1}
    stats = by_library(predictions, truths, 4, COCO, COCOeval_faster, "boundary", **options)
    metric = InstanceMetrics(4)
    metric.update(predictions, truths)
    ours, _ = coco_evaluation(metric._records, 4, "segm", lowered_to_boundaries)
    assert np.nan_to_num(ours, nan=-1) == pytest.approx(stats, abs=1e-9)  # all twelve
    result = metric.compute()
    assert result["boundary_ap"] == pytest.approx(stats[0]) and result["boundary_ap75"] == pytest.approx(stats[2])
    assert 0.05 < result["boundary_ap"] < result["mask_ap"] - 0.01


def test_boxes_are_scored_as_without_masks():
    predictions, truths = pictures(10, 4)
    metric = DetectionMetrics(4)
    metric.update(predictions, truths)
    expected, result = metric.compute(), scores_of(predictions, truths, 4)
    assert all(np.array_equal(result[key], value, equal_nan=True) for key, value in expected.items())


# ---- Connectivity of instances -----------------------------------------------------------------------------------------


def whole_of(truth, *guesses, scores=None):
    scores = scores or [0.9 - 0.1 * place for place in range(len(guesses))]
    found = instances(guesses, [0] * len(guesses), scores=scores)
    result = scores_of([found], [instances([truth], [0])], 1)
    return {key: result[key] for key in ("completeness", "connectivity", "fragments", "missed")}


def block(*sides, size=(30, 40)):
    top, bottom, left, right = sides
    mask = np.zeros(size, bool)
    mask[top:bottom, left:right] = True
    return mask


def test_a_whole_mask_is_connected():
    truth = disc((60, 80), 30, 40, 20) & ~disc((60, 80), 30, 40, 8)
    assert whole_of(truth, truth) == {"completeness": 1, "connectivity": 1, "fragments": 1, "missed": 0}


def test_a_mask_in_pieces_and_one_that_is_missed():
    truth = block(5, 25, 5, 35)  # 600 pixels
    cut = truth & ~block(5, 25, 24, 26)  # 380 and 180
    expected = {"completeness": 380 / 600, "connectivity": 380 / 560, "fragments": 2, "missed": 0}
    assert whole_of(truth, cut) == pytest.approx(expected)
    for guesses in ([], [block(0, 10, 0, 10)]):  # which overlaps by less than a half
        nothing = whole_of(truth, *guesses)
        assert (nothing["completeness"], nothing["fragments"], nothing["missed"]) == (0, 0, 1)
        assert math.isnan(nothing["connectivity"])


def test_the_best_prediction_takes_an_instance_and_another_class_none():
    truth = block(5, 25, 5, 35)
    cut = truth & ~block(5, 25, 24, 26)
    assert whole_of(truth, truth, cut)["fragments"] == 1 and whole_of(truth, cut, truth)["fragments"] == 2
    found = instances([truth], [1], scores=[0.9])
    assert scores_of([found], [instances([truth], [0])], 2)["missed"] == 1


def test_regions_of_an_instance_crowds_and_small_ones():
    truth = block(0, 10, 0, 10) | block(15, 25, 0, 10)  # one object in two pieces of 100
    found = instances([block(0, 10, 0, 10) | block(15, 25, 0, 6)], [0], scores=[0.9])
    crowd, small = block(0, 20, 20, 40), block(29, 30, 0, 40)
    true = instances([truth, crowd, small], [0, 0, 0], iscrowd=[False, True, False])
    result = scores_of([found], [true], 1)
    assert result["completeness"] == pytest.approx((1 + 0.6) / 2) and result["missed"] == 0


def test_instances_of_a_picture_without_overlaps_are_regions_of_its_map():
    """With perfect matches, the numbers are those of the label map."""
    generator = np.random.default_rng(3)
    truth, guess = np.zeros((2, 64, 96), bool), np.zeros((2, 64, 96), bool)
    for place in range(2):
        truth[place, 4:60, 4 + 46 * place : 44 + 46 * place] = True
        guess[place] = truth[place] & (generator.random((64, 96)) < 0.8)
    found, true = instances(guess, [0, 1], scores=[0.9, 0.8]), instances(truth, [0, 1])
    maps = [np.where(masks.any(0), masks.argmax(0), -1) for masks in (truth, guess)]
    maps[1] = np.where((maps[0] >= 0) & (maps[1] < 0), 2, maps[1])
    expected = reference_connectivity([(maps[0], maps[1])], 2)
    result = scores_of([found], [true], 2)
    for key in ("completeness", "connectivity", "fragments", "missed"):
        assert result[key] == pytest.approx(expected[key], abs=1e-6), key


# ---- Errors, nothing, processes ----------------------------------------------------------------------------------------


def test_masks_that_do_not_fit_are_refused():
    one = block(0, 9, 0, 9)
    found, true = instances([one], [0], scores=[0.9]), instances([one], [0])
    with pytest.raises(ValueError, match="true boxes of picture 0: 1 boxes, 0 masks"):
        scores_of([found], [true | {"masks": []}], 1)
    two, other = instances([one, one], [0, 0]), encoded(np.ones((9, 9)))
    with pytest.raises(ValueError, match=r"2 masks of the sizes \[\(9, 9\), \(30, 40\)\]"):
        scores_of([found], [two | {"masks": [two["masks"][0], other]}], 1)
    with pytest.raises(ValueError, match=r"predicted masks of picture 0 are \(9, 9\), true ones \(30, 40\)"):
        scores_of([instances([np.ones((9, 9), bool)], [0], scores=[0.9])], [true], 1)


def test_nothing_to_score():
    nothing = instances([], [], scores=[]), instances([], [])
    result = scores_of([nothing[0]], [nothing[1]], 2)
    assert math.isnan(result["mask_ap"]) and math.isnan(result["boundary_ap"]) and math.isnan(result["completeness"])
    result = scores_of([nothing[0]], [instances([block(0, 9, 0, 9)], [0])], 2)
    assert (result["mask_ap"], result["boundary_ap"], result["missed"]) == (0, 0, 1)
    result = scores_of([instances([block(0, 9, 0, 9)], [0], scores=[0.5])], [nothing[1]], 2)
    assert math.isnan(result["mask_ap"]) and result["hallucinations"] == 1


def _score_share():
    dist.init_process_group("gloo")
    predictions, truths = pictures(7, 4)
    metric, rank = InstanceMetrics(4), dist.get_rank()
    metric.update(predictions[rank::2], truths[rank::2])
    metric.gather()
    return metric.compute()


@pytest.mark.slow
def test_two_processes_score_as_one(tmp_path):
    expected = scores_of(*pictures(7, 4), 4)
    for result in run_ranks(tmp_path, _score_share):
        assert result.keys() == expected.keys()
        assert all(np.array_equal(result[name], expected[name], equal_nan=True) for name in expected)
