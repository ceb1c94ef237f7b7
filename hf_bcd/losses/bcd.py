"""Boundary and context distillation (BCD), https://huggingface.co/papers/2401.13174."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.profiler import record_function

from ..outputs import DenseOutput, Objects, Targets
from ..utils.messages import UserError
from .base import CalibrationBatches, DistillationLoss, Pair, Progress, check_positive
from .boundary import (
    Mode,
    boundary_divergence,
    boundary_strength,
    check_mode,
    different_neighbour,
    score_boundary_loss,
    score_changes,
)
from .context import literal_relation, related, relation_map, row_divergence
from .modules.aggregate import Readout, SelfRelationHead, StudentHead, TeacherHead, boundary_share
from .modules.schedules import Temperature
from .ops.functional import at_least_float32, grid_size, resize, spatial_size
from .ops.path import line_offsets


logger = logging.getLogger(__name__)

TeacherHeadKind = Literal["calibrated", "orthogonal", "logits"]
Regions = Literal["instances", "classes"]
BOUNDARY, RELATION, LEVELS = "bcd/boundary", "bcd/relation", "bcd/levels/"

# without any labels: share of positions of the stride-8 grid with another class less than 3 away. Labels have 0.44 on CamVid at
# 480x360 and 0.32 on two pictures of ADE20K at 683x512.
BOUNDARY_SHARE = 0.4


def regions_of(
    teacher: DenseOutput, targets: Targets, size: tuple[int, int], kind: Regions = "instances"
) -> tuple[Tensor, bool]:
    """A map `[B, *size]` whose ids differ across boundaries, and whether these are boundaries of things.

    The teacher's arg-max classes; of a model of objects, the masks that the teacher finds, else those of the truth, else its
    boxes, whose outlines are no boundaries of things.
    """
    if teacher.logits is not None:
        return resize(at_least_float32(teacher.logits), size).argmax(dim=1), True
    known = targets if teacher.answers is None else teacher.answers
    assert isinstance(known, Objects)  # all else has scores of each pixel
    regions = known.regions(size)
    if kind == "classes":
        ids = [torch.cat([classes.new_zeros(1), classes + 1]) for classes in known.classes]
        regions = torch.stack([one[region] for one, region in zip(ids, regions, strict=True)])
    return regions, known.masks is not None


class BCDLoss(DistillationLoss):
    """Boundary and context distillation between two feature hierarchies.

    Owns the student's connectors (trained, dropped at export) and the teacher's frozen head. At the default widths these
    cost 0.8 + 1.0 million parameters and 3 % of a step's multiply-adds (teacher forward, student forward and backward)
    for PSPNet-101 -> PSPNet-18, 0.6 + 0.7 million and 9 % for SegFormer-B4 -> SegFormer-B0, where hardly anything costs
    less than a 3x3 convolution.

    Args:
        mode: `stable` (default) or `paper`, the equations as printed.
        teacher_head: `calibrated` fits the boundary readout to the teacher's classes before training; `orthogonal`
            leaves it random ("only the student is trained"); `logits` has no readout: how class scores change around each
            position is compared, `score_boundary_loss`, which reaches decoder and classifier too.
        radius: radius of the boundary lines, in positions of the stride-8 grid.
        kappa: width of the student's boundary sigmoid.
        temperature: temperature of the relations at the start.
        channels: channels of the aggregated features.
        reduced_channels: channels of each level before they are fused.
        stride: stride of the common grid.
        boundary_regions: of models of objects, whether boundaries lie between `instances` or between `classes`.
    """

    weights = {"boundary": 3.0, "context": 1.0}
    shares = {"boundary": 0.3, "context": 0.5}
    needs = frozenset({"features"})  # of the targets, void positions only
    decays = True
    transfers = "semantic boundaries and pixel-to-pixel relations of all levels"
    checked = (
        "the paper's equations (no official code); `stable` mode is our reading of them; boundary maps are standardised over "
        "a forward pass, so accumulated batches do not add up to one"
    )
    reference = "zhang2024bcd"

    def __init__(
        self,
        pair: Pair,
        *,
        mode: Mode = "stable",
        teacher_head: TeacherHeadKind = "calibrated",
        radius: int = 3,
        kappa: float = 0.5,
        temperature: float = 1.0,
        channels: int = 256,
        reduced_channels: int = 64,
        stride: int = 8,
        boundary_regions: Regions = "instances",
    ) -> None:
        super().__init__(pair)
        check_mode(mode)
        if teacher_head not in get_args(TeacherHeadKind):
            raise UserError(f"teacher_head is {teacher_head!r}; choose one of {', '.join(get_args(TeacherHeadKind))}.")
        if mode == "paper" and teacher_head == "logits":
            raise UserError("teacher_head='logits' has no literal form; use mode='stable' or another teacher_head.")
        if boundary_regions not in get_args(Regions):
            raise UserError(f"boundary_regions is {boundary_regions!r}; choose {' or '.join(get_args(Regions))}.")
        self.boundary_regions: Regions = boundary_regions
        widths = {"channels": channels, "reduced_channels": reduced_channels}
        check_positive(kappa=kappa, temperature=temperature, stride=stride, **widths)
        line_offsets(radius)  # fails here, not at the first step
        self.mode: Mode = mode
        self.teacher_head_kind: TeacherHeadKind = teacher_head
        self.radius, self.kappa, self.stride, self.reduced_channels = radius, kappa, stride, reduced_channels
        self.student_head = StudentHead(pair.student, **widths)
        if teacher_head == "logits":
            self.needs = frozenset({"features", "logits"})
            self.weights = {"boundary": 1.0, "context": 1.0}
            self.student_head.readout.requires_grad_(False)  # unused: DDP waits for gradients of all that require them
        self.teacher_head = TeacherHead(pair.teacher, **widths, seed=pair.seed)
        self.student_relation = self.teacher_relation = None
        if mode == "paper":
            self.weights = {"boundary": 10.0, "context": 50.0}  # alpha and beta belong to its reductions
            self.student_relation = SelfRelationHead(channels, predictor=True)
            self.teacher_relation = SelfRelationHead(channels, predictor=False)
        self.boundary_temperature, self.context_temperature = Temperature(), Temperature(temperature)

    def forward(self, student: DenseOutput, teacher: DenseOutput, targets: Targets) -> dict[str, Tensor]:
        size = grid_size(targets.size, self.stride)
        mask = targets.valid(size)
        student_features = self.student_head.aggregate(student.features, size)
        with record_function("bcd/teacher"):
            known = self._known(teacher, size, mask)
        with record_function("bcd/boundary"):
            if self.teacher_head_kind == "logits":
                boundary = self._among_scores(student, teacher, targets)
            else:
                boundary = self._boundary(student_features, known[BOUNDARY], mask)
        with record_function("bcd/context"):
            context = self._context(student_features, known[RELATION], mask)
        return {"boundary": boundary, "context": context}

    def _known(self, teacher: DenseOutput, size: tuple[int, int], mask: Tensor) -> dict[str, Tensor]:
        """The teacher's boundary map, and its features as `_context` takes them."""
        if RELATION in teacher.digest:  # of an older store
            return dict(teacher.digest)
        if BOUNDARY in teacher.digest:
            return {BOUNDARY: teacher.digest[BOUNDARY], RELATION: self._relations(teacher.digest, size)}
        features = self.teacher_head(teacher.features, size)
        relations = features if self.mode == "paper" else relation_map(features)
        if self.teacher_head_kind == "logits":  # whose boundaries are no map
            return {RELATION: relations}
        return {BOUNDARY: self.teacher_boundary(teacher, features, mask), RELATION: relations}

    @torch.no_grad()
    def _relations(self, digest: Mapping[str, Tensor], size: tuple[int, int]) -> Tensor:
        levels = {name: digest[LEVELS + name] for name in self.teacher_head.aggregate.reduce}
        return relation_map(self.teacher_head.aggregate.fused(levels, size))

    @torch.no_grad()
    def digest(self, teacher: DenseOutput, targets: Targets) -> dict[str, Tensor] | None:
        """The hard boundary map `[B, h, w]`, and the levels that the teacher's head fuses: far fewer numbers than it makes of them.

        None for the printed equations, which normalise the teacher's features over the batch.
        """
        if self.mode == "paper":
            return None
        size = grid_size(targets.size, self.stride)
        aggregate = self.teacher_head.aggregate
        levels = aggregate.narrowed(teacher.features, size)
        boundary = self.teacher_boundary(teacher, aggregate.fused(levels, size), targets.valid(size))
        return {BOUNDARY: boundary} | {LEVELS + name: level for name, level in levels.items()}

    @torch.no_grad()
    def lost(self, exact: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> Tensor:
        first, second = (self._relations(digest, spatial_size(exact[BOUNDARY])) for digest in (exact, kept))
        return torch.stack([row_divergence(*pair) for pair in zip(first, second, strict=True)]).mean()

    @property
    def digested(self) -> dict[str, Any]:
        names = ("mode", "teacher_head_kind", "radius", "stride", "boundary_regions")
        widths = {"channels": self.teacher_head.readout.in_channels, "reduced_channels": self.reduced_channels}
        return {name: getattr(self, name) for name in names} | widths

    @staticmethod
    def _among_scores(student: DenseOutput, teacher: DenseOutput, targets: Targets) -> Tensor:
        size = spatial_size(teacher.logits)
        weights = targets.weights(size)
        return score_boundary_loss(student.logits, teacher.logits, mask=targets.valid(size), weights=weights)

    def _boundary(self, features: Tensor, hard_teacher: Tensor, mask: Tensor) -> Tensor:
        tau = self.boundary_temperature.value.clone()  # autograd keeps it, and `after_step` writes in place
        field = self.student_head.boundary_field(features, mask)
        strength, theta = boundary_strength(field, self.radius, mask), self.teacher_head.theta
        divergence = boundary_divergence(strength, hard_teacher, theta, self.kappa, tau, mask, self.mode)
        peak = self._peak(hard_teacher, mask, tau)
        self.boundary_temperature.observe(peak, mask.flatten(1).any(dim=1))  # one softmax an image
        return tau**2 * divergence.mean()

    def _peak(self, item: Tensor, mask: Tensor, tau: Tensor) -> Tensor:
        """Statistic of the temperature rule for a 0/1 map: one number an image."""
        item, void, inf = item.flatten(1) / tau, ~mask.flatten(1), float("inf")
        if self.mode == "paper":
            return (item.masked_fill(void, -inf).amax(dim=1) - item.masked_fill(void, inf).amin(dim=1)).clamp_min(0)
        return item.masked_fill(void, -inf).softmax(dim=1).amax(dim=1).nan_to_num(0.0)

    def _context(self, student_features: Tensor, teacher_features: Tensor, mask: Tensor) -> Tensor:
        tau = self.context_temperature.value
        if self.student_relation is None or self.teacher_relation is None:
            relation = related(student_features, teacher_features, tau=tau, mask=mask)
            rows = mask.flatten(1).sum(dim=1)
            self.context_temperature.observe(relation.peak, rows * (rows >= 2))  # one row has no other to relate to
            # a temperature below 1 sharpens the relations; its square would take away most of the loss again
            return tau.clamp_min(1) ** 2 * relation.divergence.mean()
        student_features = self.student_relation(student_features, mask)
        teacher_features = self.teacher_relation(teacher_features, mask)
        energy = teacher_features.square().sum(dim=1).masked_fill(~mask, 0) / teacher_features.shape[1] ** 0.5
        # features are non-negative, so the Gram matrix lies between 0 and its largest diagonal entry
        self.context_temperature.observe(energy.amax(dim=(1, 2)) / tau, mask.flatten(1).any(dim=1))
        return tau**2 * literal_relation(student_features, teacher_features, tau=tau, mask=mask).mean()

    @torch.no_grad()
    def teacher_boundary(self, teacher: DenseOutput, teacher_features: Tensor, mask: Tensor) -> Tensor:
        """The teacher's hard boundary map `[B, h, w]`, 0 or 1 as float."""
        if self.teacher_head_kind == "logits":
            classes = resize(at_least_float32(teacher.logits), spatial_size(mask)).argmax(dim=1)
            return different_neighbour(classes, self.radius, mask).to(teacher_features.dtype)
        field = self.teacher_head.boundary_field(teacher_features)
        return (boundary_strength(field, self.radius, mask) > self.teacher_head.theta).to(field.dtype)

    @property
    def needs_calibration(self) -> bool:
        return self.teacher_head_kind != "logits" and not bool(self.teacher_head.calibrated)

    @torch.no_grad()
    def calibrate(self, batches: CalibrationBatches, progress: Progress = iter, num_steps: int = 250) -> None:
        """Fits the teacher's boundary readout and threshold to its own classes or masks, see `TeacherHead.calibrate`.

        Where there are boxes only, the readout is not fitted to them, for rectangles are no boundaries: it is the first
        principal component of the features, and only the share of boundary positions is that of the boxes' outlines. A teacher
        of features only has no classes either: its readout is the same component, and the share is that of the labels, whose
        places it does not use; without labels it is `BOUNDARY_SHARE`.
        """
        prepared, real = [], True
        answers = [teacher.answers for teacher, _ in batches if teacher.answers is not None]
        if answers and not any(len(boxes) for one in answers for boxes in one.boxes):
            logger.warning(
                "bcd: the teacher is sure of no object in the calibration images; boundaries are those of the truth."
            )
            batches = [(replace(teacher, answers=None), targets) for teacher, targets in batches]
        labels, share = [], None
        for teacher, targets in batches:
            size = grid_size(targets.size, self.stride)
            if teacher.logits is None and not isinstance(targets, Objects):
                masks, real = targets.class_masks(size), False
                regions = masks.byte().argmax(dim=1)
                labels.append((regions, masks.any(dim=1)))
            else:
                regions, real = regions_of(teacher, targets, size, self.boundary_regions)
            prepared.append((self.teacher_head(teacher.features, size), regions, targets.valid(size)))
        if labels:
            share = boundary_share(labels, self.radius)
            share = BOUNDARY_SHARE if share is None else share
        fitted: Readout = "fitted" if real else "principal"
        readout: Readout = fitted if self.teacher_head_kind == "calibrated" else "kept"
        self.teacher_head.calibrate(
            prepared, radius=self.radius, readout=readout, num_steps=num_steps, progress=progress, share=share
        )

    def after_step(self) -> None:
        self.boundary_temperature.update()
        self.context_temperature.update()

    @torch.no_grad()
    def inspect(self, student: DenseOutput, teacher: DenseOutput, image_size: tuple[int, int]) -> dict[str, Tensor]:
        """Maps that the loss compares, for pictures: boundaries `[B, h, w]` and relation features `[B, C, h, w]`.

        Boundaries among scores are `score_changes`, in nat, on each model's own grid.
        """
        size = grid_size(image_size, self.stride)
        level = next(iter(teacher.features.values()))
        mask = torch.ones((len(level), *size), dtype=torch.bool, device=level.device)
        student_features = self.student_head.aggregate(student.features, size)
        teacher_features = self.teacher_head(teacher.features, size)
        if self.teacher_head_kind == "logits":
            teacher_boundary, student_boundary = score_changes(teacher.logits), score_changes(student.logits)
        else:
            field = self.student_head.boundary_field(student_features, mask, over_ranks=False)
            strength = boundary_strength(field, self.radius, mask)
            teacher_boundary = self.teacher_boundary(teacher, teacher_features, mask)
            student_boundary = torch.sigmoid((strength - self.teacher_head.theta) / self.kappa)
        return {
            "teacher_boundary": teacher_boundary,
            "student_boundary": student_boundary,
            "teacher_features": teacher_features,
            "student_features": student_features,
        }
