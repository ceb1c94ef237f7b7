import cmath
import math
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from loss_references import pair_of, randn, random_mask

from hf_bcd.losses.fam import FAMLoss, FrequencyAttention, fam_loss, spectral_filter
from hf_bcd.outputs import FeatureSpec


SPECS = {"stride_8": FeatureSpec(2, 8), "stride_16": FeatureSpec(3, 16)}


def frequency(k: int, side: int) -> float:
    """In cycles a position, from -1/2 to below 1/2."""
    return k / side if 2 * k < side else k / side - 1


def interpolated(nodes: np.ndarray, fy: float, fx: float) -> float:
    """Bilinear, nodes `[F, F]` evenly over [-1/2, 1/2]²."""
    last = len(nodes) - 1
    y, x = (fy + 0.5) * last, (fx + 0.5) * last
    top, left = min(int(y), last - 1), min(int(x), last - 1)
    y, x = y - top, x - left
    corners = nodes[top : top + 2, left : left + 2]
    return float(np.array([1 - y, y]) @ corners @ np.array([1 - x, x]))


def reference_filter(x: np.ndarray, spectrum: np.ndarray, cutoff: float) -> np.ndarray:
    """Of one image `[C, h, w]`: the discrete Fourier transform and its inverse as sums of waves."""
    _, height, width = x.shape
    out = np.zeros(x.shape, dtype=complex)
    places = list(np.ndindex(height, width))
    for c, channel in enumerate(x):
        for ky, kx in places:
            fy, fx = frequency(ky, height), frequency(kx, width)
            if abs(fy) < cutoff / 2 and abs(fx) < cutoff / 2:
                continue
            amplitude = sum(channel[y, u] * cmath.exp(-2j * math.pi * (fy * y + fx * u)) for y, u in places)
            weight = interpolated(spectrum[0, c], fy, fx) + 1j * interpolated(spectrum[1, c], fy, fx)
            for y, u in places:
                out[c, y, u] += weight * amplitude * cmath.exp(2j * math.pi * (fy * y + fx * u)) / len(places)
    return np.real(out)


def noisy(attention: FrequencyAttention) -> FrequencyAttention:
    for i, parameter in enumerate(attention.parameters()):
        parameter.data = randn(*parameter.shape, seed=40 + i)
    return attention


def test_golden_value():
    # without its mean, 5/2, (1, 2, 3, 4) is (-3, -1, 1, 3) / 2; W = exp(-2 pi i f) shifts it by one position along a
    # row: (3, -3, -1, 1) / 2. Its nodes -1/2, -1/4, 0, 1/4, 1/2 are W = -1, i, 1, -i, -1.
    spectrum = torch.tensor([[-1.0, 0, 1, 0, -1], [0, 1, 0, -1, 0]]).view(2, 1, 1, 5).expand(2, 1, 5, 5)
    x = torch.tensor([1.0, 2, 3, 4]).view(1, 1, 1, 4)
    expected = torch.tensor([1.5, -1.5, -0.5, 0.5]).view(1, 1, 1, 4)
    torch.testing.assert_close(spectral_filter(x, spectrum, 0.1), expected)


@pytest.mark.parametrize(("height", "width", "cutoff"), [(4, 6, 0.1), (5, 3, 0.1), (6, 5, 0.7)])
def test_the_filter_equals_sums_of_waves(height, width, cutoff):
    x, spectrum = randn(2, 2, height, width), randn(2, 2, 4, 4, seed=1)
    actual = spectral_filter(x, spectrum, cutoff).numpy()
    for image in range(2):
        expected = reference_filter(x[image].numpy(), spectrum.numpy(), cutoff)
        np.testing.assert_allclose(actual[image], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("side", "kept"), [(8, True), (20, True), (24, False)])
def test_up_to_twenty_positions_the_filter_removes_the_mean_only(side, kept):
    ones = torch.stack([torch.ones(1, 5, 5), torch.zeros(1, 5, 5)])
    wave = torch.cos(2 * math.pi * torch.arange(side) / side).expand(1, 1, side, side)  # the lowest frequency
    expected = wave if kept else torch.zeros_like(wave)
    torch.testing.assert_close(spectral_filter(3 + wave, ones, 0.1), expected, atol=1e-5, rtol=0)


def test_the_loss_equals_the_loops():
    attention = noisy(FrequencyAttention(2, 3, 4, 0.1).double())
    student, teacher, mask = randn(2, 2, 4, 5), randn(2, 3, 4, 5, seed=1), random_mask(2, 4, 5)
    weights = {name: value.detach().numpy() for name, value in attention.named_parameters()}
    mixed = np.zeros((2, 3, 4, 5))
    for image in range(2):
        x = student[image].numpy() * mask[image].numpy()
        filtered = reference_filter(x, weights["spectrum"], 0.1)
        for y, u in np.ndindex(4, 5):
            far = weights["mix.weight"][..., 0, 0] @ filtered[:, y, u]
            near = weights["local.weight"][..., 0, 0] @ x[:, y, u]
            mixed[image, :, y, u] = weights["rates"][0] * far + weights["rates"][1] * near
    valid = mask.numpy()
    errors: list[list[float]] = [[], []]
    for image, y, u in np.argwhere(valid):
        total = 0.0
        for c in range(3):
            seen = mixed[:, c][valid]  # of both images
            normed = (mixed[image, c, y, u] - seen.mean()) / (seen.std() + 1e-5)
            rectified = max(normed * weights["norm.weight"][c, 0, 0] + weights["norm.bias"][c, 0, 0], 0)
            total += (rectified - teacher[image, c, y, u].item()) ** 2 / 3
        errors[image].append(total)
    expected = sum(sum(image) / len(image) for image in errors) / 2
    assert fam_loss(student, teacher, attention, mask=mask).item() == pytest.approx(expected, rel=1e-9)


def test_the_filter_removes_what_varies_slowly_and_keeps_the_rest_at_first():
    attention = FrequencyAttention(1, 1, 17, 0.1).double()
    places = torch.arange(64).double()
    slow, fast = (torch.cos(2 * math.pi * cycles / 64 * places).expand(1, 1, 64, 64) for cycles in (3, 4))
    passed = spectral_filter(5 + slow + fast, attention.spectrum, attention.cutoff)
    torch.testing.assert_close(passed, fast)  # 3 / 64 < 0.1 / 2 < 4 / 64


def test_its_numbers_are_real_few_and_survive_a_file(tmp_path: Path):
    loss = FAMLoss(pair_of({"stride_8": FeatureSpec(6, 8)}, {"stride_8": FeatureSpec(10, 8)}), frequencies=5)
    parameters = dict(loss.named_parameters())
    assert not any(parameter.is_complex() for parameter in parameters.values())
    # spectrum, both 1x1 convolutions, scale and shift, two rates
    assert sum(parameter.numel() for parameter in parameters.values()) == 2 * 25 * 6 + 2 * 60 + 20 + 2
    noisy(loss.attention["stride_8"])  # type: ignore[arg-type]
    safetensors.torch.save_file(loss.state_dict(), tmp_path / "fam.safetensors")
    found = safetensors.torch.load_file(tmp_path / "fam.safetensors")
    assert all(torch.equal(found[name], value) for name, value in loss.state_dict().items())
