"""The machine: its cores, the layout of weights, fused kernels, layers that cannot train on one value."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn
from transformers import TrainingArguments

from ..models.heads import PooledBatchNorm2d


logger = logging.getLogger(__name__)

# instructions of x86 and ARM, any of which makes oneDNN's bfloat16 about as fast as float32 or faster
BFLOAT16 = ("avx512_bw", "avx_ne_convert", "amx_bf16", "bf16")


def cores_per_process() -> int:
    """Cores of the machine for each of the processes that run on it."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def limit_threads() -> None:
    """Leaves this process its part of the cores: more threads than cores slow all processes down."""
    torch.set_num_threads(min(torch.get_num_threads(), cores_per_process()))


def has_bfloat16() -> bool:
    """Whether this CPU computes bfloat16 by instructions of its own."""
    known = torch.cpu.get_capabilities()
    return torch.backends.mkldnn.is_available() and any(known.get(name) for name in BFLOAT16)


@cache
def warn_of_emulation() -> None:
    """Says, once, where this CPU has no bfloat16."""
    if not has_bfloat16():
        logger.warning(
            "this CPU (%s) computes bfloat16 in software, tens of times as slowly as float32; give --bf16 false and "
            "--teacher_dtype float32.",
            torch.cpu.get_capabilities().get("cpu_name", "of another kind"),
        )


def fit_loaders(args: TrainingArguments) -> None:
    """Changes arguments in place so that loaders have no more workers than cores, and pin memory for a GPU only."""
    args.dataloader_num_workers = min(args.dataloader_num_workers, cores_per_process())
    args.dataloader_persistent_workers = args.dataloader_persistent_workers and args.dataloader_num_workers > 0
    args.dataloader_pin_memory = args.dataloader_pin_memory and args.device.type != "cpu"


def fused(cls: Any, options: dict[str, Any], args: TrainingArguments) -> tuple[Any, dict[str, Any]]:
    """Class and options of an optimizer with one kernel for all tensors, where it has one and the options say nothing."""
    if cls in (torch.optim.SGD, torch.optim.AdamW) and args.device.type in ("cpu", "cuda"):
        options.setdefault("fused", True)
    return cls, options


def lay_out(*models: Any) -> None:
    """Puts the weights of convolutional models in channels-last order, in which convolutions compute, in place."""
    for model in models:
        if isinstance(model, nn.Module) and is_convolutional(model):  # a stored teacher is none
            model.to(memory_format=torch.channels_last)


def is_convolutional(model: nn.Module) -> bool:
    """Whether most of a model's weights belong to convolutions, so that channels-last layout pays."""
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    kernels = [weight.numel() for weight in weights if weight.ndim == 4]
    return sum(kernels) > sum(weight.numel() for weight in weights) / 2


def synchronized(module: nn.Module, args: Any) -> nn.Module:
    """The module with BatchNorm that is synchronised over GPUs, if `sync_batchnorm` asks for it and there are several."""
    if args.sync_batchnorm and args.world_size > 1 and args.device.type == "cuda":
        # torch's own conversion would drop the activations inside timm's BatchNormAct2d
        return convert_sync_batchnorm(module)
    return module


@contextmanager
def single_values_accepted(model: nn.Module) -> Iterator[None]:
    """Inside the block, heads with globally pooled branches train on the single image of an epoch's last batch."""
    plain = [module for module in model.modules() if type(module) is nn.BatchNorm2d]
    for module in plain:
        module.__class__ = PooledBatchNorm2d
    try:
        yield
    finally:
        for module in plain:
            module.__class__ = nn.BatchNorm2d
