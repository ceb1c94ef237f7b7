import numpy as np
import pytest
import torch
from loss_references import halved, randn, random_mask

from hf_bcd.losses import ATLoss, at_loss


def test_golden_value():
    # attention of two positions: the student's 3 and 4, of length 5; the teacher's, of two channels, 4 and 3
    # (0.6 - 0.8)² + (0.8 - 0.6)² = 0.08; with the second position void both are (1, 0)
    student = torch.tensor([[[[3**0.5, -2.0]]]])
    teacher = torch.tensor([[[[2.0, 3**0.5]], [[-2.0, 3**0.5]]]])
    assert at_loss(student, teacher).item() == pytest.approx(0.08, rel=1e-5)
    assert at_loss(student, teacher, mask=torch.tensor([[[True, False]]])).item() == 0


def test_agrees_with_plain_loops():
    student, teacher, mask = randn(2, 3, 8, 6), randn(2, 5, 4, 3, seed=1), random_mask(2, 4, 3)
    s, t = halved((student.numpy() ** 2).mean(1)), (teacher.numpy() ** 2).mean(1)
    distances = []
    for b in range(2):
        valid = [tuple(i) for i in np.argwhere(mask[b].numpy())]
        length_s, length_t = (sum(a[b][i] ** 2 for i in valid) ** 0.5 for a in (s, t))
        distances.append(sum((s[b][i] / length_s - t[b][i] / length_t) ** 2 for i in valid))
    assert at_loss(student, teacher, mask=mask).item() == pytest.approx(np.mean(distances), rel=1e-12)


def test_weighted_value_is_the_official_one_at_its_size():
    student, teacher = randn(2, 3, 64, 128), randn(2, 4, 64, 128, seed=1)
    maps = [x.square().mean(1).flatten(1) for x in (student, teacher)]
    ours, theirs = (x / x.norm(dim=1, keepdim=True) for x in maps)
    official = 1e4 * (ours - theirs).square().mean()
    assert ATLoss.weights["at"] * at_loss(student, teacher).item() == pytest.approx(official.item(), rel=1e-12)


def test_magnitude_does_not_matter():
    student, teacher = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    value = at_loss(student, teacher).item()
    assert value > 0 and at_loss(3 * student, 0.1 * teacher).item() == pytest.approx(value, rel=1e-12)
