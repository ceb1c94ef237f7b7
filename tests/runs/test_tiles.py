"""Tiles: they cover a picture, blend where they overlap, and say what one pass says where nothing is cut off."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hf_bcd.runs.tiles import predict_tiled, ramp, starts
from hf_bcd.utils.messages import UserError


class Brightness:
    """Two classes, decided by each pixel for itself; the logits have half the picture's size."""

    num_labels, image_mean = 2, torch.zeros(1)

    def __init__(self) -> None:
        self.shapes: set[tuple[int, ...]] = set()

    def __call__(self, pixel_values: torch.Tensor) -> Any:
        self.shapes.add(tuple(pixel_values.shape))
        bright = torch.nn.functional.avg_pool2d(pixel_values.float().mean(1, keepdim=True) - 127, 2)
        return SimpleNamespace(logits=torch.cat([-bright, bright], 1))


@pytest.mark.parametrize(
    ("length", "expected"), [(10, [0]), (8, [0]), (16, [0]), (17, [0, 1]), (28, [0, 12]), (30, [0, 12, 14])]
)
def test_tiles_cover_a_side(length: int, expected: list[int]) -> None:
    assert starts(length, 16, 4) == expected


def test_neighbours_weigh_one_together_where_they_overlap() -> None:
    weight = ramp(16, 4)
    torch.testing.assert_close(weight[12:] + weight[:4], torch.ones(4))
    assert weight[4:12].eq(1).all() and weight.min() > 0


@pytest.mark.parametrize("size", [(48, 70), (16, 16), (9, 40), (33, 7)])
def test_tiles_say_what_each_pixel_says(size: tuple[int, int]) -> None:
    blocks = np.random.default_rng(0).integers(0, 2, (-(-size[0] // 8), -(-size[1] // 8))) * 255
    pixels = np.kron(blocks, np.ones((8, 8)))[: size[0], : size[1], None].repeat(3, 2).astype(np.uint8)
    model: Any = Brightness()
    found = predict_tiled(model, pixels, 16, 4)
    assert found.shape == size and found.dtype == np.uint8 and model.shapes == {(1, 3, 16, 16)}
    inside = np.abs(found.astype(int) - pixels[..., 0] // 255)
    assert inside.mean() < 0.15 and found.any()


@pytest.mark.parametrize(("tile", "overlap"), [(16, 9), (16, -1), (0, 0)])
def test_tiles_must_advance(tile: int, overlap: int) -> None:
    with pytest.raises(UserError, match=f"--overlap is {overlap} and --tile {tile}"):
        predict_tiled(Brightness(), np.zeros((4, 4, 3), np.uint8), tile, overlap)  # type: ignore[arg-type]
