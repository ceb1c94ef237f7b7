"""Context distillation, Eq. 4 and 5 of the BCD paper (https://huggingface.co/papers/2401.13174)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .boundary import Mode, check_mode
from .ops.functional import at_least_float32, full_precision
from .ops.relation import Relation, literal_divergence, relation_divergence


def relation_features(features: Tensor) -> Tensor:
    """The operator O of Eq. 4 in stable mode: every position normalised over its channels, `[B, H·W, C]`.

    Scaled so that inner products are `O(x)ᵀO(x)/sqrt(C)`: between -sqrt(C) and sqrt(C).
    """
    channels = features.shape[1]
    return F.layer_norm(features.flatten(2).mT, (channels,), eps=1e-5) / channels**0.25


def _check_same_grid(student: Tensor, teacher: Tensor) -> None:
    if student.shape[0] != teacher.shape[0] or student.shape[2:] != teacher.shape[2:]:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must agree in batch and spatial size; "
            "resize one of them to a common grid."
        )


@full_precision
def context_relation(
    student: Tensor, teacher: Tensor, *, tau: float | Tensor = 1.0, mask: Tensor | None = None
) -> Relation:
    """Divergence of the self-relations of aggregated features, and how peaked the teacher's are, an image each.

    Arguments and errors are as in `context_distillation_loss`.
    """
    return related(student, relation_map(teacher.detach()), tau=tau, mask=mask)


def relation_map(features: Tensor) -> Tensor:
    """`relation_features` as a map `[B, C, H, W]`."""
    return relation_features(at_least_float32(features)).mT.unflatten(2, features.shape[2:])


def related(student: Tensor, relations: Tensor, *, tau: float | Tensor = 1.0, mask: Tensor | None = None) -> Relation:
    """`context_relation` where the teacher's side is a `relation_map` already, or one of the same inner products."""
    _check_same_grid(student, relations)
    ours, theirs = relation_features(at_least_float32(student)), relations.flatten(2).mT
    return relation_divergence(ours, theirs, tau=tau, mask=None if mask is None else mask.flatten(1))


def literal_relation(
    student: Tensor, teacher: Tensor, *, tau: float | Tensor = 1.0, mask: Tensor | None = None
) -> Tensor:
    """`literal_divergence` of features after O, `[B]`; arguments are as in `context_distillation_loss`."""
    # features over C^(1/4) have the inner products of Eq. 4, over sqrt(C)
    student, teacher = (x.flatten(2).mT / x.shape[1] ** 0.25 for x in (student, teacher))
    return literal_divergence(student, teacher, tau=tau, mask=None if mask is None else mask.flatten(1))


@full_precision
def context_distillation_loss(
    student: Tensor, teacher: Tensor, *, tau: float | Tensor = 1.0, mask: Tensor | None = None, mode: Mode = "stable"
) -> Tensor:
    """Context distillation loss L_CD: the student's pixel-to-pixel relations follow the teacher's.

    - `stable`: O is a per-position layer norm, the diagonal (a constant) is left out and every row gets one softmax;
      `tau² · mean over images and rows of KL(P_teacher ‖ P_student)`. Invariant to a scale of the features per position
      and to a rotation of the channels that keeps their mean.
    - `paper`: Eq. 4 and 5 as printed, on features that O has been applied to already (`SelfRelationHead`).

    Args:
        student: aggregated features `[B, C, H, W]`.
        teacher: aggregated features `[B, C', H, W]`; receives no gradient.
        tau: temperature.
        mask: `[B, H, W]`, True where valid.
        mode: `stable` or `paper`.

    Returns:
        Scalar: >= 0 and 0 for equal relations (stable), about n·log(n) (paper, n positions).

    Raises:
        ValueError: if the maps differ in batch or spatial size, or the mode is unknown.
    """
    check_mode(mode)
    if mode == "stable":
        return tau**2 * context_relation(student, teacher, tau=tau, mask=mask).divergence.mean()
    _check_same_grid(student, teacher)
    student, teacher = at_least_float32(student), at_least_float32(teacher.detach())
    return tau**2 * literal_relation(student, teacher, tau=tau, mask=mask).mean()


def row_divergence(exact: Tensor, kept: Tensor, block: int = 1024) -> Tensor:
    """Mean KL divergence in nat between the relations of positions before and after a codec, a scalar.

    Args:
        exact: features `[C, h, w]`, whose inner products are the relation; row softmaxes without the diagonal.
        kept: features `[C', h, w]` of the same positions.
        block: rows at a time.
    """
    first, second = exact.flatten(1).mT, kept.flatten(1).mT
    total, count = first.new_zeros(()), len(first)
    for start in range(0, count, block):
        logs = []
        for x in (first, second):
            gram = x[start : start + block] @ x.mT
            gram[torch.arange(len(gram)), torch.arange(start, start + len(gram))] = -torch.inf
            logs.append(gram.log_softmax(1))
        total += F.kl_div(*(log.nan_to_num(neginf=-1e4) for log in reversed(logs)), log_target=True, reduction="sum")
    return total / count
