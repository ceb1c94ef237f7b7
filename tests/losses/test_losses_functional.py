import math

import pytest
import torch
from loss_references import randn, random_mask

from hf_bcd.losses.ops.functional import resize, standardize
from hf_bcd.outputs import resize_nearest


def test_resize_has_half_pixel_centres():
    x = torch.tensor([[[[0.0, 4.0]]]])
    # centres of four target pixels in source coordinates: -1/4, 1/4, 3/4, 5/4
    assert resize(x, (1, 4)).flatten().tolist() == [0, 1, 3, 4]
    assert resize(x, (1, 2)) is x


@pytest.mark.parametrize("size", [(3, 5), (8, 8), (16, 4), (5, 12), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_resize_nearest_takes_the_pixel_under_the_centre(size, dtype):
    x = (torch.arange(2 * 8 * 12).view(2, 8, 12) % 256).to(dtype)
    resized = resize_nearest(x, size)
    assert resized.dtype == dtype
    for y in range(size[0]):
        for x_ in range(size[1]):
            source = math.floor((y + 0.5) * 8 / size[0]), math.floor((x_ + 0.5) * 12 / size[1])
            assert torch.equal(resized[:, y, x_], x[:, source[0], source[1]])
    assert resize_nearest(torch.full((1, 4, 4), 2**53 + 1), (2, 2)).unique().tolist() == [
        2**53 + 1
    ]  # large ids remain


@pytest.mark.parametrize("masked", [False, True])
def test_standardize(masked):
    x, mask = randn(2, 3, 4, 5) * 3 + 7, random_mask(2, 4, 5)
    valid = mask if masked else torch.ones_like(mask)
    for dims, parts in (((0, 2, 3), x.split(1, dim=1)), ((0, 1, 2, 3), [x])):  # per channel, and over everything
        actual = standardize(x, dims, mask[:, None] if masked else None)
        for part, found in zip(parts, actual.split(3 // len(parts), dim=1), strict=True):
            values = part.movedim(1, -1)[valid]
            torch.testing.assert_close(found, (part - values.mean()) / (values.std(correction=0) + 1e-5))


def test_standardize_of_a_constant_is_zero_with_a_finite_gradient():
    x = torch.full((1, 3, 3), 5.0, requires_grad=True)
    y = standardize(x, (0, 1, 2))
    (y * torch.arange(9.0).view(1, 3, 3)).sum().backward()
    assert not y.any()
    assert x.grad is not None and torch.isfinite(x.grad).all()
