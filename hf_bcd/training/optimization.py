"""What transformers' optimizers and schedules lack: layer-wise decay, steps down, an average of the weights."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ..adapters import DenseAdapter
from ..utils.messages import UserError
from .config import BCDConfig


# steps after which the average forgets almost as slowly as it will: D-FINE and RT-DETR warm it up so
AVERAGE_WARMUP = 2000


def group_parameters(
    optimizer: torch.optim.Optimizer, module: nn.Module, args: BCDConfig, student: DenseAdapter
) -> None:
    """Divides an optimizer's parameters, before it has state, by weight decay and by depth in the student.

    Matrices and kernels decay; biases, norms and other vectors do not. With `layer_decay` d < 1, stage i of the n of a
    backbone (its stem is stage 0) learns at `d^(n + 1 - i)` times the rate of all that comes after it.

    Args:
        optimizer: changed in place.
        module: its parameters, by name.
        args: weight and layer decay.
        student: knows the stages of its backbone.
    """
    depths = student.depths() if args.layer_decay < 1 else {}
    last = max(depths.values(), default=-1) + 1
    groups: dict[tuple[bool, int], list[nn.Parameter]] = {}
    for parameter in module.parameters():
        if parameter.requires_grad:
            groups.setdefault((parameter.ndim > 1, depths.get(parameter, last)), []).append(parameter)
    options = {
        key: value for key, value in optimizer.param_groups[0].items() if key not in ("params", "weight_decay", "lr")
    }
    optimizer.param_groups.clear()
    for (decays, depth), parameters in sorted(groups.items(), key=lambda item: (not item[0][0], -item[0][1])):
        decay = args.weight_decay if decays else 0.0
        rate = args.learning_rate * args.layer_decay ** (last - depth)
        optimizer.add_param_group({**options, "params": parameters, "weight_decay": decay, "lr": rate})


def step_down(scheduler: Any, milestones: Sequence[float], steps_per_unit: float) -> None:
    """Divides the rate of a schedule by ten after each milestone, given in units of so many steps."""
    if not isinstance(scheduler, LambdaLR):
        raise UserError(
            "lr_milestones divide a rate that follows from the step; choose another lr_scheduler_type, such as constant_with_warmup."
        )
    steps = [round(milestone * steps_per_unit) for milestone in milestones]

    def lowered(shape: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: shape(step) * 0.1 ** sum(step >= milestone for milestone in steps)

    scheduler.lr_lambdas = [lowered(shape) for shape in scheduler.lr_lambdas]


class WeightAverage(nn.Module):
    """An exponential average of a student's weights, which is what is scored and saved; it gets no gradient.

    Args:
        student: adapted student; it is copied.
        decay: the average's share of itself in a step, after its warm-up.
    """

    def __init__(self, student: DenseAdapter, decay: float) -> None:
        super().__init__()
        self.student, self.decay = copy.deepcopy(student).requires_grad_(False), decay

    @torch.no_grad()
    def update(self, student: DenseAdapter, step: int) -> None:
        """Moves towards the weights after optimizer step `step`; takes over their buffers."""
        kept = self.decay * (1 - math.exp(-step / AVERAGE_WARMUP))
        for average, weight in zip(self.student.parameters(), student.parameters(), strict=True):
            average.lerp_(weight, 1 - kept)
        for buffer, new in zip(self.student.buffers(), student.buffers(), strict=True):
            buffer.copy_(new)
