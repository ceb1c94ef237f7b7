"""Input normalisation, and image processors that show a saved student what its adapter saw."""

import pytest
import torch
import torch.nn.functional as F
from adapter_tiny_models import MODELS, images, timm_segmentation, tiny_model, upernet
from PIL import Image
from torchvision.transforms.v2 import functional as tvF
from transformers import SegformerImageProcessor, TimmBackboneConfig, pipeline

from hf_bcd.adapters import build_adapter, image_processor, image_statistics


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
NONE = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
STATISTICS = {
    "beit": HALF, "data2vec": HALF, "dpt": HALF, "mask2former": IMAGENET, "mobilenet_v2": HALF, "mobilevit": NONE,
    "mobilevitv2": NONE, "segformer": IMAGENET, "timm_segmentation": IMAGENET, "upernet-swin": IMAGENET,
}  # fmt: skip


@pytest.mark.parametrize(("name", "expected"), STATISTICS.items(), ids=STATISTICS)
def test_family_statistics(name, expected):
    model = tiny_model(name)
    assert image_statistics(model) == expected
    adapter = build_adapter(model)
    torch.testing.assert_close(adapter.image_mean.flatten(), torch.tensor(expected[0]))
    torch.testing.assert_close(adapter.image_std.flatten(), torch.tensor(expected[1]))


def test_statistics_of_timm_weights_come_from_timm():
    assert image_statistics(timm_segmentation("tf_mobilenetv3_small_minimal_100")) == HALF
    backbone = TimmBackboneConfig(backbone="tf_mobilenetv3_small_minimal_100", out_indices=[1, 2, 3, 4])
    assert image_statistics(upernet(backbone)) == HALF


def test_statistics_beside_the_weights_win(tmp_path, caplog):
    tiny_model("segformer").save_pretrained(tmp_path)
    reload = type(tiny_model("segformer")).from_pretrained
    assert image_statistics(reload(tmp_path)) == IMAGENET
    assert "No image processor" in caplog.text
    SegformerImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(tmp_path)
    assert image_statistics(reload(tmp_path)) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    SegformerImageProcessor(do_normalize=False).save_pretrained(tmp_path)
    assert image_statistics(reload(tmp_path)) == NONE


@pytest.mark.parametrize("name", ["mask2former", "mobilenet_v2", "segformer"])
def test_normalises_bit_for_bit_as_the_image_processor(name):
    adapter = build_adapter(tiny_model(name))
    processor = image_processor(adapter, shortest_edge=None)
    expected = processor(list(images()), return_tensors="pt")["pixel_values"]
    assert torch.equal(adapter.normalize(images()), expected)
    assert torch.equal(adapter.normalize(images().float()), expected)


@pytest.mark.parametrize("name", ["mobilevit", "mobilevitv2"])
def test_mobilevit_takes_bgr_without_normalisation(name):
    adapter = build_adapter(tiny_model(name))
    normalized = adapter.normalize(images())
    torch.testing.assert_close(normalized[:, 0], images()[:, 2] / 255)
    expected = image_processor(adapter, shortest_edge=None)(list(images()), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(normalized, expected)
    with pytest.raises(ValueError, match=r"without normalisation, but image_mean is \[0.5, 0.5, 0.5\]"):
        build_adapter(adapter.model, *HALF)
    with pytest.raises(ValueError, match=r"image_mean has 1 values \[0.5\]"):
        build_adapter(adapter.model, image_mean=[0.5])


def test_falling_back_is_a_warning_for_a_named_model_alone(caplog):
    model = tiny_model("mobilenet_v2")
    assert image_statistics(model) == HALF and not caplog.records
    model.name_or_path = "nobody/has-this-model"
    assert image_statistics(model) == HALF
    assert [record.levelname for record in caplog.records] == ["WARNING"] and model.name_or_path in caplog.text


def test_statistics_are_read_at_the_commit_of_the_weights(monkeypatch):
    model, asked = tiny_model("segformer"), {}
    model.name_or_path, model.config._commit_hash = "me/pinned", "0123abc"
    processor = SegformerImageProcessor(image_mean=[0.1, 0.2, 0.3])

    def read(source, **options):
        asked[source] = options
        return processor

    monkeypatch.setattr("transformers.AutoImageProcessor.from_pretrained", read)
    assert image_statistics(model)[0] == (0.1, 0.2, 0.3)
    assert asked == {"me/pinned": {"revision": "0123abc", "trust_remote_code": False}}


@pytest.mark.parametrize("name", MODELS)
def test_processor_resizes_bilinearly_and_never_crops(name, tmp_path):
    adapter = build_adapter(tiny_model(name))
    processor = image_processor(adapter, shortest_edge=96)
    processor.save_pretrained(tmp_path)
    processor = type(processor).from_pretrained(tmp_path)
    size = {"data2vec": (96, 96), "dpt": (96, 96)}.get(name, (96, 150))
    image = images(64, 100)
    expected = adapter.normalize(tvF.resize(image, list(size), tvF.InterpolationMode.BILINEAR, antialias=True))
    pixel_values = processor(list(image), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixel_values, expected)
    assert adapter.model(pixel_values)  # a size that the model takes
    if name == "segformer":  # the longer side has its limit
        processor = image_processor(adapter, shortest_edge=32)
        assert processor(images(20, 200)[0], return_tensors="pt")["pixel_values"].shape[-2:] == (13, 128)


@pytest.mark.parametrize("name", ["mobilevit", "segformer", "timm_segmentation"])
def test_pipeline_segments_as_the_adapter_does(name, tmp_path):
    model = tiny_model(name)
    adapter = build_adapter(model)
    model.save_pretrained(tmp_path)
    image_processor(adapter, shortest_edge=None).save_pretrained(tmp_path)
    with torch.no_grad():
        logits = adapter(images(batch=1)).logits
    classes = F.interpolate(logits, (64, 96), mode="bilinear", align_corners=False).argmax(1)[0]
    image = Image.fromarray(images(batch=1)[0].permute(1, 2, 0).numpy())
    results = pipeline("image-segmentation", str(tmp_path), device="cpu")(image)
    assert {result["label"] for result in results} == {adapter.id2label[int(c)] for c in classes.unique()}
    for result in results:
        mask = tvF.pil_to_tensor(result["mask"])[0] > 0
        assert torch.equal(mask, classes == model.config.label2id[result["label"]])
