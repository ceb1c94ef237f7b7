"""Aggregated features X^c of a feature hierarchy (BCD paper, Sec. IV-A) and the heads that read them."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...outputs import FeatureSpec
from ...utils.messages import UserError
from ..base import Progress
from ..boundary import boundary_strength, different_neighbour, pair_differences
from ..ops.functional import at_least_float32, resize, standardize
from ..ops.path import path_range


# batches of aggregated features `[B, C, h, w]`, the teacher's arg-max classes `[B, h, w]` and the valid mask
Samples = list[tuple[Tensor, Tensor, Tensor]]
Readout = Literal["fitted", "principal", "kept"]


class FeatureAggregator(nn.Module):
    """Fuses the levels of a hierarchy: 1x1 convolution each, bilinear to one grid, concatenation, 3x3 convolution.

    Each level has `reduced_channels` before the concatenation; `channels` come out.
    """

    def __init__(self, specs: Mapping[str, FeatureSpec], channels: int = 256, reduced_channels: int = 64) -> None:
        super().__init__()
        if not specs:
            raise ValueError("no feature levels to aggregate; the model's adapter must offer at least one.")
        convolutions = {name: nn.Conv2d(spec.channels, reduced_channels, 1) for name, spec in specs.items()}
        self.reduce = nn.ModuleDict(convolutions)
        self.fuse = nn.Conv2d(reduced_channels * len(specs), channels, 3, padding=1)

    def forward(self, features: Mapping[str, Tensor], size: tuple[int, int]) -> Tensor:
        """Aggregates `[B, C_k, h_k, w_k]` levels to `[B, channels, *size]` in float32 (or float64)."""
        return self.fused(self.narrowed(features, size), size)

    def narrowed(self, features: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        """The levels as small as `fused` takes them: resized if they are finer than `size`, reduced if they are wider then."""
        found = {}
        for name, convolution in self.reduce.items():
            level = at_least_float32(features[name])
            # a 1x1 convolution and a resize commute: do first what leaves fewer positions
            level = resize(level, size) if level.shape[-2] * level.shape[-1] > size[0] * size[1] else level
            found[name] = convolution(level) if _narrows(convolution) else level
        return found

    def fused(self, levels: Mapping[str, Tensor], size: tuple[int, int]) -> Tensor:
        """Aggregates what `narrowed` gives."""
        reduced = [
            resize(levels[name] if _narrows(convolution) else convolution(levels[name]), size)
            for name, convolution in self.reduce.items()
        ]
        return self.fuse(torch.cat(reduced, dim=1))


def _narrows(convolution: nn.Module) -> bool:
    return convolution.in_channels > convolution.out_channels  # type: ignore[operator]


class StudentHead(nn.Module):
    """The student's aggregated features and boundary scalar; trained with the student, dropped at export."""

    def __init__(self, specs: Mapping[str, FeatureSpec], channels: int, reduced_channels: int) -> None:
        super().__init__()
        self.aggregate = FeatureAggregator(specs, channels, reduced_channels)
        self.readout = nn.Conv2d(channels, 1, 1)

    def boundary_field(self, aggregated: Tensor, mask: Tensor, over_ranks: bool = True) -> Tensor:
        """Boundary scalar `[B, h, w]`, standardised over the valid positions of the batch, on all ranks or this one."""
        z = self.readout(aggregated).squeeze(1)
        return standardize(z, (0, 1, 2), mask, over_ranks=over_ranks)


class TeacherHead(nn.Module):
    """The teacher's aggregated features and boundary scalar. No distillation gradient ever reaches it.

    Trained jointly it would collapse within some 50 steps: a constant target is the easiest one to match. So the
    convolutions are seeded random orthogonal maps, which keep the Gram matrix, and only the 1x1 readout is fitted, once
    and before training, to separate the teacher's own arg-max classes.
    """

    z_mean: Tensor
    z_std: Tensor
    theta: Tensor
    calibrated: Tensor

    def __init__(self, specs: Mapping[str, FeatureSpec], channels: int, reduced_channels: int, seed: int) -> None:
        super().__init__()
        self.aggregate = FeatureAggregator(specs, channels, reduced_channels)
        self.readout = nn.Conv2d(channels, 1, 1)
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.orthogonal_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
        self.requires_grad_(False)
        self.register_buffer("z_mean", torch.zeros(()))
        self.register_buffer("z_std", torch.ones(()))
        self.register_buffer("theta", torch.ones(()))
        self.register_buffer("calibrated", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def forward(self, features: Mapping[str, Tensor], size: tuple[int, int]) -> Tensor:
        """Aggregated features `[B, channels, *size]` without a graph."""
        return self.aggregate(features, size)

    @torch.no_grad()
    def boundary_field(self, aggregated: Tensor) -> Tensor:
        """Boundary scalar `[B, h, w]`, standardised with the statistics of the calibration."""
        return (self.readout(aggregated).squeeze(1) - self.z_mean) / (self.z_std + 1e-5)

    def calibrate(
        self,
        batches: Samples,
        *,
        radius: int,
        readout: Readout,
        num_steps: int = 250,
        progress: Progress = iter,
        share: float | None = None,
    ) -> None:
        """Fits the readout, then its statistics and the boundary threshold theta. Needs no ground truth.

        Args:
            radius: radius of the lines between the positions of a pair.
            readout: `fitted` to the classes by `num_steps` of Adam, the `principal` component of the features, or `kept` as
                it is, at random.
            share: share of positions above theta, in 0..1, instead of that of the boundaries of the classes.

        Raises:
            UserError: if no position is valid.
        """
        if not any(mask.any() for _, _, mask in batches):
            raise UserError(
                "no valid position in the calibration batches: all pixels there are void, padding, or in cells of a level that hold "
                "such. Check the label rule and the size of the pictures, or look at more of them (`--calibration_images`)."
            )
        if readout == "fitted":
            self._fit_readout(batches, radius, num_steps, progress)
        elif readout == "principal":
            features = torch.cat([aggregated.movedim(1, -1)[mask] for aggregated, _, mask in batches])
            _, vectors = torch.linalg.eigh(features.T.cov())  # ascending
            self.readout.weight.copy_(vectors[:, -1].view_as(self.readout.weight))
        z = [self.readout(aggregated).squeeze(1) for aggregated, _, _ in batches]
        values = torch.cat([field[mask] for field, (_, _, mask) in zip(z, batches, strict=True)])
        self.z_mean.copy_(values.mean())
        self.z_std.copy_(values.std(correction=0))
        strengths = [boundary_strength(self.boundary_field(x), radius, mask)[mask] for x, _, mask in batches]
        strength = torch.cat(strengths).sort().values
        if share is None:
            share = boundary_share([(classes, mask) for _, classes, mask in batches], radius) or 0.0
        rank = len(strength) - round(share * len(strength))  # so many positions are no boundary
        # half-way between the two neighbours, so that ties and rounding on one side do not change the map
        self.theta.copy_((strength[max(rank - 1, 0)] + strength[min(rank, len(strength) - 1)]) / 2)
        self.calibrated.fill_(True)

    def _fit_readout(self, batches: Samples, radius: int, num_steps: int, progress: Progress) -> None:
        """Balanced BCE between the range on a line and "its ends differ in class", as IRN trains its boundary."""
        # the optimizer's step size presumes features of unit scale; the scale is folded into the weights afterwards
        scale = torch.cat([aggregated.flatten() for aggregated, _, _ in batches]).std().clamp_min(1e-12)
        weight = self.readout.weight.detach().clone().requires_grad_()
        optimizer = torch.optim.Adam([weight], lr=5e-3)
        targets = [pair_differences(classes, radius, "half", mask) for _, classes, mask in batches]
        with torch.enable_grad():
            for step in progress(range(num_steps)):
                (aggregated, _, mask), (differs, both) = batches[step % len(batches)], targets[step % len(batches)]
                z = F.conv2d(aggregated / scale, weight).squeeze(1)
                logits = (path_range(z, radius, "half", mask) - 0.5) / 0.1
                errors = F.binary_cross_entropy_with_logits(logits, differs.to(logits.dtype), reduction="none")
                sides = [(errors * side).sum() / side.sum().clamp_min(1) for side in (differs, both & ~differs)]
                optimizer.zero_grad()
                (sum(sides) / 2).backward()  # type: ignore[union-attr]
                optimizer.step()
        self.readout.weight.copy_(weight.detach() / scale)


def boundary_share(maps: Sequence[tuple[Tensor, Tensor]], radius: int) -> float | None:
    """Share of the valid positions of integer maps `[B, h, w]` that have another class inside the disc of `radius`.

    None if no position is valid.
    """
    found = torch.cat([different_neighbour(classes, radius, mask)[mask] for classes, mask in maps])
    return found.double().mean().item() if len(found) else None


class SelfRelationHead(nn.Module):
    """The operator O of Eq. 4 as its reference [85] (SERE) has it, with batch statistics synchronised over ranks.

    The student's has a `predictor` on top: 1x1 convolution, normalisation and ReLU.
    """

    def __init__(self, channels: int, predictor: bool) -> None:
        super().__init__()
        self.predictor = nn.Conv2d(channels, channels, 1, bias=False) if predictor else None

    def forward(self, aggregated: Tensor, mask: Tensor) -> Tensor:
        """Maps `[B, C, h, w]` to non-negative features of the same shape."""
        x = F.relu(standardize(aggregated, (0, 2, 3), mask[:, None]))
        if self.predictor is not None:
            x = F.relu(standardize(self.predictor(x), (0, 2, 3), mask[:, None]))
        return x
