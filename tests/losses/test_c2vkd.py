import math

import numpy as np
import pytest
import torch
from loss_references import Operators, divergence, masks_of, randn, random_labels, random_mask, softmax

from hf_bcd.losses import c2vkd_feature_loss, dkd_loss, kd_loss
from hf_bcd.outputs import LabelMaps


def test_decoupled_values_by_hand():
    teacher = (
        torch.tensor([2.0, 1.0, 1.0]).log().view(1, 3, 1, 1)
    )  # probabilities (1/2, 1/4, 1/4), the true class first
    student = torch.tensor([1.0, 1.0, 2.0]).log().view(1, 3, 1, 1)  # (1/4, 1/4, 1/2)
    terms = dkd_loss(student, teacher, masks_of(torch.zeros(1, 1, 1))[0])
    # (1/2, 1/2) against (1/4, 3/4); then (1/2, 1/2) against (1/3, 2/3)
    assert terms["target"].item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-6)
    assert terms["others"].item() == pytest.approx(0.5 * math.log(3 / 2) + 0.5 * math.log(3 / 4), rel=1e-6)


def test_feature_values_by_hand():
    # Two positions (columns), two channels.
    teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 2)
    student = torch.tensor([[1.0, 3.0], [0.0, 0.0]]).view(1, 2, 1, 2)
    terms = c2vkd_feature_loss(student, teacher)
    # of length 1 and centred: teacher (1, -1)/2 and (-1, 1)/2, student (1, -1)/2 twice. Divided by C - 1 = 1, the
    # products are 1/2 on the diagonal of both; off it -1/2 and 1/2: a squared difference of 1 in two of four pairs.
    assert terms["covariance"].item() == pytest.approx(0.5, rel=1e-6)
    # column 0 agrees; in column 1 softmaxes are (1, e)/(1 + e) and (e³, 1)/(1 + e³). Mean of columns, and of channels.
    e = math.e
    p, q = np.array([1, e]) / (1 + e), np.array([e**3, 1]) / (1 + e**3)
    assert terms["features"].item() == pytest.approx(divergence(p, q) / 2 / 2, rel=1e-6)


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_decoupled_terms_match_loops(tau):
    labels = random_labels(3, 8, 8, num_labels=4)
    labels[0, 2:5] = 255
    labels[1] = 255
    student, teacher = 2 * randn(3, 4, 4, 4), 2 * randn(3, 4, 4, 4, seed=1)
    target, others = 0.0, 0.0
    for s, t, label in zip(student.numpy(), teacher.numpy(), labels.numpy(), strict=True):
        valid = [(y, x) for y, x in np.ndindex(4, 4) if label[2 * y + 1, 2 * x + 1] != 255]
        for y, x in valid:
            true = label[2 * y + 1, 2 * x + 1]
            p, q = softmax(t[:, y, x] / tau), softmax(s[:, y, x] / tau)
            target += tau**2 * divergence(*(np.array([r[true], 1 - r[true]]) for r in (p, q))) / len(valid) / 3
            p, q = (np.delete(r, true) / np.delete(r, true).sum() for r in (p, q))
            others += tau**2 * divergence(p, q) / len(valid) / 3
    targets = LabelMaps(labels, 4)
    terms = dkd_loss(student, teacher, targets.class_masks((4, 4)), temperature=tau, mask=targets.valid((4, 4)))
    assert terms["target"].item() == pytest.approx(target, rel=1e-9)
    assert terms["others"].item() == pytest.approx(others, rel=1e-9)


def test_decoupled_terms_make_up_plain_distillation():
    # KL = target + (1 - p_y) · others; p_y of the teacher is 1/4 in every pixel
    student, teacher = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    teacher[:, 0] = teacher[:, 1:].logsumexp(dim=1) - math.log(3)
    terms = dkd_loss(student, teacher, masks_of(torch.zeros(2, 4, 4))[0])
    total = terms["target"] + 0.75 * terms["others"]
    assert total.item() == pytest.approx(kd_loss(student, teacher).item(), rel=1e-9)


def test_feature_terms_match_loops():
    student, teacher, mask = randn(3, 5, 2, 3), randn(3, 5, 2, 3, seed=1), random_mask(3, 2, 3)
    mask[1] = False
    features, rows = 0.0, []
    for s, t, m in zip(student.numpy(), teacher.numpy(), mask.numpy(), strict=True):
        valid = [(y, x) for y, x in np.ndindex(2, 3) if m[y, x]]
        for y, x in valid:
            features += divergence(softmax(t[:, y, x]), softmax(s[:, y, x])) / 5 / len(valid) / 3
            unit = [z[:, y, x] / math.sqrt((z[:, y, x] ** 2).sum()) for z in (s, t)]
            rows.append([u - u.mean() for u in unit])
    squares = [(a[0] @ b[0] / 4 - a[1] @ b[1] / 4) ** 2 for a in rows for b in rows]  # across images as well
    terms = c2vkd_feature_loss(student, teacher, mask=mask)
    assert terms["features"].item() == pytest.approx(features, rel=1e-9)
    assert terms["covariance"].item() == pytest.approx(sum(squares) / len(squares), rel=1e-9)


def test_pairs_of_positions_take_no_memory():
    student, teacher = randn(2, 4, 32, 32).requires_grad_(), randn(2, 4, 32, 32, seed=1)
    with Operators() as seen:
        c2vkd_feature_loss(student, teacher)["covariance"].backward()
    assert seen.largest == student.numel()  # not (2 · 32 · 32)²
