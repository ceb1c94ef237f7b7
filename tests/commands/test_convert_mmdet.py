"""`hf-bcd convert-mmdet`: each weight of a checkpoint of mmdetection arrives, and nothing else is taken."""

from pathlib import Path

import pytest
import torch
import torchvision
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from hf_bcd.adapters.mmdetection import convert_mmdetection
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
        ("mask_rcnn", {"fc_channels": 24}),
        ("cascade_mask_rcnn", {"head_convs": 2, "fc_channels": 24}),
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


def names_in_mmdetection(cascade: bool) -> dict[str, tuple[int, ...]]:
    """Weights of Mask R-CNN or Cascade Mask R-CNN of 3 classes on a ResNet-18, under the names of mmdetection 3.3, but narrow."""
    found = {}

    def layer(name: str, *shape: int) -> None:
        found.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})

    for index, width in enumerate((64, 128, 256, 512)):
        layer(f"neck.lateral_convs.{index}.conv", 16, width, 1, 1)
        layer(f"neck.fpn_convs.{index}.conv", 16, 16, 3, 3)
    layer("rpn_head.rpn_conv", 16, 16, 3, 3)
    layer("rpn_head.rpn_cls", 3, 16, 1, 1)
    layer("rpn_head.rpn_reg", 12, 16, 1, 1)
    for stage in (".0", ".1", ".2") if cascade else ("",):
        layer(f"roi_head.bbox_head{stage}.shared_fcs.0", 24, 16 * 49)
        layer(f"roi_head.bbox_head{stage}.shared_fcs.1", 24, 24)
        layer(f"roi_head.bbox_head{stage}.fc_cls", 4, 24)
        layer(f"roi_head.bbox_head{stage}.fc_reg", 4 if cascade else 12, 24)
        for index in range(4):
            layer(f"roi_head.mask_head{stage}.convs.{index}.conv", 16, 16, 3, 3)
        layer(f"roi_head.mask_head{stage}.upsample", 16, 16, 2, 2)
        layer(f"roi_head.mask_head{stage}.conv_logits", 3, 16, 1, 1)
    with torch.device("meta"):
        backbone = torchvision.models.resnet18().state_dict()
    own = {f"backbone.{name}": tuple(value.shape) for name, value in backbone.items() if not name.startswith("fc.")}
    return own | found


@pytest.mark.parametrize("cascade", [False, True])
def test_every_key_of_mmdetections_mask_models_is_used(cascade: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.rand(shape, generator=generator) for name, shape in names_in_mmdetection(cascade).items()}
    model = convert_mmdetection(state, {"CLASSES": NAMES})
    assert model.config.head == ("cascade_mask_rcnn" if cascade else "mask_rcnn")
    found = model.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(value.float(), state[name].to(value.dtype).float()) for name, value in found.items())
    del state["roi_head.mask_head.2.conv_logits.bias" if cascade else "rpn_head.rpn_conv.bias"]
    with pytest.raises(UserError, match=r"mask_head.2.conv_logits.bias|no RetinaNet, GFL, Mask R-CNN"):
        convert_mmdetection(state, {})


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
        ({"edit": rename}, "no RetinaNet, GFL, Mask R-CNN or Cascade Mask R-CNN on a ResNet"),
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


@pytest.mark.parametrize("content", [b"hello", b"<!DOCTYPE html>", b"\x80\x02K", b"Iabc\n."])
def test_a_file_of_anything_else_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.pth cannot be read without running code from it"):
        main([str(tmp_path / "x.pth"), "--output", str(tmp_path / "out")])


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(UserError, match="--output is .*out, which is a file; name a folder"):
        main(["x.pth", "--output", str(tmp_path / "out")])
