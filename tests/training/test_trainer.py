"""The trainer's promises on one process."""

import math
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
import torch
from adapters.adapter_tiny_models import mobilenet_v2
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForSemanticSegmentation, Trainer, TrainerCallback, TrainingArguments

from hf_bcd import BCDConfig, BCDTrainer, TimmSegmentationModel
from hf_bcd.adapters.specs import ModelSpec
from hf_bcd.losses import LOSSES
from hf_bcd.losses.bcd import BCDLoss
from hf_bcd.runs import baseline, experiment
from hf_bcd.runs.arguments import RECIPE_KEYS, DataArguments, ModelArguments
from hf_bcd.runs.methods import tasks_of
from hf_bcd.runs.recipes import read_recipe
from hf_bcd.training.callbacks import InterruptCallback
from hf_bcd.training.checkpoints import last_checkpoint
from hf_bcd.training.recording import schedule_words
from hf_bcd.utils.files import write_json
from hf_bcd.utils.messages import UserError


ROOT = Path(__file__).parents[2]


def state(run: BCDTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.distiller.state_dict().items()}


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 4, 6], ids=["first epoch", "between epochs", "second epoch"])
@pytest.mark.parametrize("build", [tiny.tiny_timm, tiny.tiny_segformer])
def test_resuming_repeats_the_run_bit_for_bit(build, stop: int, tmp_path: Path) -> None:
    options = {"max_steps": 7, "save_strategy": "steps", "save_steps": 100, "dataloader_num_workers": 0}

    def start(name: str, seed: int = 0) -> BCDTrainer:
        run = tiny.trainer(tmp_path / name, model=build(seed=seed), **options)
        # a temperature in motion must survive the interruption too
        run.distiller.criterion.losses["bcd"].context_temperature.threshold = 0.0
        return run

    whole = start("whole")
    whole.train()
    part = start("part")
    part.add_callback(tiny.StopAt(stop))
    part.train()
    resumed = start("part", seed=5)
    resumed.train(resume_from_checkpoint=True)

    assert resumed.state.global_step == 7
    for key in ("loss", "loss_task", "bcd/boundary", "bcd/context", "learning_rate"):
        assert tiny.history(resumed, key) == tiny.history(whole, key), (key, stop)
    assert_equal(state(resumed), state(whole))
    assert whole.distiller.criterion.losses["bcd"].context_temperature.value > 1.3
    first, second = (run.optimizer.state_dict()["state"] for run in (whole, resumed))
    assert all(torch.equal(first[k]["momentum_buffer"], second[k]["momentum_buffer"]) for k in first)


RECIPES = [read_recipe(path, RECIPE_KEYS) for path in sorted((ROOT / "examples" / "recipes").rglob("*.yaml"))]
OF_ONE = [recipe.get("losses") or {} for recipe in RECIPES if not isinstance(recipe.get("teacher"), list)]
JOINT = {"+".join(losses): losses for losses in OF_ONE if len(losses) > 1}


OF_PIXELS = [name for name in LOSSES if "segmentation" in tasks_of(name)]  # detectors: test_detection_training.py


@pytest.mark.slow
@pytest.mark.parametrize("losses", [*({name: {}} for name in OF_PIXELS), *JOINT.values()], ids=[*OF_PIXELS, *JOINT])
def test_every_method_resumes_bit_for_bit(losses: dict, tmp_path: Path) -> None:
    """Also methods that keep nothing across steps, which have no `distiller.safetensors`."""
    options = {"losses": losses, "max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    options |= {"data": {"train": tiny.TensorSamples(4, size=32)}, "calibration_images": 2}
    whole, resumed = (tiny.trainer(tmp_path, model=tiny.tiny_timm(seed=seed), **options) for seed in (0, 5))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_equal(state(resumed), state(whole))
    assert tiny.history(resumed) == tiny.history(whole)


@pytest.mark.parametrize("length", [{"max_steps": 6}, {"max_steps": -1, "num_train_epochs": 1.5}])
def test_a_run_that_died_after_its_last_step_is_loaded_as_it_ended(
    length: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = length | {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    options |= {"load_best_model_at_end": True, "losses": {"kd": {}}}
    # always the same, so the first evaluation is the best one
    monkeypatch.setattr("hf_bcd.training.trainer.evaluate", lambda *_, **__: {"mean_iou": 0.5, "num_samples": 3})
    whole = tiny.trainer(tmp_path / "whole", **options)
    whole.train()
    (tmp_path / "whole").rename(tmp_path / "moved")
    again = tiny.trainer(tmp_path / "moved", model=tiny.tiny_timm(seed=5), **options)
    monkeypatch.setattr(again, "training_step", lambda *_: pytest.fail("trained"))
    assert again.train(resume_from_checkpoint=True).global_step == again.state.max_steps == 6
    assert_equal(state(again), state(whole))
    assert again.state.best_global_step == 3 and again.train_seconds == whole.train_seconds
    assert schedule_words(again)["optimizer"] == schedule_words(whole)["optimizer"] == "sgd (momentum 0.9)"


@pytest.mark.parametrize(("step", "changed"), [(6, 4), (3, 3)])
def test_a_checkpoint_beyond_the_end_of_the_run_is_refused(step: int, changed: int, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 3, "losses": {"kd": {}}}
    tiny.trainer(tmp_path, max_steps=6, **options).train()
    run = tiny.trainer(tmp_path, max_steps=changed, **options)
    with pytest.raises(
        ValueError, match=rf"{step} steps of a run of 6, but this run has {changed}\. Set max_steps to 6"
    ):
        run.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))


def test_stock_loading_would_not_restore_a_segformer(tmp_path: Path) -> None:
    """Silent failure 1: the base class loads with strict=False and key names that do not fit."""
    run = tiny.trainer(tmp_path, model=tiny.tiny_segformer(), max_steps=1, save_strategy="steps", save_steps=1)
    run.train()
    saved = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    missing = set(run.student.state_dict()) - set(saved)
    assert missing, "transformers now saves SegFormer under its own names; the override may be unnecessary"
    trained = {name: tensor.clone() for name, tensor in run.student.state_dict().items()}
    fresh = tiny.trainer(tmp_path, model=tiny.tiny_segformer(seed=9), max_steps=1)
    fresh._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert_equal(trained, fresh.student.state_dict())


@pytest.mark.parametrize("loss", ["bcd", "kd"])  # with and without state of its own
def test_load_best_model_at_end_restores_the_best_weights(loss: str, tmp_path: Path) -> None:
    run = tiny.trainer(
        tmp_path,
        losses={loss: {}},
        model=tiny.tiny_segformer(),
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    run.train()
    assert (run.args.metric_for_best_model, run.args.greater_is_better) == ("mean_iou", True)
    assert run.state.best_metric == max(tiny.history(run, "eval_mean_iou"))
    best = AutoModelForSemanticSegmentation.from_pretrained(run.state.best_model_checkpoint)
    assert_equal(best.state_dict(), run.student.state_dict())


def accumulated(
    folder: Path, model: Any, large: tuple[int, int], small: tuple[int, int], **options: Any
) -> BCDTrainer:
    """A run in steps of small batches, after a comparison with one of large batches; each is a size and their number."""
    runs = []
    options = {"max_steps": 3, "train_sampling_strategy": "sequential"} | options
    for name, (batch, accumulation) in (("large", large), ("small", small)):
        batches = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        run = tiny.trainer(folder / name, model=tiny.freeze_batchnorm(model()), **options, **batches)
        run.train()
        runs.append(run)
    for key in ("loss", "loss_task", *run.distiller.criterion.weights):
        # where a term has no weight, its mean is over batches
        if run.distiller.criterion.weights.get(key, 1) > 0:
            assert tiny.history(runs[0], key) == pytest.approx(tiny.history(runs[1], key), rel=1e-5), key
    for (name, a), (_, b) in zip(*(run.distiller.named_parameters() for run in runs), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=name)
    return runs[1]


def without_dropout() -> TimmSegmentationModel:
    return tiny.tiny_timm(dropout=0.0)


@pytest.mark.parametrize("build", [without_dropout, tiny.tiny_segformer], ids=["timm", "segformer"])
def test_accumulation_equals_a_larger_batch(build, tmp_path: Path) -> None:
    """Silent failure 2. Void shares differ between the accumulated batches, so a mean of means would not do.

    The batch statistics of the boundary scalar differ between a batch and its halves as BatchNorm's do, so the four
    images repeat two; the other terms are compared on unequal batches below.
    """
    accumulated(tmp_path, build, (4, 1), (2, 2), data={"train": tiny.TensorSamples(2, repeat=2)})


def test_accumulation_counts_valid_pixels_over_the_whole_step(tmp_path: Path) -> None:
    losses = {"bcd": {"weight": {"boundary": 0.0, "context": 1.0}}}
    data = {"train": tiny.TensorSamples(8, void=True)}
    accumulated(tmp_path, without_dropout, (4, 1), (1, 4), data=data, losses=losses)


def test_accumulated_batches_of_unequal_size_equal_one_batch(tmp_path: Path) -> None:
    """As at the end of an epoch; with a mean of means the last image would count twice."""
    options = {"data": {"train": tiny.TensorSamples(3)}, "losses": {"kd": {"weight": 10.0}}, "max_steps": 2}
    run = accumulated(tmp_path, without_dropout, (3, 1), (2, 2), **options)
    terms = zip(tiny.history(run, "loss_task"), tiny.history(run, "kd/kd"), strict=True)
    assert tiny.history(run, "loss") == pytest.approx([task + 10 * term for task, term in terms])


def test_a_last_batch_of_one_image_trains_heads_that_pool_it_to_one_value(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = mobilenet_v2(16, tf_padding=True, **tiny.labels())
    names = list(model.state_dict())
    run = tiny.trainer(tmp_path, model=model, data=tiny.scenes(5, 1), max_steps=4, crop_size=64)
    run.train()  # batches of 2, 2, 1, 2
    assert run.state.global_step == 4 and list(model.state_dict()) == names


def test_the_teacher_stays_as_it_was_and_in_no_checkpoint(tmp_path: Path) -> None:
    teacher = tiny.tiny_timm((8, 16, 16, 32), seed=1)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    run = tiny.trainer(tmp_path, teacher=teacher, max_steps=2, save_strategy="steps", save_steps=2)
    head = {n: t.clone() for n, t in run.distiller.criterion.losses["bcd"].teacher_head.state_dict().items()}
    run.train()
    assert_equal(before, teacher.state_dict())
    assert not teacher.training and all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    folder = tmp_path / "checkpoint-2"
    student = sum(t.numel() for t in run.student.state_dict().values())
    assert sum(t.numel() for t in load_file(folder / "model.safetensors").values()) == student
    assert {name.split(".")[0] for name in load_file(folder / "distiller.safetensors")} == {"losses"}
    trained = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert not trained & {id(p) for p in teacher.parameters()}
    # the random convolutions never move; the readout was fitted before the first step
    loss = run.distiller.criterion.losses["bcd"]
    assert isinstance(loss, BCDLoss) and bool(loss.teacher_head.calibrated)
    after = loss.teacher_head.state_dict()
    assert all(torch.equal(head[name], after[name]) for name in head if name.startswith("aggregate"))
    assert all(p.grad is None for p in loss.teacher_head.parameters())


def test_every_trainable_parameter_gets_a_gradient(tmp_path: Path) -> None:
    for losses in (
        {"bcd": {}},
        {"bcd": {"mode": "paper", "teacher_head": "orthogonal"}},
        {"bcd": {"teacher_head": "logits"}},
    ):
        run = tiny.trainer(tmp_path, losses=losses, max_steps=1)
        seen: set[str] = set()
        for name, parameter in run.distiller.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda grad, name=name, seen=seen: seen.add(name))
        run.train()
        assert seen == {name for name, p in run.distiller.named_parameters() if p.requires_grad}


def test_a_nan_stops_the_run_names_the_term_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    run = tiny.trainer(tmp_path, max_steps=6, save_strategy="steps", save_steps=1, logging_steps=100)

    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                with torch.no_grad():
                    run.distiller.criterion.losses["bcd"].student_head.readout.weight.fill_(float("nan"))

    run.add_callback(Poison())
    with pytest.raises(FloatingPointError, match=r"bcd/boundary is nan.*checkpoint-2"):
        run.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    good = load_file(tmp_path / "checkpoint-2" / "distiller.safetensors")
    assert all(tensor.isfinite().all() for tensor in good.values())


def test_a_nan_in_the_last_steps_is_found_without_a_log_or_a_checkpoint(tmp_path: Path) -> None:
    run = tiny.trainer(tmp_path, max_steps=2, logging_steps=100)
    with torch.no_grad():
        run.distiller.criterion.losses["bcd"].student_head.readout.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="bcd/boundary is nan"):
        run.train()


def test_weights_that_a_gradient_has_ruined_are_not_saved(tmp_path: Path) -> None:
    run = tiny.trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=1)

    class Overflow(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 1:
                next(run.student.parameters()).grad.fill_(float("inf"))

    run.add_callback(Overflow())
    with pytest.raises(
        FloatingPointError, match=r"weight student\.model\..* is nan at or before step 2.*checkpoint-1"
    ):
        run.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_loader_worker_survives_ctrl_c_and_obeys_the_second_sigterm() -> None:
    callback = InterruptCallback()
    with callback.listening():
        for times, code in ((1, 7), (2, 128 + signal.SIGTERM)):
            worker = os.fork()
            if worker == 0:
                for number in (signal.SIGINT, signal.SIGINT, *[signal.SIGTERM] * times):
                    os.kill(os.getpid(), number)
                os._exit(7)
            assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == code
    assert not callback.requested


@pytest.mark.slow
def test_ctrl_c_leaves_a_resumable_folder(tmp_path: Path) -> None:
    run = tiny.trainer(tmp_path, max_steps=5)

    class Press(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGINT)

    run.add_callback(Press())
    with pytest.raises(KeyboardInterrupt, match="step 3"):
        run.train()
    resumed = tiny.trainer(tmp_path, max_steps=5)
    resumed.train(resume_from_checkpoint=True)
    whole = tiny.trainer(tmp_path / "whole", max_steps=5)
    whole.train()
    assert_equal(state(resumed), state(whole))


def test_terms_are_logged_and_sum_to_the_loss(tmp_path: Path) -> None:
    run = tiny.trainer(tmp_path, losses={"bcd": {}}, max_steps=4, logging_steps=2)
    run.train()
    logs = [entry for entry in run.state.log_history if "loss_task" in entry]
    assert len(logs) == 2
    for entry, decay in zip(logs, [(1 + 0.75) / 2, (0.5 + 0.25) / 2], strict=True):
        # within a window r(t) varies, so the mean decay is right only to the spread of the terms
        total = entry["loss_task"] + decay * (3 * entry["bcd/boundary"] + entry["bcd/context"])
        assert entry["loss"] == pytest.approx(total, rel=0.05)
        assert entry["images_per_second"] > 0 and entry["learning_rate"] > 0


def test_without_evaluation_data_training_goes_on_without_evaluations(tmp_path: Path) -> None:
    run = tiny.trainer(
        tmp_path, data={"train": tiny.TensorSamples(4)}, max_steps=1, eval_strategy="steps", eval_steps=1
    )
    run.train()
    assert len(tiny.history(run)) == 1 and not tiny.history(run, "eval_mean_iou")


def test_without_a_teacher_the_student_trains_alone(tmp_path: Path) -> None:
    run = tiny.trainer(tmp_path, teacher=None, max_steps=2)
    run.train()
    run.save_model()
    assert not any("bcd" in key for entry in run.state.log_history for key in entry)
    assert not (tmp_path / "distiller.safetensors").exists()


@pytest.mark.parametrize("option", ["bf16", "activation_checkpointing"])
def test_reduced_precision_and_checkpointing_keep_the_loss(option: str, tmp_path: Path) -> None:
    losses = []
    for value in (False, True):
        run = tiny.trainer(tmp_path / str(value), model=tiny.tiny_segformer(), max_steps=2, **{option: value})
        run.train()
        losses.append(tiny.history(run, "loss"))
    tolerance = 0.02 if option == "bf16" else 1e-6
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)


def test_a_model_without_activation_checkpointing_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.tiny_segformer()
    model.supports_gradient_checkpointing = False
    message = (
        "activation_checkpointing cannot be had: Segformer.* does not support activation checkpointing. Leave it out"
    )
    with pytest.raises(UserError, match=message):
        tiny.trainer(tmp_path, model=model, activation_checkpointing=True)
    student = ModelArguments(student={"backbone": "resnet18", "head": "fpn"})
    monkeypatch.setattr(TimmSegmentationModel, "supports_gradient_checkpointing", False)
    with pytest.raises(UserError, match="activation_checkpointing cannot be had"):  # no teacher is trained before
        experiment.build_student(student, tiny.config(tmp_path, activation_checkpointing=True), tiny.scenes())


@pytest.mark.gpu
@pytest.mark.parametrize("option", ["bf16", "fp16", "torch_compile"])
def test_precision_and_compilation_on_a_gpu(option: str, tmp_path: Path) -> None:
    losses = []
    for value in (False, True):
        run = tiny.trainer(tmp_path / str(value), max_steps=3, use_cpu=False, **{option: value})
        run.train()
        losses.append(tiny.history(run, "loss"))
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_evaluation_does_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    scores = []
    for batch in (1, 2):
        run = tiny.trainer(tmp_path, per_device_eval_batch_size=batch)
        scores.append(run.evaluate())
    for key in ("eval_mean_iou", "eval_boundary_f@3", "eval_completeness", "eval_per_class_iou"):
        assert scores[0][key] == pytest.approx(scores[1][key], abs=1e-3, nan_ok=True), key


def test_wrong_class_counts_and_orders_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = tiny.scenes()
    model = tiny.tiny_timm()
    model.config.id2label = dict(enumerate(reversed(tiny.ID2LABEL.values())))
    with pytest.raises(ValueError, match="another order"):
        tiny.trainer(tmp_path, model=model, data=data)
    model.config.id2label = {index: f"{name.title()}; other" for index, name in enumerate(tiny.ID2LABEL.values())}
    tiny.trainer(tmp_path, model=model, data=data)
    assert "names its classes" not in caplog.text
    model.config.id2label = {index: f"thing {index}" for index in range(8)}
    tiny.trainer(tmp_path, model=model, data=data)
    assert "the model names its classes ['thing 0'" in caplog.text
    small = tiny.load_dense_dataset("synthetic", size=(48, 64), num_classes=5, num_images={"train": 2})
    with pytest.raises(ValueError, match=r"predicts 8 classes, but the data set has 5.*num_labels=5"):
        tiny.trainer(tmp_path, data=small)
    with pytest.raises(ValueError, match="no checkpoint to resume from"):
        tiny.trainer(tmp_path / "new").train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="'nowhere/checkpoint-1', which is no folder"):
        tiny.trainer(tmp_path / "new").train(resume_from_checkpoint="nowhere/checkpoint-1")


def test_data_sets_of_one_run_have_the_same_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = tiny.scenes(2, 2)
    train, validation = data["train"], data["validation"]

    def build(train: Any, evaluated: Any) -> BCDTrainer:
        return BCDTrainer(tiny.tiny_timm(), None, tiny.config(tmp_path), train, evaluated)

    reversed_names = dict(enumerate(reversed(tiny.ID2LABEL.values())))
    other_order = {"id2label": reversed_names}
    with pytest.raises(UserError, match="train_dataset has the 8 classes vehicle.* such as 'sky' as 7 and 0"):
        build(replace(train, **other_order), validation)
    with pytest.raises(UserError, match=r"but eval_dataset\['far'\] the 8 classes vehicle"):
        build(train, {"near": validation, "far": replace(validation, **other_order)})
    with pytest.raises(UserError, match="the 8 classes sky.* but eval_dataset\\['far'\\] the 2 classes a, b"):
        build(None, {"near": validation, "far": replace(validation, id2label={0: "a", 1: "b"})})
    with pytest.raises(
        UserError, match="train_dataset is for semantic-segmentation, but eval_dataset.* object-detection"
    ):
        build(train, {"near": validation, "far": tiny.boxes(2, 2)["validation"]})
    with pytest.raises(
        UserError, match=r"holds the splits train, validation, test; give one of them, such as data\['train'\]"
    ):
        build(data, validation)
    for method in (run := build(train, validation)).evaluate, run.predict:
        with pytest.raises(
            UserError, match="but the evaluated set the 8 classes vehicle.* such as 'vehicle' as 7 and 0"
        ):
            method(replace(validation, **other_order))
        with pytest.raises(UserError, match="evaluated set for object-detection"):
            method(tiny.boxes(2, 2)["validation"])
    renamed = {index: f"thing {index}" for index in tiny.ID2LABEL}
    build(replace(train, id2label={index: name.title() for index, name in tiny.ID2LABEL.items()}), validation)
    assert "is taken for class i" not in caplog.text
    build(replace(train, id2label=renamed), validation)
    assert "class i of the one is taken for class i of the other" in caplog.text


def test_teacher_with_other_classes_size_rule_and_normalisation_distils(tmp_path: Path) -> None:
    teacher = tiny.tiny_timm(seed=3, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    teacher.config.id2label = {i: f"thing {i}" for i in range(8)}
    run = tiny.trainer(tmp_path, model=tiny.tiny_segformer(), teacher=teacher, max_steps=2, crop_size=40)
    assert run.teacher is not None and not run.teacher.shares_labels
    assert run.teacher.adapter.image_std.flatten().tolist() == [0.25] * 3
    assert run.distiller.student.image_std.flatten().tolist() != [0.25] * 3
    run.train()
    assert all(math.isfinite(value) for value in tiny.history(run, "bcd/context"))


@pytest.mark.slow
def test_tensorboard_gets_every_term_and_a_picture_at_each_evaluation(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"report_to": "tensorboard", "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    run = tiny.trainer(tmp_path, **options)
    run.train()
    run.callback_handler.on_train_end(run.args, run.state, run.control)
    events = EventAccumulator(str(next((tmp_path / "runs").iterdir())), size_guidance={"images": 0})
    events.Reload()
    scalars = events.Tags()["scalars"]
    for name in ("loss", "loss_task", "bcd/boundary", "bcd/context", "learning_rate", "images_per_second"):
        assert f"train/{name}" in scalars
    assert "eval/mean_iou" in scalars and "eval/boundary_f@3" in scalars
    for index in range(3):
        pictures = events.Images(f"evaluation/{index}")
        assert [picture.step for picture in pictures] == [1, 2]
        assert (pictures[0].height, pictures[0].width) == (48, 3 * 64)


TRACKED = """
import sys
import tiny
options = {"report_to": "trackio", "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2, "project": "ours"}
tiny.trainer(sys.argv[1], **options).train()
"""


@pytest.mark.slow
def test_trackio_gets_every_term_and_a_picture_at_each_evaluation(tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="pip install trackio")
    folder = tmp_path / "trackio"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "TRACKIO_DIR": str(folder), "PYTHONPATH": paths, "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-c", TRACKED, str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    sizes = []
    for path in folder.rglob("*.png"):
        with Image.open(path) as picture:
            sizes.append(picture.size)
    assert sizes == 2 * 3 * [(3 * 64, 48)]
    (database,) = folder.glob("ours*.db")
    with closing(sqlite3.connect(database)) as connection:
        rows = [str(row) for row in connection.execute("select * from metrics")]
    for name in ("train/loss_task", "train/bcd/context", "eval/mean_iou", "evaluation/2"):
        assert any(name in row for row in rows), name


def test_several_evaluation_sets_by_name(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    data = tiny.scenes()
    options = {"report_to": "tensorboard", "eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
    options |= {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
    model = tiny.tiny_timm()
    model.config.id2label = {index: f"LABEL_{index}" for index in tiny.ID2LABEL}
    run = BCDTrainer(
        model=model,
        args=tiny.config(tmp_path, **options),
        train_dataset=data["train"],
        eval_dataset={"near": data["validation"], "far": data["test"]},
    )
    assert model.config.id2label == tiny.ID2LABEL
    run.train()
    scores = [tiny.history(run, f"eval_{name}_mean_iou") for name in ("near", "far")]
    assert [len(score) for score in scores] == [1, 1] and scores[0] != scores[1]
    assert run.state.best_metric == scores[0][0]


def test_defaults_are_the_papers() -> None:
    config = BCDConfig(output_dir="unused", use_cpu=True, report_to="none")
    assert (config.learning_rate, config.max_steps, config.crop_size) == (0.01, 40_000, 512)
    assert (config.per_device_train_batch_size, config.optim, config.optim_args) == (8, "sgd", "momentum=0.9")
    assert config.lr_scheduler_type == "polynomial" and config.lr_scheduler_kwargs == {"power": 0.9, "lr_end": 0.0}
    assert (config.scale_min, config.scale_max) == (0.5, 2.0)
    paper = BCDConfig(output_dir="unused", use_cpu=True, report_to="none", preset="paper").loss_options["bcd"]
    assert paper.options["mode"] == "paper" and paper.weights == {"boundary": 10.0, "context": 50.0}


def test_synchronised_batchnorm_keeps_the_activations_inside_timms_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = TimmSegmentationModel.from_backbone("mobilenetv2_100", head="fpn", head_channels=8, id2label=tiny.ID2LABEL)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        before = model.eval()(image).logits
    config = tiny.config(tmp_path)
    # two GPUs up to the point where the base class would look for them
    monkeypatch.setattr(BCDConfig, "world_size", property(lambda self: 2))
    monkeypatch.setattr(BCDConfig, "device", property(lambda self: torch.device("cuda")))
    built = {}
    monkeypatch.setattr(Trainer, "__init__", lambda self, model, **kwargs: built.update(model=model) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        BCDTrainer(model=model, args=config)
    student = built["model"].eval().student.model
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in student.modules())
    with torch.no_grad():
        torch.testing.assert_close(student(image).logits, before)


def test_a_model_trained_on_the_way_is_reused_for_the_same_recipe_alone(tmp_path: Path) -> None:
    spec = ModelSpec(
        backbone="resnet10t", options={"head_channels": 8, "backbone_kwargs": {"channels": [8] * 4, "stem_width": 8}}
    )
    data, folder = tiny.scenes(), tmp_path / "teacher"
    first = baseline.train_or_reuse("teacher", spec, tiny.config(folder, max_steps=1), data)
    again = baseline.train_or_reuse("teacher", spec, tiny.config(folder, max_steps=1), data)
    assert_equal(first.model.state_dict(), again.model.state_dict())
    with pytest.raises(
        ValueError, match=r"teacher holds a model of another recipe: training\.max_steps is 1 there and 2"
    ):
        baseline.train_or_reuse("teacher", spec, tiny.config(folder, max_steps=2), data)
    with pytest.raises(ValueError, match="another recipe: data.first_image"):
        baseline.train_or_reuse("teacher", spec, tiny.config(folder, max_steps=1), tiny.scenes(size=(64, 64)))


@pytest.mark.parametrize("change", [{"warmup_steps": 1}, {"max_grad_norm": 0.5}, {"bf16": True}])
def test_a_model_of_another_schedule_is_not_reused(change: dict, tmp_path: Path) -> None:
    spec, data = ModelSpec(backbone="resnet10t"), tiny.scenes()
    recipe = baseline.recipe_of(spec, tiny.config(tmp_path, max_steps=2), data)
    write_json(tmp_path / "recipe.json", recipe)
    baseline.check_recipe(tmp_path / "recipe.json", recipe)
    with pytest.raises(ValueError, match=f"another recipe: training.{next(iter(change))}"):
        baseline.check_recipe(
            tmp_path / "recipe.json", baseline.recipe_of(spec, tiny.config(tmp_path, max_steps=2, **change), data)
        )


@pytest.mark.parametrize("schedule", ["linear", "cosine", "inverse_sqrt", "constant"])
def test_any_schedule_trains(schedule: str, tmp_path: Path) -> None:
    run = tiny.trainer(tmp_path, teacher=None, max_steps=1, lr_scheduler_type=schedule)
    run.train()
    assert run.state.global_step == 1


def test_a_run_can_go_on_with_another_learning_rate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"teacher": None, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    first = tiny.trainer(tmp_path, learning_rate=0.04, **options)
    first.add_callback(tiny.StopAt(2))
    first.train()
    second = tiny.trainer(tmp_path, learning_rate=0.004, resume_anyway=True, **options)
    second.train(resume_from_checkpoint=True)
    rates = tiny.history(second, "learning_rate")
    expected = [rate * (1 - step / 4) ** 0.9 for step, rate in enumerate((0.04, 0.04, 0.004, 0.004))]
    assert rates == pytest.approx(expected)
    assert "going on with learning rate 0.004 instead of 0.04" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": "adamw_torch"}, "checkpoint-1 belongs to another optimizer than AdamW: it has no step"),
        ({"model": lambda: tiny.tiny_timm((8, 8, 16, 32))}, "checkpoint-1 holds another student than this run's"),
        ({"teacher": lambda: tiny.tiny_timm(seed=1)}, "distiller.safetensors is missing.*losses cwd, bcd keep"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(changes: dict, message: str, tmp_path: Path) -> None:
    options = {"teacher": None, "max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    tiny.trainer(tmp_path, **options).train()
    changes = {key: value() if callable(value) else value for key, value in changes.items()}
    run = tiny.trainer(tmp_path, **(options | changes), resume_anyway=True)
    with pytest.raises(ValueError, match=message):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("content", [None, "", '{"epoch": 1.'], ids=["missing", "empty", "cut"])
def test_a_checkpoint_that_a_killed_process_left_half_written_does_not_count(
    content: str | None, tmp_path: Path
) -> None:
    options = {"teacher": None, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": None}
    whole = tiny.trainer(tmp_path / "whole", **options)
    whole.train()
    first = tiny.trainer(tmp_path / "killed", **options)
    first.add_callback(tiny.StopAt(2))
    first.train()
    half = tmp_path / "killed" / "checkpoint-10"  # after checkpoint-2 by its number, not by its name
    half.mkdir()
    if content is not None:
        (half / "trainer_state.json").write_text(content)
    assert last_checkpoint(tmp_path / "killed") == str(tmp_path / "killed" / "checkpoint-2")
    assert experiment.checkpoint_of(tiny.config(tmp_path / "killed", resume_from_checkpoint="true"), "student")
    resumed = tiny.trainer(tmp_path / "killed", **options)
    resumed.train(resume_from_checkpoint=True)
    assert_equal(state(resumed), state(whole))


def test_a_checkpoint_that_is_gone_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    config = tiny.config(tmp_path, resume_from_checkpoint="runs/checkpoint-20")
    with pytest.raises(UserError, match="'runs/checkpoint-20', which is no folder here and no Hub id"):
        experiment.checkpoint_of(config, "student")


@pytest.mark.parametrize("loss", ["kd", "bcd"])  # the latter looks at images before the first step
@pytest.mark.parametrize(("key", "what"), [("pixel_values", "images"), ("labels", "masks")])
def test_training_images_of_unequal_sizes_are_named(key: str, what: str, loss: str, tmp_path: Path) -> None:
    class Unequal(tiny.TensorSamples):
        def __getitem__(self, index: int) -> dict:
            sample = super().__getitem__(index)
            return sample | {key: sample[key][..., : 48 - 8 * index]}

    run = tiny.trainer(tmp_path, data={"train": Unequal(2)}, losses={loss: {}})
    with pytest.raises(ValueError, match=f"training {what} of 48 x 40 and of 48 x 48 pixels.*Crop or resize them"):
        run.train()


def test_a_set_smaller_than_a_batch_that_is_dropped_is_named(tmp_path: Path) -> None:
    run = tiny.trainer(
        tmp_path, teacher=None, data=tiny.scenes(3), dataloader_drop_last=True, per_device_train_batch_size=4
    )
    with pytest.raises(ValueError, match="3 training images are less than a batch of 4"):
        run.train()


def test_a_teacher_that_would_teach_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no term has a weight above 0"):
        tiny.trainer(tmp_path, losses={"bcd": {"weight": 0.0}})
    with pytest.raises(UserError, match="losses is empty, so the teacher would teach nothing"):
        tiny.trainer(tmp_path, losses={})
    tiny.trainer(tmp_path, teacher=tiny.tiny_timm(seed=1), losses={}, inherit=["head"])


def test_calibration_without_a_labelled_pixel_says_what_to_do(tmp_path: Path) -> None:
    samples = tiny.TensorSamples(4)
    samples.labels[:] = 255
    run = tiny.trainer(tmp_path, data={"train": samples}, losses={"bcd": {}}, max_steps=1)
    with pytest.raises(UserError, match="all pixels there are void, padding.*--calibration_images"):
        run.train()


def test_a_teacher_that_is_the_student_is_refused(tmp_path: Path) -> None:
    model = tiny.tiny_timm()
    with pytest.raises(UserError, match=r"student and teacher share weights.*copy\.deepcopy"):
        tiny.trainer(tmp_path, model=model, teacher=model)
    assert all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize(
    ("model", "said"), [("runs/x", "'runs/x'"), (None, "a NoneType"), (torch.nn.Conv2d(3, 8, 1), "a Conv2d")]
)
def test_what_is_no_model_of_transformers_is_named(model: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"the model is {said}, not a model of transformers: load it first"):
        BCDTrainer(model, None, tiny.config(tmp_path))


def test_arguments_of_another_class_are_refused(tmp_path: Path) -> None:
    args: Any = TrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(UserError, match="args is a TrainingArguments; give a BCDConfig"):
        BCDTrainer(tiny.tiny_timm(), None, args)


def test_evaluation_data_without_labels_are_refused(tmp_path: Path) -> None:
    data = tiny.scenes(2, 2)
    with pytest.raises(UserError, match="eval_dataset: the pictures of synthetic have no labels, so no score"):
        BCDTrainer(tiny.tiny_timm(), None, tiny.config(tmp_path), data["train"], data["validation"].without_labels())


def test_a_raw_table_is_refused_with_the_remedy(tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict({"image": [0], "annotation": [0]})
    with pytest.raises(ValueError, match=r"columns \['image', 'annotation'\].*load_dense_dataset"):
        tiny.trainer(tmp_path, teacher=None, data={"train": table})


def test_any_source_of_tensors_trains(tmp_path: Path) -> None:
    samples = tiny.TensorSamples(4)
    rows = [samples[index] for index in range(4)]
    table = datasets.Dataset.from_list([{key: torch.as_tensor(v).tolist() for key, v in row.items()} for row in rows])
    plain = datasets.Dataset.from_dict({"number": range(4)})

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from rows * 10

    sources = {
        "tensors": table.with_format("torch"),
        "transform": plain.with_transform(lambda batch: {k: [rows[i][k] for i in batch["number"]] for k in rows[0]}),
        "stream": Stream(),
    }
    losses = []
    for name, source in sources.items():
        options = {"teacher": None, "max_steps": 1, "train_sampling_strategy": "sequential"}
        run = tiny.trainer(tmp_path / name, model=tiny.tiny_timm(dropout=0.0), data={"train": source}, **options)
        run.train()
        losses += tiny.history(run)
    assert losses == pytest.approx([losses[0]] * 3)


def test_checkpoints_of_an_earlier_run_are_not_mixed_with_a_new_one(tmp_path: Path) -> None:
    options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    experiment.train_model(tiny.tiny_timm(), None, tiny.config(tmp_path, **options), tiny.scenes())
    with pytest.raises(ValueError, match=r"checkpoint-1 is left of an earlier run.*--resume_from_checkpoint true"):
        experiment.train_model(tiny.tiny_timm(), None, tiny.config(tmp_path, **options), tiny.scenes())


def test_derived_training_arguments_are_converted_and_checked(tmp_path: Path) -> None:
    config = tiny.config(tmp_path, optim_args=None)
    derived = baseline.derive_config(config, "teacher", {"optim": "adamw_torch", "eval_strategy": False})
    assert Trainer.get_optimizer_cls_and_kwargs(derived)[0] is torch.optim.AdamW
    assert derived.eval_strategy == "no" and derived.output_dir == str(Path(config.output_dir) / "_teacher")
    with pytest.raises(ValueError, match="crop_size is 0"):
        baseline.derive_config(config, tmp_path, {"crop_size": 0})
    longer = baseline.derive_config(config, "teacher", {"num_train_epochs": 2, "lr_scheduler_type": "cosine"})
    assert (longer.max_steps, longer.num_train_epochs, longer.lr_scheduler_kwargs) == (-1, 2, None)


def test_scoring_needs_no_training_split(tmp_path: Path) -> None:
    arguments = DataArguments(dataset_name="synthetic", dataset_options={"size": [48, 64], "num_images": {"test": 2}})
    assert list(experiment.load_data(arguments, for_training=False)) == ["test"]
    with pytest.raises(ValueError, match="no training split, only test"):
        experiment.load_data(arguments)


def test_building_a_trainer_changes_nothing_of_the_callers(tmp_path: Path) -> None:
    config = tiny.config(tmp_path, eval_strategy="steps", push_to_hub=False, dataloader_num_workers=1)
    before, threads = {**vars(config)}, torch.get_num_threads()
    model = tiny.tiny_timm()
    kinds = [type(module) for module in model.modules()]
    run = BCDTrainer(model=model, args=config, train_dataset=tiny.scenes()["train"])
    assert run.args.eval_strategy == "no"  # for want of data
    assert vars(config) == before and torch.get_num_threads() == threads
    run.train()
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("launched", ["FSDP", "DEEPSPEED"])
def test_sharding_is_refused_with_its_reason(launched: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{launched}", "true")
    with pytest.raises(ValueError, match=r"not supported: a student fits on one device"):
        tiny.config(tmp_path)
