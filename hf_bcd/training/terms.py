"""Running means of loss terms that cost no wait for the device until they are read."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from ..utils.distributed import is_distributed


class TermMeans:
    """Means of named loss terms over optimizer steps and ranks."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets everything added so far."""
        self._sums: dict[str, Tensor] = {}
        self._steps = 0.0

    def add(self, terms: Mapping[str, Tensor], accumulation_steps: int) -> None:
        """Adds the detached scalars of one of the batches that make an optimizer step."""
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, 0) + value / accumulation_steps
        self._steps += 1 / accumulation_steps

    def read(self) -> dict[str, float]:
        """The means so far, the same on all ranks, which must all call this; waits for the device."""
        if not self._sums:
            return {}
        means = torch.stack(list(self._sums.values())) / self._steps
        if is_distributed():
            dist.all_reduce(means)
            means /= dist.get_world_size()
        return dict(zip(self._sums, means.tolist(), strict=True))
