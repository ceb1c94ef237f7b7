"""Two gloo processes on half batches are one process on whole batches."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch


WORKER = Path(__file__).parent / "worker.py"
CORES = os.cpu_count() or 1


def run(folder: Path, kind: str, processes: int) -> list[dict[str, Any]]:
    folder.mkdir()
    batch = 4 // processes
    command = [sys.executable, str(WORKER), str(folder), kind, str(batch)]
    if processes > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [*launcher, *command[1:]]
    # as many threads as cores for each of several processes, which is what a user gets who sets nothing
    threads = 1 if processes == 1 else CORES
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]


@pytest.mark.slow
def test_losses_parameters_and_temperatures_agree(tmp_path: Path) -> None:
    (one,) = run(tmp_path / "one", "frozen", 1)
    two = run(tmp_path / "two", "frozen", 2)
    assert [result["world_size"] for result in two] == [2, 2]
    assert one["temperature"] > 1
    # silent failure 5: processes that each use every core spend their time waiting for each other
    assert [result["threads"] for result in two] == [max(1, CORES // 2)] * 2
    for result in two:
        assert result["temperature"] == one["temperature"]
        for name, parameter in one["parameters"].items():
            torch.testing.assert_close(result["parameters"][name], parameter, atol=1e-5, rtol=1e-4, msg=name)
        # five images on two ranks: the sample that fills up the last batch must not count twice
        for key, value in one["scores"].items():
            assert result["scores"][key] == pytest.approx(value, rel=0, abs=0, nan_ok=True)
    for single, double in zip(one["log"], two[0]["log"], strict=True):
        for key in ("loss", "loss_task", "bcd/boundary", "bcd/context"):
            # abs: the boundary term is a small difference of entropies of several nat
            assert double[key] == pytest.approx(single[key], rel=1e-5, abs=1e-6), key


@pytest.mark.slow
def test_ranks_evaluate_the_same_model(tmp_path: Path) -> None:
    """Silent failure 4: BatchNorm statistics of the ranks differ after training."""
    folder = tmp_path / "two"
    first, second = run(folder, "batchnorm", 2)
    assert first["epoch"] == second["epoch"] == 2, "the augmentation repeats that of an earlier epoch"
    buffers = [torch.load(folder / f"buffers{rank}.pt", weights_only=True) for rank in range(2)]
    drift = max((a - b).abs().max().item() for a, b in zip(buffers[0]["before"], buffers[1]["before"], strict=True))
    assert drift > 1e-3, "ranks no longer drift apart; the broadcast may be unnecessary"
    assert all(torch.equal(a, b) for a, b in zip(buffers[0]["after"], buffers[1]["after"], strict=True))
    assert first["scores"]["eval_mean_iou"] == second["scores"]["eval_mean_iou"]


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_of_them_with_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "two"
    results = run(folder, "interrupt", 2)
    assert all("stopped at step 10" in result["message"] for result in results)
    assert (folder / "checkpoint-10" / "trainer_state.json").is_file()
