"""Cross-head distillation: its value, what the teacher's head sees, and what it needs."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loss_references import divergence, outputs_of, pair_of, randn, random_labels, softmax
from torch import Tensor

from hf_bcd.losses import CrossKDLoss, crosskd_loss
from hf_bcd.losses.base import Pair
from hf_bcd.outputs import DenseOutput, FeatureSpec, LabelMaps


STUDENT = {"stride_4": FeatureSpec(3, 4), "stride_8": FeatureSpec(4, 8)}
TEACHER = {"stride_4": FeatureSpec(5, 4), "stride_8": FeatureSpec(6, 8)}


def mixing_head(specs: dict[str, FeatureSpec]) -> Callable[[dict[str, Tensor]], Tensor]:
    """A frozen head whose every output sees a neighbourhood."""
    kernels = {name: randn(3, spec.channels, 3, 3, seed=7) / 9 for name, spec in specs.items()}

    def head(levels: dict[str, Tensor]) -> Tensor:
        assert levels.keys() == kernels.keys()
        maps = [F.conv2d(levels[name], kernel.to(levels[name].dtype), padding=1) for name, kernel in kernels.items()]
        return torch.stack([F.interpolate(x, maps[0].shape[-2:], mode="nearest") for x in maps]).sum(0)

    return head


def batch(specs: dict[str, FeatureSpec] = STUDENT) -> tuple[DenseOutput, DenseOutput]:
    student, teacher, _ = outputs_of(specs, TEACHER, dtype=torch.float64)
    teacher.head = mixing_head(TEACHER)
    teacher.logits = teacher.head(teacher.features)
    return student, teacher


def test_value_worked_out_by_hand() -> None:
    # scores (0, 0) and (ln 3, 0): p = (1/2, 1/2), t = (3/4, 1/4), so d = (1/4 + 1/4) / 2 = 1/4 and
    # KL(t ‖ p) = 3/4 ln(3/2) + 1/4 ln(1/2) = 0.130812; the second pixel is void, the second image all of it
    cross = torch.zeros(2, 2, 1, 2)
    teacher = torch.zeros(2, 2, 1, 2)
    teacher[0, 0, 0, 0] = math.log(3)
    teacher[0, 0, 0, 1] = 50
    mask = torch.tensor([[[True, False]], [[False, False]]])
    assert crosskd_loss(cross, teacher, mask=mask).item() == pytest.approx(0.130812 / 4 / 2, rel=1e-5)
    assert crosskd_loss(cross, teacher, beta=2, mask=mask).item() == pytest.approx(0.130812 / 16 / 2, rel=1e-5)
    assert crosskd_loss(cross, teacher, beta=0, mask=mask).item() == pytest.approx(0.130812 / 2, rel=1e-5)


def reference(loss: CrossKDLoss, student: DenseOutput, teacher: DenseOutput, labels: np.ndarray, beta: float) -> float:
    """Plain loops over one level whose grids agree, and a head that is a 1x1 convolution."""
    (weight,) = (parameter.detach().numpy() for parameter in loss.pairs.parameters())
    ours, theirs = (o.features["stride_8"].detach().numpy() for o in (student, teacher))
    images, channels, height, width = theirs.shape
    spots = [(b, y, x) for b in range(images) for y in range(height) for x in range(width)]
    valid = [(b, y, x) for b, y, x in spots if labels[b, 8 * y + 4, 8 * x + 4] != 255]
    projected = {s: weight[:, :, 0, 0] @ ours[s[0], :, s[1], s[2]] for s in spots}
    crossed = {}
    for s in valid:
        crossed[s] = np.empty(channels)
        for c in range(channels):
            mine, its = [projected[v][c] for v in valid], [theirs[v[0], c, v[1], v[2]] for v in valid]
            crossed[s][c] = (projected[s][c] - np.mean(mine)) / (np.std(mine) + 1e-6) * np.std(its) + np.mean(its)
    total = 0.0
    for image in range(images):
        found = []
        for s in [v for v in valid if v[0] == image]:
            p = softmax(KERNEL.numpy() @ crossed[s])
            t = softmax(teacher.logits.numpy()[s[0], :, s[1], s[2]])
            found.append((0.5 * np.abs(p - t).sum()) ** beta * divergence(t, p))
        total += sum(found) / len(found) if found else 0.0
    return total / images


KERNEL = randn(3, 6, seed=9)


@pytest.mark.parametrize("beta", [0, 1, 2])
def test_agrees_with_plain_loops(beta: float) -> None:
    student, teacher = batch()
    teacher.head = lambda levels: F.conv2d(levels["stride_8"], KERNEL[:, :, None, None])
    teacher.logits = randn(2, 3, 4, 4, seed=5)  # no function of the features: the target is what the teacher says
    labels = random_labels(2, 32, 32, num_labels=3)
    labels[0, :20] = 255
    torch.manual_seed(0)
    loss = CrossKDLoss(Pair(STUDENT, TEACHER, 3, ("stride_8",)), beta=beta).double()
    expected = reference(loss, student, teacher, labels.numpy(), beta)
    assert expected > 1e-3
    assert loss(student, teacher, LabelMaps(labels, 3))["crosskd"].item() == pytest.approx(expected, rel=1e-9)


def test_the_head_sees_the_teachers_own_features_where_void() -> None:
    """Also a head that mixes positions: what the student has there changes nothing, and agreement remains 0."""
    torch.manual_seed(0)
    loss = CrossKDLoss(pair_of(TEACHER)).double()
    student, teacher = batch(TEACHER)
    labels = torch.zeros(2, 32, 32, dtype=torch.long)
    labels[:, :, :16] = 255
    value = loss(student, teacher, LabelMaps(labels, 3))["crosskd"].item()
    for name, level in student.features.items():
        changed = level.detach().clone()
        changed[..., : level.shape[-1] // 2] = 100 * randn(*level.shape[:-1], level.shape[-1] // 2, seed=3)
        student.features[name] = changed
    assert loss(student, teacher, LabelMaps(labels, 3))["crosskd"].item() == value > 1e-3
    student.features = dict(teacher.features)
    assert loss(student, teacher, LabelMaps(labels, 3))["crosskd"].item() < 1e-12
