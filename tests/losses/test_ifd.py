import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loss_references import halved, outputs_of, pair_of, randn, random_mask

from hf_bcd.losses import IFDLoss, ifd_loss
from hf_bcd.outputs import FeatureSpec


def test_golden_value():
    # projections (6, -5) and (0, 8) of one position: (6, 0) and (0, 8) after the ReLU, mean (3, 4) of length 5
    # its cosine with (1, 0) is 0.6
    projections = torch.tensor([[6.0, -5.0], [0.0, 8.0]])[None, ..., None, None]
    teacher = torch.tensor([1.0, 0.0])[None, :, None, None]
    assert ifd_loss(projections, teacher).item() == pytest.approx(0.4, rel=1e-6)
    assert ifd_loss(projections, -teacher).item() == pytest.approx(1.6, rel=1e-6)


def test_agrees_with_plain_loops():
    projections, teacher, mask = randn(2, 3, 4, 8, 6), randn(2, 4, 4, 3, seed=1), random_mask(2, 4, 3)
    mask[1, 1:] = False
    s, t, images = halved(np.maximum(projections.numpy(), 0).mean(1)), teacher.numpy(), []
    for b in range(2):
        pairs = [(s[b, :, y, x], t[b, :, y, x]) for y, x in np.argwhere(mask[b].numpy())]
        images.append(np.mean([1 - p @ q / (p @ p * (q @ q)) ** 0.5 for p, q in pairs]))
    assert ifd_loss(projections, teacher, mask=mask).item() == pytest.approx(np.mean(images), rel=1e-12)


def test_projectors_differ_and_each_sees_the_students_channels():
    student_specs, teacher_specs = {"stride_8": FeatureSpec(5, 8)}, {"stride_8": FeatureSpec(4, 8)}
    student, teacher, targets = outputs_of(student_specs, teacher_specs)
    loss = IFDLoss(pair_of(student_specs, teacher_specs), projectors=2)
    (first, first_bias), (second, second_bias) = zip(*(x.split(4) for x in loss.projection.parameters()), strict=True)
    assert not torch.equal(first, second)
    x = student.features["stride_8"]
    projections = torch.stack([F.conv2d(x, first, first_bias), F.conv2d(x, second, second_bias)], dim=1)
    expected = ifd_loss(projections, teacher.features["stride_8"]).item()
    value = loss(student, teacher, targets)["ifd"].item()
    assert value == pytest.approx(expected, rel=1e-5)
