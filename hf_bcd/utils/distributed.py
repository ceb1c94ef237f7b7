"""Processes that train together."""

import os

import torch
import torch.distributed as dist
from torch import Tensor


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks whose backward sums the gradients over ranks."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Tensor:
        grad = grads[0].clone()
        dist.all_reduce(grad)
        return grad


def is_distributed() -> bool:
    """Whether more than one rank takes part in this run."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first_process() -> bool:
    """Whether this is the first of the processes that a launcher has started, known before they have met."""
    return int(os.environ.get("RANK", "0")) == 0


def all_reduce_sum(x: Tensor) -> Tensor:
    """Differentiable sum of `x` over all ranks; the identity in a single process."""
    return _AllReduceSum.apply(x) if is_distributed() else x  # type: ignore[return-value]


def rank_count() -> int:
    """Number of ranks that take part in this run."""
    return dist.get_world_size() if is_distributed() else 1


def rank_index() -> int:
    """Which of these ranks this one is, from 0 on."""
    return dist.get_rank() if is_distributed() else 0
