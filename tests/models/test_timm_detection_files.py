"""Detectors where this package is missing: `pipeline` from the files of the folder, and onnxruntime."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_detectors import HEADS, MASK_HEADS, confident, tiny
from transformers import AutoImageProcessor, DeformableDetrImageProcessor, RfDetrImageProcessor, pipeline

from hf_bcd.adapters import build_adapter
from hf_bcd.utils.masks import decode


CODE = {
    "configuration_timm_detection.py",
    "dense_heads.py",
    "detection_boxes.py",
    "modeling_timm_detection.py",
    "regions.py",
    "roi_heads.py",
    "timm_backbone.py",
}
SIZES = [(160, 120), (120, 200), (97, 301), (64, 64)]


def detector(head):
    """A tiny model with many detections."""
    names = {0: "cat", 1: "dog", 2: "owl"}
    return confident(tiny(head, id2label=names, label2id={name: index for index, name in names.items()}))


def picture(size):
    return Image.fromarray(np.random.default_rng(sum(size)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


# all models in one process, because importing takes seconds
REMOTE_CODE = """
import json, sys
import numpy as np
from PIL import Image
from transformers import AutoModelForInstanceSegmentation, pipeline
folder, heads, mask_heads, pictures = sys.argv[1], *map(json.loads, sys.argv[2:])
found = {}
for head in heads:
    detector = pipeline("object-detection", model=f"{folder}/{head}", trust_remote_code=True, device="cpu")
    found[head] = [detector(Image.open(path), threshold=0.1) for path in pictures]
for head in mask_heads:
    options = {"model": f"{folder}/{head}", "trust_remote_code": True, "device": "cpu"}
    picture = f"{folder}/{head}/picture.png"
    masks = pipeline("image-segmentation", **options)(Image.open(picture), subtask="instance", threshold=0.1)
    boxes = pipeline("object-detection", **options)(Image.open(picture), threshold=0.1)
    AutoModelForInstanceSegmentation.from_pretrained(f"{folder}/{head}", trust_remote_code=True)
    np.save(f"{folder}/{head}/masks.npy", np.stack([np.array(one["mask"]) > 0 for one in masks]))
    found[head] = [[one["label"] for one in masks], [one["label"] for one in boxes]]
assert not any(name.startswith("hf_bcd") for name in sys.modules)
print(json.dumps(found))
"""
PROCESSOR = {"shortest_edge": 128, "longest_edge": 213}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """What pipelines find in another process, which knows only the folders of the models; the folders and what it wrote."""
    folder = tmp_path_factory.mktemp("repositories")
    paths = [str(folder / f"{index}.png") for index in range(len(SIZES))]
    for path, size in zip(paths, SIZES, strict=True):
        picture(size).save(path)
    for head in HEADS:
        detector(head).save_pretrained(folder / head)
        DeformableDetrImageProcessor(size=PROCESSOR).save_pretrained(folder / head)
    for head in MASK_HEADS:
        _, _, image = saved_with_masks(folder / head, head)
        image.save(folder / head / "picture.png")
    environment = os.environ | {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    arguments = [str(folder), *map(json.dumps, (HEADS, MASK_HEADS, paths))]
    command = [sys.executable, "-W", "ignore", "-c", REMOTE_CODE, *arguments]
    result = subprocess.run(command, check=False, env=environment, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "not supported" not in result.stderr
    return folder, json.loads(result.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_pipeline_runs_without_the_package(elsewhere, head):
    folder, found_by_head = elsewhere
    assert {path.name for path in (folder / head).glob("*.py")} == CODE
    model, processor = detector(head), DeformableDetrImageProcessor(size=PROCESSOR)

    # here as one padded batch, there one by one
    inputs = processor([picture(size) for size in SIZES], return_tensors="pt")
    assert not inputs["pixel_mask"].all()
    for found, size, image in zip(found_by_head[head], SIZES, range(len(SIZES)), strict=True):
        single = processor(picture(size), return_tensors="pt")
        with torch.no_grad():
            output = model(**single)
        expected = processor.post_process_object_detection(output, 0.1, [(size[1], size[0])])[0]
        assert len(found) == len(expected["scores"]) > 5
        labels = [model.config.id2label[label] for label in expected["labels"].tolist()]
        assert [row["label"] for row in found] == labels
        boxes = torch.tensor([[row["box"][side] for side in ("xmin", "ymin", "xmax", "ymax")] for row in found])
        # the pipeline cuts the fractions off
        assert (boxes + 0.5 - expected["boxes"]).abs().max() <= 0.5 + 1e-3
        width, height = size
        assert (boxes >= 0).all() and (boxes <= torch.tensor([width, height, width, height])).all()
        valid = inputs["pixel_mask"][image].nonzero().amax(dim=0) + 1
        assert valid.tolist() == list(single["pixel_values"].shape[-2:])


def painted(predicted, shape, threshold):
    """Masks of detections above a threshold, the best on top, without those that others hide."""
    taken, visible, labels = np.zeros(shape, bool), [], []
    for score, label, rle in zip(
        predicted["scores"].tolist(), predicted["labels"].tolist(), predicted["masks"], strict=True
    ):
        mask = decode(rle) & ~taken
        if score > threshold and mask.any():
            taken |= mask
            visible.append(mask)
            labels.append(label)
    return visible, labels


def saved_with_masks(folder, head):
    """A folder with a model, its predictions for a picture of a size that its processor keeps, and the picture."""
    model, image = detector(head), picture((160, 120))
    model.save_pretrained(folder)
    RfDetrImageProcessor(size={"shortest_edge": 120, "longest_edge": 213}).save_pretrained(folder)
    pixel_values = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    return model.config.id2label, build_adapter(model).predict(pixel_values, [(120, 160)])[0], image


def assert_equal_masks(found, predicted, threshold):
    masks, labels = painted(predicted, (120, 160), threshold)
    assert len(found) == len(masks) > 5
    for ours, theirs in zip(masks, found, strict=True):
        assert (ours & theirs).sum() >= 0.999 * (ours | theirs).sum()
    return labels


@pytest.mark.parametrize("head", MASK_HEADS)
def test_both_pipelines_find_what_predict_finds(tmp_path, head):
    names, predicted, image = saved_with_masks(tmp_path, head)
    found = pipeline("image-segmentation", model=str(tmp_path), device="cpu")(image, subtask="instance", threshold=0.1)
    labels = assert_equal_masks([np.array(one["mask"]) > 0 for one in found], predicted, 0.1)
    assert [one["label"] for one in found] == [names[label] for label in labels]
    boxes = pipeline("object-detection", model=str(tmp_path), device="cpu")(image, threshold=0.1)
    kept = predicted["scores"] > 0.1
    assert [one["label"] for one in boxes] == [names[label] for label in predicted["labels"][kept].tolist()]
    corners = torch.tensor([[one["box"][side] for side in ("xmin", "ymin", "xmax", "ymax")] for one in boxes])
    assert (corners + 0.5 - predicted["boxes"][kept]).abs().max() <= 0.5 + 1e-3  # the pipeline cuts the fractions off


@pytest.mark.slow
@pytest.mark.parametrize("head", MASK_HEADS)
def test_both_pipelines_run_without_the_package(elsewhere, head, tmp_path):
    folder, found = elsewhere
    names, predicted, _ = saved_with_masks(tmp_path, head)
    assert {path.name for path in (folder / head).glob("*.py")} == CODE
    labels = assert_equal_masks(np.load(folder / head / "masks.npy"), predicted, 0.1)
    of_masks, of_boxes = found[head]
    assert of_masks == [names[label] for label in labels] and len(of_boxes) == (predicted["scores"] > 0.1).sum()


@pytest.mark.parametrize("backend, suffix", [("torchvision", ""), ("pil", "Pil")])
def test_image_processor_follows_from_the_configuration(tmp_path, backend, suffix):
    detector("gfl").config.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
    assert type(processor).__name__ == f"DeformableDetrImageProcessor{suffix}"


class Detections(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        output = self.model(pixel_values)
        return output.logits, output.pred_boxes, *([] if output.pred_masks is None else [output.pred_masks > 0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("head", ["retinanet", "cascade_mask_rcnn"])
def test_onnx_runs_in_onnxruntime(tmp_path, head):
    """Of the heads that tests/export/test_detection_export.py leaves out."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = Detections(detector(head)).eval()
    with torch.no_grad():
        program = torch.onnx.export(model, (torch.randn(1, 3, 128, 160),), dynamo=True, verbose=False)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for _ in range(3):
        pixel_values = torch.randn(1, 3, 128, 160)
        logits, boxes, *masks = session.run(None, {session.get_inputs()[0].name: pixel_values.numpy()})
        with torch.no_grad():
            expected_logits, expected_boxes, *expected_masks = model(pixel_values)
        assert (expected_logits > -100).sum() > 20
        torch.testing.assert_close(torch.from_numpy(logits), expected_logits, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(torch.from_numpy(boxes), expected_boxes, rtol=1e-3, atol=1e-3)
        assert len(masks) == len(expected_masks)
        assert all((a == b.numpy()).mean() > 0.999 for a, b in zip(masks, expected_masks, strict=True))
