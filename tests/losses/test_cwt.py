import numpy as np
import pytest
import torch
from loss_references import halved, pair_of, randn, random_mask
from torch import Tensor

from hf_bcd.losses import CWTLoss, cwt_loss
from hf_bcd.outputs import DenseOutput, FeatureSpec, LabelMaps


def halves(x: Tensor) -> Tensor:
    """An MLP from one channel to two: the positive and the negative part."""
    return torch.cat([x.relu(), (-x).relu()], dim=1)


def test_golden_value():
    # 3 and -2 become (3, 0) and (0, 2); minus (1, 1) and (0, 0): squared lengths 5 and 4, mean 4.5
    student = torch.tensor([[[[3.0, -2.0]]]])
    teacher = torch.tensor([[[[1.0, 0.0]], [[1.0, 0.0]]]])
    assert cwt_loss(student, teacher, halves).item() == 4.5
    assert cwt_loss(student, teacher, halves, mask=torch.tensor([[[True, False]]])).item() == 5


def test_module_agrees_with_plain_loops():
    student, teacher = randn(2, 3, 8, 6), randn(2, 4, 4, 3, seed=1)
    mask = random_mask(2, 4, 3)
    mask[1, 1:] = False
    loss = CWTLoss(pair_of({"stride_8": FeatureSpec(3, 8)}, {"stride_8": FeatureSpec(4, 8)})).double()
    w1, b1, w2, b2 = (x.detach().numpy() for x in loss.transform.parameters())
    hidden = np.maximum(np.einsum("oi,bihw->bohw", w1[:, :, 0, 0], student.numpy()) + b1[:, None, None], 0)
    assert hidden.shape[1] == 4  # as wide as the teacher
    s = halved(np.einsum("oi,bihw->bohw", w2[:, :, 0, 0], hidden) + b2[:, None, None])
    images = []
    for b in range(2):
        differences = [s[b, :, y, x] - teacher.numpy()[b, :, y, x] for y, x in np.argwhere(mask[b].numpy())]
        images.append(np.mean([d @ d for d in differences]))
    labels = torch.where(mask, 0, 255)
    outputs = (DenseOutput({"stride_8": x}, torch.zeros(2, 2, 4, 3)) for x in (student, teacher))
    assert loss(*outputs, LabelMaps(labels, 3))["cwt"].item() == pytest.approx(np.mean(images), rel=1e-12)
