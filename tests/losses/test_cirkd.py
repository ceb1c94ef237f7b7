"""CIRKD's relations across images, the memories behind them, and both on two ranks."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from loss_references import divergence, outputs_of, pair_of, randn, random_labels, random_mask, softmax

from hf_bcd.losses import CIRKDLoss, cirkd, cirkd_loss, cirkd_memory_loss
from hf_bcd.losses.modules.memory import ClassMemory, spread_positions
from hf_bcd.outputs import DenseOutput, FeatureSpec, LabelMaps


STUDENT, TEACHER = {"stride_8": FeatureSpec(4, 8)}, {"stride_8": FeatureSpec(5, 8)}
NUM_LABELS = 3


def build(**options: Any) -> CIRKDLoss:
    torch.manual_seed(0)
    return CIRKDLoss(pair_of(STUDENT, TEACHER, NUM_LABELS), **options).double()


def batch(seed: int = 0) -> tuple[DenseOutput, DenseOutput, LabelMaps]:
    """Two images whose maps have 4x4 positions, with void in one and without the last class in the other."""
    student, teacher, _ = outputs_of(STUDENT, TEACHER, seed=seed, dtype=torch.float64)
    labels = random_labels(2, 4, 4, num_labels=NUM_LABELS, seed=seed)
    labels[0, :2, 1:] = 255
    labels[1] = labels[1].clamp_max(1)
    return student, teacher, LabelMaps(labels.repeat_interleave(8, 1).repeat_interleave(8, 2), NUM_LABELS)


def unit(x: np.ndarray) -> np.ndarray:
    return x / max(1e-4, math.sqrt((x * x).sum()))  # zeros, of a pixel where every ReLU is off, remain zeros


def relation_row(i: np.ndarray, columns: list[np.ndarray], temperature: float) -> np.ndarray:
    return softmax(np.array([unit(i) @ unit(j) / temperature for j in columns]))


def test_a_value_worked_out_by_hand():
    # two pixels: the teacher's are alike, so its rows are (1/2, 1/2); the student's are orthogonal, cosines 1 and 0, and
    # its rows are softmax(10, 0). KL = ln(e^10 + 1) - 10 / 2 - ln 2 = 4.306898, also for the second row
    student = torch.tensor([[2.0, 0.0], [0.0, 3.0]]).view(1, 2, 1, 2)
    teacher = torch.tensor([[1.0, 5.0]]).view(1, 1, 1, 2)
    assert cirkd_loss(student, teacher, pool=1).item() == pytest.approx(4.306898, rel=1e-6)
    # T = 1: ln(e + 1) - 1/2 - ln 2
    assert cirkd_loss(student, teacher, pool=1, temperature=1).item() == pytest.approx(0.120115, rel=1e-5)
    # a third image of void is a row and a column of zeros: 4.306898 · (2 of 3 rows) · (2 of 3 columns)
    images = (x.expand(3, -1, -1, -1) for x in (student, teacher))
    mask = torch.tensor([True, True, False])[:, None, None].expand(3, 1, 2)
    assert cirkd_loss(*images, pool=1, mask=mask).item() == pytest.approx(4.306898 * 4 / 9, rel=1e-6)


def test_a_relation_to_a_memory_worked_out_by_hand():
    # the student's pixel points to the first vector, the teacher's between both: the row of the test above
    student = torch.tensor([2.0, 0.0]).view(1, 2, 1, 1)
    teacher = torch.tensor([3.0, 3.0]).view(1, 2, 1, 1)
    memory = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    there = torch.tensor([True, True, False])
    assert cirkd_memory_loss(student, teacher, memory, memory_mask=there).item() == pytest.approx(4.306898, rel=1e-6)


def cells(x: np.ndarray, mask: np.ndarray, pool: int) -> list[np.ndarray]:
    """Means over the valid pixels of `pool`-sided cells of `[C, h, w]`, of those cells that have any."""
    _, height, width = x.shape
    found = []
    for top in range(0, height, pool):
        for left in range(0, width, pool):
            pixels = [
                x[:, y, u]
                for y in range(top, min(top + pool, height))
                for u in range(left, min(left + pool, width))
                if mask[y, u]
            ]
            if pixels:
                found.append(sum(pixels) / len(pixels))
    return found


@pytest.mark.parametrize("pool", [1, 2])
def test_the_batch_relation_is_the_formula(pool):
    student, teacher, mask = randn(3, 4, 5, 4), randn(3, 6, 5, 4, seed=1), random_mask(3, 5, 4, share=0.5)
    mask[1] = False
    ours, theirs = (
        [cells(a.numpy(), m.numpy(), pool) for a, m in zip(x, mask, strict=True)] for x in (student, teacher)
    )
    total = 0.0
    for a in range(3):
        for b in range(3):
            if ours[a] and ours[b]:
                rows = [
                    divergence(relation_row(t, theirs[b], 0.2), relation_row(s, ours[b], 0.2))
                    for s, t in zip(ours[a], theirs[a], strict=True)
                ]
                total += sum(rows) / len(rows) / 9
    assert cirkd_loss(student, teacher, temperature=0.2, pool=pool, mask=mask).item() == pytest.approx(total, rel=1e-9)


def head(loss: CIRKDLoss, x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The student's features `[B, C, h, w]` behind two 1x1 convolutions with a normalisation and a ReLU between."""
    first, second = (w.detach().numpy()[:, :, 0, 0] for w in (loss.head.first.weight, loss.head.second.weight))
    x = np.einsum("dc,bchw->bdhw", first, x)
    for channel in range(x.shape[1]):
        valid = x[:, channel][mask]
        x[:, channel] = (x[:, channel] - valid.mean()) / (math.sqrt(valid.var()) + 1e-5)
    return np.einsum("dc,bchw->bdhw", second, x.clip(min=0))


def test_terms_of_a_step_are_the_formulas():
    loss = build()
    (_, seen, seen_targets), (student, teacher, targets) = batch(seed=3), batch()
    seen_targets.ids[seen_targets.ids == 1] = 2  # of class 1, nothing is remembered
    first = loss(batch(seed=3)[0], seen, seen_targets)
    assert first["memory_pixel"].item() == first["memory_region"].item() == 0
    loss.after_step()
    terms = loss(student, teacher, targets)

    pixels, regions = [], []  # the images have so few pixels that all are remembered, and all are sampled
    for image, classes in zip(
        seen.features["stride_8"].detach().numpy(), seen_targets.ids[:, ::8, ::8].numpy(), strict=True
    ):
        for k in range(NUM_LABELS):
            own = [unit(image[:, y, x]) for y, x in zip(*np.nonzero(classes == k), strict=True)]
            pixels += own
            regions += [unit(np.mean(own, axis=0))] if own else []
    mask = targets.ids[:, ::8, ::8].numpy() != 255
    ours = head(loss, student.features["stride_8"].detach().numpy(), mask)
    theirs = teacher.features["stride_8"].detach().numpy()
    for term, memory in (("memory_pixel", pixels), ("memory_region", regions)):
        means = []
        for image in range(2):
            rows = [
                divergence(*(relation_row(f[image, :, y, x], memory, 0.1) for f in (theirs, ours)))
                for y, x in zip(*np.nonzero(mask[image]), strict=True)
            ]
            means.append(sum(rows) / len(rows))
        assert terms[term].item() == pytest.approx(sum(means) / 2, rel=1e-6), term


@pytest.mark.parametrize(("stride", "pool"), [(4, 1), (8, 1), (16, 2), (32, 4)])
def test_images_are_related_on_the_grid_that_is_asked_for(stride, pool):
    loss, (student, teacher, targets) = build(stride=stride), batch()
    features, mask = (student.features["stride_8"], teacher.features["stride_8"]), targets.ids[:, ::8, ::8] != 255
    found = loss(student, teacher, targets)["batch_pixel"]
    assert found.item() == cirkd_loss(*features, pool=pool, mask=mask).item()
    assert (found > 0) == (pool < 4)  # one cell alone relates to itself alike


def test_positions_are_spread_evenly_over_a_class():
    # class 0 has positions 0, 2, 3, 5, 6, of which the 1st and the (1 + 5 // 2)th are taken; class 1 has 1 and 4
    labels = torch.tensor([[0, 1, 0, 0, 1, 0, 0, 255]])
    classes = labels[:, None] == torch.arange(3)[:, None]
    positions, counts = spread_positions(classes, 2)
    assert positions[0, :2].tolist() == [[0, 3], [1, 4]] and counts.tolist() == [[2, 2, 0]]
    positions, counts = spread_positions(classes, 4)  # ranks 0, 5 // 4, 10 // 4, 15 // 4
    assert positions[0, 0].tolist() == [0, 2, 3, 5] and positions[0, 1, :2].tolist() == [1, 4]
    assert counts.tolist() == [[4, 2, 0]]


def test_the_latest_vectors_overwrite_the_oldest():
    memory = ClassMemory(num_labels=2, size=3, channels=1)
    # two images; of class 0 they have two vectors each, of class 1 none and one
    memory.observe(torch.tensor([[[1, 2], [9, 9]], [[3, 4], [5, 9]]])[..., None], torch.tensor([[2, 0], [2, 1]]))
    assert not memory.entries.any()  # not before the step ends
    memory.update()
    assert memory.entries[..., 0].tolist() == [[4, 2, 3], [5, 0, 0]]
    assert memory.filled.tolist() == [3, 1] and memory.pointer.tolist() == [1, 1]
    memory.update()
    assert memory.pointer.tolist() == [1, 1]  # nothing is inserted twice
    with pytest.raises(ValueError, match="4 vectors .* 3 entries"):
        memory.observe(torch.zeros(1, 2, 4, 1), torch.zeros(1, 2))


def test_samples_are_spread_and_distinct():
    memory = ClassMemory(num_labels=3, size=8, channels=1)
    memory.entries[:, :, 0] = torch.arange(8)
    memory.filled.copy_(torch.tensor([8, 5, 0]))
    vectors, there = memory.sample(2, torch.tensor([0.5]))
    # 8 entries: from 4 in steps of 4; 5 entries: from 2 in steps of 2
    assert vectors[:4, 0].tolist() == [4, 0, 2, 4] and there.tolist() == [True] * 4 + [False] * 2
    vectors, there = memory.sample(8, torch.tensor([0.99]))
    assert sorted(vectors[there][:, 0].tolist()) == sorted([*range(8), *range(5)])


def test_samples_move_on():
    loss, (student, teacher, targets) = build(), batch()
    loss.samples = (3, 3)  # two of each class
    loss(student, teacher, targets)
    loss.after_step()
    first, again = (loss(student, teacher, targets)["memory_pixel"].item() for _ in range(2))
    loss.noise.advance()
    assert first == again != loss(student, teacher, targets)["memory_pixel"].item()


def test_the_memory_keeps_its_bounds():
    small = build()
    assert (small.pixels.size, small.regions.size) == (20_000, 2_000)
    wide = CIRKDLoss(pair_of(STUDENT, {"stride_8": FeatureSpec(512, 8)}, 19))
    # 256 MiB / (19 · 512 · 4 bytes · 22,000) = 0.3136
    assert (wide.pixels.size, wide.regions.size) == (6271, 627)
    num_bytes = sum(x.numel() * 4 for name, x in wide.state_dict().items() if "entries" in name)
    assert 255 * 2**20 < num_bytes <= 256 * 2**20


def test_an_evaluation_leaves_nothing_behind():
    loss = build().eval()
    loss(*batch())
    loss.after_step()
    assert not loss.pixels.filled.any() and not loss.regions.filled.any()


def test_blocks_bound_the_memory_and_change_nothing(monkeypatch):
    teacher, found = randn(2, 3, 16, 16, seed=1), []
    for block_bytes in (cirkd.BLOCK_BYTES, 40 * 8 * 512):  # blocks of 40 rows of 512 similarities in float64
        monkeypatch.setattr(cirkd, "BLOCK_BYTES", block_bytes)
        student, saved = randn(2, 4, 16, 16).requires_grad_(), []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x
        ):
            value = cirkd_loss(student, teacher, pool=1)
        assert max(saved) < 512 * 512 / 10
        value.backward()
        found.append((value.detach(), student.grad))
    torch.testing.assert_close(*found)


def test_batches_of_unequal_size_are_refused():
    with pytest.raises(ValueError, match=r"student \(2, 4, 4, 4\) and teacher \(3, 4, 4, 4\) must agree in batch\."):
        cirkd_loss(randn(2, 4, 4, 4), randn(3, 4, 4, 4))
