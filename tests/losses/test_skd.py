"""Structured knowledge distillation."""

import math

import numpy as np
import pytest
import torch
from loss_references import outputs_of, pair_of, randn, random_mask

from hf_bcd.losses import SKDLoss, kd_loss, skd_loss
from hf_bcd.outputs import FeatureSpec


SPECS = {"stride_4": FeatureSpec(4, 4), "stride_8": FeatureSpec(6, 8)}


def test_value_by_hand() -> None:
    """Four windows of one position each. All of the teacher's are alike, so each of its 16 cosines is 1.

    The student's are (1, 0), (0, 1), (1, 0), (0, 1): 8 cosines are 1 and 8 are 0, so the mean squared difference is 1/2.
    Without the last position, 9 cosines remain, 4 of them 0: 4/9.
    """
    student = torch.tensor([[1.0, 0, 3, 0], [0, 2, 0, 1]]).view(1, 2, 2, 2)
    teacher = torch.tensor([2.0, 1, 2, 5]).view(1, 1, 2, 2)
    assert skd_loss(student, teacher).item() == pytest.approx(1 / 2)
    mask = torch.tensor([[[True, True], [True, False]]])
    assert skd_loss(student, teacher, mask=mask).item() == pytest.approx(4 / 9)


def reference(student: np.ndarray, teacher: np.ndarray, mask: np.ndarray, nodes: int) -> float:
    height, width = mask.shape[1:]
    rows, columns = math.ceil(height / nodes), math.ceil(width / nodes)
    total = 0.0
    for s, t, m in zip(student, teacher, mask, strict=True):
        windows = []
        for y, x in np.ndindex(math.ceil(height / rows), math.ceil(width / columns)):
            part = np.s_[y * rows : (y + 1) * rows, x * columns : (x + 1) * columns]
            if m[part].any():
                windows.append([np.array([channel[part][m[part]].max() for channel in f]) for f in (s, t)])
        errors = []
        for a in windows:
            for b in windows:
                ours, theirs = (a[i] @ b[i] / math.sqrt((a[i] @ a[i]) * (b[i] @ b[i])) for i in range(2))
                errors.append((ours - theirs) ** 2)
        total += sum(errors) / len(errors) if errors else 0.0
    return total / len(student)


@pytest.mark.parametrize("nodes", [1, 2, 3, 4])
def test_agrees_with_loops(nodes: int) -> None:
    student, teacher, mask = randn(3, 4, 5, 7), randn(3, 6, 5, 7, seed=1), random_mask(3, 5, 7, share=0.3)
    mask[0, :3, :4] = False  # a whole window of two a side
    mask[2] = False
    expected = reference(student.numpy(), teacher.numpy(), mask.numpy(), nodes)
    assert skd_loss(student, teacher, nodes=nodes, mask=mask).item() == pytest.approx(expected, rel=1e-9)


def test_its_three_terms() -> None:
    torch.manual_seed(0)
    loss = SKDLoss(pair_of(SPECS), discriminator_channels=2, nodes=4)
    student, teacher, targets = outputs_of(SPECS)
    targets.ids[:, :16] = 255
    terms = loss(student, teacher, targets)
    coarse, fine = (targets.ids[:, step // 2 :: step, step // 2 :: step] != 255 for step in (8, 4))
    assert torch.equal(terms["pixel"], kd_loss(student.logits, teacher.logits, mask=fine))
    expected = skd_loss(student.features["stride_8"], teacher.features["stride_8"], nodes=4, mask=coarse)
    assert torch.equal(terms["pair"], expected)
    assert loss.adversary is not None
    assert torch.equal(terms["holistic"], loss.adversary(student.logits, teacher.logits, fine))
    assert not any(p.requires_grad for p in loss.parameters())
