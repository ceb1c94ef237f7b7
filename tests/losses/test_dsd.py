import math

import numpy as np
import pytest
import torch
from loss_references import dense_output, halved, pair_of, randn, random_labels, random_mask

from hf_bcd.losses import DSDLoss, pixel_similarity_loss
from hf_bcd.outputs import FeatureSpec, LabelMaps


SPECS = {"stride_4": FeatureSpec(3, 4), "stride_8": FeatureSpec(2, 8), "stride_16": FeatureSpec(4, 16)}


def test_pixel_golden_value():
    # attention of two positions, from level to level: the student's (1, 0) to (0, 1), a residual along (-1, 1)
    # the teacher's (1, 0) to (3, 4) / 5, a residual (-0.4, 0.8) along (-1, 2)
    # the squared distance of unit vectors is 2 - 2 cos = 2 - 2 · 3 / (√2 √5)
    student = [torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, -2.0]]]])]
    teacher = [torch.tensor([[[[3.0, 0.0]]]]), torch.tensor([[[[3**0.5, 2.0]]]])]
    value = pixel_similarity_loss(student, teacher, mask=torch.ones(1, 1, 2, dtype=torch.bool))
    assert value.item() == pytest.approx(2 - 6 / math.sqrt(10), rel=1e-5)


def test_levels_with_one_attention_have_no_residual():
    # a single valid position, or levels that differ by a factor: the difference is rounding noise, no direction
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[:, 1, 2] = True
    student, teacher = ([randn(1, 3, 4, 4, seed=2 * i + j).float() for j in range(2)] for i in range(2))
    assert pixel_similarity_loss(student, teacher, mask=mask).item() < 1e-4
    even = [torch.ones(1, 3, 4, 4, requires_grad=True) for _ in range(2)]
    pixel_similarity_loss(even, teacher, mask=~mask).backward()
    assert all(x.grad is not None and x.grad.abs().max() < 1e4 for x in even)


def test_pixel_agrees_with_plain_loops():
    mask = random_mask(2, 2, 4, share=0.6)
    mask[:, 0, 0] = True
    shapes = {"student": [(3, 4, 8), (2, 2, 4), (5, 2, 4)], "teacher": [(2, 4, 8), (4, 2, 4), (3, 2, 4)]}
    levels = {
        who: [randn(2, *shape, seed=10 * i + j) for j, shape in enumerate(sizes)]
        for i, (who, sizes) in enumerate(shapes.items())
    }
    distances = []
    for b in range(2):
        valid = mask[b].numpy()
        fine = valid.repeat(2, 0).repeat(2, 1)
        residuals = {}
        for who, features in levels.items():
            maps = []
            for x in features:
                attention = (x[b].numpy() ** 2).mean(0)
                attention = halved(attention * fine) if attention.shape == fine.shape else attention
                values = attention[valid]
                maps.append(values / math.sqrt(sum(values**2)))
            steps = [later - earlier for earlier, later in zip(maps[:-1], maps[1:], strict=True)]
            residuals[who] = [step / math.sqrt(sum(step**2)) for step in steps]
        distances += [sum((s - t) ** 2) for s, t in zip(residuals["student"], residuals["teacher"], strict=True)]
    value = pixel_similarity_loss(levels["student"], levels["teacher"], mask=mask)
    assert len(distances) == 4 and value.item() == pytest.approx(np.mean(distances), rel=1e-12)


def test_void_neighbours_do_not_leak_through_a_resize():
    # 23 of 32 columns are void; the last level's position over columns 16 to 31 is valid, as its centre is, but the third
    # position of stride 8 and the sixth of stride 4, which it is resized from, are not
    labels = random_labels(2, 32, 32, num_labels=3)
    labels[:, :, :23] = 255
    values = []
    for noise in (0, 100):
        student, teacher = (dense_output(SPECS, 2, 32, 3, seed=i) for i in range(2))
        for output in (student, teacher):
            output.features["stride_4"][..., :6] += noise
            output.features["stride_8"][..., :3] += noise
        values.append(DSDLoss(pair_of(SPECS))(student, teacher, LabelMaps(labels, 3))["pixel"].item())
    assert values[0] > 0 and values[0] == values[1]
