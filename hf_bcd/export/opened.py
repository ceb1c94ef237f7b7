"""An exported file in the place of the model that it was made from."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..adapters import DenseAdapter
from ..outputs import DenseOutput


class OpenedFile(nn.Module):
    """A file that a runtime has opened, called like a model.

    Args:
        run: from `pixel_values`, float32 `[B, 3, H, W]` on the CPU, to the outputs by name.
        size: height and width of the only pictures that the file takes, to which others are resized; None for any.
        one_by_one: whether it takes a single picture at a time.
    """

    def __init__(
        self,
        run: Callable[[Tensor], dict[str, Tensor]],
        size: tuple[int, int] | None = None,
        one_by_one: bool = False,
    ):
        super().__init__()
        self.run, self.size, self.one_by_one = run, size, one_by_one

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """From normalised `pixel_values` `[B, 3, H, W]` on any device to the outputs by name on the same one."""
        device, pixel_values = pixel_values.device, pixel_values.cpu()
        if self.size is not None and tuple(pixel_values.shape[-2:]) != self.size:
            pixel_values = F.interpolate(pixel_values, self.size, mode="bilinear", align_corners=False, antialias=True)
        parts = pixel_values.contiguous().split(1 if self.one_by_one else len(pixel_values))
        found = [self.run(part) for part in parts]
        return {name: torch.cat([one[name] for one in found]).to(device) for name in found[0]}


def running(adapter: DenseAdapter, file: OpenedFile) -> DenseAdapter:
    """The adapter itself, which from now on predicts with the file; only its settings come from the model."""
    if adapter.exported == ("logits",):

        def run(pixel_values: Tensor, targets: Any = None) -> DenseOutput:
            return DenseOutput({}, file(pixel_values)["logits"])

        vars(adapter)["run"] = run
    else:

        def forward(pixel_values: Tensor, **options: Any) -> SimpleNamespace:
            return SimpleNamespace(**file(pixel_values))

        vars(adapter.model)["forward"] = forward
    return adapter
