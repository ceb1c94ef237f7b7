"""The Python of the README and of docs/instances.md runs, with local folders in place of the Hub's."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from adapters.adapter_tiny_detectors import mask2former_resnet, names
from PIL import Image
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerModel


README = Path(__file__).parent.parent / "README.md"


@pytest.fixture
def hub(tmp_path: Path) -> dict[str, str]:
    """Stand-ins for the Hub: a teacher with ADE20K's classes, a bare encoder, a data set of 150 classes."""
    names = json.loads((README.parent / "hf_bcd" / "data" / "sources" / "ade20k_id2label.json").read_text())
    id2label = {int(index): name for index, name in names.items()}
    config = SegformerConfig(
        hidden_sizes=[8, 8, 16, 16],
        depths=[1] * 4,
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=8,
        id2label=id2label,
        label2id={name: index for index, name in id2label.items()},
    )
    SegformerForSemanticSegmentation(config).save_pretrained(tmp_path / "teacher")
    SegformerModel(SegformerConfig(**{**config.to_dict(), "num_labels": 2})).save_pretrained(tmp_path / "encoder")
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (tmp_path / "data" / split / kind).mkdir(parents=True)
        for index in range(2):
            pixels = generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / split / "images" / f"{index}.jpg")
            ids = generator.integers(0, 150, (40, 48), dtype=np.uint8)
            Image.fromarray(ids).save(tmp_path / "data" / split / "masks" / f"{index}.png")
    (tmp_path / "data" / "id2label.json").write_text(json.dumps(names))
    return {
        "nvidia/segformer-b4-finetuned-ade-512-512": str(tmp_path / "teacher"),
        "nvidia/mit-b0": str(tmp_path / "encoder"),
        '"ade20k"': repr(str(tmp_path / "data")),
    }


def test_the_ten_lines_train_a_student(hub: dict[str, str], tmp_path: Path) -> None:
    code = next(
        block for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "BCDTrainer" in block
    )
    assert len([line for line in code.splitlines() if line.strip()]) <= 14
    for name, local in hub.items():
        assert name in code
        code = code.replace(name, local)
    output = tmp_path / "student"
    quick = (
        "max_steps=1, crop_size=32, per_device_train_batch_size=2, calibration_images=2, dataloader_num_workers=0, "
        'use_cpu=True, report_to="none", eval_strategy="no", save_strategy="no"'
    )
    code = code.replace(
        'output_dir="segformer-b0-bcd-ade20k", push_to_hub=True', f"output_dir={str(output)!r}, {quick}"
    )
    code = code.replace("trainer.push_to_hub()", "trainer.save_model()")
    scope: dict = {}
    exec(code, scope)
    student = SegformerForSemanticSegmentation.from_pretrained(output)
    assert student.config.id2label[12] == scope["data"]["train"].id2label[12]


@pytest.mark.slow
def test_the_lines_of_instances_train_a_mask2former(tmp_path: Path) -> None:
    text = (README.parent / "docs" / "instances.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "BCDTrainer" in block)
    for size in ("tiny", "large"):
        mask2former_resnet(**names({0: "person", 1: "vehicle"})).save_pretrained(tmp_path / size)
    quick = (
        "max_steps=1, image_size=48, per_device_train_batch_size=2, calibration_images=2, dataloader_num_workers=0, "
        'use_cpu=True, report_to="none", eval_strategy="no", save_strategy="no"'
    )
    for given, local in {
        '"coco_detection", data_dir="path/to/coco"': '"synthetic_instances", size=(48, 64), num_images={"train": 4, "validation": 2}',
        '"facebook/mask2former-swin-{}-coco-instance"': repr(str(tmp_path / "{}")),
        'output_dir="mask2former-t-bcd"': f"output_dir={str(tmp_path / 'student')!r}, {quick}",
    }.items():
        assert given in code
        code = code.replace(given, local)
    scope: dict = {}
    exec(code, scope)
    assert 0 <= scope["trainer"].evaluate()["eval_mask_ap"] <= 1
    assert set(scope["trainer"].distiller.criterion.losses) == {"bcd", "query_kd"}
