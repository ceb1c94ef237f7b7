import numpy as np
import pytest
import torch
from loss_references import halved, randn, random_mask

from hf_bcd.losses import pkd_loss


def test_golden_value():
    # one channel, two images of two positions: (0, 0), (2, 2) becomes (-1, -1), (1, 1) and (3, 5), (3, 5) becomes
    # (-1, 1), (-1, 1); squared differences 0, 4, 4, 0, half their mean is 1 = 1 - r with r = 0
    student = torch.tensor([[[[0.0, 0.0]]], [[[2.0, 2.0]]]])
    teacher = torch.tensor([[[[3.0, 5.0]]], [[[3.0, 5.0]]]])
    assert pkd_loss(student, teacher).item() == pytest.approx(1, rel=1e-5)
    # with (0, 3) and (2, 3) left both are (-1, 1) or constant: the teacher's zeros leave half of 1
    mask = torch.tensor([[[True, False]], [[True, False]]])
    assert pkd_loss(student, teacher, mask=mask).item() == pytest.approx(0.5, rel=1e-5)


def test_agrees_with_plain_loops():
    student, teacher, mask = 3 * randn(2, 3, 8, 6) + 2, randn(2, 3, 4, 3, seed=1), random_mask(2, 4, 3)
    mask[1, 1:] = False
    s, t = halved(student.numpy()), teacher.numpy()
    valid = [[tuple(i) for i in np.argwhere(mask[b].numpy())] for b in range(2)]
    errors: list[list[float]] = [[], []]
    for c in range(3):
        (mean_s, std_s), (mean_t, std_t) = (
            (np.mean(values), np.std(values))
            for values in ([x[b, c][i] for b in range(2) for i in valid[b]] for x in (s, t))
        )
        for b in range(2):
            errors[b] += [
                ((s[b, c][i] - mean_s) / (std_s + 1e-6) - (t[b, c][i] - mean_t) / (std_t + 1e-6)) ** 2
                for i in valid[b]
            ]
    expected = 0.5 * np.mean([np.mean(image) for image in errors])
    assert pkd_loss(student, teacher, mask=mask).item() == pytest.approx(expected, rel=1e-12)


def test_magnitude_and_offset_do_not_matter():
    student, teacher = randn(2, 3, 8, 8), randn(2, 3, 8, 8, seed=1)
    other = torch.tensor([0.5, 1.0, 20.0])[:, None, None] * student + torch.tensor([3.0, 0.0, -5.0])[:, None, None]
    correlation = np.mean(
        [np.corrcoef(student[:, c].flatten().numpy(), teacher[:, c].flatten().numpy())[0, 1] for c in range(3)]
    )
    for features in (student, other):
        assert pkd_loss(features, teacher).item() == pytest.approx(1 - correlation, rel=1e-4)
