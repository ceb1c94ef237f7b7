"""Borders between classes, and the losses that look at them."""

import math

import numpy as np
import pytest
import torch
from loss_references import (
    borders_of_classes,
    divergence,
    labels_with_void,
    masks_of,
    pair_of,
    randn,
    random_labels,
    softmax,
)
from torch import Tensor

from hf_bcd.losses import BGLSSegLoss, SlimSegLoss, bglsseg_loss, bpkd_loss, cwd_loss, kd_loss, slimseg_loss
from hf_bcd.losses.ops.borders import class_border_shares, class_borders
from hf_bcd.losses.ops.functional import spatial_size
from hf_bcd.outputs import DenseOutput, FeatureSpec, LabelMaps


LOG2, LOG3, LOG4 = math.log(2), math.log(3), math.log(4)


def test_a_border_by_hand():
    # 3 wide: columns 2 and 3 see both classes; no border between 1 and void, nor at the edge of the image
    labels = torch.tensor([[[0, 0, 0, 1, 1, 255, 0]]])
    assert class_borders(*masks_of(labels), width=3).int().tolist() == [[[0, 0, 1, 1, 0, 0, 0]]]
    # 5 wide: columns 1 to 4, and the last one sees 1 across the void
    assert class_borders(*masks_of(labels), width=5).int().tolist() == [[[0, 1, 1, 1, 1, 0, 1]]]


@pytest.mark.parametrize(("width", "void"), [(3, 255), (7, 255), (7, 3), (3, -1)])
def test_borders_match_loops(width, void):
    labels = labels_with_void()
    labels = labels.masked_fill(labels == 255, void)
    expected = np.stack([borders_of_classes(one, 3, width // 2, void) for one in labels.numpy()])
    borders = class_borders(*masks_of(labels, 3, void), width=width)
    assert borders.any() and not borders.all()
    np.testing.assert_array_equal(borders.numpy(), expected.any(axis=1))
    # cells of 1 x 1 and of 4 x 8 pixels
    for size, cells in (((12, 16), expected), ((3, 2), expected.reshape(2, 3, 3, 4, 2, 8).mean(axis=(3, 5)))):
        shares = class_border_shares(*masks_of(labels, 3, void), size, width=width)
        np.testing.assert_allclose(shares.numpy(), cells, rtol=1e-6)


def test_grids_that_do_not_divide_the_image_keep_shares():
    shares = class_border_shares(*masks_of(labels_with_void()), (5, 7))
    assert shares.shape == (2, 3, 5, 7) and shares.min() >= 0 and shares.max() <= 1


@pytest.mark.parametrize("width", [1, 4, -3])
def test_windows_without_a_centre_or_a_neighbour_are_refused(width):
    with pytest.raises(ValueError, match=f"width is {width}"):
        class_borders(*masks_of(labels_with_void()), width=width)


# ---- supervision: SlimSeg at borders, BGLSSeg of borders ---------------------------------------------------------------


def supervision(loss, scores: Tensor, labels: Tensor, width: int) -> float:
    classes, mask = masks_of(labels)
    return loss(scores, classes, mask=mask, width=width).item()


def test_supervision_by_hand():
    # 3 wide: columns 2 and 3 are the border. In column 2 the true class has 3/4; column 0 is wrong, but away from it
    labels, logits = torch.tensor([[[0, 0, 0, 1, 1, 1]]]), torch.zeros(1, 2, 1, 6).double()
    logits[0, 0, 0, 2], logits[0, 1, 0, 0] = LOG3, 50
    value = slimseg_loss(logits, masks_of(labels, 2)[0], mask=labels < 255, width=3)
    assert value.item() == pytest.approx((math.log(4 / 3) + LOG2) / 2, rel=1e-6)
    # a score of log 3 is a probability of 3/4: wrong in column 0, right in column 2; column 4 is void
    labels, scores = torch.tensor([[[0, 0, 0, 1, 255]]]), torch.tensor([LOG3, 0, LOG3, 0, 50]).view(1, 1, 1, 5)
    expected = (LOG4 + LOG2 + math.log(4 / 3) + LOG2) / 4
    assert supervision(bglsseg_loss, scores, labels, 3) == pytest.approx(expected, rel=1e-6)


def test_supervision_matches_loops():
    labels, logits, scores = labels_with_void(), randn(2, 3, 12, 16), randn(2, 1, 12, 16)
    of_classes, of_borders = [], []
    for z, score, label in zip(logits.numpy(), scores.numpy()[:, 0], labels.numpy(), strict=True):
        border = borders_of_classes(label, 3, 2, 255).max(axis=0)
        found = [-math.log(softmax(z[:, y, x])[label[y, x]]) for y, x in np.argwhere(border)]
        of_classes.append(sum(found) / len(found))
        signed = [score[i] if border[i] else -score[i] for i in np.ndindex(*label.shape) if label[i] != 255]
        of_borders.append(sum(math.log1p(math.exp(-x)) for x in signed) / len(signed))
    assert supervision(bglsseg_loss, scores, labels, 5) == pytest.approx(sum(of_borders) / 2, rel=1e-9)
    assert supervision(slimseg_loss, logits, labels, 5) == pytest.approx(sum(of_classes) / 2, rel=1e-9)
    labels[1] = 2  # an image without a border counts 0
    assert supervision(slimseg_loss, logits, labels, 5) == pytest.approx(of_classes[0] / 2, rel=1e-9)


def output(features: Tensor, seed: int = 0) -> DenseOutput:
    return DenseOutput({"stride_4": features}, randn(len(features), 3, 12, 16, seed=seed, dtype=torch.float32))


def test_both_methods_distil_beside_it_and_a_head_sees_no_void():
    labels = labels_with_void()
    targets, (classes, mask) = LabelMaps(labels, 3), masks_of(labels)
    void = (labels == 255)[:, None].expand(-1, 3, -1, -1)
    features, teacher = randn(2, 3, 12, 16, dtype=torch.float32), output(torch.zeros(2, 3, 12, 16), seed=1)
    pair = pair_of({"stride_4": FeatureSpec(3, 1)})
    slim, head = SlimSegLoss(pair, temperature=2, width=3), BGLSSegLoss(pair, temperature=2, width=3)
    for value in (0, 9):
        student = output(features.masked_fill(void, value))
        expected = kd_loss(student.logits, teacher.logits, temperature=2, mask=mask)
        terms = slim(student, teacher, targets)
        assert terms == {"kd": expected, "boundary": slimseg_loss(student.logits, classes, mask=mask, width=3)}
        boundary = bglsseg_loss(head.head(features.masked_fill(void, 0)), classes, mask=mask, width=3)
        assert head(student, teacher, targets) == {"kd": expected, "boundary": boundary}


def test_bglssegs_head_reads_the_deepest_fine_level():
    dilated = {"stride_4": FeatureSpec(2, 4), "stride_8": FeatureSpec(3, 8), "stride_16": FeatureSpec(5, 8)}
    plain = dilated | {"stride_16": FeatureSpec(5, 16)}
    coarse = {"stride_16": FeatureSpec(5, 16), "stride_32": FeatureSpec(7, 16)}
    found = [BGLSSegLoss(pair_of(specs)).level for specs in (dilated, plain, coarse)]
    assert found == ["stride_16", "stride_8", "stride_16"]
    assert BGLSSegLoss(pair_of(plain), level="stride_4").head[0].in_channels == 2


# ---- distillation: BPKD --------------------------------------------------------------------------------------------------


def bpkd(student: Tensor, teacher: Tensor, labels: Tensor, width: int = 7, **options) -> dict[str, float]:
    targets, size = LabelMaps(labels, teacher.shape[1]), spatial_size(teacher)
    edges = class_border_shares(*masks_of(labels, teacher.shape[1]), size, width=width)
    terms = bpkd_loss(student, teacher, edges, mask=targets.valid(size), **options)
    return {term: value.item() for term, value in terms.items()}


def test_bpkd_by_hand():
    labels = torch.tensor([[[0, 0, 0, 1, 1, 1]]])  # 3 wide: columns 2 and 3 are the border of both classes
    teacher, student = torch.zeros(1, 2, 1, 6), torch.zeros(1, 2, 1, 6)
    teacher[0, 0, 0, 0] = teacher[0, 0, 0, 2] = LOG3
    # body: column 2 is edge, so class 0 is (3, 1, 1, 1, 1, 1)/8 for the teacher and 1/6 each for the student; class 1
    #       agrees. Mean of the two.
    body = (3 / 8 * math.log(3 / 8 * 6) + 5 / 8 * math.log(1 / 8 * 6)) / 2
    # edge: column 2 has (3/4, 1/4) against (1/2, 1/2), column 3 agrees; each class takes the mean of the two columns,
    #       and the classes are added.
    edge = 2 * (3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2)) / 2
    terms = bpkd(student, teacher, labels, temperature=1, width=3)
    assert terms == pytest.approx({"body": body, "edge": edge}, rel=1e-6)


def bpkd_reference(
    student: np.ndarray, teacher: np.ndarray, labels: np.ndarray, reach: int, tau: float
) -> dict[str, float]:
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
    return {"body": body / batch, "edge": edge / batch}


@pytest.mark.parametrize(("width", "tau"), [(3, 4.0), (7, 1.5)])
def test_bpkd_matches_loops(width, tau):
    labels = random_labels(3, 4, 4, num_labels=3).repeat_interleave(5, 1).repeat_interleave(5, 2)
    labels[0, 3:9, 6:20] = 255
    labels[1] = 255
    student, teacher = 3 * randn(3, 3, 5, 5), 3 * randn(3, 3, 5, 5, seed=1)
    expected = bpkd_reference(student.numpy(), teacher.numpy(), labels.numpy(), width // 2, tau)
    assert min(expected.values()) > 0.1
    assert bpkd(student, teacher, labels, temperature=tau, width=width) == pytest.approx(expected, rel=1e-9)


def test_bpkds_body_without_a_border_is_channel_wise_distillation():
    student, teacher = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    terms = bpkd(student, teacher, torch.ones(2, 16, 16, dtype=torch.long), temperature=2)
    expected = {"body": cwd_loss(student, teacher, temperature=2).item(), "edge": 0}
    assert terms == pytest.approx(expected, rel=1e-12)
