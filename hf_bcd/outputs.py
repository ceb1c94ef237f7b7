"""What every model looks like to the rest of the package: named feature levels and logits."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor


class FeatureSpec(NamedTuple):
    """Shape of one feature level, known before the first forward pass.

    Attributes:
        channels: number of channels C of the level.
        stride: input pixels per feature position, along each axis.
    """

    channels: int
    stride: int


@dataclass
class DenseOutput:
    """Output of an adapted model on a batch of B images.

    Attributes:
        features: level name -> `[B, C, h, w]`, from fine to coarse. Level names: `stem` (stride 4, only for backbones
            with a separate stem) and `stride_4`, `stride_8`, `stride_16`, `stride_32` after the nominal stride of the
            stage; the true stride of a dilated stage stands in its `FeatureSpec`.
        logits: per-pixel class scores `[B, num_labels, h, w]` at any stride.
        auxiliary_logits: scores of a training-only auxiliary head, `[B, num_labels, h, w]`.
        task_losses: supervised losses that only the model itself can compute (set prediction), by name, weighted as its
            authors do: their sum is trained.
        head: the model's own head as a function of its levels, `{level: [B, C, h, w]}` -> scores in the classes of
            `logits`, where a frozen teacher offers one: gradients reach the levels alone.
    """

    features: dict[str, Tensor]
    logits: Tensor
    auxiliary_logits: Tensor | None = None
    task_losses: dict[str, Tensor] = field(default_factory=dict)
    head: Callable[[dict[str, Tensor]], Tensor] | None = None
