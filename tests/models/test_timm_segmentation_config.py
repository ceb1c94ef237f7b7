import pytest
import timm

from hf_bcd.models import TimmSegmentationConfig
from hf_bcd.models.configuration_timm_segmentation import HEAD_NAMES
from hf_bcd.models.heads import HEADS


def test_every_named_head_exists():
    assert tuple(HEADS) == HEAD_NAMES


def test_builds_nothing(monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: pytest.fail("a model was built"))
    assert TimmSegmentationConfig(backbone="mobilenetv2_050", num_labels=4).num_labels == 4


@pytest.mark.parametrize("backbone, mean", [("resnet18.a1_in1k", 0.485), ("tf_efficientnet_lite0", 0.5)])
def test_statistics_come_from_timm(backbone, mean):
    assert TimmSegmentationConfig(backbone=backbone).image_mean[0] == mean


def test_given_statistics_survive_the_file(tmp_path):
    # those of the default backbone, where this backbone's own are 0.5: they must not be dropped as defaults
    default = TimmSegmentationConfig()
    TimmSegmentationConfig(
        backbone="tf_efficientnet_lite0", image_mean=default.image_mean, image_std=default.image_std
    ).save_pretrained(tmp_path)
    reloaded = TimmSegmentationConfig.from_pretrained(tmp_path)
    assert (reloaded.image_mean, reloaded.image_std) == (default.image_mean, default.image_std)


def test_labels():
    config = TimmSegmentationConfig(id2label={0: "road", 1: "sky", 2: "car"}, label2id={"road": 0, "sky": 1, "car": 2})
    assert config.num_labels == 3
    assert TimmSegmentationConfig(num_labels=7).num_labels == 7


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"backbone": "resnet81"}, "'resnet81' is not an architecture of timm; the nearest are .*resnet18"),
        ({"backbone": "hf-hub:timm/resnet18"}, "not an architecture"),
        ({"backbone": "resnet18.a9_in1k"}, "unknown tag; timm knows .*resnet18.a1_in1k"),
        ({"head": "upernet"}, "'upernet' is unknown; choose one of .*psp"),
        ({"output_stride": 4}, "output_stride 4 is not possible; choose one of .*8"),
        ({"backbone_kwargs": {"output_stride": 8}}, r"must not hold \['output_stride'\]"),
    ],
)
def test_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        TimmSegmentationConfig(**fields)
