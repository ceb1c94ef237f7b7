"""Values of the losses of detectors: published numbers, and plain loops written from the formulas."""

import itertools
import math

import numpy as np
import pytest
import torch
from adapters.adapter_tiny_detectors import objects
from torch import Tensor

from hf_bcd.losses import box_response_loss, distribution_divergence, general_instances
from hf_bcd.losses.base import Pair
from hf_bcd.losses.crosskd import cross_head_losses
from hf_bcd.losses.ddf import ddf_loss
from hf_bcd.losses.fgd import box_weights
from hf_bcd.losses.gid import GIDLoss, disputed_answers, normalised_distances, pooled
from hf_bcd.losses.ld import LDLoss, heads_of
from hf_bcd.losses.ops.boxes import atss_thresholds, overlaps, valuable_region
from hf_bcd.losses.query_kd import box_costs, mask_query_kd_losses, match_queries, query_kd_losses, teacher_answers
from hf_bcd.models.detection_boxes import square_priors
from hf_bcd.outputs import DenseHead, DenseOutput, FeatureSpec, Objects, Queries


# ---- Numbers -----------------------------------------------------------------------------------------------------------

RAMP = torch.linspace(-1, 1, 17).repeat(4)
TRUTHS = torch.tensor([[20.0, 20, 70, 60], [100, 30, 180, 150]])
CELLS = [(20, 24), (10, 12), (5, 6), (3, 3), (2, 2)]


def priors_of(cells: list[tuple[int, int]]) -> tuple[Tensor, tuple[int, ...]]:
    """GFL's square priors for levels of the strides 8, 16, ..., and their numbers."""
    boxes = [square_priors(*size, 8 * 2**i, torch.device("cpu")) for i, size in enumerate(cells)]
    return torch.cat(boxes), tuple(map(len, boxes))


@pytest.mark.parametrize(("tau", "of_bins", "expected"), [(10, 1, 0.0440843), (10, 17, 0.749433), (1, 17, 0.698832)])
def test_divergence_of_two_ramps(tau: float, of_bins: int, expected: float) -> None:
    sides = of_bins * distribution_divergence(RAMP, -RAMP, tau=tau)
    assert sides.tolist() == pytest.approx([expected] * 4, abs=1e-6)


def test_valuable_region_of_the_example() -> None:
    priors, sizes = priors_of(CELLS)
    torch.testing.assert_close(
        atss_thresholds(priors, sizes, TRUTHS), torch.tensor([0.324808, 0.459024]), atol=1e-6, rtol=0
    )
    regions = [valuable_region(priors, sizes, TRUTHS[i : i + 1]) for i in range(2)]
    assert [int((region > 0).sum()) for region in regions] == [54, 162]
    both = valuable_region(priors, sizes, TRUTHS)
    assert int((both > 0).sum()) == 216 and float(both.sum()) == pytest.approx(60.5866, abs=1e-4)


def test_crossed_classes_of_the_example() -> None:
    student = dense(torch.zeros(1, 3, 1), torch.zeros(1, 3, 4), torch.tensor([[0, -1, -1]]))
    crossed, own = (torch.tensor(row)[None, :, None] for row in ([1.0, -2, 0.5], [0.5, -1, 2]))
    teacher = dense(own, torch.zeros(1, 3, 4))
    for chosen, expected in ((0, 0.0750206), (1, 0.0995478), (2, 0.1378693), (None, 0.3124377)):
        student.assigned = torch.full((1, 3), -2)  # neither: such priors do not count
        student.assigned[0, slice(None) if chosen is None else chosen] = -1
        teacher.cross = lambda tower: dense(crossed, torch.zeros(1, 3, 4))
        found = cross_head_losses(student, teacher, objects(0))["classes"]
        assert found.item() == pytest.approx(expected, abs=1e-6)


def test_general_instances_of_the_example() -> None:
    teacher = [[0.9, 0.1], [0.2, 0.2], [0.6, 0.1], [0.1, 0.7]]
    student = [[0.5, 0.1], [0.1, 0.3], [0.6, 0.2], [0.1, 0.1]]
    apart = torch.arange(4.0)[:, None] * 100 + torch.tensor([0.0, 0, 10, 10])
    ours, theirs = (
        dense(torch.tensor(scores).logit()[None], torch.zeros(1, 4, 4), boxes=apart[None] + shift)
        for scores, shift in ((student, 1), (teacher, 0))
    )
    boxes, scores, at_priors = general_instances(ours, theirs, count=6)
    assert scores[0].tolist() == pytest.approx([0.6, 0.4, 0.1, 0.1, 0, 0])
    assert boxes[0, :2].tolist() == [[300, 300, 310, 310], [0, 0, 10, 10]]
    # from the teacher where it is surer; in the second row the two classes tie
    assert at_priors[0, [0, 2, 3]].tolist() == [apart[0].tolist(), (apart[2] + 1).tolist(), apart[3].tolist()]


def test_overlapping_instances_are_left_out_in_their_own_image_only() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 8, 10, 18]])
    scores = torch.tensor([[0.9, 0.8, 0.7], [0.2, 0.8, 0.1]])[..., None].logit()
    ours = dense(torch.full((2, 3, 1), -50.0), torch.zeros(2, 3, 4), boxes=boxes.expand(2, -1, -1))
    theirs = dense(scores, torch.zeros(2, 3, 4), boxes=boxes.expand(2, -1, -1))
    _, found, _ = general_instances(ours, theirs, count=3)
    assert found[0].tolist() == pytest.approx([0.9, 0.7, 0]) and found[1].tolist() == pytest.approx([0.8, 0.1, 0])


def test_box_weights_of_the_example() -> None:
    targets = Objects([torch.tensor([[0.0, 0, 16, 16], [8, 8, 40, 24]])], [torch.tensor([0, 0])], (64, 64), 1)
    foreground, background = (weight[0] for weight in box_weights(targets, (8, 8)))
    expected = torch.zeros(8, 8)
    expected[1:4, 1:6] = 1 / 15
    expected[:3, :3] = 1 / 9
    torch.testing.assert_close(foreground, expected)
    assert float(foreground.sum()) == pytest.approx(1.733333) and int((background > 0).sum()) == 44
    assert float(background.sum()) == pytest.approx(1)


# ---- Formulas in plain loops ---------------------------------------------------------------------------------------------


def dense(class_logits: Tensor, box_outputs: Tensor, assigned: Tensor | None = None, **fields) -> DenseHead:
    """A raw output at priors of no particular kind."""
    count = class_logits.shape[1]
    boxes = fields.pop("boxes", torch.zeros(len(class_logits), count, 4))
    plain = {"priors": torch.zeros(count, 4), "strides": torch.ones(count), "level_sizes": (count,)}
    return DenseHead(class_logits, box_outputs, lambda: boxes, assigned=assigned, **plain | fields)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def kl(teacher: np.ndarray, student: np.ndarray, tau: float = 1.0) -> float:
    t, s = softmax(teacher / tau), softmax(student / tau)
    return float((t * np.log(t / s)).sum())


def bce(logit: float, target: float) -> float:
    return -target * math.log(sigmoid(logit)) - (1 - target) * math.log(1 - sigmoid(logit))


def iou_giou_diou(a: list[float], b: list[float]) -> tuple[float, float, float]:
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(w, 0) * max(h, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common
    hull = [max(a[2], b[2]) - min(a[0], b[0]), max(a[3], b[3]) - min(a[1], b[1])]
    centres = ((a[0] + a[2] - b[0] - b[2]) / 2) ** 2 + ((a[1] + a[3] - b[1] - b[3]) / 2) ** 2
    iou, area = common / union, hull[0] * hull[1]
    return iou, iou - (area - union) / area, iou - centres / (hull[0] ** 2 + hull[1] ** 2)


def random_boxes(*shape: int, seed: int, size: float = 64) -> Tensor:
    corner = torch.rand(*shape, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * size / 2
    extent = torch.rand(*shape, 2, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64) * size / 2
    return torch.cat([corner, corner + extent + 1], -1)


def test_overlaps_of_boxes() -> None:
    first, second = random_boxes(30, seed=0), random_boxes(30, seed=5)
    found = torch.stack(overlaps(first[:, None], second[None]), -1)
    for i, j in itertools.product(range(30), repeat=2):
        expected = iou_giou_diou(first[i].tolist(), second[j].tolist())
        assert found[i, j].tolist() == pytest.approx(expected, abs=1e-6)


def test_ld_in_loops() -> None:
    priors, sizes = priors_of([(4, 5), (2, 3)])
    truths = [torch.tensor([[4.0, 3, 30, 28]]), torch.tensor([[0.0, 0, 24, 20], [10, 8, 40, 32]])]
    targets = Objects(truths, [torch.tensor([1]), torch.tensor([0, 2])], (32, 40), 3)
    assigned = torch.full((2, 26), -1)
    assigned[0, [3, 7, 22]], assigned[1, [0, 1, 6, 21, 25]] = 0, torch.tensor([0, 0, 1, 0, 1])
    ours, theirs = (
        dense(randn(2, 26, 3, seed=seed), randn(2, 26, 4 * 6, seed=seed + 1), assigned, level_sizes=sizes)
        for seed in (0, 10)
    )
    ours.priors = theirs.priors = priors.double()
    pair = Pair({}, {}, 3, ())
    outputs = [DenseOutput({"stride_8": torch.zeros(1)}, None, dense=head) for head in (ours, theirs)]
    found = LDLoss(pair, temperature=3.0, class_temperature=2.0)(*outputs, targets)

    z, t, d, e = (x.numpy() for x in (ours.class_logits, theirs.class_logits, ours.box_outputs, theirs.box_outputs))
    main = weights = vlr = classes = 0.0
    for b, a in itertools.product(range(2), range(26)):
        sides = [9 * kl(e[b, a].reshape(4, 6)[side], d[b, a].reshape(4, 6)[side], 3) / 6 for side in range(4)]
        if assigned[b, a] >= 0:
            confidence = sigmoid(z[b, a].max())
            main, weights = main + confidence * sum(sides) / 4, weights + confidence
        overlap = 0.0
        for truth in truths[b].tolist():
            threshold = float(atss_thresholds(priors, sizes, torch.tensor([truth]))[0])
            iou, _, diou = iou_giou_diou(priors[a].tolist(), truth)
            if 0.25 * threshold <= diou < threshold:
                overlap = max(overlap, iou)
        vlr += overlap * sum(sides) / 16  # over two images: twice the mean is their sum
    for level in (range(20), range(20, 26)):
        of_level = [
            4 * kl(t[b, a], z[b, a], 2) / 3 for b, a in itertools.product(range(2), level) if assigned[b, a] >= 0
        ]
        classes += sum(of_level) / max(1, len(of_level))
    expected = {"main": main / max(1, weights), "vlr": vlr, "classes": classes}
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("bins", [0, 5])
def test_crosskd_in_loops(bins: int) -> None:
    """A level of 3 x 4 cells with one prior each; the teacher's last layers are 1x1 convolutions."""
    kernel = {"class": randn(3, 2, seed=1), "box": randn(4 * bins or 4, 2, seed=2)}
    base = random_boxes(12, seed=3)

    def head(tower: dict[str, list[Tensor]]) -> DenseHead:
        outputs = [torch.einsum("oc,bchw->bhwo", kernel[side], tower[side][0].relu()).flatten(1, 2) for side in kernel]
        boxes = base + 4 * outputs[1][..., :4].tanh()
        return dense(*outputs, boxes=boxes, tower=tower)

    towers = [{side: [randn(2, 2, 3, 4, seed=seed)] for side, seed in (("class", s), ("box", s + 1))} for s in (5, 8)]
    ours, theirs = map(head, towers)
    theirs.cross = head
    ours.assigned = torch.full((2, 12), -1)
    ours.assigned[0, :3], ours.assigned[1, 4:6], ours.assigned[1, 8] = 0, 1, -2
    mask = torch.ones(2, 24, 32, dtype=torch.bool)
    mask[1, :, 24:] = False  # the last of four columns is padding
    found = cross_head_losses(ours, theirs, objects(1, 1, size=(24, 32), mask=mask))

    inside = np.ones((2, 3, 4), bool)
    inside[1, :, 3] = False
    crossed = {}
    for side in kernel:
        student, teacher = (tower[side][0].numpy() for tower in towers)
        moved = np.empty_like(student)
        for c in range(2):
            s, t = student[:, c][inside], teacher[:, c][inside]
            moved[:, c] = (student[:, c] - s.mean()) / (s.std() + 1e-6) * t.std() + t.mean()
        crossed[side] = [torch.from_numpy(moved)]
    crossed = head(crossed)
    classes = boxes = weights = positives = 0.0
    for b, a in itertools.product(range(2), range(12)):
        positives += int(ours.assigned[b, a] >= 0)
        if ours.assigned[b, a] < -1:
            continue
        p, t = crossed.class_logits[b, a].tolist(), theirs.class_logits[b, a].tolist()
        classes += sum(abs(sigmoid(x) - sigmoid(y)) * bce(x, sigmoid(y)) for x, y in zip(p, t, strict=True))
        weight = max(map(sigmoid, t))
        weights += weight
        if bins:
            d, e = (x.box_outputs[b, a].numpy().reshape(4, bins) for x in (crossed, theirs))
            boxes += weight * sum(kl(e[side], d[side]) for side in range(4))
        else:
            boxes += weight * (1 - iou_giou_diou(crossed.boxes()[b, a].tolist(), theirs.boxes()[b, a].tolist())[1])
    assert found["classes"].item() == pytest.approx(classes / positives, rel=1e-5)
    assert found["boxes"].item() == pytest.approx(boxes / (weights if bins else positives), rel=1e-5)


def bilinear(image: np.ndarray, x: float, y: float) -> np.ndarray:
    """A map `[C, h, w]` at a place in cells, whose centres are at a half; 0 outside."""
    x, y, value = x - 0.5, y - 0.5, np.zeros(len(image))
    for i, j in itertools.product((math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)):
        if 0 <= i < image.shape[1] and 0 <= j < image.shape[2]:
            value += image[:, i, j] * (1 - abs(y - i)) * (1 - abs(x - j))
    return value


def test_pooled_features_in_loops() -> None:
    specs = {"p3": FeatureSpec(2, 8), "p4": FeatureSpec(2, 16)}
    maps = {"p3": randn(1, 2, 32, 40), "p4": randn(1, 2, 16, 20, seed=1)}
    boxes = torch.tensor([[[10.0, 20, 60, 90], [3, 5, 310, 250], [0, 0, 224, 224], [300, 200, 330, 260]]]).double()
    found = pooled(maps, specs, boxes)
    for number, (x0, y0, x1, y1) in enumerate(boxes[0].tolist()):
        level = min(1, max(0, math.floor(math.log2(math.sqrt((x1 - x0) * (y1 - y0)) / 56 + 1e-6)) - 1))
        name, stride = [("p3", 8), ("p4", 16)][level]
        for i, j in itertools.product(range(7), repeat=2):
            place = x0 + (j + 0.5) / 7 * (x1 - x0), y0 + (i + 0.5) / 7 * (y1 - y0)
            expected = bilinear(maps[name][0].numpy(), place[0] / stride, place[1] / stride)
            assert found[0, number, :, i, j].tolist() == pytest.approx(expected.tolist(), rel=1e-5, abs=1e-5), (
                number,
                i,
                j,
            )


def test_gid_in_loops() -> None:
    specs = {"p3": FeatureSpec(3, 8), "p4": FeatureSpec(3, 16)}
    count = 10
    ours, theirs = (
        dense(randn(2, count, 2, seed=s), torch.zeros(2, count, 4), boxes=random_boxes(2, count, seed=s + 5))
        for s in (0, 20)
    )
    maps = [{"p3": randn(2, 3, 8, 8, seed=s), "p4": randn(2, 3, 4, 4, seed=s + 1)} for s in (30, 40)]
    outputs = [DenseOutput(features, None, dense=head) for features, head in zip(maps, (ours, theirs), strict=True)]
    loss = GIDLoss(Pair(specs, specs, 2, ()), num_boxes=10).double()
    found = loss(*outputs, objects(1, 1))

    p, q = (head.class_logits.sigmoid().numpy() for head in (ours, theirs))
    boxes_s, boxes_t = (head.boxes().tolist() for head in (ours, theirs))
    features = relations = responses = chosen_count = pairs = answering = 0.0
    for b in range(2):
        candidates = []
        for a in range(count):
            c = int(np.abs(q[b, a] - p[b, a]).argmax())
            surer = q[b, a, c] > p[b, a, c]
            candidates.append((abs(q[b, a, c] - p[b, a, c]), (boxes_t if surer else boxes_s)[b][a]))
        left, chosen = sorted(candidates, reverse=True), []
        while left and len(chosen) < 10:
            chosen.append(left.pop(0)[1])
            left = [one for one in left if iou_giou_diou(one[1], chosen[-1])[0] <= 0.3]
        k = len(chosen)
        places = torch.tensor(chosen, dtype=torch.float64)[None]
        one = [{name: x[b : b + 1] for name, x in side.items()} for side in maps]
        mine, its = (pooled(side, specs, places)[0].flatten(1).numpy() for side in one)
        features += sum(((mine[i] - its[i]) ** 2).mean() for i in range(k))
        chosen_count += k
        distances = []
        for vectors in (mine, its):
            table = np.array([[math.sqrt(((u - v) ** 2).mean()) for u in vectors] for v in vectors])
            distances.append(table / (table.sum() / (k * (k - 1))) if k > 1 else table)
        difference = np.abs(distances[0] - distances[1])
        relations += np.where(difference < 1, difference**2 / 2, difference - 0.5).sum()
        pairs += k * k
        for a in range(count):
            if any(iou_giou_diou(candidates[a][1], box)[0] >= 0.5 for box in chosen):
                z = ours.class_logits[b, a].tolist()
                responses += sum(bce(x, y) for x, y in zip(z, q[b, a].tolist(), strict=True))
                responses += 1 - iou_giou_diou(boxes_s[b][a], boxes_t[b][a])[1]
                answering += 1
    assert chosen_count < 20 and answering > chosen_count - 1
    expected = {
        "features": features / chosen_count,
        "relations": relations / pairs,
        "responses": responses / answering,
    }
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, rel=1e-4)


def test_distances_of_boxes_that_are_not_there_do_not_count() -> None:
    vectors, real = randn(1, 3, 5), torch.tensor([[1.0, 1.0, 0.0]]).double()
    found = normalised_distances(vectors, real)[0]
    assert found[0, 1].item() == pytest.approx(1) and found[0, 0].item() < 1e-5
    assert normalised_distances(vectors, 0 * real).isfinite().all()


def test_gid_of_final_boxes_in_loops() -> None:
    """Ten boxes of each model; a box's score is the largest difference of what the two say of it."""
    ours, theirs = ((randn(2, 10, 3, seed=s), random_boxes(2, 10, seed=s + 5)) for s in (0, 20))
    boxes, scores = disputed_answers(ours, theirs, 4)
    for b in range(2):
        everything = [box for _, own in (ours, theirs) for box in own[b].tolist()]

        def said(side: tuple[Tensor, Tensor], box: list[float], c: int, b: int = b) -> float:
            near = [k for k, own in enumerate(side[1][b].tolist()) if iou_giou_diou(own, box)[0] >= 0.5]
            return max([sigmoid(float(side[0][b, k, c])) for k in near], default=0.0)

        candidates = [
            (max(abs(said(ours, box, c) - said(theirs, box, c)) for c in range(3)), box) for box in everything
        ]
        left, expected = sorted(candidates, reverse=True), []
        while left and len(expected) < 4:
            expected.append(left.pop(0))
            left = [one for one in left if iou_giou_diou(one[1], expected[-1][1])[0] <= 0.3]
        assert len(expected) >= 3
        for place, (score, box) in enumerate(expected):
            assert scores[b, place].item() == pytest.approx(score, rel=1e-5)
            assert boxes[b, place].tolist() == pytest.approx(box, rel=1e-5)
        assert scores[b, len(expected) :].eq(0).all()
    same, none = disputed_answers(ours, ours, 4)[1], disputed_answers(ours, (ours[0] - 1e4, ours[1]), 4)[1]
    assert same.eq(0).all() and none[:, 0].gt(0).all()


def cxcywh(boxes: Tensor) -> Tensor:
    return torch.cat([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], -1)


def queries(layers: int, count: int, classes: int, seed: int, softmax: bool = False, bins: int = 0) -> Queries:
    boxes = cxcywh(random_boxes(layers, 2, count, seed=seed, size=1.0) / 4)
    corners = randn(layers, 2, count, 4 * bins, seed=seed + 3) if bins else None
    return Queries(2 * randn(layers, 2, count, classes, seed=seed), boxes, softmax, corners)


def corners_of(box: list[float]) -> list[float]:
    x, y, w, h = box
    return [x - w / 2, y - h / 2, x + w / 2, y + h / 2]


def best_matches(
    ours: Queries, theirs: Queries, least: float, layer: int, b: int, valid: np.ndarray | None = None
) -> list[tuple[float, int, int]]:
    """(score, teacher's query, student's query) of the cheapest of all assignments, tried one by one."""
    t = theirs.class_logits[-1, b].numpy()
    scores = [softmax(row)[:-1].max() if ours.softmax else sigmoid(row.max()) for row in t]
    answers = [k for k in sorted(range(len(t)), key=lambda k: -scores[k]) if scores[k] >= least]
    answers = answers[: ours.class_logits.shape[2]]
    z = ours.class_logits[layer, b].numpy()

    def cost(k: int, q: int) -> float:
        if ours.softmax:
            scored = -float((softmax(t[k]) * np.log(softmax(z[q]))).sum())
        else:
            scored = sum(bce(x, sigmoid(y)) for x, y in zip(z[q], t[k], strict=True))
        if valid is not None:
            crossed, dice = mask_distances(ours.masks[layer, b, q], theirs.masks[-1, b, k], valid[b])
            return 2 * scored + 5 * crossed - 5 * dice
        mine, its = ours.boxes[layer, b, q].tolist(), theirs.boxes[-1, b, k].tolist()
        distance = sum(abs(x - y) for x, y in zip(mine, its, strict=True))
        return scored + 5 * distance - 2 * iou_giou_diou(corners_of(mine), corners_of(its))[1]

    best = min(
        itertools.permutations(range(len(z)), len(answers)),
        key=lambda places: sum(cost(k, q) for k, q in zip(answers, places, strict=True)),
    )
    return [(scores[k], k, q) for k, q in zip(answers, best, strict=True)]


@pytest.mark.parametrize("softmax_head", [False, True])
def test_query_kd_in_loops(softmax_head: bool) -> None:
    ours, theirs = queries(2, 5, 3, 0, softmax_head), queries(3, 4, 3, 50, softmax_head)
    found = query_kd_losses(ours, theirs, least_score=0.6)
    sums, weights = {"classes": 0.0, "boxes": 0.0, "giou": 0.0}, 0.0
    for layer, b in itertools.product(range(2), range(2)):
        for score, k, q in best_matches(ours, theirs, 0.6, layer, b):
            weights += score / 2  # once, not for each of the two layers
            z, t = ours.class_logits[layer, b, q].numpy(), theirs.class_logits[-1, b, k].numpy()
            distance = kl(t, z) if softmax_head else sum(bce(x, sigmoid(y)) for x, y in zip(z, t, strict=True))
            mine, its = ours.boxes[layer, b, q].tolist(), theirs.boxes[-1, b, k].tolist()
            sums["classes"] += score * distance
            sums["boxes"] += score * sum(abs(x - y) for x, y in zip(mine, its, strict=True))
            sums["giou"] += score * (1 - iou_giou_diou(corners_of(mine), corners_of(its))[1])
    expected = {name: value / max(1, weights) for name, value in sums.items()}
    assert weights > 1 and {name: value.item() for name, value in found.items()} == pytest.approx(expected, rel=1e-5)


def mask_distances(z: Tensor, t: Tensor, valid: np.ndarray) -> tuple[float, float]:
    """Mean cross-entropy and dice coefficient of two masks `[h, w]` over the valid positions."""
    pairs = [(float(z[place]), sigmoid(float(t[place]))) for place in map(tuple, np.argwhere(valid).tolist())]
    crossed = sum(bce(x, y) for x, y in pairs) / len(pairs)
    shared, both = sum(sigmoid(x) * y for x, y in pairs), sum(sigmoid(x) + y for x, y in pairs)
    return crossed, (2 * shared + 1) / (both + 1)


@pytest.mark.parametrize("softmax_head", [False, True])
def test_query_kd_of_masks_in_loops(softmax_head: bool) -> None:
    ours, theirs = (
        Queries(
            2 * randn(layers, 2, count, 3, seed=seed),
            None,
            softmax_head,
            masks=2 * randn(layers, 2, count, 3, 4, seed=seed + 1),
        )
        for layers, count, seed in ((2, 5, 0), (3, 4, 50))
    )
    valid = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0)) < 0.8
    found = mask_query_kd_losses(ours, theirs, valid, least_score=0.6)
    sums, weights = {"classes": 0.0, "masks": 0.0, "dice": 0.0}, 0.0
    for layer, b in itertools.product(range(2), range(2)):
        for score, k, q in best_matches(ours, theirs, 0.6, layer, b, valid.numpy()):
            weights += score / 2
            z, t = ours.class_logits[layer, b, q].numpy(), theirs.class_logits[-1, b, k].numpy()
            distance = kl(t, z) if softmax_head else sum(bce(x, sigmoid(y)) for x, y in zip(z, t, strict=True))
            crossed, dice = mask_distances(ours.masks[layer, b, q], theirs.masks[-1, b, k], valid[b].numpy())
            sums["classes"] += score * distance
            sums["masks"] += score * crossed
            sums["dice"] += score * (1 - dice)
    expected = {name: value / max(1, weights) for name, value in sums.items()}
    assert weights > 1 and {name: value.item() for name, value in found.items()} == pytest.approx(expected, rel=1e-5)


def test_masks_of_another_resolution_are_compared_on_the_students_grid() -> None:
    theirs = Queries(3 * randn(1, 1, 2, 3, seed=3), None, True, masks=4 * randn(1, 1, 2, 2, 3, seed=4))
    fine = theirs.masks[0].repeat_interleave(2, 2).repeat_interleave(2, 3)
    ours = Queries(theirs.class_logits, None, True, masks=fine[None])
    terms = mask_query_kd_losses(ours, theirs, torch.ones(1, 4, 6, dtype=torch.bool), least_score=1e-6)
    exact = mask_query_kd_losses(ours, ours, torch.ones(1, 4, 6, dtype=torch.bool), least_score=1e-6)
    assert terms["classes"].item() == pytest.approx(0, abs=1e-6) and terms["dice"] < 0.2
    assert exact["masks"] <= terms["masks"]


def test_ddf_in_loops() -> None:
    ours, theirs = queries(2, 5, 3, 0, bins=6), queries(1, 4, 3, 50, bins=6)
    found = ddf_loss(ours, theirs, tau=4.0, least_score=0.6)
    total = count = 0.0
    for layer, b in itertools.product(range(2), range(2)):
        for _, k, q in best_matches(ours, theirs, 0.6, layer, b):
            s, t = ours.corners[layer, b, q].numpy(), theirs.corners[-1, b, k].numpy()
            near = iou_giou_diou(
                corners_of(ours.boxes[layer, b, q].tolist()), corners_of(theirs.boxes[-1, b, k].tolist())
            )[0]
            sides = [16 * kl(t.reshape(4, 6)[i], s.reshape(4, 6)[i], 4) for i in range(4)]
            total, count = total + near * sum(sides) / 4, count + 1 / 2
    assert total > 0 and found.item() == pytest.approx(total / count, rel=1e-5)


def test_a_teacher_has_no_more_answers_than_the_student_has_queries() -> None:
    ours, theirs = queries(1, 3, 2, 0), queries(1, 9, 2, 50)
    answers = teacher_answers(theirs, 1e-6, 3)
    assert answers.weights.shape == (2, 3)
    places = box_costs(ours.boxes[0], answers.of(theirs.boxes))
    for row in match_queries(ours, 0, answers, places).tolist():
        assert sorted(row) == [0, 1, 2]
    nothing = query_kd_losses(ours, theirs, least_score=1.0)
    assert {name: value.item() for name, value in nothing.items()} == {"classes": 0, "boxes": 0, "giou": 0}


def test_other_priors_are_a_clear_error() -> None:
    ours, theirs = (DenseOutput({}, None, dense=dense(torch.zeros(1, n, 1), torch.zeros(1, n, 4))) for n in (3, 4))
    with pytest.raises(ValueError, match=r"have \(3,\) and \(4,\) priors a level.*multiples of 32"):
        heads_of(ours, theirs)


def test_the_response_of_boxes_is_a_weighted_divergence_of_each_class() -> None:
    student, teacher = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    terms = []
    for s, t in zip(student.flatten(0, 1).tolist(), teacher.flatten(0, 1).tolist(), strict=True):
        p, q = ([1 / (1 + math.exp(-x)) for x in row] for row in (t, s))
        terms += [
            max(p) * (a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))) for a, b in zip(p, q, strict=True)
        ]
    assert box_response_loss(student, teacher).item() == pytest.approx(sum(terms) / len(terms))
