"""Random numbers that are equal on all ranks and that a resumed run repeats."""

import torch
from torch import Tensor, nn


class SharedNoise(nn.Module):
    """Uniform numbers in [0, 1) that depend only on the seed and the optimizer step.

    The global generator differs between ranks, so two ranks would not equal one; a generator's state cannot be kept on
    the device. So the numbers come from a fixed table, read from another place at each step.
    """

    size = 65_537  # prime, so that the strides below reach every place

    table: Tensor
    step: Tensor

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("table", torch.rand(self.size, generator=generator), persistent=False)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def draw(self, *shape: int) -> Tensor:
        """Numbers of a shape; the same at every call within a step."""
        count = torch.Size(shape).numel()
        places = torch.arange(count, device=self.table.device)
        return self.table[(places + 8_191 * self.step) % self.size].view(shape)

    def advance(self) -> None:
        """Ends an optimizer step."""
        self.step += 1
