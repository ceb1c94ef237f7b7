"""A checkpoint is compared with the run that is to go on from it, and what ends a run leaves one."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from transformers import EarlyStoppingCallback

from hf_bcd import BCDConfig, BCDTrainer
from hf_bcd.training.checkpoints import last_checkpoint, read_state
from hf_bcd.utils.messages import UserError


OPTIONS = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "losses": {"kd": {}}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Checkpoint after the first of two steps."""
    folder = tmp_path_factory.mktemp("saved")
    run = tiny.trainer(folder, **OPTIONS)
    run.add_callback(tiny.StopAt(1))
    run.train()
    return folder / "checkpoint-1"


CHANGES = {
    "seed": {"seed": 7},
    "crop_size": {"crop_size": 32},
    "learning_rate": {"learning_rate": 0.02},
    "losses.kd": {"losses": {"kd": {"weight": 3}}},
    "losses.cwd": {"losses": {"cwd": {}}},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 2},
    "lr_scheduler_type": {"lr_scheduler_type": "linear"},
    "teacher": {"teacher": None},
    "teacher.weights": {"teacher": lambda: tiny.tiny_timm((8, 16, 16, 32), seed=2)},
    "student": {"model": lambda: tiny.tiny_timm((8, 8, 16, 32))},
    "data.images": {"data": lambda: tiny.scenes(train=9)},
}


@pytest.mark.parametrize("key", CHANGES)
def test_what_changes_the_result_is_named(key: str, saved: Path, tmp_path: Path) -> None:
    changes = {name: value() if callable(value) else value for name, value in CHANGES[key].items()}
    run = tiny.trainer(tmp_path, **(OPTIONS | changes))
    with pytest.raises(
        UserError, match=rf"checkpoint-1 would not go on.*{key} is .* there and .* here.*--resume_anyway"
    ):
        run.train(resume_from_checkpoint=str(saved))
    assert run.state.global_step == 0


def test_another_seed_is_taken_anyway_if_asked(saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tiny.trainer(tmp_path, **OPTIONS, seed=7, resume_anyway=True)
    assert run.train(resume_from_checkpoint=str(saved)).global_step == 2
    assert "training.seed is 42 there and 7 here. Resumed anyway." in caplog.text


def test_the_first_logged_means_after_resuming_are_of_all_their_steps(tmp_path: Path) -> None:
    options = OPTIONS | {"max_steps": 4, "save_steps": 2, "logging_steps": 3, "gradient_accumulation_steps": 2}
    whole, resumed = tiny.trainer(tmp_path, **options), tiny.trainer(tmp_path / "resumed", **options)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name in ("loss", "loss_task", "kd/kd"):
        assert len(tiny.history(whole, name)) == 1 and tiny.history(whole, name) == tiny.history(resumed, name)
    (tmp_path / "checkpoint-2" / "term_means.json").write_text("[]")
    with pytest.raises(UserError, match="term_means.json: damaged"):
        tiny.trainer(tmp_path / "third", **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "run_key.json"])
def test_files_that_are_missing_are_named(name: str, saved: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(saved, tmp_path / "checkpoint-1")
    (copy / name).unlink()
    with pytest.raises(UserError, match=f"it has no {name}"):
        tiny.trainer(tmp_path, **OPTIONS).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json", "run_key.json"]
)
@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs.github.com/spec/v1\n", None], ids=["empty", "LFS", "cut"]
)
def test_damaged_files_are_named(name: str, content: bytes | None, saved: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(saved, tmp_path / "checkpoint-1")
    whole = (copy / name).read_bytes()
    (copy / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(UserError, match=rf"{name}: (damaged|cannot be read|a Git LFS)"):
        tiny.trainer(tmp_path, **OPTIONS).train(resume_from_checkpoint=str(copy))


@pytest.mark.parametrize("step", ["../../x", -1, 1.5, True, None])
def test_a_step_that_is_none_never_becomes_a_path(step: object, saved: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(saved, tmp_path / "checkpoint-1")
    state = json.loads((copy / "trainer_state.json").read_text())
    (copy / "trainer_state.json").write_text(json.dumps(state | {"global_step": step}))
    with pytest.raises(UserError, match="global_step is .*, which is no number of steps"):
        read_state(copy)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_picture_that_cannot_be_read_leaves_a_checkpoint(workers: int, tmp_path: Path) -> None:
    class Broken(tiny.TensorSamples):
        def __getitem__(self, index: int):
            if index == 5 and self.broken:
                raise UserError("photo_5.jpg: cannot be decoded")
            return super().__getitem__(index)

    options = OPTIONS | {"teacher": None, "max_steps": 4, "save_strategy": "no", "dataloader_num_workers": workers}
    data = Broken(8)
    data.broken = True
    run = tiny.trainer(tmp_path, data={"train": data}, **options)
    with pytest.raises(UserError) as caught:
        run.train()
    step = run.state.global_step
    assert 0 < step < 4 and str(caught.value).startswith("photo_5.jpg: cannot be decoded Step")
    assert "\n" not in str(caught.value) and last_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{step}")
    data.broken = False
    resumed = tiny.trainer(tmp_path, data={"train": data}, **options)
    resumed.train(resume_from_checkpoint=True)
    whole = tiny.trainer(tmp_path / "whole", data={"train": data}, **options)
    whole.train()
    expected = whole.distiller.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.distiller.state_dict().items())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_a_full_disk_is_one_line(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_, **__):
        raise error

    run = tiny.trainer(tmp_path, **OPTIONS)
    monkeypatch.setattr(run, "_save_optimizer_and_scheduler", fail)
    with pytest.raises(UserError, match=f"{tmp_path}: cannot be written to .*Make room"):
        run.train()


def test_early_stopping_compares_the_first_score(tmp_path: Path) -> None:
    def begin(**changes) -> BCDTrainer:
        data = tiny.scenes()
        args = tiny.config(tmp_path, eval_steps=1, **changes)
        sets = {"train_dataset": data["train"], "eval_dataset": data["validation"]}
        return BCDTrainer(tiny.tiny_timm(), args=args, callbacks=[EarlyStoppingCallback(1, 2.0)], **sets)

    run = begin(eval_strategy="steps", load_best_model_at_end=True, save_strategy="steps", save_steps=1)
    assert run.train().global_step == 2  # no evaluation is better by 200 points
    with pytest.raises(UserError, match="EarlyStoppingCallback compares evaluations, but eval_strategy is no"):
        begin(eval_strategy="no").train()


@pytest.mark.parametrize(
    "name", ["compute_metrics", "preprocess_logits_for_metrics", "model_init", "compute_loss_func"]
)
def test_arguments_of_the_base_class_without_a_meaning_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"BCDTrainer takes no {name}: "):
        BCDTrainer(tiny.tiny_timm(), args=tiny.config(tmp_path), **{name: lambda *_: None})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include_for_metrics": ["inputs"]}, "include_for_metrics is"),
        ({"bf16_full_eval": True}, "bf16_full_eval is True, which would be ignored"),
        ({"optim_args": "momentum=0.9,speed=3"}, "sets speed, which optim .*sgd would ignore"),
        ({"report_to": "comet_ml"}, "report_to names comet_ml, which cannot be imported here. Install it"),
    ],
)
def test_options_that_nobody_reads_are_refused(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        BCDConfig(str(tmp_path), use_cpu=True, **options)


@pytest.mark.parametrize("name", ["eval_loss", "mIoU", "classes_averaged"])
def test_unknown_metrics_are_refused_before_training(name: str, tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    with pytest.raises(UserError, match=rf"unknown metric_for_best_model '{name}'.*mean_iou"):
        tiny.trainer(tmp_path, **options, load_best_model_at_end=True, metric_for_best_model=name)


def test_lower_is_better_where_the_task_says_so(tmp_path: Path) -> None:
    run = tiny.trainer(tmp_path, metric_for_best_model="fragments", greater_is_better=True)
    assert run.args.greater_is_better is False


def test_predictions_are_label_maps(tmp_path: Path) -> None:
    data = tiny.scenes(validation=3)
    run = BCDTrainer(tiny.tiny_timm(), args=tiny.config(tmp_path), eval_dataset=data["validation"])
    output = run.predict(data["validation"])
    assert output.predictions.shape == output.label_ids.shape == (3, 48, 64)
    agree = (output.predictions == output.label_ids)[output.label_ids != 255].mean()
    assert agree == pytest.approx(output.metrics["test_overall_accuracy"])
    assert run.evaluate()["eval_overall_accuracy"] == pytest.approx(agree)


def test_parts_of_data_sets_train_as_they_are(tmp_path: Path) -> None:
    data = tiny.scenes(train=6)
    parts = torch.utils.data.random_split(data["train"], [4, 2])
    both = torch.utils.data.ConcatDataset([parts[1], torch.utils.data.Subset(parts[0], [0, 1])])
    run = BCDTrainer(tiny.tiny_timm(), args=tiny.config(tmp_path), train_dataset=both, eval_dataset=parts[0])
    assert len(run.train_dataset) == len(run.eval_dataset) == 4
    assert (run.train_dataset.samples[0]["label"] == data["train"][parts[1].indices[0]]["label"]).all()
    run.train()
    other = tiny.load_dense_dataset("synthetic", size=(48, 64), num_images={"train": 2}, num_classes=5)
    with pytest.raises(UserError, match="cannot be joined: their classes"):
        BCDTrainer(tiny.tiny_timm(), train_dataset=torch.utils.data.ConcatDataset([data["train"], other["train"]]))


PIXELS, LABELS = torch.randint(0, 256, (3, 48, 48), dtype=torch.uint8), torch.zeros(48, 48, dtype=torch.long)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"pixel_values": PIXELS, "labels": LABELS}, "lacks index: a sample must be"),
        ([PIXELS, LABELS], "holds list and lacks index, pixel_values, labels"),
        (
            {"pixel_values": PIXELS / 255, "labels": LABELS},
            r"lie in 0\.00\.\.1\.00, as if scaled or normalised already",
        ),
        ({"pixel_values": PIXELS - 128.0, "labels": LABELS}, r"lie in -128.*normalised already"),
        ({"pixel_values": PIXELS[:1], "labels": LABELS}, r"pixel_values \[1, 48, 48\]"),
        ({"pixel_values": PIXELS.numpy(), "labels": LABELS}, "pixel_values of .* is a ndarray, not a tensor"),
        ({"pixel_values": PIXELS, "labels": LABELS[None]}, r"labels \[1, 48, 48\]"),
        ({"pixel_values": PIXELS, "labels": LABELS.float()}, "labels of .* are torch.float32"),
        ({"pixel_values": PIXELS, "labels": LABELS - 100}, r"hold the ids \[-100\].*ignore_index=255"),
        ({"pixel_values": PIXELS, "labels": LABELS + 8}, r"hold the ids \[8\], .* 8 classes"),
    ],
)
def test_the_first_sample_from_elsewhere_is_looked_at(sample: object, message: str, tmp_path: Path) -> None:
    if isinstance(sample, dict) and "lacks" not in message:
        sample |= {"index": 0}
    with pytest.raises(UserError, match=message):
        tiny.trainer(tmp_path, teacher=None, data={"train": [sample] * 4})
