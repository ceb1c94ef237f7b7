"""The cost of a model: parameters, multiply-adds, latency and the size of its weights."""

import platform
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


MAX_REPEATS = 50


def measure_costs(models: Mapping[str, tuple[nn.Module, Tensor]], budget: float = 1.5) -> dict[str, dict[str, Any]]:
    """The costs of several models, which run in evaluation mode and are left in the mode they were in.

    Args:
        models: by name, a model and its `pixel_values` `[B, 3, H, W]` on the same device.
        budget: seconds a model for the timed forward passes.

    Returns:
        By name: `parameters`, `macs`, `weight_bytes`, `latency_ms` (median), `repeats`, `batch_size`, `size` (height,
        width) and `dtype`.
    """
    modes = {name: model.training for name, (model, _) in models.items()}
    for model, _ in models.values():
        model.eval()
    macs = {name: count_macs(model, pixel_values) for name, (model, pixel_values) in models.items()}
    seconds = time_forward(models, budget * len(models))
    for name, (model, _) in models.items():
        model.train(modes[name])
    return {
        name: {
            "parameters": count_parameters(model),
            "macs": macs[name],
            "weight_bytes": weight_bytes(model),
            "latency_ms": 1000 * statistics.median(seconds[name]),
            "repeats": len(seconds[name]),
            "batch_size": len(pixel_values),
            "size": list(pixel_values.shape[-2:]),
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        }
        for name, (model, pixel_values) in models.items()
    }


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the saved weights (parameters and persistent buffers, shared ones once), without the file's header."""
    tensors = {tensor.data_ptr() if tensor.numel() else id(tensor): tensor for tensor in model.state_dict().values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@torch.no_grad()
def count_macs(model: nn.Module, pixel_values: Tensor) -> int:
    """Multiply-adds of the convolutions and matrix products in one forward pass; nothing else counts."""
    counter = FlopCounterMode(display=False)
    with counter:
        model(pixel_values=pixel_values)
    return counter.get_total_flops() // 2


@torch.no_grad()
def time_forward(models: Mapping[str, tuple[nn.Module, Tensor]], budget: float) -> dict[str, list[float]]:
    """Seconds of each of several forward passes, each right after one of the same model that does not count.

    The models, in evaluation mode, take turns, so that whatever else the machine is doing slows all of them alike. No
    round begins after `budget` seconds; at least one and at most 50 run.
    """

    def run(model: nn.Module, pixel_values: Tensor) -> float:
        synchronize(pixel_values.device)
        start = time.perf_counter()
        model(pixel_values=pixel_values)
        synchronize(pixel_values.device)
        return time.perf_counter() - start

    seconds: dict[str, list[float]] = {name: [] for name in models}
    end = time.perf_counter() + budget
    for _ in range(MAX_REPEATS):
        for name, pair in models.items():
            run(*pair)  # the caches are full of the model before
            seconds[name].append(run(*pair))
        if time.perf_counter() >= end:
            break
    return seconds


def synchronize(device: torch.device) -> None:
    """Waits for what a device has been told to do; a CPU does it at once."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """The name of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] else platform.processor() or platform.machine()
