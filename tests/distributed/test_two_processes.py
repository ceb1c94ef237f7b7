"""Two gloo processes on half batches are one process on whole batches."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from processes import run_ranks
from transformers import TrainerCallback

from hf_bcd.training.hardware import limit_threads


pytestmark = pytest.mark.slow

CORES = os.cpu_count() or 1
TRAINING = {"max_steps": 5, "train_sampling_strategy": "sequential"}


# ---- Losses, parameters, temperatures --------------------------------------------------------------------------------


def frozen(folder: Path, batch: int) -> dict[str, Any]:
    """What comes out of a run whose BatchNorm statistics are fixed."""
    model = tiny.freeze_batchnorm(tiny.tiny_timm(dropout=0.0))
    data = {"train": tiny.TensorSamples(8, void=True), "validation": tiny.scenes(validation=5)["validation"]}
    options = TRAINING | {"per_device_train_batch_size": batch, "calibration_images": 8}
    run = tiny.trainer(folder, model=model, data=data, **options)
    # temperatures that move, so that their statistics over all ranks are compared too
    context_temperature = run.distiller.criterion.losses["bcd"].context_temperature
    context_temperature.threshold = 0.03
    scores = run.evaluate()
    run.train()
    return {
        "log": [entry for entry in run.state.log_history if "loss_task" in entry],
        "parameters": {name: parameter.detach() for name, parameter in run.distiller.named_parameters()},
        "world_size": run.args.world_size,
        "temperature": context_temperature.value,
        "scores": {key: scores[key] for key in ("eval_mean_iou", "eval_boundary_f@3", "eval_per_class_iou")},
    }


def train_frozen(folder: Path) -> dict[str, Any]:
    torch.set_num_threads(CORES)  # as many for each process, which is what a user gets who sets nothing
    limit_threads()  # as every command does
    return frozen(folder, batch=2) | {"threads": torch.get_num_threads()}


def test_losses_parameters_and_temperatures_agree(tmp_path: Path) -> None:
    one = frozen(tmp_path / "one", batch=4)
    two = run_ranks(tmp_path, train_frozen, tmp_path / "two")
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


# ---- BatchNorm -------------------------------------------------------------------------------------------------------


def train_batchnorm(folder: Path) -> dict[str, Any]:
    data = tiny.scenes(train=8, validation=5)
    run = tiny.trainer(folder, model=tiny.tiny_timm(dropout=0.0), data=data, learning_rate=0.1, **TRAINING)
    run.train()
    before = [buffer.clone() for name, buffer in run.student.named_buffers() if "running" in name]
    mean_iou = run.evaluate()["eval_mean_iou"]
    after = [buffer.clone() for name, buffer in run.student.named_buffers() if "running" in name]
    epoch = int(run.train_dataset._epoch)
    return {"before": before, "after": after, "mean_iou": mean_iou, "epoch": epoch}


def test_ranks_evaluate_the_same_model(tmp_path: Path) -> None:
    """Silent failure 4: BatchNorm statistics of the ranks differ after training."""
    first, second = run_ranks(tmp_path, train_batchnorm, tmp_path / "two")
    assert first["epoch"] == second["epoch"] == 2, "the augmentation repeats that of an earlier epoch"
    drift = max((a - b).abs().max().item() for a, b in zip(first["before"], second["before"], strict=True))
    assert drift > 1e-3, "ranks no longer drift apart; the broadcast may be unnecessary"
    assert all(torch.equal(a, b) for a, b in zip(first["after"], second["after"], strict=True))
    assert first["mean_iou"] == second["mean_iou"]


# ---- Interruption ----------------------------------------------------------------------------------------------------


class Press(TrainerCallback):
    """Sends the signal of Ctrl-C to one rank."""

    def on_step_end(self, args, state, control, **kwargs):
        if args.process_index == 1 and state.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)


def train_interrupted(folder: Path) -> str:
    options = TRAINING | {"max_steps": 40, "logging_steps": 1000}  # nothing is logged or saved for a long time
    run = tiny.trainer(folder, model=tiny.tiny_timm(dropout=0.0), data={"train": tiny.TensorSamples(8)}, **options)
    run.add_callback(Press())
    with pytest.raises(KeyboardInterrupt) as interrupt:
        run.train()
    return str(interrupt.value)


def test_a_signal_to_one_rank_stops_all_of_them_with_a_checkpoint(tmp_path: Path) -> None:
    messages = run_ranks(tmp_path, train_interrupted, tmp_path / "run")
    assert all("stopped at step 10" in message for message in messages)
    assert (tmp_path / "run" / "checkpoint-10" / "trainer_state.json").is_file()


# ---- Resuming --------------------------------------------------------------------------------------------------------


def train_and_resume(folder: Path) -> list[dict[str, list[float]]]:
    """The logged means of a whole run, and of one that goes on from a checkpoint between two of its logs."""
    options = TRAINING | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 3}
    logged = []
    for place, checkpoint in ((folder, None), (folder / "resumed", str(folder / "checkpoint-2"))):
        model, data = tiny.tiny_timm(dropout=0.0), {"train": tiny.TensorSamples(8)}
        run = tiny.trainer(place, model=model, data=data, losses={"kd": {}}, **options)
        run.train(resume_from_checkpoint=checkpoint)
        logged.append({name: tiny.history(run, name) for name in ("loss", "loss_task", "kd/kd")})
    return logged


def test_the_first_logged_means_after_resuming_are_of_all_steps_of_all_ranks(tmp_path: Path) -> None:
    for whole, resumed in run_ranks(tmp_path, train_and_resume, tmp_path / "run"):
        assert all(len(values) == 1 for values in whole.values())
        assert resumed == {name: pytest.approx(values, rel=1e-6) for name, values in whole.items()}
