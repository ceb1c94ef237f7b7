"""Decay of the distillation terms, and temperatures that adapt, over the steps of a run."""

import torch
from torch import Tensor, nn

from ...utils.distributed import all_reduce_sum


def decay(step: int, total: int) -> float:
    """Decay of the distillation terms, r(t) of Eq. 7: 1 at the first step, 1/total at the last.

    Args:
        step: optimizer step, counted from 1.
        total: number of optimizer steps of the run.

    Returns:
        `1 - (step - 1) / total`, in (0, 1].

    Raises:
        ValueError: if `step` is not in 1..total.
    """
    if not 1 <= step <= total:
        raise ValueError(f"step {step} is outside 1..{total}; count optimizer steps from 1.")
    return 1 - (step - 1) / total


class Temperature(nn.Module):
    """A temperature that grows while the teacher's distribution is too peaked.

    After each step: if the mean over rows of the teacher's largest probability, after temperature, exceeds 0.5, the
    temperature grows by 5 % for the next step, up to 4 (Phuong & Lampert, ICCV 2019, which the BCD paper follows; for
    `paper` losses the statistic is the range of the teacher's item divided by the temperature).
    """

    threshold = 0.5
    growth = 1.05
    maximum = 4.0

    value: Tensor

    def __init__(self, initial: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("value", torch.tensor(float(initial)))
        # plain attribute: DDP overwrites buffers with rank 0's before each forward pass
        self._observed: Tensor | None = None

    def observe(self, statistic: Tensor, rows: Tensor | None = None) -> None:
        """Adds an image's mean over rows `[B]`, and over how many `[B]` (one by default), to the current step."""
        statistic = statistic.detach().float()
        rows = torch.ones_like(statistic) if rows is None else rows.to(statistic)
        observed = torch.stack([(statistic * rows).masked_fill(rows == 0, 0).sum(), rows.sum()])
        self._observed = observed if self._observed is None else self._observed + observed

    def update(self) -> None:
        """Ends an optimizer step: the mean over all ranks and accumulated batches decides on the next temperature."""
        if self._observed is None:
            return
        (total, rows), self._observed = all_reduce_sum(self._observed), None
        grown = (self.value * self.growth).clamp_max(self.maximum)
        self.value.copy_(torch.where(total / rows > self.threshold, grown, self.value))
