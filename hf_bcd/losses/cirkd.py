"""Cross-image relational knowledge distillation (Yang et al., CVPR 2022, https://arxiv.org/abs/2204.06986)."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..outputs import DenseOutput, Targets
from ..utils.distributed import all_reduce_sum, is_distributed
from ..utils.messages import UserError
from .base import DistillationLoss, Pair, check_positive
from .kd import kd_loss
from .modules.connectors import BatchStandardize
from .modules.memory import ClassMemory, spread_positions
from .modules.noise import SharedNoise
from .ops.functional import (
    class_means,
    divergence,
    full_precision,
    image_means,
    on_teacher_grid,
    pool_valid,
    spatial_size,
    unit_vectors,
)


BLOCK_BYTES = 32 * 2**20  # of a block of similarities, of which a backward pass holds about eight at a time


@full_precision
def cirkd_loss(
    student: Tensor, teacher: Tensor, *, temperature: float = 0.1, pool: int = 1, mask: Tensor | None = None
) -> Tensor:
    """Relation between the pixels of all images of a batch, over all ranks.

    `mean over images a, their pixels i, and images b of KL(softmax_j(cos(t_ai, t_bj) / T) ‖ softmax_j(cos(s_ai, s_bj) /
    T))`. A rank yields the rows of its own images; the gradients of the columns go back to the ranks that own them.
    Besides the pooled features of all ranks it needs some 8 · `BLOCK_BYTES` of memory, however large the batch is.

    Args:
        student: features `[B, C, h, w]`; `teacher`, with any channels, and `mask` are as in `on_teacher_grid`.
        temperature: T, > 0.
        pool: side of the cells whose valid pixels are averaged first; time and gathered bytes fall with it.

    Returns:
        Scalar >= 0 in nat, 0 where student and teacher relate pixels alike; float32 or float64.

    Raises:
        ValueError: if the batches differ. All ranks must show batches and grids of one size.
    """
    student, teacher, mask = on_teacher_grid(student, teacher, mask, same_channels=False)
    (ours, valid), (theirs, _) = (pool_valid(x, mask, pool) for x in (student, teacher.to(student.dtype)))
    ours, theirs, valid = _unit_rows(ours), _unit_rows(theirs), valid.flatten(1)
    columns = _of_all_ranks(valid.to(ours.dtype)) > 0
    rows = _row_divergence(ours, theirs, _of_all_ranks(ours), _of_all_ranks(theirs), columns, temperature)
    return image_means(rows, valid).mean()


@full_precision
def cirkd_memory_loss(
    student: Tensor,
    teacher: Tensor,
    memory: Tensor,
    *,
    temperature: float = 0.1,
    mask: Tensor | None = None,
    memory_mask: Tensor | None = None,
) -> Tensor:
    """Relation between the pixels of a batch and remembered ones, or regions.

    `mean over images and their pixels i of KL(softmax_j(cos(t_i, m_j) / T) ‖ softmax_j(cos(s_i, m_j) / T))`.

    Args:
        student: features `[B, C, h, w]`, projected to the teacher's channels and grid.
        teacher: features `[B, C, h, w]`; they receive no gradient.
        memory: vectors `[M, C]` of length 1 that the teacher had elsewhere.
        temperature: T, > 0.
        mask: `[B, h, w]`, True where valid.
        memory_mask: `[M]`, True where there is a vector.

    Returns:
        Scalar >= 0 in nat, 0 without a valid vector; float32 or float64.
    """
    student, teacher, mask = on_teacher_grid(student, teacher, mask)
    columns = None if memory_mask is None else memory_mask[None]
    vectors = memory.detach().to(student.dtype)[None]
    rows = (_unit_rows(student), _unit_rows(teacher.to(student.dtype)))
    divergences = _row_divergence(*rows, vectors, vectors, columns, temperature)
    return image_means(divergences, mask.flatten(1)).mean()


def _unit_rows(x: Tensor) -> Tensor:
    """Features `[B, C, h, w]` as vectors of length 1: `[B, h · w, C]`."""
    return unit_vectors(x.flatten(2).mT, dim=2)


def _of_all_ranks(x: Tensor) -> Tensor:
    """`[B, ...]` of every rank in order, `[ranks · B, ...]`, differentiably: a column's gradient sums over ranks."""
    if not is_distributed():
        return x
    own = dist.get_rank()
    return all_reduce_sum(torch.cat([x if r == own else torch.zeros_like(x) for r in range(dist.get_world_size())]))


def _row_divergence(
    student: Tensor,
    teacher: Tensor,
    student_columns: Tensor,
    teacher_columns: Tensor,
    mask: Tensor | None,
    temperature: float,
) -> Tensor:
    """Divergence of rows `[B, n, C]` over each of some groups of columns `[G, m, C]`, averaged over groups: `[B, n]`."""
    groups = student_columns.shape[:2]

    def block(ours: Tensor, theirs: Tensor) -> Tensor:
        ours = (ours @ student_columns.flatten(0, 1).mT).unflatten(1, groups)
        theirs = (theirs @ teacher_columns.flatten(0, 1).mT).unflatten(1, groups)
        return divergence(ours, theirs, dim=2, tau=temperature, mask=mask).mean(dim=1)

    size = max(1, BLOCK_BYTES // (groups.numel() * student.element_size()))
    blocks = zip(student.flatten(0, 1).split(size), teacher.flatten(0, 1).split(size), strict=True)
    # computed again in the backward pass, or all blocks of similarities would be kept for it
    rows = [checkpoint(block, *pair, use_reentrant=False, preserve_rng_state=False) for pair in blocks]
    return torch.cat(rows).view(student.shape[:2])  # type: ignore[arg-type]


class _Head(nn.Module):
    """1x1 convolution, normalisation over the valid pixels of all ranks, ReLU, 1x1 convolution, as in the official code."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.norm = BatchStandardize(out_channels)
        self.second = nn.Conv2d(out_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x), mask).relu())


class CIRKDLoss(DistillationLoss):
    """`kd_loss` of the class scores, `cirkd_loss` between the images of a batch, and `cirkd_memory_loss` with pixels and
    regions (class means of an image) of past images, which the teacher's features fill after each optimizer step.

    Of a class, an image gives 16 evenly spaced pixels and one region; the memories keep the latest 20,000 and 2,000 of
    each class, or, in this proportion, as many as `memory_mib` allows: `(pixels + regions) · classes · channels · 4`
    bytes on every rank and in each checkpoint. About 4,096 pixels and 1,024 regions are compared at a
    step, as many of each class, from a place in its memory that changes from step to step. All these numbers are the
    official ones. New vectors wait until the end of a step: 17 · classes · channels · 4 bytes an image.

    The images of one forward pass on all ranks are related, whose batches must have one size; accumulated batches are
    not related to each other.

    Args:
        temperature: T of the similarities; 0.1 as in the official code, where that of the scores is 1.
        memory_mib: upper bound of both memories together, in MiB.
        stride: input pixels along a cell's side when images are related; finer maps are averaged first. Time falls with
            its fourth power: 8 as in the official scripts, which relate only the two images of each GPU, takes 16
            times as long.
        level: level of the features; the coarsest that both models have by default.

    Raises:
        UserError: if an option is out of range, or `memory_mib` is too small for one region of each class.
    """

    weights = {"kd": 1.0, "batch_pixel": 1.0, "memory_pixel": 0.1, "memory_region": 0.1}
    borrowed = frozenset({"kd"})
    needs = frozenset({"logits", "features", "labels"})
    transfers = "similarities of pixels across images, and to remembered pixels and regions"
    keeps = "memory"
    checked = (
        "official code: same weights, temperatures and memories; but features of the backbone, stride 16 and all ranks' "
        "images in the batch relation (there: 8, one rank's), void pixels left out, pixels remembered under their own "
        "class (there: whatever fills the image's first rows), memories filled after the step and empty at first (there: "
        "before the loss, and random), lengths below 1e-4 count as 1e-4; accumulated batches do not add up to one, as each "
        "relates its own images only"
    )
    reference = "yang2022cross"

    # of pixels and regions: how many are remembered of a class at most, and compared at a step, all classes together
    max_entries = (20_000, 2_000)
    samples: tuple[int, int] = (4_096, 1_024)
    pixels_an_image = 16  # for the memory of a class

    def __init__(
        self,
        pair: Pair,
        *,
        temperature: float = 0.1,
        memory_mib: float = 256,
        stride: float = 16,
        level: str | None = None,
    ) -> None:
        super().__init__(pair)
        check_positive(temperature=temperature, memory_mib=memory_mib, stride=stride)
        self.temperature, self.level, self.num_labels = temperature, pair.level(level), pair.num_labels
        ours, theirs = pair.channels(self.level)
        self.pool = max(1, round(stride / pair.teacher[self.level].stride))
        num_pixels, num_regions = self._entries(theirs, memory_mib)
        self.head = _Head(ours, theirs)
        self.pixels = ClassMemory(pair.num_labels, num_pixels, theirs)
        self.regions = ClassMemory(pair.num_labels, num_regions, theirs)
        self.noise = SharedNoise(pair.seed)

    def _entries(self, channels: int, memory_mib: float) -> tuple[int, int]:
        """How many pixels and regions of each class `memory_mib` holds."""
        pixels, regions = self.max_entries
        full = (pixels + regions) * self.num_labels * channels * 4 / 2**20
        part = min(1.0, memory_mib / full)
        if part * regions < 1:
            raise UserError(
                f"memory_mib is {memory_mib}; {self.num_labels} classes of {channels} channels need {full / regions:.3g} "
                "MiB for one region and ten pixels of each class."
            )
        return int(part * pixels), int(part * regions)

    def forward(self, student: DenseOutput, teacher: DenseOutput, targets: Targets) -> dict[str, Tensor]:
        ours, theirs = student.features[self.level], teacher.features[self.level]
        size = spatial_size(theirs)
        ours, theirs, mask = on_teacher_grid(ours, theirs, targets.valid(size), same_channels=False)
        if self.training:
            self._observe(theirs, targets.class_masks(size) >= 0.5)
        projected = self.head(ours, mask)
        valid = targets.valid(spatial_size(teacher.logits))
        options = {"temperature": self.temperature, "mask": mask}
        terms = {
            "kd": kd_loss(student.logits, teacher.logits, mask=valid),
            "batch_pixel": cirkd_loss(ours, theirs, pool=self.pool, **options),
        }
        memories = {"memory_pixel": self.pixels, "memory_region": self.regions}
        for (term, memory), samples in zip(memories.items(), self.samples, strict=True):
            vectors, there = memory.sample(samples // self.num_labels + 1, self.noise.draw(1))
            terms[term] = cirkd_memory_loss(projected, theirs, vectors, memory_mask=there, **options)
        return terms

    def _observe(self, features: Tensor, classes: Tensor) -> None:
        """Leaves what the memories are to get from a batch."""
        unit = unit_vectors(features, dim=1)
        positions, counts = spread_positions(classes.flatten(2), min(self.pixels_an_image, self.pixels.size))
        pixels = torch.take_along_dim(unit.flatten(2).mT, positions.flatten(1)[:, :, None], dim=1)
        self.pixels.observe(pixels.unflatten(1, positions.shape[1:]), counts)
        regions = unit_vectors(class_means(unit, classes), dim=2)
        self.regions.observe(regions[:, :, None], counts.clamp_max(1))

    def after_step(self) -> None:
        self.pixels.update()
        self.regions.update()
        self.noise.advance()
