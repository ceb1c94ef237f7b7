"""Stores of models of the DETR kind keep the best answers of their last layer, which is all that losses read."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from adapters.adapter_tiny_detectors import tiny_detector

from hf_bcd import BCDTrainer
from hf_bcd.adapters import adapt
from hf_bcd.runs.arguments import ModelArguments
from hf_bcd.runs.reinforce import build_reinforcer, make_store
from hf_bcd.stores import Store


THINGS = {0: "person", 1: "vehicle"}
ANSWERS = {"least_score": 1e-3}
FAMILIES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "softmax": ("detr", {"query_kd": ANSWERS}, {"softmax", "boxes"}),
    "sigmoid": ("d_fine", {"query_kd": ANSWERS, "ddf": ANSWERS}, {"sigmoid", "boxes", "corners"}),
    "masks": ("mask2former", {"query_kd": {**ANSWERS, "on": "masks"}}, {"softmax", "masks"}),
}


def run_with(folder: Path, family: str, teacher: Any, losses: Any) -> BCDTrainer:
    data = tiny.instances() if family == "mask2former" else tiny.boxes()
    options = {"square_size": 64, "crop_size": 512, "max_steps": 2, "calibration_images": 4}
    return tiny.trainer(folder, tiny_detector(family, THINGS), teacher, data, losses=losses, **options)


@pytest.mark.parametrize("kind", FAMILIES)
def test_queries_of_a_store_teach_as_the_teacher_does(kind: str, tmp_path: Path) -> None:
    family, losses, fields = FAMILIES[kind]
    teacher = tiny_detector(family, THINGS)
    torch.manual_seed(1)
    with torch.no_grad():  # another model than the student
        for parameter in teacher.parameters():
            parameter.mul_(1 + 0.5 * torch.randn_like(parameter))
    live = run_with(tmp_path / "live", family, teacher, losses)
    data = {"train": live.train_dataset.dataset}
    for precision in ("exact", "compact"):
        made = build_reinforcer(ModelArguments(), live.args, data, teacher=adapt(teacher, live.task.name))
        make_store(tmp_path / precision, made, 1, precision)
    store = Store(tmp_path / "exact")
    assert {name.removeprefix("queries/") for name in store.columns} == fields
    terms = {}
    for name in ("live", "exact", "compact"):
        taught = live if name == "live" else run_with(tmp_path / "r", family, Store(tmp_path / name), losses)
        taught.distiller.load_state_dict(live.distiller.state_dict())
        batch = taught.data_collator([taught.train_dataset[index] for index in range(4)])
        targets = taught._targets(batch)
        output = taught._teacher_output(batch, targets)
        student = taught.distiller.student.eval()(batch["pixel_values"], targets=targets)
        _, terms[name] = taught.distiller.criterion({"loss_task": torch.zeros(())}, student, output, targets)
    assert len(terms["live"]) >= 4 and all(value > 0 for key, value in terms["live"].items() if key != "loss_task")
    for key, value in terms["live"].items():  # sums over a gathered copy end in other digits
        assert terms["exact"][key].item() == pytest.approx(value.item(), rel=1e-6), key
        assert terms["compact"][key].item() == pytest.approx(value.item(), rel=0.02), key
