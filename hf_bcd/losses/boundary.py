"""Boundary distillation, Eq. 2 and 3 of the BCD paper (https://huggingface.co/papers/2401.13174)."""

from typing import Literal

import torch
from torch import Tensor

from ..utils.messages import UserError
from .ops.functional import at_least_float32, divergence, full_precision, on_teacher_grid, weighted_means
from .ops.path import line_ends, path_range
from .ops.windows import window_divergence


Mode = Literal["stable", "paper"]


def check_mode(mode: str) -> None:
    if mode not in ("stable", "paper"):
        raise UserError(f"mode is {mode!r}; choose 'stable' (default) or 'paper' (the literal equations).")


def boundary_strength(z: Tensor, radius: int = 3, mask: Tensor | None = None) -> Tensor:
    """Largest range of a field `[B, H, W]` on any line that leaves a position, `[B, H, W]`, non-negative."""
    return path_range(z, radius, "disc", mask).amax(dim=1)


def different_neighbour(classes: Tensor, radius: int = 3, mask: Tensor | None = None) -> Tensor:
    """Where an integer map `[B, H, W]` has another class inside the disc of `radius`; void differs from nothing."""
    differs, _ = pair_differences(classes, radius, "disc", mask)
    return differs.any(dim=1)


def pair_differences(
    classes: Tensor, radius: int, directions: Literal["disc", "half"], mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Whether the two ends of every line of an integer map `[B, H, W]` differ in class, and whether both are valid.

    Both are boolean `[B, D, H, W]` with D as in `path_offsets`; the first is False wherever the second is.
    """
    valid = torch.ones_like(classes, dtype=torch.bool) if mask is None else mask
    both = torch.stack([valid & other for other in line_ends(valid, radius, directions)], dim=1)
    differs = torch.stack([classes != other for other in line_ends(classes, radius, directions)], dim=1)
    return differs & both, both


def spatial_divergence(
    student: Tensor, teacher: Tensor, *, tau: float | Tensor = 1.0, mask: Tensor | None = None, entropy: bool = True
) -> Tensor:
    """`divergence` between two fields `[B, H, W]`, read as distributions over the positions of each image: `[B]`."""
    mask = None if mask is None else mask.flatten(1)
    return divergence(student.flatten(1), teacher.flatten(1), dim=1, tau=tau, mask=mask, entropy=entropy)


@full_precision
def boundary_distillation_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    radius: int = 3,
    theta: float | Tensor = 1.0,
    kappa: float = 0.5,
    tau: float | Tensor = 1.0,
    mask: Tensor | None = None,
    mode: Mode = "stable",
) -> Tensor:
    """Boundary distillation loss L_BD.

    A position is a boundary if the field varies by more than `theta` on some line that leaves it. The teacher's
    boundary map is hard; the student's is a sigmoid of width `kappa`, because a hard one has no gradient.

    - `stable`: `tau² · mean over images of KL(softmax(b_teacher / tau) ‖ softmax(b_student / tau))` over positions.
    - `paper`: Eq. 3 as printed: cross-entropy of `1 - b` on both sides, with a straight-through estimator.

    Args:
        student: standardised scalar field `[B, H, W]`, in units of its own deviation.
        teacher: standardised scalar field `[B, H, W]`; receives no gradient.
        radius: radius of the lines in grid steps.
        theta: range above which a line crosses a boundary, in deviations.
        kappa: width of the student's sigmoid, in deviations.
        tau: temperature.
        mask: `[B, H, W]`, True where valid.
        mode: `stable` or `paper`.

    Returns:
        Scalar >= 0 (stable) or about log(H·W) per image (paper), float32 or float64.

    Raises:
        ValueError: if the two fields differ in shape or the mode is unknown.
    """
    check_mode(mode)
    if student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ; resize one.")
    student, teacher = at_least_float32(student), at_least_float32(teacher.detach())
    hard_teacher = (boundary_strength(teacher, radius, mask) > theta).to(teacher.dtype)
    strength = boundary_strength(student, radius, mask)
    return tau**2 * boundary_divergence(strength, hard_teacher, theta, kappa, tau, mask, mode).mean()


@full_precision
def score_boundary_loss(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """Boundary distillation among class scores: how the score of each class changes around each position.

    `mean over images and, weighted, over positions of sum over classes of KL(softmax(t) ‖ softmax(s))`, the softmaxes over 3 x 3
    windows of positions. Ours; not in the paper.

    Args:
        student: class scores `[B, K, h, w]`; `teacher` and `mask` are as in `on_teacher_grid`.
        weights: of positions, `[B, h', w']` >= 0; by default 1 where `mask` is True.

    Returns:
        Scalar >= 0 in nat, float32 or float64; 0 if the scores of each class differ by a constant.
    """
    student, teacher, mask = on_teacher_grid(student, teacher, mask)
    weights = mask.to(student.dtype) if weights is None else weights
    return weighted_means(window_divergence(student, teacher, mask).sum(dim=1), weights).mean()


def score_changes(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """How much class scores change around each position: what `score_boundary_loss` compares, as a map.

    `sum over classes of KL(softmax(scores) ‖ uniform)` over 3 x 3 windows: 0 where every class has the same score all around.

    Args:
        scores: `[B, K, h, w]`.
        mask: boolean `[B, h, w]`, True where valid; everywhere by default.

    Returns:
        `[B, h, w]` in nat, >= 0, without a graph.
    """
    scores = at_least_float32(scores.detach())
    mask = torch.ones_like(scores[:, 0], dtype=torch.bool) if mask is None else mask
    return window_divergence(torch.zeros_like(scores), scores, mask).sum(dim=1).clamp_min(0)


def boundary_divergence(
    strength: Tensor,
    hard_teacher: Tensor,
    theta: float | Tensor,
    kappa: float,
    tau: float | Tensor,
    mask: Tensor | None,
    mode: Mode,
) -> Tensor:
    """The divergence inside `boundary_distillation_loss`, per image `[B]`, for a teacher map `[B, H, W]` of 0 and 1.

    `strength` is the student's `boundary_strength`; the other arguments are as in `boundary_distillation_loss`.
    """
    soft = torch.sigmoid((strength - theta) / kappa)
    if mode == "stable":
        return spatial_divergence(soft, hard_teacher, tau=tau, mask=mask)
    hard = (strength > theta).to(soft.dtype)
    straight_through = hard + (soft - soft.detach())  # exactly hard: the bracket is zero
    return spatial_divergence(1 - straight_through, 1 - hard_teacher, tau=tau, mask=mask, entropy=False)
