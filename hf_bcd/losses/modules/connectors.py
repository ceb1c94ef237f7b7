"""Modules that bring a student's features beside its teacher's: a projection, a common grid, a normalisation."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..base import Pair
from ..ops.functional import at_least_float32, resize, spatial_size, standardize


class Projection(nn.Conv2d):
    """1x1 convolution from the student's channels to the teacher's; the identity at first where both agree."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias)
        if in_channels == out_channels:
            nn.init.dirac_(self.weight)
            if self.bias is not None:
                nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Projects `[B, in_channels, h, w]` in float32 or float64."""
        return super().forward(at_least_float32(input))


class FeaturePair(nn.Module):
    """One level of both models: the student's projected to the teacher's channels and resized to the teacher's grid.

    Args:
        pair: the models.
        level: level name; the coarsest that both have by default.
        bias: whether the projection has one; without where a loss removes it, whose gradient would be rounding errors.
    """

    def __init__(self, pair: Pair, level: str | None = None, bias: bool = True) -> None:
        super().__init__()
        self.level = pair.level(level)
        ours, self.channels = pair.channels(self.level)
        self.projection = Projection(ours, self.channels, bias)

    def forward(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Student and teacher features, both `[B, channels, h, w]`; the teacher's are constant."""
        target = at_least_float32(teacher[self.level]).detach()
        return resize(self.projection(student[self.level]), spatial_size(target)), target


class BatchStandardize(nn.Module):
    """Batch normalisation with the statistics of the whole batch over all ranks, and of valid positions only.

    Unlike `nn.BatchNorm2d` it keeps no running statistics: connectors never run in evaluation.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalises `[B, channels, h, w]`; `mask` `[B, h, w]` is True where a position counts."""
        return standardize(x, (0, 2, 3), None if mask is None else mask[:, None]) * self.weight + self.bias
