"""`hf-bcd convert-mmdet`: each weight of a checkpoint of mmdetection arrives, and nothing else is taken."""

from pathlib import Path

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from hf_bcd.commands.convert_mmdet import main
from hf_bcd.models import TimmDetectionConfig, TimmDetectionModel
from hf_bcd.utils.messages import UserError


NAMES = ("cat", "dog", "owl")


def checkpoint(folder: Path, head: str, meta=None, edit=lambda state: None, **fields) -> tuple[Path, dict]:
    """A file as mmdetection writes it, with random weights."""
    fields = {"neck_channels": 32, "head_channels": 32, "num_labels": 3} | fields
    with torch.device("meta"):
        model = TimmDetectionModel(TimmDetectionConfig(backbone="resnet18", head=head, **fields))
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.rand(value.shape, generator=generator).add(0.5).to(value.dtype)
        for name, value in model.state_dict().items()
    }
    written = state | ({"bbox_head.integral.project": torch.arange(17.0)} if head == "gfl" else {})
    edit(written)
    path = folder / "model.pth"
    torch.save({"meta": {"CLASSES": NAMES} if meta is None else meta, "state_dict": written}, path)
    return path, state


@pytest.mark.parametrize(
    ("head", "fields"),
    [
        ("retinanet", {"head_convs": 2}),
        ("retinanet", {"extra_levels": "on_output"}),
        ("gfl", {"reg_max": 8}),
        ("gfl", {"strides": [8, 16, 32, 64]}),
    ],
)
def test_every_weight_arrives(tmp_path: Path, head: str, fields: dict) -> None:
    path, state = checkpoint(tmp_path, head, **fields)
    main([str(path), "--output", str(tmp_path / "out")])
    model = AutoModelForObjectDetection.from_pretrained(tmp_path / "out")
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    config = model.config
    assert all(getattr(config, name) == value for name, value in fields.items())
    assert (config.head, config.backbone, list(config.id2label.values())) == (head, "resnet18", list(NAMES))
    assert (config.frozen_stages, config.norm_eval) == (1, True)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert processor.image_mean == pytest.approx([0.485, 0.456, 0.406], abs=1e-6)
    assert processor.image_std == pytest.approx([0.229, 0.224, 0.225], abs=1e-6)
    with pytest.raises(UserError, match="holds a model already"):
        main([str(path), "--output", str(tmp_path / "out")])


def test_other_ways_of_writing_it(tmp_path: Path) -> None:
    def edit(state):
        for name in list(state):
            value = state.pop(name)
            if not name.endswith("num_batches_tracked"):
                state[f"module.{name}"] = value

    path, state = checkpoint(tmp_path, "gfl", meta={"dataset_meta": {"classes": list(NAMES)}}, edit=edit)
    main([str(path), "--output", str(tmp_path / "out")])
    model = AutoModelForObjectDetection.from_pretrained(tmp_path / "out")
    assert model.config.id2label[2] == "owl"
    assert torch.equal(model.state_dict()["bbox_head.gfl_reg.weight"], state["bbox_head.gfl_reg.weight"])


def add(state):
    state["backbone.layer2.0.conv2_offset.weight"] = torch.zeros(2)


def drop(state):
    del state["bbox_head.reg_convs.1.conv.weight"]


def rename(state):
    state["roi_head.fc.bias"] = state.pop("bbox_head.gfl_cls.weight")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edit": add}, r"1 of its weights differ, such as 'backbone.layer2.0.conv2_offset.weight' with shape \(2,\)"),
        ({"edit": drop}, r"'bbox_head.reg_convs.1.conv.weight' with shape none, expected \(32, 32, 3, 3\)"),
        ({"edit": rename}, "no RetinaNet or GFL on a ResNet"),
        ({"meta": {"CLASSES": ("cat",)}}, "names 1 classes but has outputs for 3"),
        ({"meta": {"config": "norm_eval=True,\n style='caffe'"}}, "Caffe's style"),
    ],
)
def test_refuses_what_does_not_fit(tmp_path: Path, options: dict, message: str) -> None:
    path, _ = checkpoint(tmp_path, "gfl", **options)
    with pytest.raises(UserError, match=message):
        main([str(path), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_runs_no_code_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"state_dict": {}, "meta": {"when": Path("x")}}, path)
    with pytest.raises(UserError, match="cannot be read without running code"):
        main([str(path), "--output", str(tmp_path / "out")])
    torch.save({"weights": {}}, path)
    with pytest.raises(UserError, match="has no 'state_dict'"):
        main([str(path), "--output", str(tmp_path / "out")])
    with pytest.raises(UserError, match="is no file"):
        main([str(tmp_path / "absent.pth"), "--output", str(tmp_path / "out")])
