"""Divergence between the self-relations of two feature maps."""

from typing import NamedTuple

import torch
from torch import Tensor

from .functional import mask_fill_value


class Relation(NamedTuple):
    """Result of `relation_divergence`.

    Attributes:
        divergence: mean over valid rows of the KL divergence in nat, `[B]`.
        peak: mean over valid rows of the teacher's largest probability, `[B]`, without gradient.
    """

    divergence: Tensor
    peak: Tensor


def relation_divergence(
    student: Tensor, teacher: Tensor, *, tau: float | Tensor = 1.0, mask: Tensor | None = None
) -> Relation:
    """KL divergence between the row softmaxes of two Gram matrices, diagonals and masked positions left out.

    `P = softmax_j(<x_i, x_j> / tau)` for teacher and student; the result is the mean over rows i of `KL(P_teacher,i ‖
    P_student,i)`. This is the reference: it holds a few `[B, n, n]` matrices at once.

    Args:
        student: features `[B, n, C]`, scaled so that their inner product is the relation.
        teacher: features `[B, n, C']`, constant.
        tau: temperature.
        mask: `[B, n]`, True where valid. Other positions count neither as rows nor as columns.

    Returns:
        Divergence and peak probability per image; both 0 for an image with fewer than two valid positions.
    """
    teacher = teacher.detach()
    batch, positions, _ = student.shape
    valid = torch.ones(batch, positions, dtype=torch.bool, device=student.device) if mask is None else mask
    hidden = ~valid[:, None, :] | torch.eye(positions, dtype=torch.bool, device=student.device)
    fill = mask_fill_value(student.dtype)
    log_q = (student @ student.mT / tau).masked_fill(hidden, fill).log_softmax(dim=-1)
    log_p = (teacher @ teacher.mT / tau).masked_fill(hidden, fill).log_softmax(dim=-1)
    rows = (log_p.exp() * (log_p - log_q)).masked_fill(hidden, 0).sum(dim=-1)

    num_valid = valid.sum(dim=-1)
    weight = (valid & (num_valid >= 2)[:, None]).to(rows.dtype) / num_valid.clamp_min(1)[:, None]
    peak = log_p.amax(dim=-1).exp()
    return Relation((rows * weight).sum(dim=-1), (peak * weight).sum(dim=-1))
