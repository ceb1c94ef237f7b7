import math

import numpy as np
import pytest
import torch
from loss_references import borders_of_classes, divergence, masks_of, randn, random_labels, softmax
from torch import Tensor

from hf_bcd.losses import bpkd_loss, cwd_loss
from hf_bcd.losses.ops.borders import class_border_shares
from hf_bcd.losses.ops.functional import spatial_size
from hf_bcd.outputs import LabelMaps


def test_a_value_by_hand():
    labels = torch.tensor([[[0, 0, 0, 1, 1, 1]]])  # 3 wide: columns 2 and 3 are the border of both classes
    teacher, student = torch.zeros(1, 2, 1, 6), torch.zeros(1, 2, 1, 6)
    teacher[0, 0, 0, 0] = math.log(3)
    teacher[0, 0, 0, 2] = math.log(3)
    # body: column 2 is edge, so class 0 is (3, 1, 1, 1, 1, 1)/8 for the teacher and 1/6 each for the student; class 1
    #       agrees. Mean of the two.
    body = (3 / 8 * math.log(3 / 8 * 6) + 5 / 8 * math.log(1 / 8 * 6)) / 2
    # edge: column 2 has (3/4, 1/4) against (1/2, 1/2), column 3 agrees; each class takes the mean of the two columns,
    #       and the classes are added.
    edge = 2 * (3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2)) / 2
    terms = loss_of(student, teacher, labels, temperature=1, width=3)
    assert terms["body"].item() == pytest.approx(body, rel=1e-6)
    assert terms["edge"].item() == pytest.approx(edge, rel=1e-6)


def loss_of(student: Tensor, teacher: Tensor, labels: Tensor, width: int = 7, **options) -> dict[str, Tensor]:
    targets, size = LabelMaps(labels, teacher.shape[1]), spatial_size(teacher)
    edges = class_border_shares(*masks_of(labels, teacher.shape[1]), size, width=width)
    return bpkd_loss(student, teacher, edges, mask=targets.valid(size), **options)


def reference(
    student: np.ndarray, teacher: np.ndarray, labels: np.ndarray, reach: int, tau: float
) -> tuple[float, float]:
    """Maps `[B, K, h, w]` whose cells are blocks of 4 x 4 pixels; a cell is valid if pixel (2, 2) of it is."""
    batch, classes, height, width = student.shape
    body, edge = 0.0, 0.0
    for s, t, label in zip(student, teacher, labels, strict=True):
        share = borders_of_classes(label, classes, reach, 255).reshape(classes, height, 4, width, 4).mean(axis=(2, 4))
        valid = [(y, x) for y, x in np.ndindex(height, width) if label[4 * y + 2, 4 * x + 2] != 255]
        for c in range(classes):
            if valid:
                p, q = (softmax(np.array([z[c, y, x] * (1 - share[c, y, x]) / tau for y, x in valid])) for z in (t, s))
                body += tau**2 * divergence(p, q) / classes
            of_class = [(y, x) for y, x in valid if share[c, y, x] > 0]
            for y, x in of_class:
                p, q = (softmax(z[:, y, x] * share[:, y, x] / tau) for z in (t, s))
                edge += tau**2 * share[c, y, x] * divergence(p, q) / len(of_class)
    return body / batch, edge / batch


@pytest.mark.parametrize(("width", "tau"), [(3, 4.0), (7, 1.5)])
def test_it_matches_loops(width, tau):
    labels = random_labels(3, 4, 4, num_labels=3).repeat_interleave(5, 1).repeat_interleave(5, 2)
    labels[0, 3:9, 6:20] = 255
    labels[1] = 255
    student, teacher = 3 * randn(3, 3, 5, 5), 3 * randn(3, 3, 5, 5, seed=1)
    terms = loss_of(student, teacher, labels, temperature=tau, width=width)
    body, edge = reference(student.numpy(), teacher.numpy(), labels.numpy(), width // 2, tau)
    assert body > 0.1 and edge > 0.1
    assert terms["body"].item() == pytest.approx(body, rel=1e-9)
    assert terms["edge"].item() == pytest.approx(edge, rel=1e-9)


def test_without_a_border_the_body_is_channel_wise_distillation():
    student, teacher = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    terms = loss_of(student, teacher, torch.ones(2, 16, 16, dtype=torch.long), temperature=2)
    assert terms["edge"] == 0
    assert terms["body"].item() == pytest.approx(cwd_loss(student, teacher, temperature=2).item(), rel=1e-12)
