import loss_references as reference
import numpy as np
import pytest
import torch
from loss_references import randn, random_mask

from hf_bcd.losses import relation_divergence


def inputs(batch: int = 3, n: int = 7, student: int = 4, teacher: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    return randn(batch, n, student, seed=1), randn(batch, n, teacher, seed=2)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tau", [1.0, 2.3])
def test_divergence_and_peak_equal_plain_loops(masked, tau):
    student, teacher = inputs()
    mask = random_mask(3, 7) if masked else torch.ones(3, 7, dtype=torch.bool)
    if masked:
        mask[1] = False
        mask[2] = torch.arange(7) == 3  # a single valid position has no other one to relate to
    result = relation_divergence(student, teacher, tau=torch.tensor(tau), mask=mask if masked else None)
    for b in range(3):
        divergence, peak = reference.relation(student[b].numpy(), teacher[b].numpy(), mask[b].numpy(), tau)
        assert result.divergence[b].item() == pytest.approx(divergence, rel=1e-6, abs=1e-12)
        assert result.peak[b].item() == pytest.approx(peak, rel=1e-6, abs=1e-12)


def test_gradient_has_the_closed_form_q_minus_p():
    """With G = x xᵀ: d KL / d G = (q - p) / (n·tau), hence d KL / d x = (A + Aᵀ) x."""
    student, teacher = inputs(batch=1)
    student.requires_grad_()
    tau, n = 1.7, 7
    divergence = relation_divergence(student, teacher, tau=tau).divergence
    (actual,) = torch.autograd.grad(divergence.sum(), student)

    x, a = student[0].detach().numpy(), np.zeros((n, n))
    p = reference.relation_rows(teacher[0].numpy(), list(range(n)), tau)
    q = reference.relation_rows(x, list(range(n)), tau)
    for i in range(n):
        others = [j for j in range(n) if j != i]
        a[i, others] = (q[i] - p[i]) / (n * tau)
    torch.testing.assert_close(actual[0], torch.from_numpy((a + a.T) @ x), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(masked):
    student, teacher = inputs(batch=2, n=4)
    mask = torch.tensor([[True, True, False, True], [False, False, True, False]]) if masked else None
    student.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: relation_divergence(s, teacher, tau=1.3, mask=mask).divergence, student, atol=1e-6
    )


def test_masked_positions_equal_absent_positions():
    student, teacher = inputs()
    mask = torch.tensor([True, False, True, True, False, True, True]).expand(3, 7)
    kept = relation_divergence(student[:, mask[0]], teacher[:, mask[0]])
    masked = relation_divergence(student, teacher, mask=mask)
    torch.testing.assert_close(masked.divergence, kept.divergence)
    torch.testing.assert_close(masked.peak, kept.peak)


def test_equal_relations_give_zero_with_zero_gradient():
    student, _ = inputs()
    student.requires_grad_()
    divergence = relation_divergence(student, student.detach().clone()).divergence
    (grad,) = torch.autograd.grad(divergence.sum(), student)
    assert divergence.abs().max() < 1e-12
    assert grad.abs().max() < 1e-12


def test_invariant_to_an_orthogonal_rotation_of_the_channels():
    student, teacher = inputs()
    rotation = torch.linalg.qr(randn(4, 4, seed=5)).Q
    rotated = relation_divergence(student @ rotation, teacher).divergence
    torch.testing.assert_close(rotated, relation_divergence(student, teacher).divergence, rtol=1e-9, atol=0)


def test_the_diagonal_does_not_count():
    """Two orthogonal directions, huge self-relation: with the diagonal every row would be one-hot."""
    x = torch.eye(4, dtype=torch.float64)[None] * 100
    result = relation_divergence(x, x)
    assert result.peak.item() == pytest.approx(1 / 3, rel=1e-9)


def test_peak_carries_no_gradient_and_the_teacher_none():
    student, teacher = (x.requires_grad_() for x in inputs())
    result = relation_divergence(student, teacher)
    assert not result.peak.requires_grad
    result.divergence.sum().backward()
    assert teacher.grad is None and student.grad is not None and student.grad.any()
