"""Backbones without a head as teachers of features: every type that `AutoBackbone` maps, from tiny configurations."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoBackbone, AutoConfig, AutoModel
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING_NAMES

from hf_bcd.adapters import DenseAdapter, FrozenTeacher, adapt, backbones, build_adapter, describe
from hf_bcd.adapters.backbones import is_backbone, spread_layers
from hf_bcd.adapters.loading import load_adapter, load_model
from hf_bcd.adapters.specs import ModelSpec
from hf_bcd.commands import distill
from hf_bcd.losses import build_criterion
from hf_bcd.losses.base import Pair
from hf_bcd.losses.bcd import BCDLoss
from hf_bcd.losses.boundary import boundary_strength
from hf_bcd.losses.modules.aggregate import TeacherHead
from hf_bcd.losses.recipe import OFFERED_BY_ALL, others_that_serve
from hf_bcd.outputs import FeatureSpec, LabelMaps
from hf_bcd.utils.messages import UserError


PLAIN = {
    "hidden_size": 32, "num_hidden_layers": 8, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 64,
    "patch_size": 16,
}  # fmt: skip
STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32]}
HEADS = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "image_size": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    "beit": PLAIN,
    "bit": {**STAGES, "hidden_sizes": [16, 32, 48, 64], "embedding_size": 16, "num_groups": 4},
    "convnext": STAGES,
    "convnextv2": STAGES,
    "dinov2": {**PLAIN, "image_size": 56, "patch_size": 14, "mlp_ratio": 2},
    "dinov2_with_registers": {**PLAIN, "image_size": 56, "patch_size": 14, "mlp_ratio": 2},
    "dinov3_convnext": STAGES,
    "dinov3_vit": {**PLAIN, "num_register_tokens": 4},
    "focalnet": {"embed_dim": 16, "hidden_sizes": [32, 64, 128, 128], "depths": [1, 1, 1, 1], "image_size": 64},
    "hgnet_v2": {
        "embedding_size": 8, "depths": [1, 1, 1, 1], "hidden_sizes": [16, 16, 16, 16], "stem_channels": [3, 8, 8],
        "stage_in_channels": [8, 16, 16, 16], "stage_mid_channels": [8, 8, 8, 8],
        "stage_out_channels": [16, 16, 16, 16], "stage_num_blocks": [1, 1, 1, 1], "stage_numb_of_layers": [1, 1, 1, 1],
    },
    "hiera": {**HEADS, "image_size": [64, 64]},
    "lw_detr_vit": {**PLAIN, "pretrain_image_size": 64, "num_windows": 4, "window_block_indices": [0, 2]},
    "maskformer-swin": {**HEADS, "window_size": 4},
    "pixio": PLAIN,
    "pp_lcnet": {"scale": 0.25},
    "pp_lcnet_v3": {"scale": 0.25},
    "pvt_v2": {**STAGES, "num_attention_heads": [1, 1, 2, 2]},
    "resnet": {**STAGES, "embedding_size": 8},
    "rf_detr_dinov2": {**PLAIN, "num_windows": 2, "window_block_indexes": [0, 2]},
    "rt_detr_resnet": {**STAGES, "embedding_size": 8},
    "sapiens2": PLAIN,
    "swin": {**HEADS, "window_size": 4},
    "swinv2": {**HEADS, "window_size": 4},
    "textnet": {"hidden_sizes": [8, 8, 16, 24, 32], "stem_out_channels": 8},
    "timm_backbone": {"backbone": "resnet10t", "out_indices": [1, 2, 3, 4]},
    "tipsv2_vision_model": {**PLAIN, "image_size": 56, "patch_size": 14},
    "vitdet": PLAIN,
    "vitpose_backbone": {**PLAIN, "image_size": [64, 64], "patch_size": [16, 16]},
}  # fmt: skip
# encoders that are no backbone of transformers
ENCODERS: dict[str, dict[str, Any]] = {
    "sam": {
        "vision_config": {
            "hidden_size": 32, "num_hidden_layers": 8, "num_attention_heads": 2, "image_size": 64, "window_size": 2,
            "global_attn_indexes": [1, 3], "output_channels": 16, "initializer_range": 0.02,
        }
    },
    "sam2": {
        "vision_config": {
            "backbone_config": {
                "model_type": "sam2_hiera_det_model", "hidden_size": 16, "image_size": [64, 64],
                "blocks_per_stage": [1, 1, 2, 1], "embed_dim_per_stage": [16, 32, 64, 128],
                "num_attention_heads_per_stage": [1, 1, 2, 2], "window_size_per_stage": [8, 4, 4, 2],
                "global_attention_blocks": [3], "window_positional_embedding_background_size": [7, 7],
            },
            "backbone_channel_list": [128, 64, 32, 16], "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
            "fpn_hidden_size": 16,
        }
    },
}  # fmt: skip
ALL = {**CONFIGS, **ENCODERS}
UNFIT = {
    "dinat": "needs the package natten, which has no wheel for this machine",
    "pp_lcnet_v4": "its stages shrink the height only, as lines of text want it",
    "tipsv2": "holds a text model too; its vision part is tipsv2_vision_model",
    "uvdoc_backbone": "a model of bent paper whose six maps have one stride, and other channels than it states",
}


def tiny_backbone(name: str) -> Any:
    """A backbone in evaluation mode that hands out what `load_backbone` would have it hand out."""
    torch.manual_seed(0)
    config: Any = AutoConfig.for_model(name, **ALL[name])
    if name in backbones.ENCODERS:
        return backbones.ENCODERS[name](getattr(config, "vision_config", config)).eval()
    if stages := getattr(config, "stage_names", None):
        plain = name in ("beit", "vitdet") or len(stages) > 6
        config.out_features = (
            [stages[i] for i in (2, 4, 6, 8)]
            if plain
            else [n for n in stages if n != "stem" and (name, n) != ("focalnet", "stage3")]
        )
    model = AutoBackbone.from_config(config).eval()
    if name.startswith("pp_lcnet"):  # of whose usual random weights hardly anything comes out
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.kaiming_normal_(parameter)
    return model


def picture(adapter: DenseAdapter) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    size = adapter.size_as_teacher((192, 128))
    return torch.randint(0, 255, (1, 3, *size), generator=generator, dtype=torch.uint8)


def test_every_type_of_transformers_is_tried():
    assert CONFIGS.keys() | UNFIT.keys() == set(MODEL_FOR_BACKBONE_MAPPING_NAMES)


@pytest.mark.parametrize("name", ALL)
def test_levels_are_as_the_specs_say(name):
    adapter = adapt(tiny_backbone(name))
    assert adapter.offers == {"features"} and not adapter.predicts and adapter.num_labels == 0
    levels = list(adapter.feature_specs)
    usual = ["stem", "stride_4", "stride_8", "stride_16", "stride_32"]
    assert levels in (usual, usual[1:], {"focalnet": usual[2:], "sam2": usual[1:4]}.get(name))
    pixel_values = picture(adapter)
    output = adapter(pixel_values)
    assert output.logits is None and list(output.features) == levels
    for level, spec in adapter.feature_specs.items():
        shape = (1, spec.channels, pixel_values.shape[-2] // spec.stride, pixel_values.shape[-1] // spec.stride)
        assert output.features[level].shape == shape, level


@pytest.mark.parametrize("name", ALL)
def test_a_bright_patch_changes_a_map_most_at_its_place(name):
    adapter = adapt(tiny_backbone(name))
    dark = picture(adapter) // 4
    height, width = dark.shape[-2:]
    # of the smallest grid of levels, 6x4 or 2x2, one cell inside
    top, bottom, left, right = height * 4 // 6, height * 5 // 6, width // 4, width // 2
    bright = dark.clone()
    bright[..., top:bottom, left:right] = 255 - bright[..., top:bottom, left:right]
    before, after = adapter(dark).features, adapter(bright).features
    for level, spec in adapter.feature_specs.items():
        change = (after[level] - before[level]).detach().norm(dim=1)[0]
        rows, columns = (torch.arange(number) * spec.stride + spec.stride / 2 for number in change.shape)
        high, wide = (
            (places > low - spec.stride / 2) & (places < end + spec.stride / 2)
            for places, low, end in ((rows, top, bottom), (columns, left, right))
        )
        inside = high[:, None] & wide
        assert change[inside].mean() > 1.1 * change[~inside].mean(), level


@pytest.mark.parametrize("name", ALL)
def test_features_teach_a_student(name):
    student, teacher = build_adapter(tiny.tiny_segformer()), FrozenTeacher(adapt(tiny_backbone(name)), tiny.ID2LABEL)
    losses = {"bcd": {"channels": 8, "reduced_channels": 4}, "pkd": {}, "at": {}}
    criterion = build_criterion(
        losses, student.feature_specs, teacher.feature_specs, num_labels=8, offers=student.offers_with(teacher.adapter)
    )
    pixel_values = torch.randint(0, 255, (2, 3, 64, 96), dtype=torch.uint8)
    targets = LabelMaps(torch.randint(0, 8, (2, 64, 96)), 8)
    output = teacher(pixel_values)
    assert teacher.label_map is None and output.logits is None
    criterion.calibrate([(output, targets)])
    ours = student(pixel_values, targets)
    loss, terms = criterion(ours.task_losses, ours, output, targets)
    loss.backward()
    assert {"bcd/boundary", "bcd/context", "pkd/pkd", "at/at"} <= terms.keys() and all(
        x.isfinite() for x in terms.values()
    )


@pytest.mark.parametrize("name", sorted(UNFIT.keys() - {"tipsv2", "dinat"}))
def test_a_backbone_whose_maps_are_no_levels_is_refused(name):
    config: Any = AutoConfig.for_model(name, **({"scale": 0.25} if name == "pp_lcnet_v4" else {}))
    config.out_features = config.stage_names[1:]
    with pytest.raises(UserError, match=r"cannot teach features: for a picture of .* its maps are"):
        adapt(AutoBackbone.from_config(config))


def test_layers_are_spread():
    assert [spread_layers(n) for n in (12, 24, 40, 6, 3)] == [
        [3, 6, 9, 12],
        [6, 12, 18, 24],
        [10, 20, 30, 40],
        [2, 3, 4, 6],
        [1, 2, 3],
    ]


# ---- Sizes ---------------------------------------------------------------------------------------------------------


def test_sizes_are_multiples_of_the_patch_or_the_only_one_that_fits():
    sizes = {
        name: adapt(tiny_backbone(name)).size_as_teacher((100, 70))
        for name in ("dinov2", "swin", "hiera", "rf_detr_dinov2")
    }
    assert sizes == {"dinov2": (112, 70), "swin": (128, 96), "hiera": (64, 64), "rf_detr_dinov2": (64, 64)}


# ---- Loading -------------------------------------------------------------------------------------------------------


def save_headless(name: str, folder: Path) -> Any:
    """Saves what the Hub holds of most foundation models: the model of `AutoModel`, not of `AutoBackbone`."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **ALL[name])
    try:
        model = AutoModel.from_config(config).eval()
    except ValueError:
        model = AutoBackbone.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", sorted(ALL.keys() - {"timm_backbone"}))
def test_a_saved_model_without_a_head_loads_with_all_its_weights(name, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    saved = save_headless(name, tmp_path)
    adapter = load_adapter(str(tmp_path), to_teach=True)
    assert "teaches features only" in caplog.text
    stored = {key.rpartition("embeddings.")[2]: value for key, value in saved.state_dict().items()}
    values = {round(float(x.detach().double().sum()), 4) for x in stored.values() if x.ndim > 1}
    loaded = [p for key, p in adapter.model.named_parameters() if p.ndim > 1]
    assert loaded and all(round(float(p.detach().double().sum()), 4) in values for p in loaded)
    adapter(picture(adapter))


def test_a_model_with_a_head_is_no_teacher_of_features(tmp_path):
    tiny.tiny_segformer().save_pretrained(tmp_path)
    assert load_adapter(str(tmp_path), to_teach=True).predicts
    config = AutoConfig.for_model("beit", **CONFIGS["beit"])
    heads = {"BeitForSemanticSegmentation": False, "BeitForImageClassification": True, "BeitModel": True}
    for head, expected in heads.items():
        config.architectures = [head]
        assert is_backbone(config) is expected
    assert not is_backbone(tiny.tiny_segformer().config)


def test_a_backbone_that_lacks_weights_is_refused(tmp_path):
    save_headless("dinov2", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file(
        {key: value for key, value in state.items() if ".7." not in key},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(UserError, match=r"is no finished Dinov2Backbone: it lacks the weights of \d+ parameters"):
        load_adapter(str(tmp_path), to_teach=True)


def test_only_a_teacher_can_do_without_a_head(tmp_path):
    save_headless("dinov2", tmp_path)
    with pytest.raises(UserError, match="it can only be a teacher, of features"):
        load_model(str(tmp_path))
    with pytest.raises(UserError, match="it can only be a teacher, of features"):
        tiny.trainer(tmp_path / "run", model=tiny_backbone("dinov2"))
    with pytest.raises(UserError, match="head of student is none"):
        ModelSpec.parse({"backbone": "resnet10t", "head": "none"}, "student")


def test_hiera_of_auto_backbone_is_refused_for_its_order_of_tokens():
    config: Any = AutoConfig.for_model("hiera", **CONFIGS["hiera"])
    config.out_features = config.stage_names[1:]
    with pytest.raises(UserError, match="its tokens are in another order than its layers expect; load a HieraModel"):
        adapt(AutoBackbone.from_config(config))


# ---- timm ----------------------------------------------------------------------------------------------------------

TIMM = {
    "resnet10t": {"channels": [8, 8, 16, 16], "stem_width": 8},
    "swin_tiny_patch4_window7_224": {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]},
    "vit_tiny_patch16_224": {"embed_dim": 32, "depth": 8, "num_heads": 2},
}


def timm_spec(name: str, folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    kwargs = TIMM[name]
    save_file(timm.create_model(name, **kwargs).state_dict(), folder / "weights.safetensors")
    return {
        "backbone": name,
        "head": "none",
        "weights": str(folder / "weights.safetensors"),
        "options": {"backbone_kwargs": kwargs},
    }


@pytest.mark.parametrize("name", TIMM)
def test_a_backbone_of_timm_teaches_with_its_weights(name, tmp_path):
    spec = ModelSpec.parse(timm_spec(name, tmp_path), "teacher")
    assert spec.is_finished
    adapter = load_adapter(spec)
    assert adapter.offers == {"features"} and adapter.model.config.backbone == name
    assert adapter.size_as_teacher((100, 70)) == {"v": (112, 80)}.get(name[0], (128, 96))
    pixel_values = picture(adapter)
    features = adapter(pixel_values).features
    for level, level_spec in adapter.feature_specs.items():
        side = pixel_values.shape[-2] // level_spec.stride
        assert features[level].shape[1:3] == (level_spec.channels, side)
    original: Any = timm.create_model(name, **TIMM[name], **({"dynamic_img_size": True} if name[0] in "vs" else {}))
    original.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    _, maps = original.eval().forward_intermediates(adapter.normalize(pixel_values))
    torch.testing.assert_close(features["stride_32"], maps[-1])


def test_a_backbone_of_timm_needs_weights(tmp_path):
    for fields in ({}, {"pretrained": True, "weights": "w.safetensors"}):
        with pytest.raises(UserError, match="without a head needs weights that it has learned elsewhere"):
            ModelSpec.parse({"backbone": "resnet10t", "head": "none", **fields}, "teacher")
    with pytest.raises(UserError, match="option head_channels of teacher|'head_channels'"):
        ModelSpec.parse(
            {"backbone": "resnet10t", "head": "none", "pretrained": True, "options": {"head_channels": 8}}, "teacher"
        )
    spec = timm_spec("resnet10t", tmp_path)
    spec["backbone"] = "resnet14t"
    with pytest.raises(UserError, match=r"has shape|no such key"):
        load_adapter(ModelSpec.parse(spec, "teacher"))


# ---- Losses --------------------------------------------------------------------------------------------------------


def test_losses_that_need_more_are_refused_with_those_that_serve():
    teacher = adapt(tiny_backbone("dinov2"))
    student = build_adapter(tiny.tiny_segformer())
    with pytest.raises(
        UserError, match=r"loss 'cwd' needs logits, but .* only offer features.*or another loss: .*pkd"
    ):
        build_criterion(
            {"cwd": {}},
            student.feature_specs,
            teacher.feature_specs,
            num_labels=8,
            offers=student.offers_with(teacher),
        )
    with pytest.raises(UserError, match="needs features, logits, but|needs logits, but"):
        build_criterion(
            {"bcd": {"teacher_head": "logits"}}, student.feature_specs, teacher.feature_specs, num_labels=8,
            offers=student.offers_with(teacher),
        )  # fmt: skip


def serving() -> list[dict[str, Any]]:
    """Losses that ask for no more than features, as messages name them."""
    found = []
    for words in others_that_serve(OFFERED_BY_ALL):
        name, _, options = words.partition(" (")
        found.append({name: dict(pair.split(": ") for pair in options.rstrip(")").split(", ")) if options else {}})
    return found


@pytest.mark.parametrize("losses", serving(), ids=lambda losses: next(iter(losses)))
def test_every_loss_that_is_said_to_serve_does(losses):
    student, teacher = (
        build_adapter(tiny.tiny_segformer()),
        FrozenTeacher(adapt(tiny_backbone("dinov2")), tiny.ID2LABEL),
    )
    criterion = build_criterion(
        losses, student.feature_specs, teacher.feature_specs, num_labels=8, head_levels=(),
        offers=OFFERED_BY_ALL | student.offers_with(teacher.adapter),
    )  # fmt: skip
    pixel_values = torch.randint(0, 255, (2, 3, 64, 96), dtype=torch.uint8)
    targets = LabelMaps(torch.randint(0, 8, (2, 64, 96)), 8)
    output, ours = teacher(pixel_values), student(pixel_values, targets)
    criterion.calibrate([(output, targets)], lambda steps: list(steps)[:1])
    loss, _ = criterion(ours.task_losses, ours, output, targets)
    assert loss.isfinite()
    loss.backward()


def test_boundaries_of_features_are_as_many_as_those_of_the_labels(monkeypatch):
    teacher = FrozenTeacher(adapt(tiny_backbone("dinov2")), tiny.ID2LABEL)
    pair = Pair(teacher.feature_specs, teacher.feature_specs, num_labels=8, head_levels=())
    loss, given = BCDLoss(pair, channels=8, reduced_channels=4), {}
    monkeypatch.setattr(loss.teacher_head, "calibrate", lambda batches, **options: given.update(options))
    ids = torch.zeros(2, 128, 192, dtype=torch.long)
    ids[:, :, 96:] = 1
    ids[1, :64] = 255
    output = teacher(torch.randint(0, 255, (2, 3, 128, 192), dtype=torch.uint8))
    loss.calibrate([(output, LabelMaps(ids, 8))])
    # two columns of 24 on each side of the edge are less than 3 from the other
    assert (given["readout"], given["share"]) == ("principal", 4 / 24)


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_theta_leaves_the_share_of_positions_above_it(share):
    head = TeacherHead({"stride_8": FeatureSpec(4, 8)}, channels=8, reduced_channels=4, seed=0)
    features, mask = torch.randn(2, 8, 32, 32), torch.ones(2, 32, 32, dtype=torch.bool)
    head.calibrate([(features, mask.long(), mask)], radius=2, readout="principal", share=share)
    above = boundary_strength(head.boundary_field(features), 2, mask) > head.theta
    # neighbours share a range, so that some lie on theta
    assert above.float().mean() == pytest.approx(share, abs=0.01)


# ---- Runs ----------------------------------------------------------------------------------------------------------


def test_a_description_names_no_labels():
    assert "labels: none; a teacher of features" in describe(tiny_backbone("dinov2"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dinov2", "swin"])
def test_a_run_with_a_teacher_of_features(name, tmp_path):
    saved = tmp_path / "teacher"
    save_headless(name, saved)
    losses = {"bcd": {"channels": 8, "reduced_channels": 4}, "pkd": {}, "at": {}}
    command = tiny.command_line(
        dataset_name="synthetic", teacher=saved, student=json.dumps({"backbone": "resnet10t", "head": "fpn"}),
        losses=json.dumps(losses), max_steps=2, output_dir=tmp_path / "run", max_train_samples=4, max_eval_samples=2,
    )  # fmt: skip
    distill.main(command)
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert "student" in results and "teacher" not in results
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "- classes: the teacher has none; it gave features only" in card
    for wrong in ("cwd", "kd"):
        with pytest.raises(UserError, match=f"loss '{wrong}' needs .*only offer features"):
            distill.main([*command[:-2], "--losses", json.dumps({wrong: {}}), "--output_dir", str(tmp_path / wrong)])
