"""The number that stands for the code of the training transform: whoever changes what a seed gives must raise it.

    python tests/data/test_views_version.py

writes what the present code gives as `views.json`, of the present `VIEWS_VERSION`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import Dataset
from torchvision import tv_tensors

from hf_bcd import BCDConfig
from hf_bcd.data import transforms
from hf_bcd.data.dataset import TransformedDataset
from hf_bcd.data.masks import to_rle
from hf_bcd.tasks import TASKS


GOLDEN = Path(__file__).with_name("views.json")
SIZE, VIEWS, EVERY = (44, 60), 3, 7
LEVELS = 2  # that a picture's pixel may differ by, where platforms round otherwise


class Drawn(Dataset[Any]):
    """Two pictures of waves that are the same for all times, with a class for each block and boxes around some."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, Any]:
        y, x = np.mgrid[: SIZE[0], : SIZE[1]]
        waves = [np.sin(x / (3 + index) + channel) * np.cos(y / (4 + channel)) for channel in range(3)]
        image = np.stack([127.5 + 90 * wave for wave in waves], -1).astype(np.uint8)
        blocks = (y // 11 + 3 * (x // 15) + index) % 6
        boxes = np.array([[3, 4, 30, 20], [20, 10, 58, 40], [1, 30, 12, 43]], np.float32)
        corners = [[[float(b[side]) for side in (0, 1, 2, 1, 2, 3)]] for b in boxes]  # of a triangle in each
        masks = [to_rle(corner, *SIZE, "drawn") for corner in corners]
        sizes = boxes[:, 2:] - boxes[:, :2]
        return {
            "image": image, "label": blocks.astype(np.uint8), "boxes": boxes, "classes": np.array([0, 1, 1]),
            "areas": sizes.prod(1), "crowd": np.array([False, False, True]), "masks": masks,
        }  # fmt: skip


OPTIONS = {
    "semantic-segmentation": {"crop_size": 40, "image_size": 40, "class_crops": 0.5},
    "object-detection": {"square_size": 48, "color_jitter": 0.3},
    "instance-segmentation": {"train_shortest": [32, 48], "image_size": 48, "image_longest": 64},
}


def made(task: str) -> list[dict[str, Any]]:
    """What the transform of a task makes of the pictures: every few pixels, and all that is no picture."""
    args = BCDConfig("unused", use_cpu=True, report_to="none", **OPTIONS[task])
    views = TransformedDataset(Drawn(), TASKS[task].train_transform(args), seed=3)
    found = []
    for view in range(VIEWS):
        for index in range(2):
            tensors = views.view(index, view)
            tensors.pop("index")
            thin = {
                name: x[..., ::EVERY, ::EVERY] if name in ("pixel_values", "labels") else x
                for name, x in tensors.items()
            }
            found.append({name: x.tolist() for name, x in sorted(thin.items())})
    return found


def differs(now: list[dict[str, Any]], then: list[dict[str, Any]]) -> list[str]:
    """Names of what is not the same in all views."""
    wrong = set[str]()
    for ours, theirs in zip(now, then, strict=True):
        for name in ours.keys() | theirs.keys():
            first, second = (np.array(x.get(name), float) for x in (ours, theirs))
            tolerance = LEVELS if name == "pixel_values" else 1e-3
            if first.shape != second.shape or (first.size and np.abs(first - second).max() > tolerance):
                wrong.add(name)
    return sorted(wrong)


@pytest.mark.parametrize("task", OPTIONS)
def test_views_are_those_of_their_version(task: str) -> None:
    golden = json.loads(GOLDEN.read_text())
    wrong = differs(made(task), golden["views"][task])
    assert golden["version"] == transforms.VIEWS_VERSION and not wrong, (
        f"{', '.join(wrong) or 'the number'} of {task} is not that of version {golden['version']}: stored teachers of it would be "
        f"read beside other views. Raise VIEWS_VERSION and run `python {Path(__file__).name}`."
    )


def _other_flip(monkeypatch: Any) -> None:
    plain = transforms.F.horizontal_flip
    monkeypatch.setattr(transforms.F, "horizontal_flip", lambda x: plain(x) if isinstance(x, tv_tensors.Image) else x)


def _other_order(monkeypatch: Any) -> None:
    monkeypatch.setattr(
        transforms, "_uniform", lambda low, high: high - (high - low) * transforms.torch.rand(()).item()
    )


def _other_colours(monkeypatch: Any) -> None:
    plain = transforms.adjust_colours
    monkeypatch.setattr(transforms, "adjust_colours", lambda x, b, c, s: plain(x, c, b, s))


@pytest.mark.parametrize(("change", "named"), [
    (_other_flip, "labels"), (_other_order, "pixel_values"), (_other_colours, "pixel_values"),
])  # fmt: skip
def test_changed_code_is_noticed(change: Any, named: str, monkeypatch: Any) -> None:
    change(monkeypatch)
    golden = json.loads(GOLDEN.read_text())["views"]["semantic-segmentation"]
    assert named in differs(made("semantic-segmentation"), golden)


if __name__ == "__main__":
    content = {"version": transforms.VIEWS_VERSION, "views": {task: made(task) for task in OPTIONS}}
    GOLDEN.write_text(json.dumps(content, separators=(",", ":")) + "\n")
