import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loss_references import halved, outputs_of, pair_of, randn, random_mask

from hf_bcd.losses import FitNetLoss, fitnet_loss
from hf_bcd.outputs import FeatureSpec


def test_golden_value():
    # differences (1, 3) and (0, 2) of two channels at two positions: squares 1, 9, 0, 4, mean 3.5; the first alone 5
    student = torch.tensor([[[[2.0, 5.0]], [[3.0, 1.0]]]])
    teacher = torch.tensor([[[[1.0, 5.0]], [[0.0, -1.0]]]])
    assert fitnet_loss(student, teacher).item() == 3.5
    assert fitnet_loss(student, teacher, mask=torch.tensor([[[True, False]]])).item() == 5


def test_agrees_with_plain_loops():
    student, teacher, mask = randn(2, 3, 8, 6), randn(2, 3, 4, 3, seed=1), random_mask(2, 4, 3)
    mask[1, 1:] = False  # images count alike, however few valid positions they have
    s, t, images = halved(student.numpy()), teacher.numpy(), []
    for b in range(2):
        squares = [(s[b, c, y, x] - t[b, c, y, x]) ** 2 for c in range(3) for y, x in np.argwhere(mask[b].numpy())]
        images.append(np.mean(squares))
    assert fitnet_loss(student, teacher, mask=mask).item() == pytest.approx(np.mean(images), rel=1e-12)


def test_a_level_is_projected_to_the_teachers_channels():
    specs = {"stride_4": FeatureSpec(3, 4), "stride_8": FeatureSpec(5, 8)}, {"stride_4": FeatureSpec(4, 4)}
    student, teacher, targets = outputs_of(*specs)
    loss = FitNetLoss(pair_of(*specs), level="stride_4")
    projected = F.conv2d(student.features["stride_4"], loss.pair.projection.weight, loss.pair.projection.bias)
    expected = (projected - teacher.features["stride_4"]).square().mean()
    assert loss(student, teacher, targets)["fitnet"].item() == pytest.approx(expected.item(), rel=1e-5)
