"""Structural and statistical texture distillation."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loss_references import outputs_of, pair_of, randn, random_mask
from torch import Tensor

from hf_bcd.losses import SSTKDLoss, kd_loss, sstkd_loss
from hf_bcd.losses.sstkd import contourlet, directional_bands, equalized_intensity
from hf_bcd.outputs import FeatureSpec, resize_nearest


SPECS = {"stride_4": FeatureSpec(4, 4), "stride_8": FeatureSpec(6, 8)}


def test_structure_by_hand() -> None:
    """Stripes of 1 and -1 have the mean 0 in each 2x2 block: all of them is detail, its mean square is 1.

    The second level sees a single 0. So one level gives 1 and the mean of two levels 1/2.
    """
    stripes = torch.tensor([[1.0, -1.0], [1.0, -1.0]]).view(1, 1, 2, 2)
    found = [sstkd_loss(stripes + 5, torch.zeros(1, 1, 2, 2), pyramid_levels=n)["structure"].item() for n in (1, 2)]
    assert found == pytest.approx([1, 1 / 2])


def test_intensity_by_hand() -> None:
    """Features (1, 0), (1, 0), (0, 1) have the mean (2, 1) / 3 and the cosines 2, 2 and 1 with it, over √5.

    Two levels: one position at the lower, two at the upper. Their equalised values are half of 1/3, and 1/3 plus half of
    2/3. The fourth position is void.
    """
    features = torch.tensor([[1.0, 1, 0, -9], [0, 0, 1, 5]]).view(1, 2, 2, 2)
    mask = torch.tensor([[[True, True], [True, False]]])
    found = equalized_intensity(features, mask, levels=2).flatten()[:3].tolist()
    assert found == pytest.approx([2 / 3, 2 / 3, 1 / 6])


@pytest.mark.parametrize(
    ("rows", "columns", "band"), [(0, 2, 0), (1, 1, 1), (2, 0, 2), (1, -1, 3), (1, 3, 0), (3, 1, 2)]
)
def test_a_wave_goes_to_the_band_of_its_direction(rows: int, columns: int, band: int) -> None:
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    wave = torch.cos(2 * math.pi * (rows * y + columns * x) / 8).view(1, 1, 8, 8)
    energy = directional_bands(wave, 4).square().sum(dim=(1, 2, 3, 4))
    assert energy.argmax() == band and energy[band] == pytest.approx(32, rel=1e-5)
    assert energy.sum() == pytest.approx(32, rel=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 6)])
def test_bands_are_orthogonal_and_add_up(size: tuple[int, int]) -> None:
    x = randn(2, 3, *size)
    bands = directional_bands(x, 6)
    torch.testing.assert_close(bands.sum(dim=0), x)
    products = torch.einsum("ibcyx,jbcyx->ij", bands, bands)
    if size[1] % 2:  # waves of half the sampling rate have two directions
        torch.testing.assert_close(products, products.diagonal().diag(), atol=1e-9, rtol=0)


def test_structure_against_full_fourier_transforms() -> None:
    student, teacher, mask = randn(2, 3, 9, 13), randn(2, 3, 9, 13, seed=1), random_mask(2, 9, 13)
    difference, levels = (student - teacher) * mask[:, None], []
    for height, width in ((9, 13), (5, 7)):
        low = F.interpolate(difference, (height // 2 + 1, width // 2 + 1), mode="bilinear")
        high = (difference - F.interpolate(low, (height, width), mode="bilinear")).numpy()
        difference, total = low, 0.0
        for image, valid in zip(high, resize_nearest(mask, (height, width)).numpy(), strict=True):
            squares = np.zeros((height, width))
            for channel in image:
                spectrum = np.fft.fft2(channel)
                for band in range(4):
                    kept = np.zeros_like(spectrum)
                    for v, u in np.ndindex(height, width):
                        # frequencies above a half are negative ones; opposite ones make one wave
                        angle = math.atan2(v / height - (v > height // 2), u / width - (u > width // 2)) % math.pi
                        beside = min(abs(angle - turn - band * math.pi / 4) for turn in (0, math.pi))
                        if beside < math.pi / 8:
                            kept[v, u] = spectrum[v, u]
                    squares += np.fft.ifft2(kept).real ** 2 / 3
            total += squares[valid].sum() / valid.sum()
        levels.append(total / 2)
        found = sstkd_loss(student, teacher, pyramid_levels=len(levels), mask=mask)["structure"].item()
        assert found == pytest.approx(np.mean(levels), rel=1e-9)


def intensity(features: np.ndarray, mask: np.ndarray, levels: int) -> dict[tuple[int, ...], float]:
    """Valid position -> equalised intensity, `[C, h, w]` and `[h, w]`."""
    valid = {i: features[:, i[0], i[1]] for i in np.ndindex(*mask.shape) if mask[i]}
    mean = np.mean(list(valid.values()), axis=0)
    cosines = {i: f @ mean / math.sqrt((f @ f) * (mean @ mean)) for i, f in valid.items()}
    lowest, highest = min(cosines.values()), max(cosines.values())
    shares = [0.0] * levels
    belongs = {}
    for i, cosine in cosines.items():
        place = (cosine - lowest) / (highest - lowest) * (levels - 1)
        below = min(math.floor(place), levels - 2)
        belongs[i] = {below: 1 - (place - below), below + 1: place - below}
        for level, part in belongs[i].items():
            shares[level] += part / len(cosines)
    value = [sum(shares[:level]) + shares[level] / 2 for level in range(levels)]
    return {i: sum(part * value[level] for level, part in parts.items()) for i, parts in belongs.items()}


def test_statistics_agree_with_loops() -> None:
    student, teacher, mask = randn(2, 3, 5, 7), randn(2, 3, 5, 7, seed=1), random_mask(2, 5, 7)
    total = 0.0
    for s, t, valid in zip(student.numpy(), teacher.numpy(), mask.numpy(), strict=True):
        ours, theirs = intensity(s, valid, 6), intensity(t, valid, 6)
        total += sum((ours[i] - theirs[i]) ** 2 for i in ours) / len(ours)
    found = sstkd_loss(student, teacher, intensity_levels=6, mask=mask)["statistics"].item()
    assert found == pytest.approx(total / 2, rel=1e-9)


def test_levels_have_the_sizes_of_a_pyramid() -> None:
    bands: list[Tensor] = contourlet(randn(2, 3, 7, 5), levels=4, directions=8)
    assert [x.shape for x in bands] == [(8, 2, 3, *size) for size in ((7, 5), (4, 3), (2, 2), (1, 1))]


def test_its_four_terms() -> None:
    torch.manual_seed(0)
    loss = SSTKDLoss(pair_of(SPECS), discriminator_channels=2)
    student, teacher, targets = outputs_of(SPECS)
    terms = loss(student, teacher, targets)
    texture = sstkd_loss(student.features["stride_4"], teacher.features["stride_4"])
    assert torch.equal(terms["structure"], texture["structure"]) and torch.equal(
        terms["statistics"], texture["statistics"]
    )
    assert torch.equal(terms["response"], kd_loss(student.logits, teacher.logits))
    assert loss.adversary is not None
    assert torch.equal(terms["adversarial"], loss.adversary(student.logits, teacher.logits))
