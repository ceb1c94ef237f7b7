"""Time and memory of functions that are compared, and what the machine itself can do."""

import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hf_bcd.utils.costs import synchronize


@dataclass(frozen=True)
class Measurement:
    """Seconds of one call over several repeats, and bytes that it needed beyond what was there before.

    Attributes:
        median: seconds.
        low: fastest repeat.
        high: slowest repeat.
        peak_bytes: largest memory in use during one call, minus that before it; None where it cannot be read.
    """

    median: float
    low: float
    high: float
    peak_bytes: int | None

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)


def compare(
    functions: Mapping[str, Callable[[], object]], device: torch.device, repeats: int
) -> dict[str, Measurement]:
    """Measures functions in turns, so that a slow moment of the machine hits all of them.

    The first call of each warms up and is not timed; its memory counts.
    """
    peaks = {name: peak_memory(function, device) for name, function in functions.items()}
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return {
        name: Measurement(statistics.median(times), min(times), max(times), peaks[name])
        for name, times in seconds.items()
    }


def peak_memory(function: Callable[[], object], device: torch.device) -> int | None:
    """Bytes in use at the worst moment of a call, beyond those before it.

    None where it cannot be read, see `reset_peak`.
    """
    gc.collect()
    before = reset_peak(device)
    function()
    synchronize(device)
    return None if before is None else peak_since(device, before)


def reset_peak(device: torch.device) -> int | None:
    """Bytes in use now, after which `peak_since` looks for the worst moment.

    On a GPU PyTorch's allocator counts them. On the CPU it is the kernel's own mark of the process, which Linux can reset; None
    where that cannot be done.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    mark = Path("/proc/self/clear_refs")
    if not os.access(mark, os.W_OK):
        return None
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)  # glibc keeps freed pages; what uses them again would not show
    mark.write_text("5", encoding="utf-8")
    return _resident("VmRSS")


def peak_since(device: torch.device, before: int) -> int:
    """Most bytes in use since `reset_peak`, beyond `before`."""
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")
    return max(0, peak - before)


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def machine_rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What bounds every kernel here: `copy_bytes_per_second` (read plus written) and `matmul_flops_per_second`."""
    size, side = (2**30, 8192) if device.type == "cuda" else (2**27, 1024)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = compare({"copy": lambda: target.copy_(source), "matmul": lambda: left @ right}, device, repeats=7)
    return {
        "copy_bytes_per_second": 2 * size / best["copy"].low,
        "matmul_flops_per_second": 2 * side**3 / best["matmul"].low,
    }


def ratio(part: Measurement, whole: Measurement) -> float:
    """How long the one takes, in units of the other."""
    return part.median / whole.median
