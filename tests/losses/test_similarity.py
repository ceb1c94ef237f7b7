"""SKD and IFVD: similarity of regions, and of positions to their class."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loss_references import masks_of, outputs_of, pair_of, randn, random_labels, random_mask

from hf_bcd.losses import IFVDLoss, SKDLoss, ifvd_loss, kd_loss, skd_loss
from hf_bcd.outputs import FeatureSpec


SPECS = {"stride_4": FeatureSpec(4, 4), "stride_8": FeatureSpec(6, 8)}


def test_skd_by_hand() -> None:
    """Four windows of one position each. All of the teacher's are alike, so each of its 16 cosines is 1.

    The student's are (1, 0), (0, 1), (1, 0), (0, 1): 8 cosines are 1 and 8 are 0, so the mean squared difference is 1/2.
    Without the last position, 9 cosines remain, 4 of them 0: 4/9.
    """
    student = torch.tensor([[1.0, 0, 3, 0], [0, 2, 0, 1]]).view(1, 2, 2, 2)
    teacher = torch.tensor([2.0, 1, 2, 5]).view(1, 1, 2, 2)
    assert skd_loss(student, teacher).item() == pytest.approx(1 / 2)
    mask = torch.tensor([[[True, True], [True, False]]])
    assert skd_loss(student, teacher, mask=mask).item() == pytest.approx(4 / 9)


def test_ifvd_by_hand() -> None:
    """Class 0 has the features (1, 0) and (0, 1) with the mean (1/2, 1/2), so both have the cosine 1 / √2.

    Class 1 has one position, which is its own mean: cosine 1. All cosines of the teacher's equal features are 1.
    Mean over the three positions: 2/3 · (1 - 1/√2)². The fourth position is void.
    """
    student = torch.tensor([[1.0, 0, 3, 7], [0, 1, 3, 0]]).view(1, 2, 2, 2)
    classes = masks_of(torch.tensor([[[0, 0], [1, 255]]]))[0]
    value = ifvd_loss(student, torch.ones(1, 1, 2, 2), classes).item()
    assert value == pytest.approx(2 / 3 * (1 - 1 / math.sqrt(2)) ** 2)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return a @ b / math.sqrt((a @ a) * (b @ b))


def skd_reference(student: np.ndarray, teacher: np.ndarray, mask: np.ndarray, nodes: int) -> float:
    height, width = mask.shape[1:]
    rows, columns = max(1, height // nodes), max(1, width // nodes)
    total = 0.0
    for s, t, m in zip(student, teacher, mask, strict=True):
        windows = []
        for y, x in np.ndindex(math.ceil(height / rows), math.ceil(width / columns)):
            part = np.s_[y * rows : (y + 1) * rows, x * columns : (x + 1) * columns]
            if m[part].any():
                windows.append([np.array([channel[part][m[part]].max() for channel in f]) for f in (s, t)])
        errors = [(cosine(a[0], b[0]) - cosine(a[1], b[1])) ** 2 for a in windows for b in windows]
        total += sum(errors) / len(errors) if errors else 0.0
    return total / len(student)


@pytest.mark.parametrize("side", [(8, 8), (9, 7), (65, 65), (1, 3)])
def test_skd_has_the_official_windows(side: tuple[int, int]) -> None:
    student, teacher = randn(2, 4, *side), randn(2, 6, *side, seed=1)
    kernel = [max(1, int(0.5 * length)) for length in side]  # CriterionPairWiseforWholeFeatAfterPool, scale 0.5

    def similarity(x: torch.Tensor) -> torch.Tensor:
        pooled = torch.nn.functional.max_pool2d(x, kernel, stride=kernel, padding=0, ceil_mode=True).flatten(2)
        unit = pooled / (pooled.norm(dim=1, keepdim=True) + 1e-8)
        return torch.einsum("icm,icn->imn", unit, unit)

    ours, theirs = similarity(student), similarity(teacher)
    expected = (ours - theirs).square().sum() / ours.shape[-1] ** 2 / len(ours)
    assert skd_loss(student, teacher).item() == pytest.approx(expected.item(), rel=1e-6)
    if side == (65, 65):
        assert ours.shape[-1] == 9


@pytest.mark.parametrize("nodes", [1, 2, 3, 4])
def test_skd_agrees_with_loops(nodes: int) -> None:
    student, teacher, mask = randn(3, 4, 5, 7), randn(3, 6, 5, 7, seed=1), random_mask(3, 5, 7, share=0.3)
    mask[0, :3, :4] = False  # a whole window of two a side
    mask[2] = False
    expected = skd_reference(student.numpy(), teacher.numpy(), mask.numpy(), nodes)
    assert skd_loss(student, teacher, nodes=nodes, mask=mask).item() == pytest.approx(expected, rel=1e-9)


def similarity(features: np.ndarray, labels: np.ndarray) -> list[float]:
    """Of every valid position, the cosine with the mean of its class; `[C, h, w]` and `[h, w]`."""
    found = []
    for y, x in np.argwhere(labels != 255):
        same = [features[:, v, u] for v, u in np.argwhere(labels == labels[y, x])]
        found.append(cosine(features[:, y, x], np.mean(same, axis=0)))
    return found


def test_ifvd_agrees_with_loops() -> None:
    student, teacher = randn(3, 4, 5, 6), randn(3, 7, 5, 6, seed=1)
    labels = random_labels(3, 5, 6, num_labels=4).masked_fill(~random_mask(3, 5, 6), 255)
    labels[1] = 255
    total = 0.0
    for s, t, image in zip(student.numpy(), teacher.numpy(), labels.numpy(), strict=True):
        errors = [(a - b) ** 2 for a, b in zip(similarity(s, image), similarity(t, image), strict=True)]
        total += sum(errors) / len(errors) if errors else 0.0
    classes = masks_of(labels, 6)[0]  # no image has the last two
    assert ifvd_loss(student, teacher, classes).item() == pytest.approx(total / 3, rel=1e-9)


def test_the_three_terms_of_skd() -> None:
    torch.manual_seed(0)
    loss = SKDLoss(pair_of(SPECS), discriminator_channels=2, nodes=4)
    student, teacher, targets = outputs_of(SPECS)
    targets.ids[:, :16] = 255
    coarse, fine = (targets.ids[:, step // 2 :: step, step // 2 :: step] != 255 for step in (8, 4))
    assert loss.adversary is not None and not any(p.requires_grad for p in loss.parameters())
    assert loss(student, teacher, targets) == {
        "pixel": kd_loss(student.logits, teacher.logits, mask=fine),
        "pair": skd_loss(student.features["stride_8"], teacher.features["stride_8"], nodes=4, mask=coarse),
        "holistic": loss.adversary(student.logits, teacher.logits, fine),
    }


def test_the_three_terms_of_ifvd() -> None:
    """The official KL divergence is PyTorch's mean over images, classes and positions."""
    torch.manual_seed(0)
    loss = IFVDLoss(pair_of(SPECS), discriminator_channels=2)
    student, teacher, targets = outputs_of(SPECS)
    terms, features = loss(student, teacher, targets), (student.features["stride_8"], teacher.features["stride_8"])
    official = F.kl_div(student.logits.log_softmax(1), teacher.logits.softmax(1), reduction="none").mean()
    assert terms.pop("kd").item() == pytest.approx(official.item(), rel=1e-5)
    assert loss.adversary is not None
    adversarial = loss.adversary(student.logits, teacher.logits)
    assert terms == {"variation": ifvd_loss(*features, targets.class_masks((4, 4))), "adversarial": adversarial}
    assert IFVDLoss(pair_of(SPECS), discriminator_channels=0).weights.keys() == {"variation", "kd"}
