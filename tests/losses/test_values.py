"""Values of losses with a short formula: worked out by hand, and against NumPy on the valid positions of each image."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loss_references import (
    Operators,
    divergence,
    halved,
    outputs_of,
    pair_of,
    randn,
    random_labels,
    random_mask,
    softmax,
)
from torch import Tensor, nn

from hf_bcd import losses
from hf_bcd.outputs import FeatureSpec, LabelMaps


def row(*channels: list[float]) -> Tensor:
    """`[1, C, 1, w]` of the values of each channel at a row of positions."""
    return torch.tensor(channels, dtype=torch.float64)[None, :, None]


def pixel(*channels: float) -> Tensor:
    return row(*([value] for value in channels))


def halves(x: Tensor) -> Tensor:
    """An MLP to twice the channels: the positive and the negative part."""
    return torch.cat([x.relu(), (-x).relu()], dim=1)


def box(x: Tensor) -> Tensor:
    """The sum over 3 x 3 neighbours of all channels, as a generator."""
    return F.conv2d(x, x.new_ones(x.shape[1], x.shape[1], 3, 3), padding=1)


FIRST = torch.tensor([[[True, False]]])
LOG2, LOG3, LOG4, E = math.log(2), math.log(3), math.log(4), math.e
# of KD and DKD; the true class comes first
SCORES = pixel(0, 0, LOG2), pixel(LOG2, 0, 0)
# of DIST, at two pixels: inter: at the first, the centred teacher (2, -1, -1) / 12 and student (-1, 2, -1) / 12 have the
# correlation -3 / 6, a distance of 1.5; the second is equal: 0. intra: of class 0 the student is constant, correlation 0,
# distance 1; of class 1 the teacher is, 1; class 2 is equal, 0
CORRELATED = row([0.25, 0.25], [0.5, 0.25], [0.25, 0.5]).log(), row([0.5, 0.25], [0.25, 0.25], [0.25, 0.5]).log()
# of C2VKD, at two positions: of length 1 and centred, the teacher is (1, -1) / 2 and (-1, 1) / 2, the student twice
# (1, -1) / 2. Divided by C - 1 = 1, products are 1/2 on the diagonal of both; off it -1/2 and 1/2: a squared difference
# of 1 in two of four pairs. The features agree at the first; at the second, softmaxes are (1, e) and (e³, 1) over their sums
TURNED = row([1, 3], [0, 0]), row([1, 0], [0, 1])
# of PKD, two images: (0, 0), (2, 2) becomes (-1, -1), (1, 1) and (3, 5), (3, 5) becomes (-1, 1), (-1, 1): squared
# differences 0, 4, 4, 0, half their mean is 1 = 1 - r with r = 0. Without the second position the teacher's are zeros: 1/2
STANDARDISED = torch.cat([row([0, 0]), row([2, 2])]), row([3, 5]).expand(2, -1, -1, -1)
# of the task: log 2, then log(1 + e²), then void
TASK = row([0, 2, 9], [0, 0, -9])
BY_HAND = {
    # attention of two positions: the student's 3 and 4, of length 5; the teacher's, of two channels, 4 and 3
    # (0.6 - 0.8)² + (0.8 - 0.6)² = 0.08; with the second position void both are (1, 0)
    "at": (lambda: losses.at_loss(row([3**0.5, -2]), row([2, 3**0.5], [-2, 3**0.5])), 0.08),
    "at, one position": (lambda: losses.at_loss(row([3**0.5, -2]), row([2, 3], [-2, 3]), mask=FIRST), 0),
    "c2vkd covariance": (lambda: losses.c2vkd_feature_loss(*TURNED)["covariance"], 0.5),
    "c2vkd features": (
        lambda: losses.c2vkd_feature_loss(*TURNED)["features"],
        divergence(np.array([1, E]) / (1 + E), np.array([E**3, 1]) / (1 + E**3)) / 2 / 2,
    ),
    # the student's classes are equally probable everywhere: cosine 1; the teacher's are (0.8, 0.2) and (0.2, 0.8) at
    # temperature 2: cosine 0.32 / 0.68 = 8 / 17; of the four pairs of classes two differ, by 9 / 17
    "category": (
        lambda: losses.category_similarity_loss(row([0, 0], [0, 0]), row([2 * LOG4, 0], [0, 2 * LOG4]), temperature=2),
        (9 / 17) ** 2 / 2,
    ),
    # positions of a channel: (3/4, 1/4) against (1/2, 1/2), at T = 2 four times as much
    "cwd": (lambda: losses.cwd_loss(row([0, 0]), row([2 * LOG3, 0]), temperature=2), 4 * (3 / 4 * LOG3 - LOG2)),
    # 3 and -2 become (3, 0) and (0, 2); minus (1, 1) and (0, 0): squared lengths 5 and 4, mean 4.5
    "cwt": (lambda: losses.cwt_loss(row([3, -2]), row([1, 0], [1, 0]), halves), 4.5),
    "cwt, one position": (lambda: losses.cwt_loss(row([3, -2]), row([1, 0], [1, 0]), halves, mask=FIRST), 5),
    "dist inter": (lambda: losses.dist_loss(*CORRELATED)["inter"], 0.75),
    "dist intra": (lambda: losses.dist_loss(*CORRELATED)["intra"], 2 / 3),
    # probabilities that differ by a factor and an offset have the same order and correlation 1
    "dist, alike": (lambda: losses.dist_loss(pixel(0.4, 0.32, 0.28).log(), pixel(0.5, 0.3, 0.2).log())["inter"], 0),
    # teacher (1/2, 1/4, 1/4), student (1/4, 1/4, 1/2): (1/2, 1/2) against (1/4, 3/4); then against (1/3, 2/3)
    "dkd target": (lambda: losses.dkd_loss(*SCORES, pixel(1, 0, 0))["target"], 0.5 * LOG2 + 0.5 * math.log(2 / 3)),
    "dkd others": (lambda: losses.dkd_loss(*SCORES, pixel(1, 0, 0))["others"], 0.5 * math.log(9 / 8)),
    "kd": (lambda: losses.kd_loss(*SCORES), 0.25 * LOG2),
    # differences (1, 3) and (0, 2) of two channels at two positions: squares 1, 9, 0, 4, mean 3.5; of the first 5
    "fitnet": (lambda: losses.fitnet_loss(row([2, 5], [3, 1]), row([1, 5], [0, -1])), 3.5),
    "fitnet, one position": (lambda: losses.fitnet_loss(row([2, 5], [3, 1]), row([1, 5], [0, -1]), mask=FIRST), 5),
    # projections (6, -5) and (0, 8): (6, 0) and (0, 8) after the ReLU, mean (3, 4) of length 5, cosine 0.6 with (1, 0)
    "ifd": (lambda: losses.ifd_loss(torch.stack([pixel(6, -5), pixel(0, 8)], dim=1), pixel(1, 0)), 0.4),
    "ifd, opposite": (lambda: losses.ifd_loss(torch.stack([pixel(6, -5), pixel(0, 8)], dim=1), pixel(-1, 0)), 1.6),
    # of 1, 2, 4 the second is masked and the third void, so the generator sees 1, 0, 0 and gives 1, 1, 0
    # minus 0, 3, anything: squares 1 and 4 at the two valid positions, mean 2.5
    "mgd": (
        lambda: losses.mgd_loss(
            row([1, 2, 4]), row([0, 3, 100]), box,
            keep=torch.tensor([[True, False, True]]), mask=torch.tensor([[[True, True, False]]]),
        ),
        2.5,
    ),
    "pkd": (lambda: losses.pkd_loss(*STANDARDISED), 1),
    "pkd, one position": (lambda: losses.pkd_loss(*STANDARDISED, mask=FIRST.expand(2, -1, -1)), 0.5),
    "task": (lambda: losses.segmentation_loss(TASK, torch.tensor([[[0, 1, 255]]])), (LOG2 + math.log(1 + E**2)) / 2),
    "task, another divisor": (
        lambda: losses.segmentation_loss(TASK, torch.tensor([[[0, 1, 7]]]), ignore_index=7, num_valid=torch.tensor(8)),
        (LOG2 + math.log(1 + E**2)) / 8,
    ),
    # (0, 4) at width 2 becomes (0, 1, 3, 4) at width 4
    "task, up-sampled": (
        lambda: losses.segmentation_loss(row([0, 4], [0, 0]), torch.zeros(1, 1, 4).long()),
        sum(math.log(1 + math.exp(-x)) for x in (0, 1, 3, 4)) / 4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_a_value_by_hand(name):
    value, expected = BY_HAND[name]
    assert value().item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).sum(axis=0))


def softmaxes(x: np.ndarray, tau: float = 1) -> list[np.ndarray]:
    return [softmax(row / tau) for row in x]


def divergences(s: np.ndarray, t: np.ndarray, tau: float) -> list[float]:
    return [tau**2 * divergence(*pair) for pair in zip(softmaxes(t, tau), softmaxes(s, tau), strict=True)]


def category_cosines(x: np.ndarray) -> np.ndarray:
    p = unit(np.stack(softmaxes(x, 4)))
    return p.T @ p


def distance(u: np.ndarray, v: np.ndarray) -> float:
    u, v = u - u.mean(), v - v.mean()
    return 1 - u @ v / (math.sqrt(u @ u) * math.sqrt(v @ v) + 1e-8)


def distances(p: list[np.ndarray], q: list[np.ndarray]) -> float:
    return sum(distance(u, v) for u, v in zip(p, q, strict=True)) / len(p)


def intra(s: np.ndarray, t: np.ndarray) -> float:
    return distances(list(np.stack(softmaxes(s)).T), list(np.stack(softmaxes(t)).T)) if len(s) > 1 else 0


# channels of student and teacher, the loss, a map of the student's at its own resolution, and the loss of one image from
# its valid positions `[n, C]`
FORMULAS = {
    "at": (
        (3, 5), losses.at_loss, lambda s: (s**2).mean(axis=1, keepdims=True),
        lambda s, t: sum((unit(s[:, 0]) - unit((t**2).mean(axis=1))) ** 2),
    ),
    "c2vkd features": ((5, 5), lambda *given, **options: losses.c2vkd_feature_loss(*given, **options)["features"], None, lambda s, t: np.mean(divergences(s, t, 1)) / 5),
    "category": ((3, 3), losses.category_similarity_loss, None, lambda s, t: np.mean((category_cosines(s) - category_cosines(t)) ** 2)),
    "cwd": ((3, 3), partial(losses.cwd_loss, temperature=2), None, lambda s, t: np.mean(divergences(s.T, t.T, 2))),
    "cwt": (
        (3, 6), partial(losses.cwt_loss, transform=halves), lambda s: np.concatenate([s.clip(0), (-s).clip(0)], axis=1),
        lambda s, t: np.mean(((s - t) ** 2).sum(axis=1)),
    ),
    "dist inter": ((5, 5), lambda *given, **options: losses.dist_loss(*given, **options)["inter"], None, lambda s, t: distances(softmaxes(s), softmaxes(t))),
    "dist intra": ((5, 5), lambda *given, **options: losses.dist_loss(*given, **options)["intra"], None, intra),
    "fitnet": ((3, 3), losses.fitnet_loss, None, lambda s, t: np.mean((s - t) ** 2)),
    "ifd": (
        (8, 4), lambda s, t, **options: losses.ifd_loss(s.unflatten(1, (2, 4)), t, **options),
        lambda s: s.clip(0).reshape(len(s), 2, 4, *s.shape[2:]).mean(axis=1),
        lambda s, t: np.mean(1 - (unit(s.T) * unit(t.T)).sum(axis=0)),
    ),
    "kd": ((4, 4), partial(losses.kd_loss, temperature=3), None, lambda s, t: np.mean(divergences(s, t, 3))),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMULAS)
def test_it_is_a_mean_over_images_of_the_formula(name):
    (ours, theirs), loss, before, of_image = FORMULAS[name]
    student, teacher, mask = 2 * randn(4, ours, 8, 6), 2 * randn(4, theirs, 4, 3, seed=1), random_mask(4, 4, 3)
    mask[1, 1:], mask[2], mask[3] = False, False, False
    mask[3, 1, 1] = True  # images count alike, however few valid positions they have
    s = halved(before(student.numpy()) if before else student.numpy()).transpose(0, 2, 3, 1)
    t, valid = teacher.numpy().transpose(0, 2, 3, 1), mask.numpy()
    expected = [of_image(s[b][valid[b]], t[b][valid[b]]) if valid[b].any() else 0 for b in range(4)]
    assert expected[0] > 1e-3
    assert loss(student, teacher, mask=mask).item() == pytest.approx(np.mean(expected), rel=1e-9)


def test_pkd_agrees_with_plain_loops():
    student, teacher, mask = 3 * randn(2, 3, 8, 6) + 2, randn(2, 3, 4, 3, seed=1), random_mask(2, 4, 3)
    mask[1, 1:] = False
    valid, normed = mask.numpy(), []
    for x in (halved(student.numpy()), teacher.numpy()):
        values = [x[:, c][valid] for c in range(3)]  # of both images
        normed.append(np.stack([(x[:, c] - v.mean()) / (v.std() + 1e-6) for c, v in enumerate(values)], axis=-1))
    expected = 0.5 * np.mean([((normed[0][b] - normed[1][b])[valid[b]] ** 2).mean() for b in range(2)])
    assert losses.pkd_loss(student, teacher, mask=mask).item() == pytest.approx(expected, rel=1e-12)


def test_mgd_agrees_with_plain_loops():
    student, teacher, mask = randn(2, 2, 8, 6), randn(2, 2, 4, 3, seed=1), random_mask(2, 4, 3)
    mask[1, 2:] = False
    keep = random_mask(4, 3, seed=1)
    s, t, images = halved(student.numpy()), teacher.numpy(), []
    for b in range(2):
        seen = s[b] * (keep & mask[b]).numpy()
        errors = []
        for y, x in np.argwhere(mask[b].numpy()):
            around = [(v, u) for v in range(y - 1, y + 2) for u in range(x - 1, x + 2) if 0 <= v < 4 and 0 <= u < 3]
            generated = sum(seen[c, v, u] for c in range(2) for v, u in around)
            errors.append(sum((generated - t[b, c, y, x]) ** 2 for c in range(2)))
        images.append(np.mean(errors))
    value = losses.mgd_loss(student, teacher, box, keep=keep, mask=mask)
    assert value.item() == pytest.approx(np.mean(images), rel=1e-12)


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_dkd_agrees_with_plain_loops(tau):
    labels = random_labels(3, 8, 8, num_labels=4)
    labels[0, 2:5] = 255
    labels[1] = 255
    student, teacher = 2 * randn(3, 4, 4, 4), 2 * randn(3, 4, 4, 4, seed=1)
    target, others = 0.0, 0.0
    for s, t, label in zip(student.numpy(), teacher.numpy(), labels.numpy(), strict=True):
        valid = [(y, x) for y, x in np.ndindex(4, 4) if label[2 * y + 1, 2 * x + 1] != 255]
        for y, x in valid:
            true = label[2 * y + 1, 2 * x + 1]
            p, q = softmax(t[:, y, x] / tau), softmax(s[:, y, x] / tau)
            target += tau**2 * divergence(*(np.array([r[true], 1 - r[true]]) for r in (p, q))) / len(valid) / 3
            p, q = (np.delete(r, true) / np.delete(r, true).sum() for r in (p, q))
            others += tau**2 * divergence(p, q) / len(valid) / 3
    targets = LabelMaps(labels, 4)
    terms = losses.dkd_loss(student, teacher, targets.class_masks((4, 4)), temperature=tau, mask=targets.valid((4, 4)))
    assert {term: value.item() for term, value in terms.items()} == pytest.approx(
        {"target": target, "others": others}, rel=1e-9
    )


def test_c2vkd_compares_pairs_of_positions_across_images_without_their_memory():
    student, teacher, mask = randn(3, 5, 2, 3), randn(3, 5, 2, 3, seed=1), random_mask(3, 2, 3)
    mask[1] = False
    rows = []
    for b, y, x in np.argwhere(mask.numpy()):
        vectors = [unit(z.numpy()[b, :, y, x]) for z in (student, teacher)]
        rows.append([v - v.mean() for v in vectors])
    squares = [(a[0] @ b[0] / 4 - a[1] @ b[1] / 4) ** 2 for a in rows for b in rows]
    covariance = losses.c2vkd_feature_loss(student, teacher, mask=mask)["covariance"]
    assert covariance.item() == pytest.approx(np.mean(squares), rel=1e-9)
    student, teacher = randn(2, 4, 32, 32).requires_grad_(), randn(2, 4, 32, 32, seed=1)
    with Operators() as seen:
        losses.c2vkd_feature_loss(student, teacher)["covariance"].backward()
    assert seen.largest == student.numel()  # not (2 · 32 · 32)²


def test_weighted_values_are_the_official_ones_at_their_size():
    student, teacher = randn(2, 3, 64, 128), randn(2, 4, 64, 128, seed=1)
    ours, theirs = (F.normalize(x.square().mean(1).flatten(1)) for x in (student, teacher))
    value = losses.ATLoss.weights["at"] * losses.at_loss(student, teacher)
    assert value.item() == pytest.approx(1e4 * (ours - theirs).square().mean().item(), rel=1e-12)
    student, teacher = ([randn(2, 3, 64, 128, seed=seed + i) for i in range(2)] for seed in (0, 10))
    value = losses.pixel_similarity_loss(student, teacher, mask=torch.ones(2, 64, 128, dtype=torch.bool))
    maps = ([F.normalize(x.square().mean(1).flatten(1)) for x in levels] for levels in (student, teacher))
    ours, theirs = (F.normalize(second - first) for first, second in maps)
    official = 1000 * (ours - theirs).square().mean()
    assert losses.DSDLoss.weights["pixel"] * value.item() == pytest.approx(official.item(), rel=1e-12)
    student, teacher, keep = randn(2, 2, 64, 64), randn(2, 2, 64, 64, seed=1), random_mask(64, 64, share=0.25)
    official = 2e-5 * (box(student * keep) - teacher).square().sum() / 2
    value = 0.08192 * losses.mgd_loss(student, teacher, box, keep=keep)
    assert value.item() == pytest.approx(official.item(), rel=1e-12)


def test_parts_of_a_batch_with_a_common_divisor_add_up_to_the_task_loss():
    logits, labels = randn(2, 3, 4, 4, dtype=torch.float32).requires_grad_(), random_labels(2, 8, 8, num_labels=3)
    labels[0, :6] = 255
    num_valid, whole = (labels != 255).sum(), losses.segmentation_loss(logits, labels)
    parts = [losses.segmentation_loss(logits[i : i + 1], labels[i : i + 1], num_valid=num_valid) for i in range(2)]
    assert torch.stack(parts).sum().item() == pytest.approx(whole.item(), rel=1e-6)
    void = losses.segmentation_loss(logits, torch.full_like(labels, 255))
    void.backward()
    assert void.item() == 0 and logits.grad is not None and not logits.grad.any()


# ---- modules -------------------------------------------------------------------------------------------------------

STUDENT, TEACHER = {"stride_4": FeatureSpec(3, 4), "stride_8": FeatureSpec(5, 8)}, {"stride_4": FeatureSpec(4, 4)}


def through(x: Tensor, layer: nn.Module) -> Tensor:
    return F.conv2d(x, layer.weight, layer.bias)  # type: ignore[arg-type]


def projections(module: losses.IFDLoss, x: Tensor) -> Tensor:
    (first, first_bias), (second, second_bias) = zip(
        *(x.split(4) for x in module.projection.parameters()), strict=True
    )
    assert not torch.equal(first, second)
    return torch.stack([F.conv2d(x, first, first_bias), F.conv2d(x, second, second_bias)], dim=1)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("cwt", {}, lambda m, s, t: losses.cwt_loss(s, t, lambda x: through(through(x, m.transform[0]).relu(), m.transform[2]))),
        ("fitnet", {"level": "stride_4"}, lambda m, s, t: (through(s, m.pair.projection) - t).square().mean()),
        ("ifd", {"projectors": 2}, lambda m, s, t: losses.ifd_loss(projections(m, s), t)),
        ("mgd", {"masked": 0}, lambda m, s, t: (m.generator(through(s, m.pair.projection)) - t).square().sum(1).mean()),
    ],
)  # fmt: skip
def test_modules_bring_a_level_to_the_teachers_channels(name, options, expected):
    student, teacher, targets = outputs_of(STUDENT, TEACHER)
    module = losses.LOSSES[name](pair_of(STUDENT, TEACHER), **options)
    assert name != "cwt" or module.transform[0].out_channels == 4  # as wide as the teacher
    value = module(student, teacher, targets)[name]
    wanted = expected(module, student.features["stride_4"], teacher.features["stride_4"])
    assert value.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_mgds_generator_sees_a_quarter_of_the_positions_and_others_at_each_step():
    loss = losses.MGDLoss(pair_of(STUDENT, TEACHER, seed=1))
    seen = []
    loss.generator.register_forward_hook(lambda module, given, output: seen.append(given[0].abs().sum(1) > 0))
    student, teacher, targets = outputs_of(STUDENT, TEACHER, size=128)
    for _ in range(2):
        loss(student, teacher, targets)
        loss.after_step()
    (first, same), (second, _) = seen
    assert torch.equal(first, same) and not torch.equal(first, second)
    assert all(0.2 < x.float().mean() < 0.3 for x in (first, second))
