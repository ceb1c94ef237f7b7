"""Intra-class feature variation distillation."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loss_references import masks_of, outputs_of, pair_of, randn, random_labels, random_mask

from hf_bcd.losses import IFVDLoss, ifvd_loss
from hf_bcd.outputs import FeatureSpec


SPECS = {"stride_4": FeatureSpec(4, 4), "stride_8": FeatureSpec(6, 8)}


def test_value_by_hand() -> None:
    """Class 0 has the features (1, 0) and (0, 1) with the mean (1/2, 1/2), so both have the cosine 1 / √2.

    Class 1 has one position, which is its own mean: cosine 1. All cosines of the teacher's equal features are 1.
    Mean over the three positions: 2/3 · (1 - 1/√2)². The fourth position is void.
    """
    student = torch.tensor([[1.0, 0, 3, 7], [0, 1, 3, 0]]).view(1, 2, 2, 2)
    teacher = torch.ones(1, 1, 2, 2)
    classes = masks_of(torch.tensor([[[0, 0], [1, 255]]]))[0]
    assert ifvd_loss(student, teacher, classes).item() == pytest.approx(2 / 3 * (1 - 1 / math.sqrt(2)) ** 2)


def similarity(features: np.ndarray, labels: np.ndarray) -> dict[tuple[int, ...], float]:
    """Position -> cosine with the mean of its class, `[C, h, w]` and `[h, w]`."""
    found = {}
    for i in np.ndindex(*labels.shape):
        if labels[i] == 255:
            continue
        same = [features[:, j[0], j[1]] for j in np.ndindex(*labels.shape) if labels[j] == labels[i]]
        mean, own = np.mean(same, axis=0), features[:, i[0], i[1]]
        found[i] = own @ mean / math.sqrt((own @ own) * (mean @ mean))
    return found


def test_agrees_with_loops() -> None:
    student, teacher = randn(3, 4, 5, 6), randn(3, 7, 5, 6, seed=1)
    labels = random_labels(3, 5, 6, num_labels=4).masked_fill(~random_mask(3, 5, 6), 255)
    labels[1] = 255
    total = 0.0
    for s, t, image in zip(student.numpy(), teacher.numpy(), labels.numpy(), strict=True):
        ours, theirs = similarity(s, image), similarity(t, image)
        errors = [(ours[i] - theirs[i]) ** 2 for i in ours]
        total += sum(errors) / len(errors) if errors else 0.0
    classes = masks_of(labels, 6)[0]  # no image has the last two
    assert ifvd_loss(student, teacher, classes).item() == pytest.approx(total / 3, rel=1e-9)


def test_its_three_terms() -> None:
    """The official KL divergence is PyTorch's mean over images, classes and positions."""
    torch.manual_seed(0)
    loss = IFVDLoss(pair_of(SPECS), discriminator_channels=2)
    student, teacher, targets = outputs_of(SPECS)
    terms = loss(student, teacher, targets)
    official = F.kl_div(student.logits.log_softmax(1), teacher.logits.softmax(1), reduction="none").mean()
    assert terms["kd"].item() == pytest.approx(official.item(), rel=1e-5)
    classes = targets.class_masks((4, 4))
    assert torch.equal(
        terms["variation"], ifvd_loss(student.features["stride_8"], teacher.features["stride_8"], classes)
    )
    assert loss.adversary is not None
    assert torch.equal(terms["adversarial"], loss.adversary(student.logits, teacher.logits))
    without = IFVDLoss(pair_of(SPECS), discriminator_channels=0)
    assert without(student, teacher, targets).keys() == without.weights.keys()
    assert "adversarial" not in without.weights
