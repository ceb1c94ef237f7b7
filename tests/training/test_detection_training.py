"""Training detectors: rates by depth and by milestone, averaged weights, sizes, epochs of r(t), resuming, predictions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from adapters.adapter_tiny_detectors import SQUARES, WITH_MASKS, tiny_detector
from host_sync import no_host_synchronisation
from PIL import Image
from transformers import TrainerCallback

from hf_bcd import BCDTrainer
from hf_bcd.adapters import build_adapter
from hf_bcd.adapters.loading import load_adapter
from hf_bcd.data import load_dense_dataset
from hf_bcd.data.detection import collate_boxes
from hf_bcd.runs.arguments import ModelArguments
from hf_bcd.runs.experiment import build_student
from hf_bcd.utils.messages import UserError


THINGS = {0: "person", 1: "vehicle"}
OPTIONS = {
    "crop_size": 512, "image_size": 64, "image_longest": 96, "learning_rate": 1e-3, "optim": "adamw_torch",
    "optim_args": None, "color_jitter": 0.2, "save_strategy": "steps", "save_steps": 2,
}  # fmt: skip
BCD = {"losses": {"bcd": {"channels": 8, "reduced_channels": 4}}}


def scenes(train: int = 8, name: str = "synthetic_detection") -> Any:
    numbers = {"train": train, "validation": 3, "test": 2}
    return load_dense_dataset(name, size=(64, 96), num_images=numbers)


def trainer(folder: Path, student: str = "gfl", teacher: str | None = None, **changes: Any) -> BCDTrainer:
    masks = student in WITH_MASKS
    data = changes.pop("data", None) or scenes(name="synthetic_instances" if masks else "synthetic_detection")
    model = changes.pop("model", None) or tiny_detector(student, THINGS)
    taught = changes.pop("taught", None) or (None if teacher is None else tiny_detector(teacher, THINGS))
    squares = (
        {}
        if student in ("gfl", "retinanet") or student in WITH_MASKS and student not in SQUARES
        else {"square_size": 64, "image_size": None}
    )
    return tiny.trainer(folder, model=model, teacher=taught, data=data, **(OPTIONS | squares | changes))


def assert_same_student(first: BCDTrainer, second: BCDTrainer) -> None:
    expected = first.distiller.state_dict()
    for name, tensor in second.distiller.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


# ---- What a student starts with ----------------------------------------------------------------------------------------


def test_a_student_starts_with_modules_of_its_teacher(tmp_path: Path) -> None:
    student, teacher = tiny_detector("gfl", THINGS), tiny_detector("gfl", THINGS)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(1)
    run = trainer(tmp_path, model=student, losses={"pkd": {}}, inherit=["neck.fpn_convs", "bbox_head"], taught=teacher)
    inherited = ("neck.fpn_convs.", "bbox_head.")
    for name, parameter in run.distiller.student.model.named_parameters():
        assert torch.equal(parameter, teacher.get_parameter(name)) == name.startswith(inherited), name
        assert parameter.requires_grad or name.startswith("backbone")


@pytest.mark.parametrize(
    ("name", "fields", "labels", "message"),
    [
        ("bbox_hed", {}, THINGS, r"TimmDetectionModel has no weights 'bbox_hed'; name modules of both"),
        ("bbox_head", {"head_channels": 32}, THINGS, r"bbox_head\.\S+ is \[.*\] in the student and \[.*Name smaller"),
        ("bbox_head", {}, {0: "vehicle", 1: "person"}, r"bbox_head may score its own classes"),
    ],
)
def test_modules_that_cannot_be_inherited(
    name: str, fields: dict, labels: dict[int, str], message: str, tmp_path: Path
) -> None:
    teacher = tiny_detector("gfl", labels, **fields)
    with pytest.raises(UserError, match=f"inherit: .*{message}"):
        trainer(tmp_path, losses={"pkd": {}}, inherit=[name], taught=teacher)


# ---- Models of several tasks -------------------------------------------------------------------------------------------

QUERY_KD = {"losses": BCD["losses"] | {"query_kd": {"on": "masks", "least_score": 1e-3}}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("student", "teacher", "options"),
    [
        ("mask2former", "mask2former-resnet", QUERY_KD),
        ("maskformer", "mask2former", QUERY_KD),
        ("eomt", "mask2former", QUERY_KD | {"image_size": 192, "image_longest": 192}),
        ("rf_detr-masks", "eomt", BCD | {"square_size": 96}),
        ("detr-masks", "rf_detr-masks", BCD | {"square_size": 96, "image_size": None}),
        ("mask_rcnn", "detr-masks", BCD),
    ],
)
def test_families_with_masks_learn_from_each_other(student: str, teacher: str, options: dict, tmp_path: Path) -> None:
    """As the data ask of them; the saved student finds what the trained one does."""
    run = trainer(tmp_path, student, teacher, max_steps=2, save_strategy="no", **options)
    assert run.distiller.student.task == "instance-segmentation"
    run.train()
    scores = run.evaluate()
    assert 0 <= scores["eval_mask_ap"] <= 1
    run.save_model()
    saved, pictures = load_adapter(str(tmp_path), task="instance-segmentation"), torch.randint(256, (1, 3, 96, 96))
    found, expected = (model.predict(pictures, [(50, 60)])[0] for model in (saved, run.distiller.student.eval()))
    torch.testing.assert_close(found["scores"], expected["scores"])
    assert found["masks"] == expected["masks"]


# ---- The learning rate -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gfl", "d_fine", "detr"])
def test_layers_learn_the_slower_the_deeper_they_are(family: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, family, layer_decay=0.9, weight_decay=0.05)
    optimizer = run.create_optimizer()
    student, rates = run.distiller.student, {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.05 if parameter.ndim > 1 else 0)
            rates[parameter] = group["lr"] / 1e-3
    depths = student.depths()
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            assert rates[parameter] == pytest.approx(0.9 ** (5 - depths.get(parameter, 5))), name
    found = sorted({round(rate, 5) for rate in rates.values()})
    assert found == [0.59049, 0.6561, 0.729, 0.81, 0.9, 1.0]
    assert len(rates) == sum(p.requires_grad for p in run.distiller.parameters())
    connected = trainer(tmp_path, "gfl", "gfl", layer_decay=0.9, **BCD)
    connected.create_optimizer()
    (connector, *_) = [p for p in connected.distiller.criterion.parameters() if p.requires_grad]
    group = next(g for g in connected.optimizer.param_groups if any(p is connector for p in g["params"]))
    assert group["lr"] == pytest.approx(1e-3)


def test_layer_decay_of_a_family_without_stages_is_refused(tmp_path: Path) -> None:
    run = tiny.trainer(tmp_path, model=tiny.tiny_segformer(), layer_decay=0.9)
    try:
        run.create_optimizer()
    except UserError as error:
        assert "layer_decay: the stages of a" in str(error)


@pytest.mark.parametrize(
    ("length", "milestones"), [({"max_steps": 12}, [8, 11]), ({"num_train_epochs": 3, "max_steps": -1}, [2, 2.75])]
)
def test_rates_step_down_at_milestones(length: dict[str, Any], milestones: list[float], tmp_path: Path) -> None:
    constant = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2}
    run = trainer(tmp_path, data=scenes(8), lr_milestones=milestones, **length, **constant)
    assert len(run.get_train_dataloader()) == 4  # so that three epochs have twelve steps
    run.create_optimizer()
    scheduler, rates = run.create_scheduler(12, run.optimizer), []
    for _ in range(12):
        rates.append(scheduler.get_last_lr()[0] / 1e-3)
        run.optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0, 0.5, *[1.0] * 6, *[0.1] * 3, 0.01])


@pytest.mark.parametrize("milestones", [[], [11, 8], [0, 3]])
def test_milestones_must_ascend(milestones: list[float], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lr_milestones is .*ascending"):
        trainer(tmp_path, lr_milestones=milestones)


def test_milestones_need_a_schedule_of_the_step(tmp_path: Path) -> None:
    schedule = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1}
    run = trainer(tmp_path, lr_milestones=[2], **schedule)
    run.create_optimizer()
    with pytest.raises(UserError, match="choose another lr_scheduler_type"):
        run.create_scheduler(4, run.optimizer)


# ---- Averaged weights --------------------------------------------------------------------------------------------------


class Weights(TrainerCallback):
    """Keeps the student's weights after each optimizer step."""

    def __init__(self, run: BCDTrainer) -> None:
        self.run, self.seen = run, []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seen.append({name: p.detach().clone() for name, p in self.run.distiller.student.named_parameters()})


def test_the_average_is_what_is_scored_and_saved(tmp_path: Path) -> None:
    run = trainer(tmp_path, ema_decay=0.9, max_steps=3)
    average = {name: p.detach().clone() for name, p in run.distiller.student.named_parameters()}
    weights = Weights(run)
    run.add_callback(weights)
    run.train()
    for step, seen in enumerate(weights.seen, 1):
        share = 0.9 * (1 - np.exp(-step / 2000))
        average = {name: share * value + (1 - share) * seen[name] for name, value in average.items()}
    found = dict(run.distiller.finished.named_parameters())
    moved = [(found[name] - weights.seen[-1][name]).abs().max().item() for name in found]
    assert max(moved) > 0, "the average cannot be told from the last weights"
    for name, value in average.items():
        torch.testing.assert_close(found[name].detach(), value, rtol=1e-5, atol=1e-7, msg=name)
    buffers = zip(run.distiller.finished.buffers(), run.distiller.student.buffers(), strict=True)
    assert all(torch.equal(a, b) for a, b in buffers)

    run.save_model(str(tmp_path / "saved"))
    saved = type(run.student).from_pretrained(tmp_path / "saved")
    assert all(torch.equal(p, found[f"model.{name}"]) for name, p in saved.named_parameters())
    assert not any(p.requires_grad for p in run.distiller.finished.parameters())
    picture = run.eval_dataset[0]["pixel_values"][None]
    (expected,) = build_adapter(saved.eval()).predict(picture, [(64, 96)])
    (predicted, *_) = run.predict(run.eval_dataset).predictions
    np.testing.assert_allclose(predicted["boxes"], expected["boxes"].numpy(), atol=1e-3)
    np.testing.assert_allclose(predicted["scores"], expected["scores"].numpy(), atol=1e-5)


# ---- Resuming ----------------------------------------------------------------------------------------------------------

RESUMED = {
    "gfl-bcd-epochs": ("gfl", "gfl", {"num_train_epochs": 2, "max_steps": -1, "save_steps": 5} | BCD),
    "gfl-average": ("gfl", "retinanet", {"ema_decay": 0.99, "losses": {"pkd": {"features": "pyramid"}}}),
    "retinanet-sizes": ("retinanet", "retinanet", {"train_shortest": [32, 48, 64], "losses": {"gid": {}}}),
    "d_fine-queries": ("d_fine", "d_fine", {"losses": {"query_kd": {"least_score": 1e-3}, "ddf": {}}}),
    "mask_rcnn": ("mask_rcnn", "cascade_mask_rcnn", BCD | {"gradient_accumulation_steps": 2}),
    "detr-average": ("detr", "detr", {"ema_decay": 0.9, "losses": {"query_kd": {}}}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_ends_bit_for_bit(name: str, tmp_path: Path) -> None:
    student, teacher, options = RESUMED[name]
    options = {"max_steps": 4, **options}
    whole = trainer(tmp_path, student, teacher, **options)
    whole.train()
    checkpoint = tmp_path / f"checkpoint-{options.get('save_steps', 2)}"
    resumed = trainer(tmp_path / "resumed", student, teacher, **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same_student(whole, resumed)
    for key in whole.terms.read():
        assert tiny.history(whole, key)[-2:] == tiny.history(resumed, key)[-2:]
    scores = [run.predict(run.eval_dataset).predictions for run in (whole, resumed)]
    for one, other in zip(*scores, strict=True):
        assert all(np.array_equal(one[key], other[key]) for key in ("boxes", "scores", "labels"))


# ---- Batches of one shape ----------------------------------------------------------------------------------------------


def pictures_of_two_shapes(folder: Path, count: int = 12, outlines: Any = None) -> Any:
    """COCO's files, every third picture upright; perhaps with an outline of each object."""
    (folder / "train").mkdir(parents=True)
    (folder / "annotations").mkdir()
    images, annotations = [], []
    for number in range(count):
        width, height = (64, 96) if number % 3 == 0 else (96, 64)
        Image.fromarray(np.full((height, width, 3), 20 * number, np.uint8)).save(folder / "train" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": width, "height": height})
        box = {"bbox": [4 + number, 5, 20, 22], "area": 440, "iscrowd": 0, "category_id": 1 + number % 2}
        annotations.append({"id": number + 1, "image_id": number, **box})
        if outlines is not None:
            annotations[-1]["segmentation"] = outlines(number)
    categories = [{"id": index + 1, "name": name} for index, name in THINGS.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / "instances_train.json").write_text(json.dumps(content))
    return load_dense_dataset(folder)


def triangle(number: int) -> list[list[float]]:
    return [[4 + number, 5, 24 + number, 5, 4 + number, 27]]


@pytest.mark.parametrize(
    ("outlines", "found"),
    [(triangle, 12), (lambda number: triangle(number) if number % 2 else [], 6), (lambda number: [], 0), (None, 0)],
    ids=["all", "some", "empty", "none"],
)
def test_bcd_is_calibrated_on_masks_that_files_of_boxes_have(
    outlines: Any, found: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = pictures_of_two_shapes(tmp_path / "data", outlines=outlines)
    assert data["train"].task == "object-detection" and data["train"][1]["masks"] is None
    run, seen = trainer(tmp_path, "gfl", "gfl", data=data, calibration_images=12, **BCD), []
    monkeypatch.setattr(run.distiller.criterion, "calibrate", lambda batches, progress: seen.extend(batches))
    run.calibrate()
    targets = [targets for _, targets in seen]
    assert sum(len(one.boxes) for one in targets) == (found or 12)
    assert all((one.masks is not None) == (found > 0) for one in targets)
    if found:  # a triangle is half of its box
        whole, boxes = (
            sum(float(x.sum()) for one in targets for x in masks)
            for masks in (
                [one.covered(one.masks, one.size) for one in targets][0],
                [one.inside(one.boxes, one.size) for one in targets][0],
            )
        )
        assert whole == pytest.approx(boxes / 2, rel=0.1)


def test_batches_hold_pictures_of_one_shape(tmp_path: Path) -> None:
    data = pictures_of_two_shapes(tmp_path / "data")
    run = trainer(tmp_path, data=data, group_by_shape=True, per_device_train_batch_size=2)
    loader, orders = run.get_train_dataloader(), []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        batches = list(loader)
        assert not any("pixel_mask" in batch for batch in batches[:-1]), "of one shape nothing is padded"
        orders.append([index for batch in batches for index in batch["index"].tolist()])
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert orders[0] == orders[2] != orders[1]


def test_a_run_by_shape_resumes_in_the_middle_of_its_second_epoch(tmp_path: Path) -> None:
    data = pictures_of_two_shapes(tmp_path / "data")
    options = {
        "data": data,
        "group_by_shape": True,
        "max_steps": 11,
        "save_steps": 4,
        "per_device_train_batch_size": 2,
    }
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    resumed = trainer(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    assert_same_student(whole, resumed)


def test_pictures_of_unknown_sizes_cannot_be_grouped(tmp_path: Path) -> None:
    data = tiny.scenes()
    run = tiny.trainer(tmp_path, data=data, group_by_shape=True)
    message = "group_by_shape needs the width and height"
    with pytest.raises(UserError, match=message):
        run.get_train_dataloader()
    student = ModelArguments(student={"backbone": "resnet10t", "head": "fpn"})
    with pytest.raises(UserError, match=message):  # no teacher is trained before
        build_student(student, tiny.config(tmp_path, group_by_shape=True), data)


# ---- Sizes, epochs, predictions ----------------------------------------------------------------------------------------


def test_sizes_are_drawn_and_padded(tmp_path: Path) -> None:
    run = trainer(tmp_path, train_shortest=[33, 64], max_steps=2)
    sizes = {tuple(run.train_dataset[index]["pixel_values"].shape[1:]) for index in range(8)}
    assert sizes == {(33, 50), (64, 96)}
    batch = collate_boxes([run.train_dataset[index] for index in range(8)])
    assert batch["pixel_values"].shape == (8, 3, 64, 96) and not batch["pixel_mask"].all()
    run.train()
    assert all(np.isfinite(tiny.history(run, "loss_task")))


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_real_time_families_need_squares(side: str, tmp_path: Path) -> None:
    families = ("rt_detr", "detr") if side == "student" else ("gfl", "rt_detr")
    with pytest.raises(UserError, match=r"RTDetrForObjectDetection takes only squares.*square_size: 640"):
        trainer(tmp_path, *families, square_size=None, image_size=64, losses={"pkd": {}})
    trainer(tmp_path, *families, square_size=64, image_size=None, losses={"pkd": {}})


def test_a_short_side_above_the_long_one_is_refused_by_the_names_of_the_options(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"image_longest is 96, less than image_size, which is 800, as usual"):
        trainer(tmp_path, image_size=None)


class Decay(TrainerCallback):
    """Keeps r(t) of each step."""

    def __init__(self, run: BCDTrainer) -> None:
        self.run, self.seen = run, []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seen.append(float(self.run.distiller.criterion.decay))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_train_epochs": 4, "max_steps": -1}, [1, 1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]),
        ({"num_train_epochs": 1.5, "max_steps": -1}, [1, 1, 0.5]),
        ({"num_train_epochs": 2, "max_steps": -1, "decay_per": "step"}, [1, 0.75, 0.5, 0.25]),
        ({"max_steps": 4}, [1, 0.75, 0.5, 0.25]),
    ],
)
def test_r_of_t_counts_epochs_where_a_run_has_them(options: dict, expected: list[float], tmp_path: Path) -> None:
    run = trainer(tmp_path, "gfl", "gfl", data=scenes(4), save_strategy="no", **options, **BCD)
    decay = Decay(run)
    run.add_callback(decay)
    run.train()
    assert decay.seen == pytest.approx(expected)


def test_epochs_of_r_of_t_need_epochs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="decay_per is epoch, but max_steps counts steps"):
        trainer(tmp_path, "gfl", "gfl", max_steps=4, decay_per="epoch", **BCD)


def test_predictions_are_detections(tmp_path: Path) -> None:
    data = scenes()
    run = trainer(tmp_path, data=data)
    output = run.predict(data["validation"])
    assert len(output.predictions) == len(output.label_ids) == 3
    for index, (found, truth) in enumerate(zip(output.predictions, output.label_ids, strict=True)):
        count = len(found["scores"])
        assert found["boxes"].shape == (count, 4) and found["labels"].shape == (count,) and count <= 100
        assert (np.diff(found["scores"]) <= 0).all() and set(found["labels"].tolist()) <= {0, 1}
        np.testing.assert_array_equal(truth["boxes"], data["validation"][index]["boxes"])
        np.testing.assert_array_equal(truth["labels"], data["validation"][index]["classes"])
    assert output.metrics["test_box_ap"] == pytest.approx(run.evaluate()["eval_box_ap"], nan_ok=True)


# ---- A step ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["gfl", "retinanet"])
def test_a_whole_step_never_waits_for_the_device(head: str, tmp_path: Path) -> None:
    losses = {"bcd": BCD["losses"]["bcd"], "gid": {}, "crosskd": {"on": "tower"}, "fgd": {"on": "boxes"}}
    schedule = {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": None}
    run = trainer(tmp_path, head, head, losses=losses, train_shortest=[48, 64], max_steps=1, ema_decay=0.9, **schedule)
    run.train()
    batch = run.data_collator([run.train_dataset[index] for index in range(4)])
    assert "pixel_mask" in batch
    before = {name: parameter.clone() for name, parameter in run.distiller.named_parameters()}
    with no_host_synchronisation():
        num_items = run._get_num_items_in_batch([batch], run.args.device)
        run.training_step(run.model_wrapped, dict(batch), num_items)
        run.optimizer.step()
        run.distiller.after_step(2)
    moved = [name for name, parameter in run.distiller.named_parameters() if not torch.equal(parameter, before[name])]
    assert len(moved) > len(before) / 2
