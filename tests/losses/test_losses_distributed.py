"""Two processes on half batches equal one process on the whole."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from loss_references import dense_output, random_labels
from torch import Tensor, nn

from hf_bcd.losses import BCDLoss
from hf_bcd.outputs import DenseOutput, FeatureSpec


SPECS = {"stride_4": FeatureSpec(4, 4), "stride_8": FeatureSpec(6, 8)}
MODES = ("stable", "paper")


class Student(nn.Module):
    """A backbone parameter in front of the loss, in float64 so that only a wrong formula can differ."""

    def __init__(self, mode) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Conv2d(4, 4, 1)
        self.loss = BCDLoss(SPECS, SPECS, mode=mode, channels=8, reduced_channels=4)
        self.loss.teacher_head.theta.fill_(1.2)
        self.double()

    def forward(self, student: DenseOutput, teacher: DenseOutput, labels: Tensor) -> dict[str, Tensor]:
        features = student.features | {"stride_4": self.backbone(student.features["stride_4"])}
        return self.loss(DenseOutput(features, student.logits), teacher, labels)


def batch(rows: slice) -> tuple[DenseOutput, DenseOutput, Tensor]:
    student, teacher = (dense_output(SPECS, 4, 32, 3, seed=seed) for seed in (0, 100))
    labels = random_labels(4, 32, 32, num_labels=3)
    labels[0, :16] = 255  # the halves differ in their number of valid positions
    labels[1, :, 4:20] = 255
    halves = [
        DenseOutput({name: x[rows].double() for name, x in output.features.items()}, output.logits[rows].double())
        for output in (student, teacher)
    ]
    return halves[0], halves[1], labels[rows]


def run(mode, rows: slice) -> dict[str, Tensor]:
    """Losses, gradients and temperatures of one step."""
    student = Student(mode)
    terms = student(*batch(rows))
    (terms["boundary"] + terms["context"]).backward()
    results = {name: value.detach() for name, value in terms.items()}
    results |= {f"grad {name}": p.grad for name, p in student.named_parameters() if p.grad is not None}
    for name in ("boundary", "context"):
        temperature = getattr(student.loss, f"{name}_temperature")
        # as if this part of the batch were peaked: one rank's mean lies above one half, the other's below
        temperature.observe(torch.tensor([0.95, 0.95, 0.02, 0.03][rows]) * 4)
        temperature.update()
        results[f"{name} temperature"] = temperature.value.clone()
    return results


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for mode in MODES:
        for name, value in run(mode, slice(2 * rank, 2 * rank + 2)).items():
            if "temperature" not in name:  # losses are averaged for the log, gradients by DDP
                dist.all_reduce(value)
                value /= 2
            results[f"{mode} {name}"] = value
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict[str, Tensor]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (str(folder),), nprocs=2)  # type: ignore[attr-defined]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("mode", MODES)
def test_split_batch_equals_whole_batch(two_ranks, mode):
    expected = run(mode, slice(0, 4))
    assert expected["boundary"] > 1e-2 and expected["grad backbone.weight"].any()
    for rank in two_ranks:
        assert {f"{mode} {name}" for name in expected} == {name for name in rank if name.startswith(mode)}
        for name, value in expected.items():
            # biases that a normalisation removes have a gradient of rounding errors alone, hence atol
            torch.testing.assert_close(rank[f"{mode} {name}"], value, rtol=1e-6, atol=1e-9, msg=name)


def test_all_ranks_agree_on_the_temperature(two_ranks):
    for name in ("stable boundary temperature", "paper context temperature"):
        assert two_ranks[0][name].item() == two_ranks[1][name].item() == pytest.approx(1.05)
