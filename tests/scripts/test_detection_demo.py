"""The demo of object detection, and real pictures that a small detector can learn by heart.

As processes the scripts are started by test_distill_script.py.
"""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import yaml
from PIL import Image
from transformers import set_seed

from hf_bcd import BCDTrainer, TimmDetectionModel, load_dense_dataset
from hf_bcd.commands import distill, evaluate
from hf_bcd.data import keep_in_memory
from hf_bcd.tasks import TASKS


ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples" / "recipes" / "synthetic" / "gfl_resnet18_to_gfl_resnet10.yaml"
DATA = ["--dataset_options.size", "[48, 64]", "--dataset_options.num_images", "{train: 8, validation: 2, test: 3}"]
SHORT = [
    "--image_size", "48", "--max_steps", "3", "--warmup_steps", "1", "--teacher_training.max_steps", "2",
    "--per_device_train_batch_size", "2", "--calibration_images", "4", "--dataloader_num_workers", "0",
    "--use_cpu", "true",
]  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The demo, shortened; its folder and what it printed."""
    folder, printed = tmp_path_factory.mktemp("demo"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        distill.main(["--config", str(RECIPE), "--output_dir", str(folder), *DATA, *SHORT])
    return folder, printed.getvalue()


def test_the_demo_leaves_a_complete_folder_and_a_table(demo: tuple[Path, str]) -> None:
    folder, printed = demo
    for name in ("model.safetensors", "modeling_timm_detection.py", "preprocessor_config.json", "README.md"):
        assert (folder / name).stat().st_size > 0, name
    assert {path.name for path in (folder / "figures").iterdir()} >= {"comparison.png", "boundaries.png"}
    results = json.loads((folder / "results.json").read_text())
    assert results.keys() == {"teacher", "baseline", "student", "protocol"}
    keys = {score.key for score in TASKS["object-detection"].scores} | {"per_class_ap"}
    assert all(keys <= results[name].keys() for name in ("teacher", "baseline", "student"))
    assert f'pipeline("object-detection", "{folder}"' in printed and "AP50" in printed
    text = (folder / "README.md").read_text()
    card = yaml.safe_load(text.split("---")[1])
    assert card["pipeline_tag"] == "object-detection" and card["metrics"] == ["mean-average-precision"]
    assert "boxes of 2 classes" in text and "pixel accuracy" not in text and "up-sampled" not in text


def test_the_printed_lines_load_the_student(demo: tuple[Path, str], tmp_path: Path) -> None:
    _, printed = demo
    *imports, call = printed[printed.index("import hf_bcd") :].strip().splitlines()[:3]
    picture = tmp_path / "picture.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(picture)
    scope: dict[str, Any] = {}
    call = call.replace("picture.jpg", str(picture)).removesuffix(")") + ", threshold=0.0)"
    exec("\n".join([*imports, f"found = {call}"]), scope)
    assert all({"score", "label", "box"} == found.keys() for found in scope["found"])


def test_evaluate_repeats_the_runs_numbers(demo: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = demo
    options = ["--dataset_name", "synthetic_detection", *DATA, "--output_dir", tmp_path, "--report_to", "none"]
    evaluate.main(["--student", *map(str, [folder, *options]), "--use_cpu", "true"])
    scores = json.loads((tmp_path / "evaluation.json").read_text())["scores"]
    expected = json.loads((folder / "results.json").read_text())["student"]
    assert scores["box_ar"] == expected["box_ar"] and scores["box_ap"] == expected["box_ap"]


def test_ten_real_pictures_are_learnt_by_heart(shared_data: Path, tmp_path: Path) -> None:
    """The whole real path: files, transforms, a pretrained backbone, assignment, suppression, AP."""
    data = load_dense_dataset(shared_data / "coco_mini")["train"]
    numbers = [len(sample["boxes"]) for sample in data]
    few = [index for index in np.argsort(numbers, kind="stable") if numbers[index]][:10]
    pictures = keep_in_memory(data.select(few))
    set_seed(0)
    weights = shared_data / "weights" / "mobilenetv2_100.tf_in1k.timm.safetensors"
    sizes = {"neck_channels": 64, "head_channels": 64, "head_convs": 2, "norm_groups": 8}
    names = {"id2label": data.id2label, "label2id": {name: index for index, name in data.id2label.items()}}
    options = {
        "backbone_kwargs": {"pad_type": "same"},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "norm_eval": True,
    }
    model = TimmDetectionModel.from_backbone("mobilenetv2_100", weights=weights, **sizes, **options, **names)
    args = tiny.config(
        tmp_path, max_steps=75, learning_rate=1e-3, lr_scheduler_type="cosine", warmup_steps=10, optim="adamw_torch",
        optim_args=None, weight_decay=0.0, max_grad_norm=10.0, color_jitter=0.0, image_size=128, image_longest=256,
        per_device_train_batch_size=4, crop_size=512, logging_steps=50,
    )  # fmt: skip
    run = BCDTrainer(model=model, args=args, train_dataset=pictures, eval_dataset=pictures)
    run.train()
    assert run.evaluate()["eval_box_ap"] > 0.3
