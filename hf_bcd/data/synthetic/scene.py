"""One generated scene: a random street in metres, a pinhole camera, and the canvas that both image and label come from."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from ..labels import IGNORE_INDEX
from .materials import COLOURS, FAR, FLAT, GROUND, MATERIALS, POLE, ROAD, SKY, Colour, Point, Position, mix, tint


SUPERSAMPLING = 2

Item = TypeVar("Item")


class Scene:
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
        self.placed: list[tuple[float, Callable[[], None]]] = []
        self.owners: list[int] = []  # of each surface, the number of the thing that it belongs to; 0 for none
        self.current = 0

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

    def surface(
        self,
        label: int,
        colour: Colour,
        z: float,
        texture: int = FLAT,
        accent: float | Colour = 0.0,
        vague: bool = False,
    ) -> int:
        """Number of a new surface at depth z.

        Its texture runs from `colour` to `accent` (a colour, or relative). A void rim surrounds a vague surface.
        """
        if not isinstance(accent, tuple):
            accent = tint(colour, 1 + accent)
        fog = z / (z + self.haze_distance)
        self.owners.append(self.current)
        self.surfaces.append((label, mix(colour, self.haze, fog), mix(accent, self.haze, fog), texture, vague))
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

    def depth(self, near: float, far: float) -> float:
        """Random depth that is nearly uniform in the picture's rows, a little more often far away."""
        return 1 / (1 / far + (1 / near - 1 / far) * self.random() ** 1.5)

    def kerb(self, side: float, z: float) -> float:
        """x of the road's left (-1) or right (+1) edge at depth z, or of its middle (0); straight beyond 35 m."""
        bow = z * z if z < 35 else 35 * (2 * z - 35)
        return self.road_offset + self.road_bend * bow + side * self.road_half_width

    def place(self, z: float, paint: Callable[..., None], *arguments: Any) -> None:
        """Notes that something at depth z is to be painted when all farther things are."""
        self.placed.append((z, partial(paint, self, *arguments)))

    def paint_placed(self) -> None:
        for number, (_, paint) in enumerate(sorted(self.placed, key=lambda entry: -entry[0]), 1):
            self.current = number
            paint()
        self.current = 0

    def polygon(self, surface: int, corners: Iterable[Position]) -> None:
        self.draw.polygon([self.project(*corner) for corner in corners], fill=surface)

    def line(self, surface: int, points: Sequence[Point], width: float) -> None:
        """Line on the canvas, never thinner than one pixel of the label."""
        self.draw.line(points, fill=surface, width=max(SUPERSAMPLING, round(width)))

    def bar(self, surface: int, start: Position, end: Position, thickness: float) -> None:
        self.line(surface, (self.project(*start), self.project(*end)), thickness * self.scale(start[2]))

    def disc(self, surface: int, centre: Point, radius: float, squash: float = 1.0) -> None:
        x, y = centre
        self.draw.ellipse((x - squash * radius, y - radius, x + squash * radius, y + radius), fill=surface)

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

    def things(self, labels: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
        """The placed things of some classes as the picture shows them.

        Returns:
            The number of the thing at each pixel `[H, W]`, 0 where there is none; and the class of each surface's thing
            by that number, int64.
        """
        painted, owners = np.array([surface[0] for surface in self.surfaces]), np.array(self.owners)
        owners = np.where(np.isin(painted, list(labels)), owners, 0)
        classes = np.zeros(len(self.placed) + 1, np.int64)
        classes[owners] = painted
        return owners[np.asarray(self.surface_map)[1::SUPERSAMPLING, 1::SUPERSAMPLING]], classes

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
