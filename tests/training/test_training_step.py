"""A training step never waits for the device; optimizers are fused, and convolutions are laid out as they compute."""

import multiprocessing
from contextlib import nullcontext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from host_sync import no_host_synchronisation
from torch import nn
from transformers import TrainerCallback

from hf_bcd import BCDTrainer
from hf_bcd.training.hardware import is_convolutional
from hf_bcd.utils.messages import UserError


def prepared_step(folder: Path, model: nn.Module, **changes):
    """A trainer that has made its first step, and a function that makes one more on a batch that is on the device."""
    schedule = {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": None}
    run = tiny.trainer(folder, model=model, max_steps=1, **schedule, **changes)
    run.train()
    batch = run.data_collator([run.train_dataset[index] for index in range(2)])
    batch = {name: tensor.to(run.args.device) for name, tensor in batch.items()}

    def step() -> torch.Tensor:
        num_items = run._get_num_items_in_batch([batch], run.args.device)
        loss = run.training_step(run.model_wrapped, dict(batch), num_items)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.distiller.criterion.after_step()
        run.distiller.criterion.begin_step(1, 10)
        return loss

    return run, step


MODELS = pytest.mark.parametrize("build", [tiny.tiny_timm, tiny.tiny_segformer], ids=["timm", "segformer"])


@MODELS
def test_a_whole_step_never_waits_for_the_device(build, tmp_path: Path) -> None:
    run, step = prepared_step(tmp_path, build())
    before = {name: parameter.clone() for name, parameter in run.distiller.named_parameters()}
    with no_host_synchronisation():
        step()
    moved = [name for name, parameter in run.distiller.named_parameters() if not torch.equal(parameter, before[name])]
    assert len(moved) > len(before) / 2


@pytest.mark.gpu
@MODELS
def test_cuda_reports_no_synchronisation_in_a_whole_step(build, tmp_path: Path) -> None:
    _, step = prepared_step(tmp_path, build(), use_cpu=False, bf16=True)
    step()  # lets the libraries set themselves up
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_optimizers_are_fused_and_can_be_told_otherwise(optim: str, tmp_path: Path, monkeypatch) -> None:
    fused = tiny.trainer(tmp_path, optim=optim, optim_args=None).create_optimizer()
    assert all(group["fused"] for group in fused.param_groups)
    known = BCDTrainer.get_optimizer_cls_and_kwargs

    def unfused(args, model=None):
        cls, options = known(args, model)
        return cls, options | {"fused": False}

    monkeypatch.setattr(BCDTrainer, "get_optimizer_cls_and_kwargs", staticmethod(unfused))
    assert not any(group["fused"] for group in tiny.trainer(tmp_path, optim=optim).create_optimizer().param_groups)


def test_fused_sgd_gives_the_same_weights_bit_for_bit() -> None:
    states = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3, fused=fused)
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.rand(2, 3, 8, 8)).square().sum().backward()
            optimizer.step()
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_channels_last_is_for_convolutional_models_and_changes_no_file(tmp_path: Path) -> None:
    model = tiny.tiny_timm()
    assert is_convolutional(model) and not is_convolutional(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(64, 64)))
    model.save_pretrained(tmp_path / "plain")
    model.to(memory_format=torch.channels_last).save_pretrained(tmp_path / "last")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "last")]
    assert files[0] == files[1]


def is_channels_last(model: nn.Module) -> bool:
    kernels = [p for p in model.parameters() if p.ndim == 4 and min(p.shape[1], p.shape[2]) > 1]
    assert kernels
    return all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)


def test_models_are_laid_out_for_training_and_left_alone_for_scoring(tmp_path: Path) -> None:
    run = tiny.trainer(tmp_path)
    assert run.teacher is not None
    assert is_channels_last(run.student) and is_channels_last(run.teacher)
    scored = tiny.tiny_timm()
    BCDTrainer(model=scored, args=tiny.config(tmp_path), eval_dataset=tiny.scenes()["validation"])
    assert not is_channels_last(scored)


@pytest.mark.slow
def test_persistent_workers_give_the_samples_of_every_epoch(tmp_path: Path) -> None:
    """The epoch reaches workers that are already running; an evaluation reads the data set that it is asked for."""
    losses, data = [], tiny.scenes(train=4)
    for workers in (0, 2):
        run = tiny.trainer(tmp_path / str(workers), data=data, max_steps=6, dataloader_num_workers=workers)
        run.train()
        losses.append(tiny.history(run))
    assert run.args.dataloader_persistent_workers
    assert losses[0] == losses[1]
    both = [run.evaluate(data[split])["eval_mean_iou"] for split in ("validation", "train", "validation")]
    assert both[0] == both[2] != both[1]


@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True])
def test_no_worker_outlives_the_training_that_started_it(fails: bool, tmp_path: Path) -> None:
    """The next training would wait for five seconds until it is killed."""
    workers: list[BaseProcess] = []

    class Look(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            workers.extend(multiprocessing.active_children())
            if fails:
                raise UserError("a picture that cannot be read")

    run = tiny.trainer(tmp_path, max_steps=1, dataloader_num_workers=1)
    run.add_callback(Look())
    with pytest.raises(UserError) if fails else nullcontext():
        run.train()
    assert [worker.exitcode for worker in workers] == [0]
