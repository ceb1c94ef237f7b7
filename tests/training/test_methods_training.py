"""Every method trains a student through the real trainer, alone, beside others and after an interruption."""

import math
from pathlib import Path

import pytest
import tiny
from torch.utils.data import Dataset

from hf_bcd import BCDTrainer
from hf_bcd.losses import LOSSES
from hf_bcd.runs.methods import tasks_of


STEPS = 12
# methods at a size that suits the models here
OPTIONS = {
    "bcd": {"channels": 16, "reduced_channels": 8},
    "cirkd": {"memory_mib": 0.1},
    "ifvd": {"discriminator_channels": 4},
    "skd": {"discriminator_channels": 4},
    "sstkd": {"discriminator_channels": 4},
}


class FixedScenes(Dataset):
    """The same two synthetic scenes again and again, as they are."""

    def __init__(self, length: int) -> None:
        data = tiny.scenes(train=2, size=(48, 48))["train"]
        self.samples = [{"index": index, **tiny.tensors(sample)} for index, sample in enumerate(data)]
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        return self.samples[index % len(self.samples)]


@pytest.fixture(scope="module")
def scenes() -> FixedScenes:
    return FixedScenes(2 * STEPS)


def start(folder: Path, losses: dict, data: Dataset | None = None, **changes) -> BCDTrainer:
    options = {"max_steps": STEPS, "optim": "adamw_torch", "optim_args": None, "learning_rate": 2e-3, "losses": losses}
    options |= {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": None, "train_sampling_strategy": "sequential"}
    given = None if data is None else {"train": data}
    return tiny.trainer(folder, model=tiny.tiny_timm(dropout=0.0), data=given, **(options | changes))


def weighted(run: BCDTrainer, weights: dict[str, float]) -> list[float]:
    """The weighted sum of terms at each step, without r(t)."""
    histories = [[weight * value for value in tiny.history(run, term)] for term, weight in weights.items()]
    return [sum(values) for values in zip(*histories, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(name for name in LOSSES if "segmentation" in tasks_of(name)))
def test_a_method_trains_without_harm(name: str, scenes: FixedScenes, tmp_path: Path) -> None:
    run = start(tmp_path, {name: OPTIONS.get(name, {})}, scenes)
    run.train()
    totals, task = weighted(run, run.distiller.criterion.weights), tiny.history(run, "loss_task")
    assert len(totals) == len(task) == STEPS and all(map(math.isfinite, totals))
    totals = [total for total in totals if total != 0]  # a closed gate of SCKD
    assert len(totals) >= STEPS / 2 and sum(totals[-3:]) / 3 < totals[0]
    assert task[-1] < task[0] and max(task) < 1.5 * task[0]


def test_a_method_trains_beside_bcd(scenes: FixedScenes, tmp_path: Path) -> None:
    run = start(tmp_path, {name: OPTIONS[name] for name in ("ifvd", "bcd")}, scenes)
    run.train()
    for name in ("ifvd", "bcd"):
        weights = {k: w for k, w in run.distiller.criterion.weights.items() if k.startswith(f"{name}/")}
        totals = weighted(run, weights)
        assert len(totals) == STEPS and sum(totals[-3:]) / 3 < totals[0]
    decay = [1 - step / STEPS for step in range(STEPS)]
    for step, logged in enumerate(tiny.history(run)[:STEPS]):  # r(t) multiplies the terms of BCD alone
        parts = [
            weighted(run, {k: w})[step] * (decay[step] if k.startswith("bcd") else 1)
            for k, w in run.distiller.criterion.weights.items()
        ]
        assert logged == pytest.approx(tiny.history(run, "loss_task")[step] + sum(parts), rel=1e-4)
