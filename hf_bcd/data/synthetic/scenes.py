"""Procedural street and park scenes: a segmentation data set that needs no download.

A scene is a small world in metres (road, facades, trees, poles, wires, people, vehicles) seen by a pinhole camera.
Every shape is painted, far to near, into one map of surface numbers at twice the image's resolution. Image and label
are both read from this map, so they agree by construction. Classes share their colours: texture and context decide.
"""

from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ...utils.masks import encode_ids
from ...utils.messages import UserError
from ..boxes import RawBoxes
from ..dataset import Sample
from ..labels import IGNORE_INDEX
from .materials import PERSON, VEHICLE
from .objects import paint_scene
from .scene import Scene


THINGS = (PERSON, VEHICLE)
MIN_PIXELS = 12
SPLITS = ("train", "validation", "test")

# num_classes -> name of each of the eight painted classes (SKY to VEHICLE); classes of one name are merged.
TAXONOMIES = {
    8: ("sky", "ground", "road", "building", "tree", "pole", "person", "vehicle"),
    7: ("sky", "ground", "ground", "building", "tree", "pole", "person", "vehicle"),
    6: ("sky", "ground", "ground", "building", "tree", "pole", "traffic", "traffic"),
    5: ("sky", "ground", "ground", "building", "tree", "object", "object", "object"),
    4: ("sky", "ground", "ground", "scenery", "scenery", "object", "object", "object"),
    3: ("sky", "ground", "ground", "object", "object", "object", "object", "object"),
    2: ("background", "background", "background", "object", "object", "object", "object", "object"),
}


class SyntheticScenes(Dataset[Sample]):
    """Images of procedural scenes with exact labels, made when they are asked for.

    Sample `i` is `{"image": RGB image, "label": uint8 [H, W]}` and depends on `(seed, split, i)` alone: neither on the
    order of access nor on `num_images`. The same scene is drawn at every size of one aspect ratio. Pixels around some
    objects are void (255), as in annotations made by hand. Poles include lamp posts, railings and wires.

    Args:
        size: height and width of the images in pixels, each at least 32.
        num_images: number of images of the split.
        seed: non-negative seed of the whole data set.
        split: `train`, `validation` or `test`; splits share no scene.
        num_classes: 2 to 8. Below 8, related classes are merged, see `TAXONOMIES`.

    Raises:
        UserError: an argument is outside its range.
    """

    def __init__(
        self,
        size: tuple[int, int] = (128, 128),
        num_images: int = 1000,
        seed: int = 0,
        split: str = "train",
        num_classes: int = 8,
    ):
        for wrong, message in (
            (min(size) < 32, f"size is {size}; scenes need at least 32 pixels in height and in width."),
            (num_images < 1, f"num_images is {num_images}; ask for at least one."),
            (seed < 0, f"seed is {seed}; it must not be negative."),
            (split not in SPLITS, f"split is {split!r}; choose one of {', '.join(SPLITS)}."),
            (
                num_classes not in TAXONOMIES,
                f"num_classes is {num_classes}; choose {min(TAXONOMIES)} to {max(TAXONOMIES)}.",
            ),
        ):
            if wrong:
                raise UserError(message)
        self.size, self.num_images, self.seed, self.split = (size[0], size[1]), num_images, seed, split
        names = list(dict.fromkeys(TAXONOMIES[num_classes]))
        self.id2label = dict(enumerate(names))
        self._merge = np.full(256, IGNORE_INDEX, np.uint8)
        self._merge[:8] = [names.index(name) for name in TAXONOMIES[num_classes]]

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> Sample:
        image, label = self.scene(index).render()
        return {"image": image, "label": self._merge[label]}

    def scene(self, index: int) -> Scene:
        """The painted scene of an image."""
        key = (SPLITS.index(self.split), range(self.num_images)[index])
        seed = np.random.SeedSequence(self.seed, spawn_key=key)
        scene = Scene(self.size, np.random.Generator(np.random.PCG64(seed)))
        paint_scene(scene)
        return scene


class SyntheticBoxes(SyntheticScenes):
    """The same pictures with a box around the visible part of every person and vehicle.

    Sample `i` is `{"image": RGB image, "boxes": RawBoxes}`: corners in pixels, class ids, and the number of visible pixels
    as area; with `masks`, these pixels, too. What shows fewer than `MIN_PIXELS` pixels has no box. The other arguments are
    those of `SyntheticScenes`.
    """

    def __init__(
        self,
        size: tuple[int, int] = (128, 128),
        num_images: int = 1000,
        seed: int = 0,
        split: str = "train",
        masks: bool = False,
    ):
        super().__init__(size, num_images, seed, split)
        self.masks = masks
        self.id2label = {place: self.id2label[thing] for place, thing in enumerate(THINGS)}

    def __getitem__(self, index: int) -> Any:
        scene = self.scene(index)
        numbers, classes = scene.things(THINGS)
        pixels = np.bincount(numbers.ravel(), minlength=len(classes))
        found = [number for number in range(1, len(classes)) if pixels[number] >= MIN_PIXELS]
        boxes = np.zeros((len(found), 4))
        for place, number in enumerate(found):
            rows, columns = np.nonzero(numbers == number)
            boxes[place] = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        ids = np.array([THINGS.index(classes[number]) for number in found], np.int64)
        masks = encode_ids(numbers) if self.masks else {}
        raw = RawBoxes(
            boxes, ids, pixels[found].astype(float), np.zeros(len(found), bool), (self.size[1], self.size[0]),
            [masks[number] for number in found] if self.masks else None,
        )  # fmt: skip
        return {"image": scene.render()[0], "boxes": raw}
