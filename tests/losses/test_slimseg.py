import math

import numpy as np
import pytest
import torch
from loss_references import borders_of_classes, labels_with_void, masks_of, pair_of, randn, softmax

from hf_bcd.losses import SlimSegLoss, kd_loss, slimseg_loss
from hf_bcd.outputs import DenseOutput, LabelMaps


def loss_of(logits: torch.Tensor, labels: torch.Tensor, width: int = 7) -> torch.Tensor:
    classes, mask = masks_of(labels, logits.shape[1])
    return slimseg_loss(logits, classes, mask=mask, width=width)


def test_a_value_by_hand():
    labels = torch.tensor([[[0, 0, 0, 1, 1, 1]]])
    logits = torch.zeros(1, 2, 1, 6)
    logits[0, 0, 0, 2] = math.log(3)  # the true class has 3/4
    logits[0, 1, 0, 0] = 50  # far wrong, but away from the border
    # 3 wide: the border is columns 2 and 3
    expected = (math.log(4 / 3) + math.log(2)) / 2
    assert loss_of(logits, labels, 3).item() == pytest.approx(expected, rel=1e-6)


def test_it_matches_loops():
    labels, logits = labels_with_void(), randn(2, 3, 12, 16)
    expected = 0.0
    for z, label in zip(logits.numpy(), labels.numpy(), strict=True):
        border = borders_of_classes(label, 3, 2, 255).max(axis=0)
        found = [-math.log(softmax(z[:, y, x])[label[y, x]]) for y, x in np.ndindex(*label.shape) if border[y, x]]
        expected += sum(found) / len(found) / 2
    assert loss_of(logits, labels, 5).item() == pytest.approx(expected, rel=1e-9)


def test_an_image_without_a_border_counts_nothing():
    labels, logits = labels_with_void(), randn(2, 3, 12, 16)
    alone = loss_of(logits[:1], labels[:1])
    labels[1] = 2
    assert loss_of(logits, labels).item() == pytest.approx(alone.item() / 2, rel=1e-9)


def test_the_method_distils_beside_it():
    labels, (ours, theirs) = labels_with_void(), (randn(2, 3, 12, 16), randn(2, 3, 12, 16, seed=1))
    loss = SlimSegLoss(pair_of({}), temperature=2, width=3)
    terms = loss(DenseOutput({}, ours), DenseOutput({}, theirs), LabelMaps(labels, 3))
    assert terms["boundary"] == loss_of(ours, labels, 3)
    assert terms["kd"] == kd_loss(ours, theirs, temperature=2, mask=labels != 255)
