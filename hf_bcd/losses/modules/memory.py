"""Unit vectors of every class from past images, in a ring each, the same on all ranks."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...utils.distributed import is_distributed


def spread_positions(classes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Up to `count` positions of every class, evenly spaced among all that it has in one-hot maps `[B, K, n]`.

    Returns:
        Indices `[B, K, count]` in 0..n-1, each class's own first and in ascending order, and how many of them are the
        class's own: `[B, K]`.
    """
    order = classes.cumsum(dim=2, dtype=torch.int32)
    total = order[:, :, -1:]
    # the first, (1 + total / count)th, ... position of a class; simply the first, second, ... of a class with few
    wanted = torch.arange(count, device=classes.device, dtype=torch.int32) * total.clamp_min(count) // count + 1
    indices = torch.searchsorted(order, wanted).clamp_max(classes.shape[2] - 1)
    return indices, total.squeeze(2).clamp_max(count)


def rank_by_rank(x: Tensor) -> Iterator[Tensor]:
    """`x` of every rank, one after the other, so that no rank ever holds all of them."""
    if not is_distributed():
        yield x
        return
    for rank in range(dist.get_world_size()):
        theirs = x if rank == dist.get_rank() else torch.empty_like(x)
        dist.broadcast(theirs, rank)
        yield theirs


class ClassMemory(nn.Module):
    """The latest vectors of every class: a ring of `size` entries each, whose oldest are overwritten.

    Takes `num_labels · size · channels` numbers, which never grow.
    """

    entries: Tensor
    pointer: Tensor
    filled: Tensor

    def __init__(self, num_labels: int, size: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("entries", torch.zeros(num_labels, size, channels))
        self.register_buffer("pointer", torch.zeros(num_labels, dtype=torch.int64))
        self.register_buffer("filled", torch.zeros(num_labels, dtype=torch.int64))
        # vectors and their numbers of each forward pass since the last step
        self._observed: list[tuple[Tensor, Tensor]] = []

    @property
    def size(self) -> int:
        return self.entries.shape[1]

    @torch.compiler.disable(reason="a list that grows would compile anew for each of several accumulated batches")
    def observe(self, vectors: Tensor, counts: Tensor) -> None:
        """Takes the vectors of a forward pass, which are remembered once the optimizer step ends.

        Of `vectors` `[B, K, p, channels]`, p <= `size`, the first `counts` `[B, K]` count.
        """
        if vectors.shape[2] > self.size:
            raise ValueError(f"{vectors.shape[2]} vectors of an image exceed a memory of {self.size} entries a class.")
        self._observed.append((vectors.detach().to(self.entries.dtype).contiguous(), counts))

    @torch.no_grad()
    def update(self) -> None:
        """Ends an optimizer step: the vectors of all its batches and ranks, in this order, overwrite the oldest ones."""
        for batch in self._observed:
            for vectors, counts in zip(*map(rank_by_rank, batch), strict=True):
                for image in zip(vectors, counts, strict=True):
                    self._insert(*image)
        self._observed.clear()

    def _insert(self, vectors: Tensor, counts: Tensor) -> None:
        places = torch.arange(vectors.shape[1], device=vectors.device)
        rows = torch.arange(len(vectors), device=vectors.device)[:, None]
        slots = (self.pointer[:, None] + places) % self.size
        new = (places < counts[:, None])[:, :, None]
        self.entries[rows, slots] = torch.where(new, vectors, self.entries[rows, slots])
        self.pointer.copy_((self.pointer + counts) % self.size)
        self.filled.copy_((self.filled + counts).clamp_max(self.size))

    def sample(self, count: int, start: Tensor) -> tuple[Tensor, Tensor]:
        """Up to `count` entries of each class, evenly spaced from `start` in 0..1 of its ring on, none twice.

        Returns:
            `[K · count, channels]`, and which of them there are, `[K · count]`: a class may have fewer entries.
        """
        places = torch.arange(count, device=self.entries.device)
        filled = self.filled[:, None]
        slots = ((start * filled).long() + places * (filled // count).clamp_min(1)) % filled.clamp_min(1)
        rows = torch.arange(len(filled), device=self.entries.device)[:, None]
        return self.entries[rows, slots].flatten(0, 1), (places < filled).flatten()
