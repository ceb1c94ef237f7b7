"""A genuine checkpoint of transformers as teacher, on genuine VOC files."""

import json
import shutil
from pathlib import Path

import pytest
import tiny

from hf_bcd.commands import distill


@pytest.mark.slow
def test_a_deeplab_of_transformers_teaches_a_student(shared_data: Path, tmp_path: Path) -> None:
    voc = shared_data / "format_samples/voc/VOCdevkit/VOC2012"
    masks = list((voc / "SegmentationClass").glob("*.png"))
    for split in ("train", "val"):
        for folder, files in (("images", [voc / "JPEGImages" / f"{m.stem}.jpg" for m in masks]), ("masks", masks)):
            (tmp_path / "voc" / split / folder).mkdir(parents=True)
            for file in files:
                shutil.copy(file, tmp_path / "voc" / split / folder)
    teacher = shared_data / "weights/deeplabv3_mobilenet_v2_1.0_voc_hf"
    names = json.loads((teacher / "config.json").read_text())["id2label"]
    (tmp_path / "voc" / "id2label.json").write_text(json.dumps(names))

    student = "{backbone: resnet10t, options: {head_channels: 8, backbone_kwargs: {channels: [8, 8, 16, 16], stem_width: 8}}}"
    distill.main(tiny.command_line(
        data_dir=tmp_path / "voc", teacher=teacher, student=student, output_dir=tmp_path / "run", crop_size=96,
        image_size=256, max_steps=2, per_device_train_batch_size=1, calibration_images=1,
    ))  # fmt: skip
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["teacher"]["mean_iou"] > 0.5 > results["student"]["mean_iou"]
    assert str(shared_data) not in (tmp_path / "run" / "config.json").read_text()
