"""Procedural street and park scenes: a segmentation data set that needs no download.

A scene is a small world in metres (road, facades, trees, poles, wires, people, vehicles) seen by a pinhole camera.
Every shape is painted, far to near, into one map of surface numbers at twice the image's resolution. Image and label
are both read from this map, so they agree by construction. Classes share their colours: texture and context decide.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from torch.utils.data import Dataset

from .dataset import Sample
from .labels import IGNORE_INDEX


SPLITS = ("train", "validation", "test")
SKY, GROUND, ROAD, BUILDING, TREE, POLE, PERSON, VEHICLE = range(8)

# num_classes -> name of each of the eight painted classes, in the order above; classes of one name are merged.
TAXONOMIES = {
    8: ("sky", "ground", "road", "building", "tree", "pole", "person", "vehicle"),
    7: ("sky", "ground", "ground", "building", "tree", "pole", "person", "vehicle"),
    6: ("sky", "ground", "ground", "building", "tree", "pole", "traffic", "traffic"),
    5: ("sky", "ground", "ground", "building", "tree", "object", "object", "object"),
    4: ("sky", "ground", "ground", "scenery", "scenery", "object", "object", "object"),
    3: ("sky", "ground", "ground", "object", "object", "object", "object", "object"),
    2: ("background", "background", "background", "object", "object", "object", "object", "object"),
}

COLOURS = {
    "asphalt": (84, 86, 92), "azure": (120, 168, 214), "brick": (152, 88, 68), "crimson": (160, 50, 52),
    "dusk": (226, 174, 144), "leaf": (88, 118, 62), "mud": (108, 88, 70), "navy": (52, 66, 104),
    "olive": (120, 118, 70), "pale": (204, 214, 224), "rust": (164, 108, 58), "sand": (198, 176, 136),
    "slate": (104, 114, 128), "snow": (228, 230, 232), "stone": (156, 152, 146), "straw": (188, 168, 98),
    "teal": (76, 116, 114),
}  # fmt: skip
MATERIALS = {
    SKY: ("azure", "azure", "azure", "azure", "pale", "pale", "dusk"),
    GROUND: ("leaf", "leaf", "leaf", "olive", "olive", "straw", "sand", "sand", "stone", "snow"),
    ROAD: ("asphalt", "asphalt", "asphalt", "asphalt", "slate", "slate", "stone", "mud"),
    BUILDING: ("brick", "brick", "brick", "rust", "rust", "sand", "dusk", "stone", "teal", "pale", "azure"),
    TREE: ("leaf", "leaf", "leaf", "olive", "olive", "rust", "straw", "teal"),
    POLE: ("asphalt", "asphalt", "asphalt", "asphalt", "navy", "mud", "pale"),
    PERSON: ("crimson", "crimson", "navy", "navy", "teal", "straw", "snow", "rust", "asphalt"),
    VEHICLE: ("crimson", "crimson", "navy", "azure", "straw", "snow", "snow", "teal", "slate", "asphalt"),
}
FLAT, GRAIN, BLOTCH, CLOUD, SIDING, BRICKWORK = range(6)

# (share of the length, metres above the wall) between the wall's upper corners.
ROOFS = (
    (),
    ((0.5, 3.2),),
    ((0.25, 0), (0.25, 2.5), (0.7, 2.5), (0.7, 0)),
    ((0.15, 0), (0.15, 1.6), (0.22, 1.6), (0.22, 0), (0.75, 0), (0.75, 1.6), (0.82, 1.6), (0.82, 0)),
    tuple((i // 2 / 7, 0.9 * ((i - 1) // 2 % 2)) for i in range(2, 14)),
)
# Side views, (metres along, metres up) from tail to nose: saloon, hatchback, van, bus.
BODIES = (
    ((0.0, 0.35), (0.0, 0.9), (0.25, 0.95), (0.8, 1.42), (2.3, 1.45), (3.1, 0.95), (4.1, 0.8), (4.2, 0.35)),
    ((0.0, 0.35), (0.0, 1.0), (0.15, 1.55), (2.4, 1.6), (3.0, 1.0), (3.8, 0.9), (3.9, 0.35)),
    ((0.0, 0.4), (0.0, 1.3), (0.1, 2.1), (3.6, 2.1), (4.3, 1.2), (5.0, 1.05), (5.0, 0.4)),
    ((0.0, 0.45), (0.0, 1.5), (0.1, 2.9), (8.8, 2.9), (9.0, 0.45)),
)

SUPERSAMPLING = 2
FAR = 4000.0

Point = tuple[float, float]
Position = tuple[float, float, float]
Colour = tuple[float, float, float]
Item = TypeVar("Item")


class SyntheticScenes(Dataset[Sample]):
    """Images of procedural scenes with exact labels, made when they are asked for.

    Sample `i` is `{"image": RGB image, "label": int64 [H, W]}` and depends on `(seed, split, i)` alone: neither on the
    order of access nor on `num_images`. The same scene is drawn at every size of one aspect ratio. Pixels around some
    objects are void (255), as in annotations made by hand. Poles include lamp posts, railings and wires.

    Args:
        size: height and width of the images in pixels, each at least 32.
        num_images: number of images of the split.
        seed: non-negative seed of the whole data set.
        split: `train`, `validation` or `test`; splits share no scene.
        num_classes: 2 to 8. Below 8, related classes are merged, see `TAXONOMIES`.

    Raises:
        ValueError: an argument is outside its range.
    """

    def __init__(
        self,
        size: tuple[int, int] = (128, 128),
        num_images: int = 1000,
        seed: int = 0,
        split: str = "train",
        num_classes: int = 8,
    ):
        if min(size) < 32:
            raise ValueError(f"size is {size}; scenes need at least 32 pixels in height and in width.")
        if num_images < 1:
            raise ValueError(f"num_images is {num_images}; ask for at least one.")
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must not be negative.")
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; choose one of {', '.join(SPLITS)}.")
        if num_classes not in TAXONOMIES:
            raise ValueError(f"num_classes is {num_classes}; choose {min(TAXONOMIES)} to {max(TAXONOMIES)}.")
        self.size = size
        self.num_images = num_images
        self.seed = seed
        self.split = split
        names = list(dict.fromkeys(TAXONOMIES[num_classes]))
        self.id2label = dict(enumerate(names))
        self._merge = np.full(256, IGNORE_INDEX, np.int64)
        self._merge[:8] = [names.index(name) for name in TAXONOMIES[num_classes]]

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> Sample:
        key = (SPLITS.index(self.split), range(self.num_images)[index])
        seed = np.random.SeedSequence(self.seed, spawn_key=key)
        scene = _Scene(self.size, np.random.Generator(np.random.PCG64(seed)))
        _compose(scene)
        image, label = scene.render()
        return {"image": image, "label": self._merge[label]}


class _Scene:
    """Random numbers, camera, street, canvas and surfaces of one scene.

    World axes in metres: x to the right, y up from the ground, z ahead of the camera. The canvas is larger than the
    image by `SUPERSAMPLING`. Of the generator only `random` is used: its stream is the same in every numpy version.
    """

    def __init__(self, size: tuple[int, int], rng: np.random.Generator):
        self.rng = rng
        self.random = rng.random
        self.height, self.width = size[0] * SUPERSAMPLING, size[1] * SUPERSAMPLING
        self.surface_map = Image.new("I", (self.width, self.height))
        self.draw = ImageDraw.Draw(self.surface_map)
        self.shadow_map = Image.new("L", (self.width, self.height))
        self.shadow_draw = ImageDraw.Draw(self.shadow_map)
        self.surfaces: list[tuple[int, Colour, Colour, int, bool]] = []
        self.vague_outline = False
        self.standing: list[tuple[float, Callable[[], None]]] = []

        self.focal = self.uniform(1.0, 1.4) * self.height
        self.camera_height = self.uniform(1.5, 3.2)
        self.horizon = self.uniform(0.38, 0.58) * self.height
        self.centre = self.uniform(0.3, 0.7) * self.width
        self.roll = self.uniform(-0.035, 0.035)
        self.haze = self.colour(SKY)
        self.haze_distance = 80 / (0.05 + self.random() ** 2)
        self.sun_side = self.pick((-1, 1))
        self.blobs = [self._blob() for _ in range(8)]

        self.style = self.pick(("street", "street", "square", "park"))
        self.road_half_width = self.uniform(0.9, 1.6) if self.style == "park" else self.uniform(2.4, 5.0)
        self.road_offset = self.uniform(-1.2, 1.2) * self.road_half_width
        self.road_bend = self.uniform(-0.006, 0.006) if self.chance(0.5) else 0.0
        # Room for what stands on the ground: from kerb to facades at the left (-1) and right (1), and in depth.
        self.setback = {-1: FAR, 1: FAR}
        self.far_limit = 55.0

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.random()

    def pick(self, items: Sequence[Item]) -> Item:
        return items[int(self.random() * len(items))]

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def _blob(self) -> list[Point]:
        """Ragged star-shaped outline of mean radius 1."""
        radii = (0.7 + 0.6 * self.rng.random(13)).tolist()
        angles = [2 * math.pi * i / 13 for i in range(13)]
        return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]

    def colour(self, label: int) -> Colour:
        """Random colour of a class: a shared material in other light."""
        red, green, blue = tint(COLOURS[self.pick(MATERIALS[label])], self.uniform(0.82, 1.15))
        return red + self.uniform(-15, 15), green + self.uniform(-12, 12), blue + self.uniform(-15, 15)

    def surface(self, label: int, colour: Colour, z: float, texture: int = FLAT, accent: float | Colour = 0.0) -> int:
        """Number of a new surface at depth z, whose texture runs from `colour` to `accent` (a colour, or relative)."""
        if not isinstance(accent, tuple):
            accent = tint(colour, 1 + accent)
        fog = z / (z + self.haze_distance)
        self.surfaces.append(
            (label, mix(colour, self.haze, fog), mix(accent, self.haze, fog), texture, self.vague_outline)
        )
        return len(self.surfaces) - 1

    def scale(self, z: float) -> float:
        """Canvas pixels of one metre at depth z."""
        return self.focal / max(z, 0.8)

    def project(self, x: float, y: float, z: float) -> Point:
        scale = self.focal / max(z, 0.8)
        across, down = x * scale, (self.camera_height - y) * scale
        return self.centre + across - self.roll * down, self.horizon + down + self.roll * across

    def visible_x(self, z: float) -> float:
        """Random x inside the picture at depth z."""
        return (self.random() * self.width - self.centre) / self.scale(z)

    def kerb(self, side: float, z: float) -> float:
        """x of the road's left (-1) or right (+1) edge at depth z, or of its middle (0); straight beyond 35 m."""
        bow = z * z if z < 35 else 35 * (2 * z - 35)
        return self.road_offset + self.road_bend * bow + side * self.road_half_width

    def place(self, z: float, paint: Callable[..., None], *arguments: Any) -> None:
        """Notes that something at depth z is to be painted when all farther things are."""
        self.standing.append((z, partial(paint, self, *arguments)))

    def polygon(self, surface: int, corners: Iterable[Position]) -> None:
        self.draw.polygon([self.project(*corner) for corner in corners], fill=surface)

    def line(self, surface: int, points: Sequence[Point], width: float) -> None:
        """Line on the canvas, never thinner than one pixel of the label."""
        self.draw.line(points, fill=surface, width=max(SUPERSAMPLING, round(width)))

    def bar(self, surface: int, start: Position, end: Position, thickness: float) -> None:
        self.line(surface, (self.project(*start), self.project(*end)), thickness * self.scale(start[2]))

    def shadow(self, corners: Iterable[Position]) -> None:
        """Shadow on the ground."""
        self.shadow_draw.polygon([self.project(*corner) for corner in corners], fill=255)

    def render(self) -> tuple[Image.Image, np.ndarray]:
        """RGB image, and label map uint8 [H, W] of the eight classes with void rims."""
        ids = np.asarray(self.surface_map)
        labels, near, far, textures, vague = (np.array(column) for column in zip(*self.surfaces, strict=True))
        labels = labels.astype(np.uint8)
        offsets = (textures * ids.size)[ids] + np.arange(ids.size).reshape(ids.shape)
        mixing = Image.fromarray(np.take(self._textures(), offsets))
        image = Image.composite(self._flat(far, ids), self._flat(near, ids), mixing).reduce(SUPERSAMPLING)
        on_ground = ((labels == GROUND) | (labels == ROAD)).astype(np.uint8)[ids]
        shade = Image.fromarray(on_ground * np.asarray(self.shadow_map)).reduce(SUPERSAMPLING)

        ids = ids[1::SUPERSAMPLING, 1::SUPERSAMPLING]
        label = labels[ids]
        label[self._void(label, vague[ids])] = IGNORE_INDEX
        return self._photograph(np.asarray(image, np.float32), np.asarray(shade, np.float32) / 255), label

    def _flat(self, colours: np.ndarray, ids: np.ndarray) -> Image.Image:
        """Canvas with one colour per surface; a pixel's bytes are looked up as one number for speed."""
        table = np.zeros((len(colours), 4), np.uint8)
        table[:, :3] = np.clip(colours, 0, 255)
        pixels = np.take(table.view(np.uint32)[:, 0], ids)
        return Image.frombytes("RGB", (self.width, self.height), pixels.tobytes(), "raw", "RGBX")

    def _textures(self) -> np.ndarray:
        """Mixing weights uint8 [texture, h, w]. Grids do not depend on the resolution, so that the scene does not."""

        def noise(rows: int, stretch: float = 1.0) -> Image.Image:
            columns = max(2, round(rows * self.width / self.height / stretch))
            grid = (256 * self.rng.random((rows, columns), dtype=np.float32)).astype(np.uint8)
            return Image.fromarray(grid).resize((self.width, self.height), Image.Resampling.BILINEAR)

        clouds = Image.blend(noise(5, 2.0), noise(14, 2.0), 0.35)
        clouds = clouds.point([min(max(int(2.2 * v) - 150, 0), 255) for v in range(256)])
        rows = np.arange(self.height) / self.height * self.pick((36, 48, 64))
        columns = np.arange(self.width) / self.height * self.pick((20, 28))
        courses = np.where(rows % 1 < 0.35, 255, 0)[:, None]
        joints = np.where((columns + [[0.0], [0.5]]) % 1 < 0.25, 255, 0)[rows.astype(int) % 2]
        bank = np.empty((6, self.height, self.width), np.uint8)
        for i, texture in enumerate((0, noise(128), noise(44), clouds, courses, np.maximum(courses, joints))):
            bank[i] = np.asarray(texture)
        return bank

    def _void(self, label: np.ndarray, vague: np.ndarray) -> np.ndarray:
        """Rims [H, W] outside the objects drawn with a vague outline; these objects and poles stay whole."""
        rim = np.zeros(label.shape, bool)
        for here, there in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
            differs = label[here] != label[there]
            rim[here] |= differs & vague[there]
            rim[there] |= differs & vague[here]
        if grow := label.shape[0] // 256:
            rim = np.asarray(Image.fromarray(rim.astype(np.uint8)).filter(ImageFilter.MaxFilter(2 * grow + 1))) > 0
        return rim & ~vague & (label != POLE)

    def _photograph(self, pixels: np.ndarray, shade: np.ndarray) -> Image.Image:
        """Light across the picture, shadows, contrast, exposure, white balance and sensor noise."""
        rows = np.linspace(-0.5, 0.5, pixels.shape[0], dtype=np.float32)[:, None]
        columns = np.linspace(-0.5, 0.5, pixels.shape[1], dtype=np.float32)
        light = 1 + self.uniform(-0.2, 0.2) * rows + self.uniform(-0.3, 0.3) * columns
        light -= self.uniform(0.25, 0.55) * shade
        contrast, exposure = self.uniform(0.85, 1.15), self.uniform(0.85, 1.2)
        balance = np.array([exposure * self.uniform(0.94, 1.06) for _ in range(3)], np.float32)
        pixels = (pixels * light[..., None] - 120) * (contrast * balance) + 120 * balance
        pixels += self.uniform(4, 20) * (self.rng.random(pixels.shape, dtype=np.float32) - 0.5)
        return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def tint(colour: Colour, gain: float) -> Colour:
    return colour[0] * gain, colour[1] * gain, colour[2] * gain


def mix(a: Colour, b: Colour, share: float) -> Colour:
    return a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share, a[2] + (b[2] - a[2]) * share


def _compose(scene: _Scene) -> None:
    """Paints one random scene, far to near."""
    low = mix(scene.haze, COLOURS["snow"], scene.random())
    sky = scene.surface(SKY, scene.colour(SKY), 0, scene.pick((CLOUD, CLOUD, CLOUD, FLAT)), low)
    scene.draw.rectangle((0, 0, scene.width, scene.height), fill=sky)
    if scene.chance(0.8 if scene.style == "park" else 0.3):
        _hills(scene, scene.pick((900.0, 400.0)))
    plain = scene.surface(GROUND, scene.colour(GROUND), 12, scene.pick((GRAIN, BLOTCH)), scene.uniform(-0.35, 0.35))
    scene.polygon(plain, _rectangle(-FAR, FAR, 0.8, FAR))
    if scene.style != "street" or scene.chance(0.6):
        _skyline(scene)
    _road(scene, scene.far_limit if scene.style == "square" else 400.0)
    if scene.style == "street":
        for side in scene.pick(((-1, 1), (-1, 1), (-1,), (1,))):
            _terrace(scene, side)
    _plants(scene)
    _poles(scene)
    _traffic(scene)
    for _, paint in sorted(scene.standing, key=lambda entry: -entry[0]):
        paint()
    if scene.chance(0.25):
        _overhanging_limb(scene)


def _rectangle(left: float, right: float, near: float, far: float) -> list[Position]:
    """Corners of a rectangle on the ground."""
    return [(left, 0, near), (left, 0, far), (right, 0, far), (right, 0, near)]


def _hills(scene: _Scene, z: float) -> None:
    surface = scene.surface(GROUND, scene.colour(GROUND), z / 10, BLOTCH, scene.uniform(-0.3, 0.3))
    span = 1.2 * z * scene.width / scene.focal
    ridge = [scene.uniform(0.0, 0.07) * z for _ in range(10)]
    # Corners cut twice (Chaikin) round the ridge.
    points = [(span * (i / 9 - 0.5), y) for i, y in enumerate(ridge)]
    for _ in range(2):
        pairs = pairwise(points)
        points = [(a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1])) for a, b in pairs for t in (0.25, 0.75)]
    scene.polygon(surface, [(-span, -z, z), *((x, y, z) for x, y in points), (span, -z, z)])


def _road(scene: _Scene, end: float) -> None:
    """Road along z; outside parks with pavements, markings and, at times, a crossing road."""
    depths = [z for z in (0.8, 1.5, 2.2, 3, 4, 5.5, 7.5, 10, 13, 17, 22, 28, 36, 46, 60, 80, 120, 200) if z < end] + [
        end
    ]

    def ribbon(surface: int, side: float, left: float, right: float) -> None:
        edge = [(scene.kerb(side, z) + left, 0, z) for z in depths]
        scene.polygon(surface, edge + [(x + right - left, y, z) for x, y, z in reversed(edge)])

    colour, paved = scene.colour(ROAD), scene.style != "park"
    asphalt = scene.surface(ROAD, colour, 10, GRAIN, scene.uniform(-0.15, 0.15))
    if paved and scene.chance(0.6):
        z = scene.uniform(9, 30)
        scene.polygon(asphalt, _rectangle(-FAR, FAR, z, z + scene.uniform(5, 10)))
    if paved:
        width, flags = scene.uniform(1.6, 4.0), scene.colour(GROUND)
        pavement = scene.surface(GROUND, flags, 10, GRAIN, scene.uniform(-0.2, 0.2))
        joint = scene.surface(GROUND, tint(flags, 0.75), 10)
        for side in (-1, 1):
            ribbon(pavement, side, 0, side * width)
            for z in [2 + 1.1 * i for i in range(12) if 2 + 1.1 * i < end]:
                x = scene.kerb(side, z)
                scene.bar(joint, (x, 0, z), (x + side * width, 0, z), 0)
    ribbon(asphalt, 0, -scene.road_half_width, scene.road_half_width)
    paint = scene.surface(ROAD, mix(colour, COLOURS["snow"], scene.uniform(0.5, 0.9)), 10)
    if paved and scene.chance(0.75):
        for z in [2 + 3.5 * i for i in range(14) if 4 + 3.5 * i < end]:
            scene.polygon(paint, _rectangle(scene.kerb(0, z) - 0.09, scene.kerb(0, z) + 0.09, z, z + 1.8))
    if paved and scene.chance(0.35):
        z, stripe = scene.uniform(4.5, 14), scene.road_half_width / 8
        for i in range(8):
            left = scene.kerb(-1, z) + (2 * i + 0.5) * stripe
            scene.polygon(paint, _rectangle(left, left + stripe, z, z + 2.6))


def _skyline(scene: _Scene) -> None:
    """Row of facades across the view."""
    square = scene.style == "square"
    z = scene.far_limit = scene.uniform(13, 28) if square else scene.uniform(38, 60)
    x, end = ((edge - scene.centre) / scene.scale(z) for edge in (0, scene.width))
    x -= scene.uniform(0, 8)
    while x < end:
        length = scene.uniform(5, 14)
        if not scene.chance(0.15 if square else 0.4):
            height = scene.uniform(3.5, 12.5) * (1 if square else scene.uniform(0.8, 2.0))
            _facade(scene, (x, z), (x + length, z), height, scene.colour(BUILDING), scene.pick(ROOFS))
        x += length


def _terrace(scene: _Scene, side: int) -> None:
    """Houses along one side of the street, in perspective."""
    setback = scene.setback[side] = scene.uniform(1.5, 5.0)
    z, houses = scene.uniform(2, 9), []
    while z < 60:
        houses.append((z, z + scene.uniform(6, 16)))
        z = houses[-1][1] + (scene.uniform(2, 9) if scene.chance(0.4) else 0)
    light = scene.uniform(0.6, 0.85) if side == scene.sun_side else scene.uniform(0.85, 1.1)
    for near, far in reversed(houses):
        height, wall = scene.uniform(4.5, 14), scene.colour(BUILDING)
        front = scene.kerb(side, (near + far) / 2) + side * (setback + scene.uniform(0, 0.6))
        if side == scene.sun_side:
            scene.shadow(_rectangle(front, front - side * 0.6 * height, near, far))
        _facade(scene, (front, far), (front, near), height, tint(wall, light))
        left, right = sorted((front, front + side * 9))
        _facade(scene, (left, near), (right, near), height, tint(wall, 0.8 * light), scene.pick(ROOFS))


def _facade(scene: _Scene, a: Point, b: Point, height: float, wall: Colour, roof: Iterable[Point] = ()) -> None:
    """Upright wall from ground point a to b (x, z): windows, a roof line, at times a passage to look through."""
    (ax, az), (bx, bz) = a, b
    length, z = math.hypot(bx - ax, bz - az), (az + bz) / 2

    def at(u: float, y: float) -> Point:
        return scene.project(ax + u * (bx - ax), y, az + u * (bz - az))

    scene.vague_outline = scene.chance(0.15)
    texture = scene.pick((GRAIN, SIDING, SIDING, BRICKWORK, BRICKWORK))
    surface = scene.surface(BUILDING, wall, z, texture, scene.uniform(-0.35, 0.25))
    rise = scene.uniform(0.6, 1.4)
    outline = [(0, 0), (0, height), *((u, height + rise * y) for u, y in roof), (1, height), (1, 0)]
    left = right = 0.0
    if scene.chance(0.25) and length > 6:
        width, top = scene.uniform(2.0, 3.6) / length, min(0.75 * height, scene.uniform(2.6, 4.5))
        left = scene.uniform(0.12, 0.86 - width)
        right = left + width
        arch = [(right - width * t, top - (2 * t - 1) ** 2) for t in (0, 0.15, 0.35, 0.5, 0.65, 0.85, 1)]
        outline += [(right, 0), *arch, (left, 0)]
    scene.draw.polygon([at(u, y) for u, y in outline], fill=surface)

    reflection = mix(wall, scene.haze, scene.uniform(0.35, 0.75))
    panes = [scene.surface(BUILDING, scene.pick((tint(wall, 0.45), reflection)), z, CLOUD, 0.3) for _ in range(2)]
    scene.vague_outline = False
    columns, rows = min(9, int(length / scene.uniform(1.9, 3.2))), min(5, int((height - 0.6) / 2.9))
    half, tall, sill = scene.uniform(0.15, 0.35), scene.uniform(1.1, 2.0), scene.uniform(0.7, 1.1)
    for i in range(columns):
        u0, u1 = (i + 0.5 - half) / columns, (i + 0.5 + half) / columns
        if left - 0.02 < u1 and u0 < right + 0.02:
            continue
        for j in range(rows):
            y0, y1 = sill + 2.9 * j, sill + 2.9 * j + tall
            scene.draw.polygon([at(u0, y0), at(u0, y1), at(u1, y1), at(u1, y0)], fill=panes[(5 * i + 3 * j) % 7 > 3])


def _random_depth(scene: _Scene, near: float, far: float) -> float:
    """Depth that is nearly uniform in the picture's rows, a little more often far away."""
    return 1 / (1 / far + (1 / near - 1 / far) * scene.random() ** 1.5)


def _plants(scene: _Scene) -> None:
    design = scene.pick(("bare", "leafy", "leafy", "conifer", "mixed"))
    for _ in range(int(scene.uniform(4, 10) if scene.style == "park" else scene.uniform(1, 6))):
        z, side = _random_depth(scene, 6, min(50, scene.far_limit)), scene.pick((-1, 1))
        spread = 14 if scene.style == "park" else min(8, scene.setback[side] - 0.3)
        x = scene.kerb(side, z) + side * scene.uniform(0.7, spread)
        kind = scene.pick(("bare", "leafy", "leafy", "conifer")) if design == "mixed" else design
        scene.place(z, _tree, x, z, kind)
    if scene.style != "street" and scene.chance(0.4):
        z = _random_depth(scene, 7, min(30, scene.far_limit))
        scene.place(z, _hedge, z)


def _tree(scene: _Scene, x: float, z: float, kind: str) -> None:
    height, scene.vague_outline = scene.uniform(3.5, 8.5), kind != "bare" and scene.chance(0.2)
    (foot_x, foot_y), size = scene.project(x, 0, z), height * scene.scale(z)
    bark = scene.surface(TREE, tint(scene.colour(TREE), 0.7), z, BLOTCH, -0.25)
    leaves = _leaves(scene, z)
    scene.vague_outline = False
    scene.shadow((x + 0.3 * height * u, 0, z + 0.2 * height * v) for u, v in scene.blobs[0])
    if kind == "conifer":
        scene.line(bark, [(foot_x, foot_y), (foot_x, foot_y - 0.3 * size)], 0.04 * size)
        tiers, width = scene.pick((4, 5, 6)), scene.uniform(0.16, 0.24)
        heights = [(i + 0.5 * tip) / tiers for i in range(tiers) for tip in (0, 1)]
        reaches = [width * (1 - v) * (1.0 if i % 2 == 0 else 0.55) for i, v in enumerate(heights)]
        flank = list(zip(reaches, heights, strict=True))
        outline = [(scene.uniform(0.85, 1.1) * u, v) for u, v in flank] + [(0.0, 1.0)]
        outline += [(-scene.uniform(0.85, 1.1) * u, v) for u, v in reversed(flank)]
        scene.draw.polygon(
            [(foot_x + u * size, foot_y - (0.12 + 0.88 * v) * size) for u, v in outline], fill=leaves[0]
        )
        return
    forks: list[Point] = []
    levels, angle = (5 if kind == "bare" else 4) - (z > 22), scene.uniform(-0.15, 0.15) - math.pi / 2
    _limb(scene, bark, (foot_x, foot_y), angle, 0.3 * size, 0.045 * size, levels, forks)
    if kind == "leafy":
        _foliage(scene, leaves, forks, size * scene.uniform(0.06, 0.1))


def _limb(
    scene: _Scene, bark: int, start: Point, angle: float, length: float, width: float, levels: int, forks: list[Point]
) -> None:
    """Limb on the canvas that forks `levels` times; appends its outer forks and ends to `forks`."""
    end = (start[0] + length * math.cos(angle), start[1] + length * math.sin(angle))
    scene.line(bark, (start, end), width)
    if levels <= 1:
        forks.append(end)
    for turn in (-1, 1) if levels else ():
        turned = angle + turn * scene.uniform(0.2, 0.65)
        _limb(scene, bark, end, turned, length * scene.uniform(0.62, 0.88), 0.62 * width, levels - 1, forks)


def _leaves(scene: _Scene, z: float) -> tuple[int, int]:
    """Surfaces of dark and of sunlit leaves."""
    crown = scene.colour(TREE)
    dark, sunlit = (scene.surface(TREE, tint(crown, gain), z, BLOTCH, -0.3) for gain in (0.8, 1.1))
    return dark, sunlit


def _foliage(scene: _Scene, leaves: tuple[int, int], centres: Sequence[Point], size: float) -> None:
    """Clumps of leaves with gaps between them: dark ones, then smaller sunlit ones above."""
    for surface, gain, lift in ((leaves[0], 1.0, 0.0), (leaves[1], 0.7, 0.35)):
        for i, (x, y) in enumerate(centres):
            radius = gain * size * scene.uniform(0.6, 1.3)
            points = [(x + radius * u, y - lift * size + radius * v) for u, v in scene.blobs[i % 8]]
            scene.draw.polygon(points, fill=surface)


def _hedge(scene: _Scene, z: float) -> None:
    height, x = scene.uniform(0.5, 1.4), scene.visible_x(z)
    bushes = [scene.project(x + 0.5 * height * i, 0.45 * height, z) for i in range(-6, int(scene.uniform(2, 10)))]
    _foliage(scene, _leaves(scene, z), bushes, 0.5 * height * scene.scale(z))


def _overhanging_limb(scene: _Scene) -> None:
    """Limb of a tree outside the picture, across its upper part."""
    side, size, angle = scene.pick((0, 1)), scene.uniform(0.5, 0.9) * scene.height, scene.uniform(-0.2, 0.35)
    start, forks = (side * scene.width, scene.uniform(0.0, 0.25) * scene.height), []
    bark = scene.surface(TREE, tint(scene.colour(TREE), 0.6), 3)
    _limb(scene, bark, start, math.pi - angle if side else angle, 0.3 * size, 0.03 * size, 4, forks)
    if scene.chance(0.7):
        _foliage(scene, _leaves(scene, 3), forks, 0.06 * size)


def _poles(scene: _Scene) -> None:
    for side in scene.pick(((-1, 1), (-1, 1), (-1,), (1,))):
        colour, height, arm = scene.colour(POLE), scene.uniform(4.5, 7.5), -side * scene.uniform(0.8, 1.8)
        first, spacing, beside = scene.uniform(6, 10), scene.uniform(6, 12), side * scene.uniform(0.3, 1.2)
        carries_wires = scene.chance(0.35)
        # The line of poles goes on behind the camera: the nearest wires leave the picture.
        depths = [1.0] + [z for i in range(5) if (z := first + spacing * i) < min(scene.far_limit, 32)]
        feet = [(scene.kerb(side, z) + beside, z) for z in depths]
        for x, z in feet[1:]:
            scene.place(z, _pole, x, z, height, 0 if carries_wires else arm, colour)
        for a, b in pairwise(feet) if carries_wires else ():
            scene.place(a[1], _wires, a, b, height, colour)
    for _ in range(int(scene.uniform(0, 3))):
        z, side = _random_depth(scene, 6, 25), scene.pick((-1, 1))
        x = scene.kerb(side, z) + side * scene.uniform(0.2, min(1.5, scene.setback[side]))
        scene.place(z, _sign_post, x, z)
    if scene.chance(0.35):
        z = _random_depth(scene, 6, 16)
        scene.place(z, _railing, z)


def _pole(scene: _Scene, x: float, z: float, height: float, arm: float, colour: Colour) -> None:
    """Lamp post with an arm of this length, or, without one, a mast with cross-bars."""
    surface = scene.surface(POLE, colour, z, GRAIN, -0.2)
    scene.bar(surface, (x, 0, z), (x, height + (0 if arm else 0.6), z), 0.15)
    scene.shadow([(x - 0.1, 0, z), (x + 0.1, 0, z), (x - 3 * scene.sun_side, 0, z - 0.6)])
    if arm:
        bow = [scene.project(x + t * arm, height + 0.5 * math.sqrt(t), z) for t in (0.0, 0.15, 0.45, 0.8, 1.0)]
        scene.line(surface, bow, 0.06 * scene.scale(z))
        scene.bar(surface, (x + arm, height + 0.5, z), (x + 1.3 * arm, height + 0.48, z), 0.12)
    for y in () if arm else (height, height - 0.7):
        scene.bar(surface, (x - 0.9, y, z), (x + 0.9, y, z), 0.07)


def _wires(scene: _Scene, a: Point, b: Point, height: float, colour: Colour) -> None:
    """Two sagging wires between poles at (x, z)."""
    surface = scene.surface(POLE, tint(colour, 0.6), (a[1] + b[1]) / 2)
    # Even steps in 1 / z are even steps in the picture.
    depths = [1 / ((1 - i / 8) / a[1] + i / 8 / b[1]) for i in range(9)]
    shares = [(z - a[1]) / (b[1] - a[1]) for z in depths]
    for shift in (-0.8, 0.8):
        points = [
            (a[0] + t * (b[0] - a[0]) + shift, height - 3.6 * t * (1 - t), z)
            for t, z in zip(shares, depths, strict=True)
        ]
        scene.line(surface, [scene.project(*point) for point in points], 0)


def _sign_post(scene: _Scene, x: float, z: float) -> None:
    surface, height = scene.surface(POLE, scene.colour(POLE), z), scene.uniform(2.0, 2.8)
    scene.bar(surface, (x, 0, z), (x, height, z), 0.07)
    scene.bar(surface, (x - 0.3, height, z), (x + 0.3, height, z), 0.11)


def _railing(scene: _Scene, z: float) -> None:
    surface, x = scene.surface(POLE, scene.colour(POLE), z), scene.visible_x(z)
    spacing, count, height = scene.uniform(0.35, 0.8), scene.pick((8, 11, 14)), scene.uniform(0.9, 1.2)
    for i in range(count + 1):
        scene.bar(surface, (x + spacing * i, 0, z), (x + spacing * i, height, z), 0.04)
    for y in (0.45 * height, height):
        scene.bar(surface, (x, y, z), (x + spacing * count, y, z), 0.05)


def _traffic(scene: _Scene) -> None:
    for _ in range(int(scene.uniform(1, 6))):
        z = _random_depth(scene, 3.6, min(12, scene.far_limit - 0.5))
        left, right = (scene.kerb(side, z) + side * (scene.setback[side] - 0.3) for side in (-1, 1))
        x = min(max(scene.visible_x(z), left), right)
        scene.place(z, _person, x, z)
    for _ in range(int(scene.uniform(1, 6)) if scene.style != "park" else scene.pick((0, 0, 1))):
        body, across = scene.pick(BODIES), scene.chance(0.35)
        # Long bodies keep away, or one of them fills the view.
        nearest, farthest = 5 + body[-1][0] * (0.6 + across), min(24, scene.far_limit - body[-1][0])
        if nearest > farthest:
            continue
        z = _random_depth(scene, nearest, farthest)
        x = scene.kerb(side := scene.pick((-1, 1)), z) - side * 1.2
        scene.place(z, _vehicle, x, z, body, across)


def _person(scene: _Scene, x: float, z: float) -> None:
    """Walking figure: head, torso or coat, arms, legs, at times a bag."""
    height, facing, scene.vague_outline = scene.uniform(1.45, 1.9), scene.pick((-1, 1)), scene.chance(0.2)
    (foot_x, foot_y), size = scene.project(x, 0, z), height * scene.scale(z)
    coat, trousers, bag = (scene.surface(PERSON, scene.colour(PERSON), z, BLOTCH, -0.2) for _ in range(3))
    skin = scene.surface(PERSON, mix((226, 182, 150), (92, 62, 46), scene.random()), z)
    scene.vague_outline = False
    scene.shadow((x - 0.5 * scene.sun_side + 0.5 * u, 0, z + 0.3 * v) for u, v in scene.blobs[0])

    def at(u: float, v: float) -> Point:
        return foot_x + facing * u * size, foot_y - v * size

    stride, swing = scene.uniform(0.02, 0.14), scene.uniform(0.03, 0.17)
    for sign in (-1, 1):
        leg = ((0.03 * sign, 0.5), (0.7 * stride * sign + 0.02, 0.25), (stride * sign, 0))
        arm = ((0.09 * sign, 0.78), ((swing + 0.04) * sign, 0.6), (swing * sign + 0.05, 0.45))
        scene.line(trousers, [at(u, v) for u, v in leg], 0.075 * size)
        scene.line(coat, [at(u, v) for u, v in arm], 0.05 * size)
    hem = 0.3 if scene.chance(0.3) else 0.46
    torso = [(-0.1, 0.8), (-0.04, 0.84), (0.04, 0.84), (0.1, 0.8), (0.09, hem), (-0.09, hem)]
    scene.draw.polygon([at(u, v) for u, v in torso], fill=coat)
    _disc(scene, skin, at(0, 0.925), 0.065 * size)
    _disc(scene, bag, at(-0.01, 0.955), 0.05 * size)
    if scene.chance(0.3):
        left, top, right, bottom = *at(-facing * 0.18, 0.58), *at(-facing * 0.08, 0.45)
        scene.draw.rectangle((left, top, right, bottom), fill=bag)


def _disc(scene: _Scene, surface: int, centre: Point, radius: float, squash: float = 1.0) -> None:
    x, y = centre
    scene.draw.ellipse((x - squash * radius, y - radius, x + squash * radius, y + radius), fill=surface)


def _vehicle(scene: _Scene, x: float, z: float, body: Sequence[Point], across: bool) -> None:
    """Extruded side view, seen from the side (`across`) or from behind with x in its middle."""
    length, height, width = body[-1][0], max(y for _, y in body), 2.3 if body is BODIES[-1] else 1.7
    paint, facing = scene.colour(VEHICLE), scene.pick((-1, 1))
    scene.vague_outline = scene.chance(0.2)
    flank = scene.surface(VEHICLE, paint, z, GRAIN, scene.uniform(-0.15, 0.15))
    top = scene.surface(VEHICLE, tint(paint, scene.uniform(0.8, 1.2)), z, GRAIN, 0.1)
    glass = scene.surface(VEHICLE, mix(tint(paint, 0.3), scene.haze, scene.uniform(0.1, 0.6)), z)
    tyre = scene.surface(VEHICLE, (40, 40, 44), z)
    lamp = scene.surface(VEHICLE, scene.pick(((200, 40, 36), (250, 240, 200))), z)
    scene.vague_outline = False

    def at(along: float, y: float, side: float) -> Position:
        # side runs from 0, the visible flank, to 1.
        if across:
            return x + facing * (along - length / 2), y, z + side * width
        return x + (0.5 - side) * (width if x < 0 else -width), y, z + along

    footprint = ((-0.2, -0.2), (-0.2, 1.2), (length + 0.2, 1.2), (length + 0.2, -0.2))
    scene.shadow(at(along, 0, side) for along, side in footprint)
    for side in (1, 0):
        for along in (0.2 * length, 0.8 * length):
            wheel = at(along, 0.36, side)
            _disc(scene, tyre, scene.project(*wheel), 0.36 * scene.scale(wheel[2]), 1.0 if across else 0.45)
    for (a0, y0), (a1, y1) in reversed(list(pairwise(body))):
        scene.polygon(top, [at(a0, y0, 0), at(a0, y0, 1), at(a1, y1, 1), at(a1, y1, 0)])
    scene.polygon(flank, [at(a, y, 0) for a, y in body])
    sill, lintel, count = 0.6 * height + 0.06, height - 0.14, 6 if length > 6 else 2
    first, last = (0.04 * length, 0.97 * length) if length > 6 else (0.19 * length, 0.62 * length)
    for i in range(count):
        left, right = first + (last - first) * i / count, first + (last - first) * (i + 0.88) / count
        scene.polygon(glass, [at(left, sill, 0), at(left, lintel, 0), at(right, lintel, 0), at(right, sill, 0)])
    if not across:
        (tail, waist), (slant, roof) = body[1], body[2]
        if roof - waist < 0.3:
            (tail, waist), (slant, roof) = body[2], body[3]
        low, high = waist + 0.05, roof - 0.06
        corners = ((tail, low, 0.1), (slant, high, 0.16), (slant, high, 0.84), (tail, low, 0.9))
        scene.polygon(glass, [at(*corner) for corner in corners])
        for left, right in ((0.04, 0.2), (0.8, 0.96)):
            scene.polygon(lamp, [at(0, 0.66, left), at(0, 0.82, left), at(0, 0.82, right), at(0, 0.66, right)])
