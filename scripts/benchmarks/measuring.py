"""Time and memory of functions that are compared, and what the machine itself can do."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hf_bcd.utils.costs import peak_since, reset_peak, synchronize


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


def machine_rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What bounds every kernel here: `copy_bytes_per_second` (read plus written) and `matmul_flops_per_second`."""
    size, side = (2**30, 8192) if device.type == "cuda" else (2**27, 2048)
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
