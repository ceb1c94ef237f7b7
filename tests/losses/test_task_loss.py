import math

import pytest
import torch
from loss_references import randn, random_labels

from hf_bcd.losses import segmentation_loss


def test_two_pixels_by_hand():
    # two classes; pixel 0 has logits (0, 0) and class 0: log 2; pixel 1 has (2, 0) and class 1: log(1 + e^2);
    # pixel 2 is void
    logits = torch.tensor([[[[0.0, 2.0, 9.0]], [[0.0, 0.0, -9.0]]]])
    labels = torch.tensor([[[0, 1, 255]]])
    expected = (math.log(2) + math.log(1 + math.exp(2))) / 2
    assert segmentation_loss(logits, labels).item() == pytest.approx(expected, rel=1e-6)
    # another void label, another divisor
    labels = torch.tensor([[[0, 1, 7]]])
    assert segmentation_loss(logits, labels, ignore_index=7).item() == pytest.approx(expected, rel=1e-6)
    assert segmentation_loss(logits, labels, ignore_index=7, num_valid=torch.tensor(8)).item() == pytest.approx(
        expected / 4, rel=1e-6
    )


def test_logits_are_upsampled_to_the_labels():
    # (0, 4) at width 2 becomes (0, 1, 3, 4) at width 4
    logits = torch.tensor([[[[0.0, 4.0]], [[0.0, 0.0]]]])
    expected = sum(math.log(1 + math.exp(-x)) for x in (0, 1, 3, 4)) / 4
    loss = segmentation_loss(logits, torch.zeros(1, 1, 4, dtype=torch.long))
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_unequal_halves_with_a_common_divisor_add_up_to_the_whole():
    logits, labels = randn(2, 3, 4, 4, dtype=torch.float32), random_labels(2, 8, 8, num_labels=3)
    labels[0, :6] = 255
    num_valid = (labels != 255).sum()
    parts = [segmentation_loss(logits[i : i + 1], labels[i : i + 1], num_valid=num_valid) for i in range(2)]
    assert sum(parts).item() == pytest.approx(segmentation_loss(logits, labels).item(), rel=1e-6)  # type: ignore[union-attr]


def test_everything_void_gives_a_connected_zero():
    logits = randn(1, 3, 2, 2, dtype=torch.float32).requires_grad_()
    loss = segmentation_loss(logits, torch.full((1, 4, 4), 255))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None and not logits.grad.any()


def test_gradcheck():
    labels = torch.tensor([[[0, 1, 2, 255]]])
    assert torch.autograd.gradcheck(lambda x: segmentation_loss(x, labels), randn(1, 3, 1, 2).requires_grad_())
