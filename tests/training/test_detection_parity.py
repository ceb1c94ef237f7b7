"""A saved detector finds, where this package is missing, what the trainer's `predict` found."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import transformers
from adapters.adapter_tiny_detectors import tiny_detector
from models.tiny_detectors import confident
from scipy.optimize import linear_sum_assignment
from transformers import AutoModelForObjectDetection

from hf_bcd import BCDTrainer


SIZES = [(48, 64), (37, 57), (133, 97), (40, 171), (64, 64)]
THRESHOLD = 0.05
SIDES = ("xmin", "ymin", "xmax", "ymax")
DETECT = """
import json, sys
from transformers import pipeline

found = {}
for name, (folder, pictures) in json.loads(sys.argv[2]).items():
    detect = pipeline("object-detection", model=folder, trust_remote_code=True, device="cpu")
    found[name] = [detect(path, threshold=float(sys.argv[1])) for path in pictures]
assert not any(name.startswith("hf_bcd") for name in sys.modules)
print(json.dumps(found))
"""
MODELS = {
    "gfl": ({"image_size": 96, "image_longest": 192}, "detr", "DetrImageProcessor", {"shortest_edge": 96}),
    "mask_rcnn": (
        {"image_size": 96, "image_longest": 192},
        "cascade_mask_rcnn",
        "RfDetrImageProcessor",
        {"height": 96, "width": 96},
    ),
    "d_fine": ({"square_size": 64}, "rt_detr", "RTDetrImageProcessor", {"height": 64, "width": 64}),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[int, str], list, list]]:
    """Of each model the names of its classes, what the pipeline finds in a process without the package, and predictions."""
    here, expected = tmp_path_factory.mktemp("detectors"), {}
    for name in MODELS:
        (here / name).mkdir()
        expected[name] = trained(name, here / name)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(here / "home")}
    environment.pop("PYTHONPATH", None)
    given = {name: (str(here / name / "student"), pictures) for name, (_, pictures, _) in expected.items()}
    command = [sys.executable, "-W", "ignore", "-c", DETECT, str(THRESHOLD), json.dumps(given)]
    done = subprocess.run(command, env=environment, cwd=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    return {name: (names, rows[name], predictions) for name, (names, _, predictions) in expected.items()}


def trained(name: str, folder: Path) -> tuple[dict[int, str], list[str], list]:
    """Trains and saves a student; the names of its classes, files of pictures, and what `predict` finds there."""
    sizes, teacher, processor, shown = MODELS[name]
    scenes = tiny.instances if name == "mask_rcnn" else tiny.boxes
    data = scenes()
    names = dict(data["train"].id2label)
    tiny_detector(teacher, names).save_pretrained(folder / "teacher")
    getattr(transformers, processor)(size=shown).save_pretrained(folder / "teacher")
    if name in ("gfl", "mask_rcnn"):
        student: Any = confident(tiny_detector(name, names))
    else:
        tiny_detector(name, names).save_pretrained(folder / "start")
        student = AutoModelForObjectDetection.from_pretrained(folder / "start")
    options = {"crop_size": 512, "optim": "adamw_torch", "learning_rate": 1e-4, "max_steps": 2, **sizes}
    run = BCDTrainer(
        model=student,
        teacher_model=AutoModelForObjectDetection.from_pretrained(folder / "teacher"),
        args=tiny.config(folder / "student", **options),
        train_dataset=data["train"],
    )
    run.train()
    run.save_model()
    expected, pictures = [], []
    for size in SIZES:
        split = scenes(size=size)["test"]
        expected += run.predict(split).predictions
        for index in range(len(split)):
            pictures.append(str(folder / f"{len(pictures)}.png"))
            split[index]["image"].save(pictures[-1])
    return names, pictures, expected


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_pipeline_finds_what_predict_found(name: str, found: dict[str, tuple[dict[int, str], list, list]]) -> None:
    names, by_pipeline, expected = found[name]
    for rows, predicted in zip(by_pipeline, expected, strict=True):
        kept = predicted["scores"] > THRESHOLD
        assert len(rows) == kept.sum() > 5
        # the pipeline cuts fractions off, towards 0
        ours = [
            (names[label], score, *box)
            for label, score, box in zip(
                *(predicted[key][kept].tolist() for key in ("labels", "scores", "boxes")), strict=True
            )
        ]
        there = [(row["label"], row["score"], *(row["box"][side] for side in SIDES)) for row in rows]
        for label in names.values():  # scores of a class may be equal
            mine, theirs = (
                np.array([one[1:] for one in some if one[0] == label]).reshape(-1, 5) for some in (ours, there)
            )
            assert len(mine) == len(theirs)
            gaps = np.abs(theirs[:, None, 1:] + 0.5 * np.sign(mine[None, :, 1:]) - mine[None, :, 1:]).max(
                -1, initial=0
            )
            gaps += 10 * (np.abs(theirs[:, None, 0] - mine[None, :, 0]) > 1e-4)
            rows_of, columns = linear_sum_assignment(gaps)
            assert gaps[rows_of, columns].max(initial=0) <= 0.5 + 1e-3
