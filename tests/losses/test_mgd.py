import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loss_references import halved, outputs_of, pair_of, randn, random_mask
from torch import Tensor

from hf_bcd.losses import MGDLoss, mgd_loss
from hf_bcd.outputs import FeatureSpec


SPECS = {"stride_4": FeatureSpec(3, 4), "stride_8": FeatureSpec(2, 8)}


def box(x: Tensor) -> Tensor:
    """The sum over 3 x 3 neighbours of all channels, as a generator."""
    return F.conv2d(x, x.new_ones(x.shape[1], x.shape[1], 3, 3), padding=1)


def test_golden_value():
    # of 1, 2, 4 the second is masked and the third void, so the generator sees 1, 0, 0 and gives 1, 1, 0
    # minus 0, 3, anything: squares 1 and 4 at the two valid positions, mean 2.5
    student, teacher = torch.tensor([[[[1.0, 2.0, 4.0]]]]).double(), torch.tensor([[[[0.0, 3.0, 100.0]]]]).double()
    keep, mask = torch.tensor([[True, False, True]]), torch.tensor([[[True, True, False]]])
    assert mgd_loss(student, teacher, box, keep=keep, mask=mask).item() == 2.5


def test_agrees_with_plain_loops():
    student, teacher, mask = randn(2, 2, 8, 6), randn(2, 2, 4, 3, seed=1), random_mask(2, 4, 3)
    mask[1, 2:] = False
    keep = random_mask(4, 3, seed=1)
    s, t, images = halved(student.numpy()), teacher.numpy(), []
    for b in range(2):
        seen = s[b] * (keep & mask[b]).numpy()
        errors = []
        for y, x in np.argwhere(mask[b].numpy()):
            around = [(v, u) for v in range(y - 1, y + 2) for u in range(x - 1, x + 2) if 0 <= v < 4 and 0 <= u < 3]
            generated = sum(seen[c, v, u] for c in range(2) for v, u in around)
            errors.append(sum((generated - t[b, c, y, x]) ** 2 for c in range(2)))
        images.append(np.mean(errors))
    assert mgd_loss(student, teacher, box, keep=keep, mask=mask).item() == pytest.approx(np.mean(images), rel=1e-12)


def test_the_documented_weight_gives_the_official_value_at_its_size():
    student, teacher, keep = randn(2, 2, 64, 64), randn(2, 2, 64, 64, seed=1), random_mask(64, 64, share=0.25)
    official = 2e-5 * (box(student * keep) - teacher).square().sum() / 2
    value = 0.08192 * mgd_loss(student, teacher, box, keep=keep)
    assert value.item() == pytest.approx(official.item(), rel=1e-12)


def test_the_generator_sees_a_quarter_of_the_positions_and_others_at_each_step():
    loss = MGDLoss(pair_of(SPECS, seed=1), level="stride_4")
    seen = []
    loss.generator.register_forward_hook(lambda module, given, output: seen.append(given[0].abs().sum(1) > 0))
    student, teacher, targets = outputs_of(SPECS, size=128)
    for _ in range(2):
        loss(student, teacher, targets)
        loss.after_step()
    (first, same), (second, _) = seen
    assert torch.equal(first, same) and not torch.equal(first, second)
    assert all(0.2 < x.float().mean() < 0.3 for x in (first, second))


def test_nothing_masked_is_the_plain_generator():
    loss = MGDLoss(pair_of(SPECS), masked=0)
    student, teacher, targets = outputs_of(SPECS)
    expected = (loss.generator(student.features["stride_8"]) - teacher.features["stride_8"]).square().sum(1).mean()
    value = loss(student, teacher, targets)["mgd"]
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
