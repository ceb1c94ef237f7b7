"""Target-aware transformer (Lin et al., CVPR 2022, https://arxiv.org/abs/2205.10793)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..outputs import DenseOutput, Targets
from .base import DistillationLoss, Pair, check_positive
from .modules.connectors import Projection
from .ops.functional import (
    at_least_float32,
    full_precision,
    image_means,
    mask_fill_value,
    on_teacher_grid,
    pool_valid,
    spatial_size,
    standardize,
)


def _patch_groups(x: Tensor, patches: int, group: int) -> Tensor:
    """`[B, C, h, w]` -> `[B, groups, group, N, C]`, N positions in a patch; zeros fill the last patches."""
    height, width = (max(2, -(-side // patches)) for side in x.shape[-2:])
    x = F.pad(x, (0, -x.shape[-1] % (group * width), 0, -x.shape[-2] % height))
    x = x.unflatten(3, (-1, group, width)).unflatten(2, (-1, height))  # [B, C, rows, height, columns, group, width]
    return x.permute(0, 2, 4, 5, 3, 6, 1).flatten(4, 5).flatten(1, 2)


@full_precision
def tat_loss(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    target: Tensor,
    *,
    patches: int = 1,
    group: int = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """Target-aware transformer: every teacher position, rebuilt from all of the student's positions in its patch.

    `mean over images, valid positions i and channels of (sum_j softmax_j(q_i · k_j) v_j - t_i)²`. The grid is cut into
    patches of `max(2, ceil(side / patches))` positions along each axis, the last of them padded, so that a small grid
    has fewer patches; `group` neighbours along a row have one attention, of the sum of their `q_i · k_j`. It is not
    scaled, as in the official code, and holds `h · w · N` numbers an image, N positions in a patch.

    Args:
        query: student `[B, D, h, w]`.
        key: teacher behind a trained connector, `[B, D, h, w]`.
        value: student `[B, C, h, w]`.
        target: teacher `[B, C, h, w]`; receives no gradient.
        patches: number of patches along each axis, at most; 1 for attention over the whole map.
        group: number of patches with one attention.
        mask: `[B, h, w]`, True where valid: void positions are neither rebuilt nor looked at.

    Returns:
        Scalar >= 0; float32 or float64.

    Raises:
        ValueError: if the shapes disagree.
    """
    if query.shape != key.shape or not query.shape[-2:] == value.shape[-2:] == target.shape[-2:]:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)} and target "
            f"{tuple(target.shape)} must have one grid, query and key the same channels."
        )
    value, target, mask = on_teacher_grid(value, target, mask)
    void = ~mask[:, None]
    maps = (at_least_float32(x).masked_fill(void, 0) for x in (query, key, value, target))
    query, key, value, target = (_patch_groups(x, patches, group) for x in maps)
    valid = _patch_groups(mask[:, None], patches, group)
    scores = torch.einsum("bgpic,bgpjc->bgij", query, key)[:, :, None]
    attention = scores.masked_fill(~valid.mT, mask_fill_value(scores.dtype)).softmax(dim=-1)
    error = (attention @ value - target).square().mean(dim=-1)
    return image_means(error, valid[..., 0]).mean()


class Embedding(nn.Module):
    """1x1 convolution, standardised over the valid positions of each image, with a trained scale and shift.

    The official code normalises image by image as well: it feeds its batch normalisation one image at a time.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.projection = Projection(in_channels, out_channels, bias=False)
        self.weight = nn.Parameter(torch.ones(out_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(out_channels, 1, 1))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`[B, in_channels, h, w]` and `[B, h, w]` -> `[B, out_channels, h, w]`."""
        normed = standardize(self.projection(x), (2, 3), mask[:, None], over_ranks=False)
        return normed * self.weight + self.bias


class TATLoss(DistillationLoss):
    """`tat_loss` within groups of patches, and between anchors: means over the cells of a grid.

    The teacher's key is trained, as in the official code. It cannot collapse the loss: it only says where to look, and
    the target is the teacher's own map.

    Weights: α β = 0.1 · 1 and α γ = 0.1 · 0.4 of the official script for Pascal VOC and ResNet-18, whose reduction is
    this one. Its script for COCO-Stuff 10K has 0.6 for both, `patches` 32 and `group` 2.

    Args:
        patches: number of patches along each axis, at most, so that each has two positions or more; official 16.
        group: number of patches with one attention; 4, official 64 heads for 256 patches.
        anchors: number of anchors along each axis, at most; official 32.
        level: level name; the coarsest that both models have by default, the official code takes the decoder's.
    """

    weights = {"patch_group": 0.1, "anchor": 0.04}
    needs = frozenset({"features"})
    transfers = "features, each rebuilt from all of the student's"
    checked = (
        "official code (TaT-seg): same attention, normalisation, reduction and weights; padded, not cropped; voids"
    )
    reference = "lin2022knowledge"

    def __init__(
        self, pair: Pair, *, patches: int = 16, group: int = 4, anchors: int = 32, level: str | None = None
    ) -> None:
        super().__init__(pair)
        check_positive(patches=patches, group=group, anchors=anchors)
        self.patches, self.group, self.anchors = patches, group, anchors
        self.level = pair.level(level)
        ours, theirs = pair.channels(self.level)
        self.query, self.key, self.value = Embedding(ours, theirs), Embedding(theirs, theirs), Embedding(ours, theirs)
        self.key.bias.requires_grad_(False)  # softmax would cancel it

    def forward(self, student: DenseOutput, teacher: DenseOutput, targets: Targets) -> dict[str, Tensor]:
        ours, target = student.features[self.level], teacher.features[self.level]
        size = spatial_size(target)
        ours, target, mask = on_teacher_grid(ours, target, targets.valid(size), same_channels=False)
        maps = (self.query(ours, mask), self.key(target, mask), self.value(ours, mask), target)
        cell = (-(-size[0] // self.anchors), -(-size[1] // self.anchors))
        pooled = [pool_valid(x, mask, cell) for x in maps]
        return {
            "patch_group": tat_loss(*maps, patches=self.patches, group=self.group, mask=mask),
            "anchor": tat_loss(*(means for means, _ in pooled), mask=pooled[0][1]),
        }
