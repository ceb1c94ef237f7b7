"""Tiles: they cover a picture, blend where they overlap, and hold no more than the overlap of two rows."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hf_bcd.runs.tiles import predict_tiled, ramp, spans
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


class Pixels:
    """A picture in memory; it notes what was read of it."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels, self.asked = pixels, list[tuple[int, int]]()
        self.height, self.width = pixels.shape[:2]

    def read(self, top: int, bottom: int) -> np.ndarray:
        self.asked.append((top, bottom))
        return self.pixels[top:bottom]


def tiled(model: Any, picture: Pixels, tile: int, overlap: int) -> np.ndarray:
    return np.concatenate(list(predict_tiled(model, picture, tile, overlap)))


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (10, [(0, 0)]),
        (16, [(0, 0)]),
        (17, [(0, 0), (1, 12)]),
        (28, [(0, 0), (12, 12)]),
        (30, [(0, 0), (12, 12), (14, 24)]),
    ],
)
def test_tiles_cover_a_side(length: int, expected: list[tuple[int, int]]) -> None:
    assert spans(length, 16, 4) == expected


def test_neighbours_weigh_one_together_where_they_overlap() -> None:
    weight = ramp(16, 4, False, False)
    torch.testing.assert_close(weight[12:] + weight[:4], torch.ones(4))
    assert weight[4:12].eq(1).all() and weight.min() > 0
    assert ramp(16, 4, True, True).eq(1).all() and ramp(16, 0, False, False).eq(1).all()


@pytest.mark.parametrize("overlap", [0, 4, 8])
@pytest.mark.parametrize("size", [(48, 70), (16, 16), (9, 40), (33, 7), (17, 17), (61, 16)])
def test_tiles_say_what_each_pixel_says(size: tuple[int, int], overlap: int) -> None:
    blocks = np.random.default_rng(0).integers(0, 2, (-(-size[0] // 8), -(-size[1] // 8))) * 255
    pixels = np.kron(blocks, np.ones((8, 8)))[: size[0], : size[1], None].repeat(3, 2).astype(np.uint8)
    model: Any = Brightness()
    picture = Pixels(pixels)
    found = tiled(model, picture, 16, overlap)
    assert found.shape == size and found.dtype == np.uint8 and model.shapes == {(1, 3, 16, 16)}
    inside = np.abs(found.astype(int) - pixels[..., 0] // 255)
    assert inside.mean() < 0.15 and found.any()
    ends = [0, *(bottom for _, bottom in picture.asked)]
    assert picture.asked == list(zip(ends, ends[1:], strict=False)) and ends[-1] == size[0]  # each row once, in order


class Places:
    """Scores that depend on the place in a tile and on its pixels, of any number of classes."""

    image_mean = torch.zeros(1)

    def __init__(self, num_labels: int) -> None:
        self.num_labels = num_labels
        kernel = torch.randn(num_labels, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        self.kernel = kernel - kernel.mean(dim=(1, 2, 3), keepdim=True)  # no class is ahead in all places

    def __call__(self, pixel_values: torch.Tensor) -> Any:
        return SimpleNamespace(logits=torch.nn.functional.conv2d(pixel_values / 255, self.kernel, stride=4))


@pytest.mark.parametrize("size", [(50, 70), (17, 40), (16, 16), (12, 30)])
def test_rows_of_tiles_give_what_all_tiles_together_give(size: tuple[int, int]) -> None:
    model: Any = Places(5)
    pixels = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    tall, wide = max(size[0], 16), max(size[1], 16)
    padded = np.pad(pixels, [(0, tall - size[0]), (0, wide - size[1]), (0, 0)], mode="edge")
    summed = torch.zeros(5, tall, wide)
    for place, (top, used) in enumerate(down := spans(tall, 16, 4)):
        for where, (left, start) in enumerate(along := spans(wide, 16, 4)):
            shown = torch.from_numpy(padded[top : top + 16, left : left + 16]).permute(2, 0, 1)[None]
            scores = torch.nn.functional.interpolate(model(shown).logits, (16, 16), mode="bilinear")[0].softmax(0)
            rows = ramp(16 - used + top, 4, place == 0, place == len(down) - 1)
            columns = ramp(16 - start + left, 4, where == 0, where == len(along) - 1)
            summed[:, used : top + 16, start : left + 16] += (rows[:, None] * columns) * scores[
                :, used - top :, start - left :
            ]
    torch.testing.assert_close(summed.sum(0), torch.ones(tall, wide))
    found = tiled(model, Pixels(pixels), 16, 4)
    np.testing.assert_array_equal(found, summed.argmax(0)[: size[0], : size[1]].numpy())
    assert len(np.unique(found)) == 5


def test_scores_that_wait_are_those_of_the_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = Places(40)
    made, zeros = list[int](), torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size: made.append(int(np.prod(size))) or zeros(*size))
    tiled(model, Pixels(np.zeros((60, 400, 3), np.uint8)), 16, 4)
    assert max(made) == 40 * 4 * 400


@pytest.mark.parametrize(("tile", "overlap"), [(16, 9), (16, -1), (0, 0)])
def test_tiles_must_advance(tile: int, overlap: int) -> None:
    with pytest.raises(UserError, match=f"--overlap is {overlap} and --tile {tile}"):
        tiled(Brightness(), Pixels(np.zeros((4, 4, 3), np.uint8)), tile, overlap)
