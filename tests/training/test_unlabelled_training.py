"""Training on pictures without labels: the composition of batches, losses, resuming, and whole runs."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from hf_bcd.adapters import FrozenTeacher, build_adapter
from hf_bcd.commands import distill
from hf_bcd.data import DenseDatasets, load_pictures
from hf_bcd.losses import LOSSES, build_criterion
from hf_bcd.losses.base import Pair
from hf_bcd.losses.bcd import BOUNDARY_SHARE, BCDLoss
from hf_bcd.losses.recipe import ALWAYS_OFFERED, OFFERED_BY_ALL
from hf_bcd.outputs import LabelMaps
from hf_bcd.training.loaders import MixedSampler
from hf_bcd.utils.messages import UserError


def pictures(folder: Path, count: int = 8) -> Path:
    folder.mkdir()
    for index, sample in enumerate(tiny.scenes(train=count)["train"]):
        sample["image"].save(folder / f"{index}.png")
    return folder


# ---- The sampler ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("labelled", "unlabelled", "batch", "share", "expected"), [
    (10, 3, 4, 0.5, 2), (10, 100, 4, 0.01, 1), (3, 7, 5, 0.99, 4), (1, 1, 2, 0.5, 1),
])  # fmt: skip
def test_every_batch_has_as_many_pictures_without_labels(labelled, unlabelled, batch, share, expected):
    sampler = MixedSampler(labelled, unlabelled, batch, share, seed=1)
    order = list(sampler)
    assert len(order) == len(sampler) == -(-labelled // (batch - expected)) * batch
    for start in range(0, len(order), batch):
        assert sum(index >= labelled for index in order[start : start + batch]) == expected
    ours = Counter(index for index in order if index < labelled)
    assert ours.keys() == set(range(labelled)) and max(ours.values()) <= 1 + (batch - expected)
    theirs = Counter(index for index in order if index >= labelled)
    assert max(theirs.values()) - min(theirs.get(index, 0) for index in range(labelled, labelled + unlabelled)) <= 1
    assert order == list(sampler)
    sampler.set_epoch(1)
    assert labelled == 1 or order != list(sampler)


def test_batches_of_several_processes_are_as_the_others():
    batches = BatchSampler(MixedSampler(11, 5, 4, 0.5, seed=1), 4, drop_last=False)
    for rank in range(2):
        mine = list(BatchSamplerShard(batches, 2, rank))
        assert len(mine) == 3 and all(sum(index >= 11 for index in batch) == 2 for batch in mine)


def test_a_batch_of_one_is_refused():
    with pytest.raises(UserError, match="per_device_train_batch_size must be at least 2"):
        MixedSampler(3, 3, 1, 0.5, 0)


# ---- Losses --------------------------------------------------------------------------------------------------------


def test_without_labels_the_task_loss_is_a_connected_zero():
    for model in (tiny.tiny_segformer(), tiny.tiny_timm()):
        adapter = build_adapter(model)
        ids = torch.full((2, 64, 64), 255, dtype=torch.uint8)
        targets = LabelMaps(ids, 8, seen=torch.ones(2, 64, 64, dtype=torch.bool), num_valid=torch.tensor(0.0))
        losses = adapter(torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8), targets).task_losses
        total = torch.stack(list(losses.values())).sum()
        total.backward()
        assert total == 0 and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


SMALL = {
    "bcd": {"channels": 8, "reduced_channels": 4},
    "cirkd": {"memory_mib": 0.1},
    "ifvd": {"discriminator_channels": 4},
    "skd": {"discriminator_channels": 4},
    "sstkd": {"discriminator_channels": 4},
}


@pytest.mark.parametrize(
    "name", sorted(name for name, cls in LOSSES.items() if cls.needs <= ALWAYS_OFFERED | {"head"})
)
def test_every_loss_takes_a_batch_of_both_kinds(name):
    student, teacher = (
        build_adapter(tiny.tiny_segformer()).eval(),
        FrozenTeacher(build_adapter(tiny.tiny_segformer(1, 16)), tiny.ID2LABEL),
    )
    criterion = build_criterion(
        {name: SMALL.get(name, {})},
        student.feature_specs,
        teacher.feature_specs,
        num_labels=8,
        offers=OFFERED_BY_ALL | teacher.adapter.offers,
    )
    pixel_values = torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8)
    ids = torch.randint(0, 8, (2, 64, 64))
    ids[1] = 255
    seen = torch.ones(2, 64, 64, dtype=torch.bool)

    def gradient(**options: Any) -> torch.Tensor:
        targets = LabelMaps(ids, 8, **options)
        pixels = pixel_values.float().requires_grad_()
        output = teacher(pixel_values)
        criterion.calibrate([(output, targets)], lambda steps: list(steps)[:1])
        ours = student(pixels, targets)
        loss, terms = criterion(ours.task_losses, ours, output, targets)
        assert loss.isfinite() and all(term.isfinite() for term in terms.values())
        (found,) = torch.autograd.grad(sum(value for key, value in terms.items() if "/" in key), pixels)
        return found

    reached = bool(gradient(seen=seen)[1].abs().max() > 0)
    # a loss that compares with labels leaves such a picture alone, any other learns from it
    if name != "sckd":  # whose gates ask the task's gradient
        assert reached == ("labels" not in LOSSES[name].needs)


def test_boundaries_of_features_without_any_labels(monkeypatch):
    teacher = FrozenTeacher(build_adapter(tiny.tiny_segformer()), tiny.ID2LABEL)
    pair = Pair(teacher.feature_specs, teacher.feature_specs, num_labels=8, head_levels=())
    loss, given = BCDLoss(pair, channels=8, reduced_channels=4), {}
    monkeypatch.setattr(loss.teacher_head, "calibrate", lambda batches, **options: given.update(options))
    output = teacher(torch.randint(0, 255, (1, 3, 64, 64), dtype=torch.uint8))
    output.logits = None
    ids = torch.full((1, 64, 64), 255)
    loss.calibrate([(output, LabelMaps(ids, 8, seen=torch.ones(1, 64, 64, dtype=torch.bool)))])
    assert (given["readout"], given["share"]) == ("principal", BOUNDARY_SHARE)


# ---- The trainer ---------------------------------------------------------------------------------------------------


def mixed_scenes(folder: Path) -> DenseDatasets:
    data = tiny.scenes(train=4)
    return DenseDatasets({**data, "train": data["train"].with_unlabelled(load_pictures(pictures(folder)))})


@pytest.mark.slow
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path):
    data = mixed_scenes(tmp_path / "pictures")
    options: dict[str, Any] = {
        "max_steps": 6, "per_device_train_batch_size": 4, "losses": {"cwd": {}}, "logging_steps": 1, "save_steps": 3,
        "save_strategy": "steps",
    }  # fmt: skip
    whole = tiny.trainer(tmp_path / "whole", data=data, **options)
    whole.train()
    part = tiny.trainer(tmp_path / "part", data=data, **options)
    part.add_callback(tiny.StopAt(3))
    part.train()
    rest = tiny.trainer(tmp_path / "part", data=data, **options)
    rest.train(resume_from_checkpoint=True)
    assert tiny.history(rest) == tiny.history(whole) and len(tiny.history(whole)) == 6
    for ours, theirs in zip(whole.student.state_dict().values(), rest.student.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_label_free_training_refuses_what_needs_labels(tmp_path):
    data = DenseDatasets({"train": tiny.scenes(train=4)["train"].without_labels()})
    for losses, message in (
        ({"bpkd": {}}, "loss 'bpkd' needs labels, but"),
        ({"bcd": {"weight": "auto"}}, "weight of bcd is auto"),
    ):
        with pytest.raises(UserError, match=message):
            tiny.trainer(tmp_path / "run", data=data, losses=losses)
    with pytest.raises(UserError, match="nothing to learn from without a teacher"):
        tiny.trainer(tmp_path / "run", data=data, teacher=None)
    run = tiny.trainer(tmp_path / "run", data=data, losses={"cwd": {}}, max_steps=2, logging_steps=1)
    run.train()
    assert tiny.history(run, "loss_task") == [0, 0] and min(tiny.history(run, "cwd/cwd")) > 0


# ---- Commands ------------------------------------------------------------------------------------------------------


def run(folder: Path, teacher: Any, **options: Any) -> None:
    given = {
        "student": json.dumps({"backbone": "resnet10t", "head": "fpn"}), "losses": json.dumps({"cwd": {}}), "max_steps": 2,
        "output_dir": folder, "teacher": teacher, "per_device_train_batch_size": 4,
    }  # fmt: skip
    distill.main(tiny.command_line(**(given | options)))


@pytest.fixture
def teacher(tmp_path) -> Path:
    tiny.tiny_segformer().save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.mark.slow
@pytest.mark.parametrize("argument", ["data_dir", "unlabelled_dir"])
def test_a_folder_of_pictures_is_enough(argument, teacher, tmp_path, caplog):
    run(tmp_path / "run", teacher, **{argument: pictures(tmp_path / "pictures")})
    config = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert list(config["id2label"].values()) == list(tiny.ID2LABEL.values())
    assert "8 pictures without labels, so the run distils in the teacher's classes" in caplog.text
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "8 of the training images have no labels" in card
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert results == {}


@pytest.mark.slow
def test_hidden_labels_leave_the_evaluation(teacher, tmp_path):
    run(
        tmp_path / "run", teacher, dataset_name="synthetic", label_free="true", max_train_samples=4, max_eval_samples=2
    )
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert {"student", "teacher"} <= results.keys()
    assert "4 of the training images have no labels" in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_pictures_are_mixed_in_and_leave_the_baseline_alone(teacher, tmp_path):
    options = {"dataset_name": "synthetic", "max_train_samples": 4, "max_eval_samples": 2, "with_baseline": "true"}
    run(tmp_path / "run", teacher, **options, unlabelled_dir=pictures(tmp_path / "pictures"))
    recipe = json.loads((tmp_path / "run" / "_baseline" / "recipe.json").read_text(encoding="utf-8"))
    assert recipe["data.images"] == 4 and "data.unlabelled" not in recipe
    assert "8 of the training images have no labels" in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("options", "message"), [
    ({"teacher": "none"}, "nothing to learn from without a teacher"),
    ({"teacher": "bare"}, "the classes are the teacher's, but .* has no head for any"),
    ({"teacher": json.dumps({"backbone": "resnet10t", "head": "fpn"})}, "but resnet10t has none"),
    ({"data_dir": None, "dataset_name": "synthetic", "label_free": "true", "max_train_samples": 2, "max_eval_samples": 2,
      "teacher": json.dumps({"backbone": "resnet10t", "head": "fpn"})}, "has no labels, so that the teacher"),
    ({"with_baseline": "true"}, "with_baseline trains the student without its teacher"),
    ({"label_column": "mask"}, "holds pictures without labels: leave label_column out"),
    ({"data_dir": None, "dataset_name": "synthetic_detection", "unlabelled_dir": "pictures"}, "is for object detection; pictures"),
    ({"unlabelled_share": "1"}, "unlabelled_share is 1; it must be less"),
    ({"unlabelled_share": "0"}, "unlabelled_share is 0.0; it must be a number of more than 0"),
])  # fmt: skip
def test_what_cannot_be_learned_is_refused_in_one_line(options, message, teacher, tmp_path):
    given: dict[str, Any] = {"data_dir": pictures(tmp_path / "pictures"), "teacher": teacher, **options}
    if given["teacher"] == "bare":
        from transformers import Dinov2Config, Dinov2Model

        Dinov2Model(
            Dinov2Config(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=56)
        ).save_pretrained(tmp_path / "bare")
        given["teacher"] = tmp_path / "bare"
    if given.get("unlabelled_dir"):
        given["unlabelled_dir"] = tmp_path / "pictures"
    given = {key: value for key, value in given.items() if value is not None}
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", given.pop("teacher"), **given)
