"""Running means of loss terms that cost no wait for the device until they are read, and the time that steps took."""

import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ..utils.distributed import is_distributed
from ..utils.files import numbers, read_json, write_json
from ..utils.messages import UserError


MEANS_FILE = "term_means.json"


class TermMeans:
    """Means of named loss terms over optimizer steps and ranks."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets everything added so far."""
        self._sums: dict[str, Tensor] = {}
        self._steps = 0.0

    def add(self, terms: Mapping[str, Tensor], accumulation_steps: int) -> None:
        """Adds the detached scalars of one of the batches that make an optimizer step."""
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, 0) + value / accumulation_steps
        self._steps += 1 / accumulation_steps

    def read(self) -> dict[str, float]:
        """The means so far, the same on all ranks, which must all call this; waits for the device."""
        return {name: value / self._steps for name, value in self._totals().items()}

    def _totals(self) -> dict[str, float]:
        """The sums, as means over the ranks."""
        if not self._sums:
            return {}
        sums = torch.stack(list(self._sums.values()))
        if is_distributed():
            dist.all_reduce(sums)
            sums /= dist.get_world_size()
        return dict(zip(self._sums, sums.tolist(), strict=True))

    def save(self, checkpoint: Path, *, writes: bool) -> None:
        """Keeps the sums since the last log beside a checkpoint, so that the first means after it are of all their steps.

        Args:
            checkpoint: the folder.
            writes: whether this rank writes; all must call this.
        """
        totals = self._totals()
        if writes:
            write_json(checkpoint / MEANS_FILE, {"steps": self._steps, "sums": totals})

    def load(self, checkpoint: Path, device: torch.device) -> None:
        """Goes on from the sums of a checkpoint; from none where it has no such file.

        Raises:
            UserError: if the file is damaged.
        """
        self.reset()
        path = checkpoint / MEANS_FILE
        if not path.is_file():
            return
        try:
            content = read_json(path)
            self._steps = float(content["steps"])
            self._sums = {
                str(name): torch.tensor(float(x), device=device) for name, x in numbers(content["sums"]).items()
            }
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: damaged; remove it, and the first logged means are of fewer steps.") from error


class Clock:
    """Pictures and seconds of training since the last log."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begins anew: what was before, such as an evaluation, is not training time."""
        self.images, self.begun = 0, time.perf_counter()

    def read(self, before: float) -> dict[str, float]:
        """Pictures a second since the last log, and `train_seconds` in all with the seconds `before` it; begins anew."""
        images, seconds = self.images, time.perf_counter() - self.begun
        self.restart()
        return {"images_per_second": round(images / seconds, 2), "train_seconds": round(before + seconds, 3)}
