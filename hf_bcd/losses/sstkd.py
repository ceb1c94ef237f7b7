"""Structural and statistical texture distillation (Ji et al., CVPR 2022, https://arxiv.org/abs/2305.03944)."""

import math
from typing import Literal

import torch
from torch import Tensor

from ..outputs import DenseOutput, Targets, resize_nearest
from ..utils.messages import UserError
from .base import Pair, check_positive
from .modules.adversarial import AdversarialLoss
from .modules.connectors import FeaturePair
from .ops.functional import class_similarity, full_precision, image_means, on_teacher_grid, resize, spatial_size


def directional_bands(x: Tensor, directions: int) -> Tensor:
    """Directional filter bank: ideal wedges of the frequency plane, centred at multiples of π / directions.

    `[B, C, h, w]`, read as periodic, gives `[directions, B, C, h, w]` with the sum `x`; bands are orthogonal but for
    waves of half the sampling rate.
    """
    height, width = spatial_size(x)
    options = {"dtype": x.dtype, "device": x.device}
    rows, columns = torch.fft.fftfreq(height, **options), torch.fft.rfftfreq(width, **options)
    wedge = (torch.atan2(rows[:, None], columns) * (directions / math.pi)).round() % directions
    chosen = wedge == torch.arange(directions, device=x.device)[:, None, None]
    return torch.fft.irfft2(torch.fft.rfft2(x) * chosen[:, None, None], s=(height, width))


def contourlet(x: Tensor, *, levels: int = 2, directions: int = 4) -> list[Tensor]:
    """Contourlet decomposition: the directional bands of each level of a Laplacian pyramid.

    A level is `x - up(down(x))` with bilinear halving and doubling, and the next level that of `down(x)`. Bands are not
    decimated: `[B, C, h, w]` gives `[directions, B, C, h / 2^level, w / 2^level]` a level, sizes rounded up.
    """
    bands = []
    for _ in range(levels):
        low = resize(x, (-(-x.shape[-2] // 2), -(-x.shape[-1] // 2)))
        bands.append(directional_bands(x - resize(low, spatial_size(x)), directions))
        x = low
    return bands


def equalized_intensity(features: Tensor, mask: Tensor, *, levels: int = 128) -> Tensor:
    """Quantised and equalised texture intensity: how much of the image is less intense.

    A position's intensity is the cosine between its feature and the image's mean feature. `levels` levels lie evenly
    between the smallest and the largest; a position belongs to the two around it, by how near they are. A level's
    equalised value is the fraction of positions below it and half of its own, as in histogram equalisation, and a
    position's that of its two levels.

    Features `[B, C, h, w]` and mask `[B, h, w]` give `[B, h, w]` in [0, 1], of no meaning where void.
    """
    intensity, valid = class_similarity(features, mask[:, None]).flatten(1), mask.flatten(1)
    # a cosine lies within -1 and 1
    lowest = intensity.masked_fill(~valid, 2).amin(dim=1, keepdim=True)
    highest = intensity.masked_fill(~valid, -2).amax(dim=1, keepdim=True)
    step = ((highest - lowest) / (levels - 1)).clamp_min(1e-4)  # finite for an even image
    place = (intensity - lowest) / step
    belongs = 1 - (place[:, :, None] - torch.arange(levels, device=features.device)).abs()
    belongs = belongs.clamp_min(0).masked_fill(~valid[:, :, None], 0)
    fraction = belongs.sum(dim=1) / valid.sum(dim=1, keepdim=True).clamp_min(1)
    return (belongs @ (fraction.cumsum(dim=1) - fraction / 2)[:, :, None]).view_as(mask)


@full_precision
def sstkd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    pyramid_levels: int = 2,
    directions: int = 4,
    intensity_levels: int = 128,
    mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """Structural and statistical texture distillation of low-level features.

    - `structure`: mean over images, pyramid levels, valid positions and channels of the squared difference of
      `contourlet`, summed over directions.
    - `statistics`: mean over images and valid positions of that of `equalized_intensity`.

    Args:
        student: `[B, C, h, w]`; `teacher` and `mask` are as in `on_teacher_grid`.
        pyramid_levels: levels of the Laplacian pyramid, > 0.
        directions: bands of a level, > 0.
        intensity_levels: levels of intensity, >= 2.

    Returns:
        The two terms, scalars >= 0, 0 for equal features; float32 or float64.
    """
    student, teacher, mask = on_teacher_grid(student, teacher, mask)
    # the decomposition is linear: once, of the difference
    difference = (student - teacher).masked_fill(~mask[:, None], 0)
    structure = [
        image_means(bands.square().sum(dim=0).mean(dim=1), resize_nearest(mask, spatial_size(bands))).mean()
        for bands in contourlet(difference, levels=pyramid_levels, directions=directions)
    ]
    ours, theirs = (equalized_intensity(x, mask, levels=intensity_levels) for x in (student, teacher))
    statistics = image_means((ours - theirs).square(), mask).mean()
    return {"structure": torch.stack(structure).mean(), "statistics": statistics}


class SSTKDLoss(AdversarialLoss):
    """Defined here as `sstkd_loss` with `kd_loss` (response) and an `Adversary`, because no official code exists.

    Contourlet, ours: a pyramid of bilinear halvings and ideal directional filters without decimation; these are
    orthogonal, so away from void pixels the sum over directions is the energy of the pyramid's level. Denoised texture
    intensity equalisation, ours: intensities and levels of STLNet's quantise-and-count (its official code has 128 levels);
    its cut, which counts a position fully or not at all, is a linear weight, so that noise moves a count a little; and
    plain histogram equalisation stands for its learned reasoning between levels, so this term has no parameters.
    The weights have not been verified: 10 and 0.001 are `SKDLoss`'s, 0.9 and 1.15 follow the paper as far as we
    know.

    Args:
        level: level of the texture; the finest that both models have by default.
        pyramid_levels: levels of the Laplacian pyramid; our choice.
        directions: directional bands of a level; our choice.
        intensity_levels: levels of intensity.
        discriminator_channels: width of the discriminator; 64 as in SKD, 0 leaves the adversarial term out.
        on: `pixels`, or `boxes`: the response of a dense detector's priors, see `box_response_loss`, and no adversary; or `features`
            of models with neither, which leaves the texture.
    """

    weights = {"structure": 0.9, "statistics": 1.15, "response": 10.0, "adversarial": 0.001}
    borrowed = frozenset({"response", "adversarial"})
    needs = frozenset({"logits", "features"})
    transfers = (
        "low-level texture: directional detail and intensity statistics; class scores and their look as a whole"
    )
    checked = (
        "no official code: our reading of contourlet decomposition and, after STLNet's code, of intensity equalisation "
        "(without learned layers); weights unverified"
    )
    response = "response"
    reference = "ji2022structural"

    def __init__(
        self,
        pair: Pair,
        *,
        level: str | None = None,
        pyramid_levels: int = 2,
        directions: int = 4,
        intensity_levels: int = 128,
        discriminator_channels: int = 64,
        on: Literal["pixels", "boxes", "features"] = "pixels",
    ) -> None:
        super().__init__(pair, discriminator_channels, on)
        check_positive(pyramid_levels=pyramid_levels, directions=directions)
        if intensity_levels < 2:
            raise UserError(f"intensity_levels is {intensity_levels!r}; it must be >= 2.")
        self.pair = FeaturePair(pair, next(iter(pair.levels), None) if level is None else level)
        self.options = {
            "pyramid_levels": pyramid_levels,
            "directions": directions,
            "intensity_levels": intensity_levels,
        }

    def forward(self, student: DenseOutput, teacher: DenseOutput, targets: Targets) -> dict[str, Tensor]:
        ours, theirs = self.pair(student.features, teacher.features)
        texture = sstkd_loss(ours, theirs, mask=targets.valid(spatial_size(theirs)), **self.options)
        return texture | self.responses(student, teacher, targets)
