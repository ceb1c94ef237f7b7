"""Box arithmetic against mmdetection's numbers and against plain loops written from the formulas."""

import math

import pytest
import torch
from torch.nn import functional as F

from hf_bcd.models.detection_boxes import (
    BACKGROUND,
    IGNORED,
    anchor_boxes,
    assign_atss,
    assign_max_iou,
    atss_candidates,
    box_overlaps,
    decode_deltas,
    decode_distances,
    distribution_focal_loss,
    encode_deltas,
    expected_distances,
    focal_loss,
    pairwise_iou,
    quality_focal_loss,
    square_priors,
)


CPU = torch.device("cpu")
STRIDES = (8, 16, 32, 64, 128)
# of an image of 160 x 192
CELLS = [(20, 24), (10, 12), (5, 6), (3, 3), (2, 2)]
TRUTHS = torch.tensor([[20.0, 20, 70, 60], [100, 30, 180, 150]])


def all_levels(make, cells=CELLS):
    return torch.cat([make(*size, stride, CPU) for size, stride in zip(cells, STRIDES, strict=True)])


def random_truths(count, generator, height=160, width=192):
    size = torch.tensor([width, height])
    corner = torch.rand(count, 2, generator=generator) * size * 0.8
    return torch.cat([corner, corner + 4 + torch.rand(count, 2, generator=generator) * (size - corner - 4)], dim=1)


def iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inside = max(width, 0) * max(height, 0)
    return inside / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inside)


def test_priors_of_mmdetection():
    cells = [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)]
    assert len(all_levels(anchor_boxes, cells)) == 201_600
    assert len(all_levels(square_priors, cells)) == 22_400

    anchors = anchor_boxes(2, 3, 8, CPU)
    sizes = (anchors[:9, 2:] - anchors[:9, :2]).tolist()
    expected = [(45.25, 22.63), (57.02, 28.51), (71.84, 35.92), (32, 32), (40.32, 40.32), (50.80, 50.80)]
    expected += [(22.63, 45.25), (28.51, 57.02), (35.92, 71.84)]
    assert [(round(w, 2), round(h, 2)) for w, h in sizes] == expected
    # row by row, anchor by anchor in a cell, around its corner
    torch.testing.assert_close(anchors[9 * 4 :: 9][:1], anchors[:1] + torch.tensor([8.0, 8, 8, 8]))
    assert square_priors(2, 3, 16, CPU)[5].tolist() == [32 - 64, 16 - 64, 32 + 64, 16 + 64]


def test_max_iou_on_the_worked_example():
    assigned = assign_max_iou(all_levels(anchor_boxes), TRUTHS)
    counts = [(assigned == value).sum().item() for value in (0, 1, BACKGROUND, IGNORED)]
    assert (len(assigned), counts) == (5787, [31, 38, 5600, 118])


def test_atss_on_the_worked_example():
    sizes = [height * width for height, width in CELLS]
    priors = all_levels(square_priors)
    assert atss_candidates(priors, sizes, TRUTHS)[2].flatten().tolist() == pytest.approx(
        [0.324808, 0.459024], abs=1e-6
    )
    assigned = assign_atss(priors, sizes, TRUTHS)
    assert (assigned == 0).nonzero().flatten().tolist() == [101, 102, 124, 125, 126, 127, 149, 150, 151]
    assert (assigned == 1).nonzero().flatten().tolist() == [548, 549, 550, 560, 561, 562]


def max_iou_by_loops(anchors, truths):
    table = [[iou(truth, anchor) for anchor in anchors.tolist()] for truth in truths.tolist()]
    assigned = []
    for index in range(len(anchors)):
        column = [row[index] for row in table]
        best = max(column, default=0.0)
        assigned.append(column.index(best) if best >= 0.5 else -1 if best < 0.4 else -2)
    for number, row in enumerate(table):
        for index, value in enumerate(row):
            if value > 0 and abs(value - max(row)) < 1e-6:
                assigned[index] = number
    return assigned


def atss_by_loops(priors, sizes, truths):
    priors, best, assigned = priors.tolist(), [-1.0] * len(priors), [-1] * len(priors)
    for number, truth in enumerate(truths.tolist()):
        middle, candidates, start = ((truth[0] + truth[2]) / 2, (truth[1] + truth[3]) / 2), [], 0
        for size in sizes:
            near = sorted(
                range(start, start + size),
                key=lambda k: math.dist(
                    middle, ((priors[k][0] + priors[k][2]) / 2, (priors[k][1] + priors[k][3]) / 2)
                ),
            )
            candidates += near[:9]
            start += size
        overlaps = [iou(priors[k], truth) for k in candidates]
        mean = sum(overlaps) / len(overlaps)
        threshold = mean + math.sqrt(sum((v - mean) ** 2 for v in overlaps) / (len(overlaps) - 1))
        for k, value in zip(candidates, overlaps, strict=True):
            x, y = (priors[k][0] + priors[k][2]) / 2, (priors[k][1] + priors[k][3]) / 2
            inside = min(x - truth[0], y - truth[1], truth[2] - x, truth[3] - y) > 0.01
            if inside and value >= threshold and value > best[k]:
                best[k], assigned[k] = value, number
    return assigned


@pytest.mark.parametrize("count", [0, 1, 6])
def test_assigners_equal_plain_loops(count):
    generator = torch.Generator().manual_seed(count)
    truths, cells = random_truths(count, generator), [(10, 12), (5, 6), (3, 3), (2, 2), (1, 1)]
    sizes = [height * width for height, width in cells]
    anchors, priors = all_levels(anchor_boxes, cells), all_levels(square_priors, cells)
    assert assign_max_iou(anchors, truths).tolist() == max_iou_by_loops(anchors, truths)
    assert assign_atss(priors, sizes, truths).tolist() == atss_by_loops(priors, sizes, truths)


def test_max_iou_ties_and_truths_without_overlap():
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [40, 40, 50, 50]])
    truths = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [100, 100, 110, 110]])
    # both anchors fit both truths equally well: the later one has them; the third truth touches nothing
    assert assign_max_iou(anchors, truths).tolist() == [1, 1, BACKGROUND]


def test_atss_gives_a_prior_on_the_border_of_a_truth_to_none():
    priors = square_priors(4, 4, 8, CPU)
    # the only corner of a cell within this truth lies on its side
    assert (assign_atss(priors, [16], torch.tensor([[8.0, 6, 14, 10]])) == BACKGROUND).all()
    assert (assign_atss(priors, [16], torch.tensor([[6.0, 6, 14, 10]])) >= 0).any()


def test_assignment_is_blind_to_flips():
    def mirror(boxes):  # at x = 0, so that not even rounding breaks a tie
        return torch.stack([-boxes[:, 2], boxes[:, 1], -boxes[:, 0], boxes[:, 3]], dim=1)

    truths, sizes = random_truths(5, torch.Generator().manual_seed(0)), [height * width for height, width in CELLS]
    anchors, priors = all_levels(anchor_boxes), all_levels(square_priors)
    assert torch.equal(assign_max_iou(mirror(anchors), mirror(truths)), assign_max_iou(anchors, truths))
    assert torch.equal(assign_atss(mirror(priors), sizes, mirror(truths)), assign_atss(priors, sizes, truths))


def test_deltas():
    anchor, box = torch.tensor([0.0, 0, 32, 32]), torch.tensor([4.0, 8, 28, 40])
    deltas = encode_deltas(anchor, box)
    torch.testing.assert_close(deltas, torch.tensor([0, 0.25, -0.287682, 0]))
    torch.testing.assert_close(decode_deltas(anchor, deltas), box)
    # growth ends at 1000 / 16
    huge = decode_deltas(anchor, torch.tensor([0.0, 0, 50, -50]))
    torch.testing.assert_close(huge[2:] - huge[:2], torch.tensor([32 * 62.5, 32 / 62.5]))


def test_distances_and_their_expectation():
    box = decode_distances(torch.tensor([10.0, 20]), torch.tensor([1.0, 2, 3, 4]))
    assert box.tolist() == [9, 18, 13, 24]
    logits = torch.linspace(-1, 1, 17)
    assert expected_distances(logits.log_softmax(dim=0)).item() == pytest.approx(10.795327, abs=1e-5)
    assert distribution_focal_loss(logits.log_softmax(dim=0), torch.tensor(3.25)).item() == pytest.approx(
        3.607852, abs=1e-5
    )


def test_expectation_stays_exact_under_autocast():
    logits = torch.linspace(-1, 1, 17)
    with torch.autocast("cpu", torch.bfloat16):
        assert expected_distances(logits.log_softmax(dim=0)[None]).item() == pytest.approx(10.795327, abs=1e-5)


def test_overlaps():
    a, b = torch.tensor([0.0, 0, 10, 10]), torch.tensor([5.0, 5, 15, 15])
    overlap, generalised = box_overlaps(a, b)
    assert overlap.item() == pytest.approx(25 / 175)
    assert 1 - generalised.item() == pytest.approx(1.079365, abs=1e-6)
    truths, anchors = random_truths(3, torch.Generator().manual_seed(1)), all_levels(anchor_boxes)
    torch.testing.assert_close(pairwise_iou(truths, anchors), box_overlaps(truths[:, None], anchors)[0])


def test_overlap_of_empty_boxes_has_a_finite_gradient():
    box = torch.tensor([3.0, 3, 3, 3], requires_grad=True)
    sum(box_overlaps(box, torch.tensor([3.0, 3, 3, 3]))).backward()
    assert box.grad.isfinite().all()


def test_class_losses_of_mmdetection():
    logits = torch.tensor([[1.0, -2, 0.5], [0, 0, 0]])
    classes, positive, counted = torch.tensor([0, 2]), torch.tensor([True, False]), torch.tensor([True, True])
    assert focal_loss(logits, classes, positive, counted).item() == pytest.approx(0.679971, abs=1e-6)
    none = torch.tensor([False, False])
    quality = torch.tensor([0.7, 0.0])
    rows = [quality_focal_loss(logits[i], classes[i], quality[i], positive[i]).item() for i in range(2)]
    assert rows == pytest.approx([0.379807, 0.519860], abs=1e-6)
    assert focal_loss(logits, classes, none, none) == 0


def test_class_losses_equal_plain_loops():
    generator = torch.Generator().manual_seed(0)
    logits, quality = torch.randn(2, 7, 4, generator=generator) * 3, torch.rand(2, 7, generator=generator)
    assigned = torch.randint(-2, 3, (2, 7), generator=generator)
    classes = torch.randint(0, 4, (2, 7), generator=generator)
    focal, qfl = 0.0, 0.0
    for image, prior, c in torch.cartesian_prod(torch.arange(2), torch.arange(7), torch.arange(4)).tolist():
        z, state = logits[image, prior, c], assigned[image, prior]
        p = z.sigmoid().item()
        own = state >= 0 and c == classes[image, prior]
        if state != -2:
            focal += -0.25 * (1 - p) ** 2 * math.log(p) if own else -0.75 * p**2 * math.log(1 - p)
        target = quality[image, prior] if own else torch.tensor(0.0)
        qfl += (F.binary_cross_entropy_with_logits(z, target) * (p - target).abs() ** 2).item()
    positive = assigned >= 0
    assert focal_loss(logits, classes, positive, assigned != -2).item() == pytest.approx(focal, rel=1e-5)
    assert quality_focal_loss(logits, classes, quality, positive).item() == pytest.approx(qfl, rel=1e-5)
