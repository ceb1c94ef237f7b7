import numpy as np
import pytest
import torch
from loss_references import randn, random_mask, softmax

from hf_bcd.losses import dist_loss


def test_a_value_by_hand():
    # Two pixels, three classes; columns are pixels.
    p_teacher = torch.tensor([[0.50, 0.25], [0.25, 0.25], [0.25, 0.50]], dtype=torch.float64)
    p_student = torch.tensor([[0.25, 0.25], [0.50, 0.25], [0.25, 0.50]], dtype=torch.float64)
    # inter, pixel 0: centred teacher (2, -1, -1)/12, student (-1, 2, -1)/12: correlation -3/6, distance 1.5;
    #        pixel 1: equal, distance 0. Mean 0.75.
    # intra, class 0: the student is constant, correlation 0, distance 1; class 1: the teacher is, 1; class 2: equal, 0.
    terms = dist_loss(p_student.log().view(1, 3, 1, 2), p_teacher.log().view(1, 3, 1, 2))
    assert terms["inter"].item() == pytest.approx(0.75, rel=1e-6)
    assert terms["intra"].item() == pytest.approx(2 / 3, rel=1e-6)


def distance(u: np.ndarray, v: np.ndarray) -> float:
    u, v = u - u.mean(), v - v.mean()
    return 1 - float(u @ v) / (float(u @ u) ** 0.5 * float(v @ v) ** 0.5 + 1e-8)


def reference(student: np.ndarray, teacher: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    inter, intra = 0.0, 0.0
    for s, t, m in zip(student, teacher, mask, strict=True):
        valid = [(y, x) for y, x in np.ndindex(*m.shape) if m[y, x]]
        p = np.array([softmax(s[:, y, x]) for y, x in valid])
        q = np.array([softmax(t[:, y, x]) for y, x in valid])
        if valid:
            inter += sum(distance(a, b) for a, b in zip(p, q, strict=True)) / len(valid)
        if len(valid) > 1:
            intra += sum(distance(p[:, c], q[:, c]) for c in range(len(s))) / len(s)
    return inter / len(student), intra / len(student)


def test_it_matches_loops():
    student, teacher = randn(4, 5, 3, 4), randn(4, 5, 3, 4, seed=1)
    mask = random_mask(4, 3, 4)
    mask[1] = False
    mask[2] = False
    mask[2, 1, 1] = True  # one pixel correlates with nothing
    terms = dist_loss(student, teacher, mask=mask)
    inter, intra = reference(student.numpy(), teacher.numpy(), mask.numpy())
    assert terms["inter"].item() == pytest.approx(inter, rel=1e-9)
    assert terms["intra"].item() == pytest.approx(intra, rel=1e-9)


def test_what_the_teacher_ranks_alike_costs_nothing():
    # probabilities that differ by a factor and an offset have the same order and correlation 1
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    flatter = 0.4 * p + 0.2
    terms = dist_loss(flatter.log().view(1, 3, 1, 1), p.log().view(1, 3, 1, 1))
    assert terms["inter"].item() == pytest.approx(0, abs=1e-6)
