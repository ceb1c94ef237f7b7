"""Plain-loop NumPy references of the losses, written from the formulas without a helper of the package."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_bcd.losses.base import Pair
from hf_bcd.outputs import DenseOutput, FeatureSpec, LabelMaps, resize_nearest


Specs = Mapping[str, FeatureSpec]


def pair_of(student: Specs, teacher: Specs | None = None, num_labels: int = 3, seed: int = 0) -> Pair:
    """Two models whose head reads all of the teacher's levels; the same levels for both by default."""
    teacher = student if teacher is None else teacher
    return Pair(student, teacher, num_labels, tuple(teacher), seed)


def outputs_of(
    student: Specs,
    teacher: Specs | None = None,
    *,
    size: int = 32,
    num_labels: int = 3,
    images: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    rows: slice = slice(None),
) -> tuple[DenseOutput, DenseOutput, LabelMaps]:
    """Outputs of both models, the student's leaves with gradients, and targets without void; `rows` of the images."""
    outputs = []
    for specs, own_seed in ((student, seed), (student if teacher is None else teacher, seed + 100)):
        whole = dense_output(specs, images, size, num_labels, own_seed)
        features = {name: x[rows].to(dtype) for name, x in whole.features.items()}
        outputs.append(DenseOutput(features, whole.logits[rows].to(dtype)))
    for leaf in leaves(outputs[0]).values():
        leaf.requires_grad_()
    return *outputs, LabelMaps(random_labels(images, size, size, num_labels=num_labels, seed=seed)[rows], num_labels)


def leaves(output: DenseOutput) -> dict[str, Tensor]:
    return {"logits": output.logits, **output.features}


class Operators(TorchDispatchMode):
    """Records the operators that run and the number of elements of the largest tensor that one of them returns."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.append(func._schema.name.removeprefix("aten::"))
        self.largest = max([self.largest, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))])
        return result


def masks_of(labels: Tensor, num_labels: int = 3, void: int = 255) -> tuple[Tensor, Tensor]:
    """Class masks `[B, K, H, W]` and valid pixels `[B, H, W]` of label maps."""
    targets = LabelMaps(labels, num_labels, void)
    return targets.class_masks(targets.size), targets.valid(targets.size)


@dataclass
class Regions:
    """Targets whose classes overlap and have soft edges, as boxes on a coarse grid do; not all of the image has a class."""

    masks: Tensor
    mask: Tensor

    @property
    def num_labels(self) -> int:
        return self.masks.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        return self.mask.shape[-2], self.mask.shape[-1]

    def valid(self, size: tuple[int, int]) -> Tensor:
        return resize_nearest(self.mask, size)

    def weights(self, size: tuple[int, int]) -> Tensor:
        return self.valid(size).float()

    def class_masks(self, size: tuple[int, int]) -> Tensor:
        return F.adaptive_avg_pool2d(self.masks, size) * self.valid(size)[:, None]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_mask(*shape: int, share: float = 0.7, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share


def random_labels(*shape: int, num_labels: int, seed: int = 0) -> Tensor:
    return torch.randint(0, num_labels, shape, generator=torch.Generator().manual_seed(seed))


def dense_output(specs: Specs, batch: int, size: int, num_labels: int, seed: int) -> DenseOutput:
    """Smooth random features and logits of a model on `size`-pixel images."""

    def smooth(channels: int, cells: int, side: int, seed: int) -> Tensor:
        coarse = randn(batch, channels, cells, cells, seed=seed, dtype=torch.float32)
        noise = 0.1 * randn(batch, channels, side, side, seed=seed + 50, dtype=torch.float32)
        return F.interpolate(coarse, (side, side), mode="bilinear") + noise

    features = {
        name: smooth(spec.channels, 4, size // spec.stride, seed + i) for i, (name, spec) in enumerate(specs.items())
    }
    return DenseOutput(features, 3 * smooth(num_labels, 2, size // 4, seed + 20))


def disc(radius: int) -> list[tuple[int, int]]:
    reach = range(-radius, radius + 1)
    return [(y, x) for y in reach for x in reach if 0 < y * y + x * x < radius * radius]


@cache
def line(dy: int, dx: int) -> list[tuple[int, int]]:
    """IRN's thick line: squared distance to the infinite line through (0, 0) and (dy, dx) below 1, in the box."""
    points = []
    for y in range(-12, 13):
        for x in range(-12, 13):
            along = (y * dy + x * dx) / (dy * dy + dx * dx)
            squared_distance = (y - along * dy) ** 2 + (x - along * dx) ** 2
            in_box = min(0, dy) <= y <= max(0, dy) and min(0, dx) <= x <= max(0, dx)
            if in_box and squared_distance < 1 - 1e-9:
                points.append((y, x))
    return points


def values_on_line(z: np.ndarray, mask: np.ndarray, i: tuple[int, int], offset: tuple[int, int]) -> list[float]:
    height, width = z.shape
    values = []
    for dy, dx in line(*offset):
        y, x = i[0] + dy, i[1] + dx
        if 0 <= y < height and 0 <= x < width and mask[y, x]:
            values.append(z[y, x])
    return values


def path_range(z: np.ndarray, mask: np.ndarray, offsets: list[tuple[int, int]]) -> np.ndarray:
    """`[H, W]` -> `[D, H, W]`."""
    out = np.zeros((len(offsets), *z.shape))
    for d, offset in enumerate(offsets):
        for i in np.ndindex(*z.shape):
            values = values_on_line(z, mask, (i[0], i[1]), offset)
            out[d][i] = max(values) - min(values) if values else 0.0
    return out


def boundary_strength(z: np.ndarray, mask: np.ndarray, radius: int) -> np.ndarray:
    return path_range(z, mask, disc(radius)).max(axis=0)


def class_boundary(classes: np.ndarray, mask: np.ndarray, radius: int) -> np.ndarray:
    """1 where a valid position has a valid position of another class in its disc."""
    out = np.zeros(classes.shape)
    for y, x in np.ndindex(*classes.shape):
        for dy, dx in disc(radius):
            v, u = y + dy, x + dx
            inside = 0 <= v < classes.shape[0] and 0 <= u < classes.shape[1]
            if inside and mask[y, x] and mask[v, u] and classes[y, x] != classes[v, u]:
                out[y, x] = 1
    return out


def halved(x: np.ndarray) -> np.ndarray:
    """`[..., 2h, 2w]` at half the resolution: bilinear samples at half-pixel centres are means of 2 x 2 blocks."""
    return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True) if a > 0)


def cross_entropy(p: np.ndarray, q: np.ndarray) -> float:
    return -sum(a * math.log(b) for a, b in zip(p.tolist(), q.tolist(), strict=True) if a > 0)


def boundary_loss(
    student: np.ndarray,
    teacher: np.ndarray,
    mask: np.ndarray,
    *,
    radius: int,
    theta: float,
    kappa: float,
    tau: float,
    mode: str,
) -> float:
    """Eq. 3 in both modes, fields `[B, H, W]`."""
    total = 0.0
    for s, t, m in zip(student, teacher, mask, strict=True):
        if not m.any():
            continue
        hard_teacher = (boundary_strength(t, m, radius) > theta).astype(float)
        strength = boundary_strength(s, m, radius)
        if mode == "paper":
            hard_student = (strength > theta).astype(float)
            total += cross_entropy(softmax((1 - hard_teacher)[m] / tau), softmax((1 - hard_student)[m] / tau))
        else:
            soft_student = 1 / (1 + np.exp(-(strength - theta) / kappa))
            total += divergence(softmax(hard_teacher[m] / tau), softmax(soft_student[m] / tau))
    return tau**2 * total / len(student)


def score_boundary(student: np.ndarray, teacher: np.ndarray, mask: np.ndarray, weights: np.ndarray) -> float:
    """Mean over images of the weighted mean over positions of how scores of all classes differ in windows of 3 x 3."""
    means = []
    for ours, theirs, valid, weight in zip(student, teacher, mask, weights, strict=True):
        total = 0.0
        for y, x in zip(*np.nonzero(valid), strict=True):
            near = [(v, u) for v in (y - 1, y, y + 1) for u in (x - 1, x, x + 1)]
            near = [(v, u) for v, u in near if 0 <= v < valid.shape[0] and 0 <= u < valid.shape[1] and valid[v, u]]
            for a, b in zip(ours, theirs, strict=True):
                p, q = (softmax(np.array([field[place] for place in near])) for field in (b, a))
                total += weight[y, x] * divergence(p, q)
        means.append(total / weight[valid].sum() if valid.any() else 0.0)
    return float(np.mean(means))


def relation_rows(x: np.ndarray, valid: list[int], tau: float) -> list[np.ndarray]:
    """Row softmaxes of the Gram matrix of `[n, C]` over the other valid positions."""
    return [softmax(np.array([x[i] @ x[j] / tau for j in valid if j != i])) for i in valid]


def relation(student: np.ndarray, teacher: np.ndarray, mask: np.ndarray, tau: float) -> tuple[float, float]:
    """Mean row divergence and mean row peak of one image, features `[n, C]`."""
    valid = [i for i in range(len(mask)) if mask[i]]
    if len(valid) < 2:
        return 0.0, 0.0
    p, q = relation_rows(teacher, valid, tau), relation_rows(student, valid, tau)
    rows = [divergence(a, b) for a, b in zip(p, q, strict=True)]
    return sum(rows) / len(rows), sum(float(a.max()) for a in p) / len(p)


def layer_norm(x: np.ndarray) -> np.ndarray:
    """`[C, H, W]` -> `[n, C]`, normalised over the channels and divided by C^(1/4)."""
    positions = x.reshape(x.shape[0], -1).T
    normed = [(v - v.mean()) / math.sqrt(v.var() + 1e-5) for v in positions]
    return np.stack(normed) / x.shape[0] ** 0.25


def context_loss(student: np.ndarray, teacher: np.ndarray, mask: np.ndarray, tau: float) -> float:
    """Stable L_CD, features `[B, C, H, W]`."""
    images = zip(student, teacher, mask, strict=True)
    rows = [relation(layer_norm(s), layer_norm(t), m.reshape(-1), tau)[0] for s, t, m in images]
    return tau**2 * sum(rows) / len(rows)


def literal_context_loss(student: np.ndarray, teacher: np.ndarray, mask: np.ndarray, tau: float) -> float:
    """Eq. 4 and 5: softmax of (softmax of the Gram matrix / tau), diagonal kept, summed over rows."""
    total = 0.0
    for s, t, m in zip(student, teacher, mask, strict=True):
        valid = [i for i in range(m.size) if m.reshape(-1)[i]]
        s, t = (x.reshape(x.shape[0], -1).T for x in (s, t))
        for i in valid:
            outer = []
            for x in (s, t):
                inner = softmax(np.array([x[i] @ x[j] / math.sqrt(x.shape[1]) for j in valid]))
                outer.append(softmax(inner / tau))
            total += cross_entropy(outer[1], outer[0])
    return tau**2 * total / len(student)


def labels_with_void() -> Tensor:
    labels = random_labels(2, 3, 4, num_labels=3).repeat_interleave(4, 1).repeat_interleave(4, 2)
    labels[0, 2:7, 5:8] = 255
    labels[1, :, :3] = 255
    return labels


def borders_of_classes(labels: np.ndarray, num_labels: int, reach: int, void: int) -> np.ndarray:
    """`[H, W]` -> `[K, H, W]`: pixels that are not void and see both the class and another one."""
    out = np.zeros((num_labels, *labels.shape))
    for y, x in np.ndindex(*labels.shape):
        window = labels[max(y - reach, 0) : y + reach + 1, max(x - reach, 0) : x + reach + 1]
        seen = {int(value) for value in window.reshape(-1)} - {void}
        if labels[y, x] != void and len(seen) > 1:
            for c in seen:
                out[c, y, x] = 1
    return out
