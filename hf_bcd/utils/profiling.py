"""Seconds and memory of the parts of a training step, for the log; torch's profiler shows the same names."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch

from .costs import peak_since, reset_peak, synchronize


class StepProfile:
    """Adds up what the parts of training steps take. Parts do not nest.

    Waits for the device before and after each part, so a profiled run is slower than others.

    Args:
        device: where the step runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Forgets everything measured so far."""
        self._seconds: dict[str, float] = {}
        self._peaks: dict[str, int] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Measures the block as a part of the step."""
        synchronize(self.device)
        before, start = reset_peak(self.device), time.perf_counter()
        with torch.profiler.record_function(name):
            yield
        synchronize(self.device)
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start
        if before is not None:
            self._peaks[name] = max(self._peaks.get(name, 0), peak_since(self.device, before))

    def read(self, steps: int) -> dict[str, float]:
        """`profile/<part>/seconds`, the mean over so many steps, and `profile/<part>/MiB`, the largest so far.

        The memory is that at the worst moment of the part beyond what was in use before it; on the CPU, pages that the
        allocator has kept and uses again do not show.
        """
        seconds = {f"profile/{name}/seconds": value / max(steps, 1) for name, value in self._seconds.items()}
        return seconds | {f"profile/{name}/MiB": value / 2**20 for name, value in self._peaks.items()}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Makes this the profile that `part` writes to."""
        global _running
        _running = self
        try:
            yield
        finally:
            _running = None


_running: StepProfile | None = None


def part(name: str) -> AbstractContextManager[None]:
    """Measures a block as a part of the step where a profile is running; else nothing."""
    return nullcontext() if _running is None else _running.measure(name)


def as_part(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, measured as a part of the step."""

    @wraps(function)
    def measured(*args: Any, **kwargs: Any) -> Any:
        with part(name):
            return function(*args, **kwargs)

    return measured
