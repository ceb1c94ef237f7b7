import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loss_references import borders_of_classes, labels_with_void, masks_of, pair_of, randn, random_labels
from torch import Tensor

from hf_bcd.losses import BGLSSegLoss, bglsseg_loss, kd_loss
from hf_bcd.losses.ops.borders import class_borders
from hf_bcd.outputs import DenseOutput, FeatureSpec, LabelMaps


def test_a_value_by_hand():
    labels = torch.tensor([[[0, 0, 0, 1, 255]]])  # 3 wide: columns 2 and 3 are border, column 4 is void
    scores = torch.tensor([math.log(3), 0, math.log(3), 0, 50]).view(1, 1, 1, 5)
    # a score of log 3 is a probability of 3/4: wrong in column 0, right in column 2
    classes, mask = masks_of(labels)
    expected = (math.log(4) + math.log(2) + math.log(4 / 3) + math.log(2)) / 4
    assert bglsseg_loss(scores, classes, mask=mask, width=3).item() == pytest.approx(expected, rel=1e-6)


def test_it_matches_loops():
    labels, scores = labels_with_void(), randn(2, 1, 12, 16)
    classes, mask = masks_of(labels)
    expected = 0.0
    for z, label in zip(scores.numpy()[:, 0], labels.numpy(), strict=True):
        border = borders_of_classes(label, 3, 2, 255).max(axis=0)
        signed = [z[i] if border[i] else -z[i] for i in np.ndindex(*label.shape) if label[i] != 255]
        expected += sum(math.log1p(math.exp(-x)) for x in signed) / len(signed) / 2
    assert bglsseg_loss(scores, classes, mask=mask, width=5).item() == pytest.approx(expected, rel=1e-9)


def output(features: Tensor, seed: int = 0) -> DenseOutput:
    return DenseOutput({"stride_4": features}, randn(len(features), 3, 6, 8, seed=seed, dtype=torch.float32))


def test_its_head_finds_borders_and_it_distils_beside():
    torch.manual_seed(0)
    labels = random_labels(4, 6, 8, num_labels=3).repeat_interleave(4, 1).repeat_interleave(4, 2)
    features = F.one_hot(labels, 3).movedim(-1, 1).float()
    loss = BGLSSegLoss(pair_of({"stride_4": FeatureSpec(3, 1)}), width=3)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.02)
    student, teacher = output(features), output(features, seed=1)
    for _ in range(30):
        optimizer.zero_grad()
        terms = loss(student, teacher, LabelMaps(labels, 3))
        terms["boundary"].backward()
        optimizer.step()
    share = class_borders(*masks_of(labels), width=3).mean().item()
    blind = -share * math.log(share) - (1 - share) * math.log(1 - share)  # of the best constant
    assert terms["boundary"].item() < 0.5 * blind
    assert terms["kd"] == kd_loss(student.logits, teacher.logits)


def test_its_head_sees_no_void():
    labels = labels_with_void()
    classes, mask = masks_of(labels)
    void = (labels == 255)[:, None].expand(-1, 3, -1, -1)
    loss = BGLSSegLoss(pair_of({"stride_4": FeatureSpec(3, 1)}), width=3)
    features, teacher = randn(2, 3, 12, 16, dtype=torch.float32), output(torch.zeros(2, 3, 12, 16), seed=1)
    found = [
        loss(output(features.masked_fill(void, value)), teacher, LabelMaps(labels, 3))["boundary"] for value in (0, 9)
    ]
    assert found[0] == found[1] == bglsseg_loss(loss.head(features.masked_fill(void, 0)), classes, mask=mask, width=3)


def test_its_head_reads_the_deepest_fine_level():
    dilated = {"stride_4": FeatureSpec(2, 4), "stride_8": FeatureSpec(3, 8), "stride_16": FeatureSpec(5, 8)}
    plain = dilated | {"stride_16": FeatureSpec(5, 16)}
    assert BGLSSegLoss(pair_of(dilated)).level == "stride_16" and BGLSSegLoss(pair_of(plain)).level == "stride_8"
    assert (
        BGLSSegLoss(pair_of({"stride_16": FeatureSpec(5, 16), "stride_32": FeatureSpec(7, 16)})).level == "stride_16"
    )
    assert BGLSSegLoss(pair_of(plain), level="stride_4").head[0].in_channels == 2
