"""Teachers with other classes than the data set: what they score, what they teach, and what is refused."""

import copy
import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from adapters.adapter_tiny_models import mask2former
from torch import nn
from transformers import PreTrainedModel, ResNetBackbone, ResNetConfig, SegformerConfig, SegformerModel

from hf_bcd import BCDTrainer, SemanticMetrics
from hf_bcd.adapters import adapt
from hf_bcd.adapters.loading import build_model
from hf_bcd.adapters.specs import ModelSpec
from hf_bcd.commands import distill
from hf_bcd.losses.bcd import BCDLoss
from hf_bcd.losses.recipe import LOSSES
from hf_bcd.runs.arguments import ModelArguments
from hf_bcd.runs.baseline import prepare_teacher
from hf_bcd.runs.experiment import evaluate_model
from hf_bcd.runs.reinforce import build_reinforcer, make_store
from hf_bcd.stores import Store
from hf_bcd.tasks import semantic_segmentation


ORDER = [3, 0, 7, 5, 1, 6, 2, 4]
EXTRA = ["fountain", "awning", "stage"]


def tiny_mask2former() -> PreTrainedModel:
    torch.manual_seed(0)
    return mask2former(num_queries=20, **tiny.labels())


def classifier(model: Any) -> Any:
    """The layer whose outputs are the classes; Mask2Former's has "no object" as a last one."""
    if model.config.model_type == "mask2former":
        return model.class_predictor
    return model.decode_head.classifier if model.config.model_type == "segformer" else model.head.classifier


def rename(model: PreTrainedModel, names: list[str]) -> None:
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}


def spread(model: PreTrainedModel) -> PreTrainedModel:
    """Random classifiers see one class everywhere; sharper ones see several."""
    with torch.no_grad():
        classifier(model).weight.mul_(50)
    return model.eval()


def permuted(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with its classes, names included, in another order."""
    model = copy.deepcopy(model)
    layer, rows = classifier(model), [*ORDER, 8][: len(classifier(model).weight)]
    with torch.no_grad():
        for parameter in (layer.weight, layer.bias):
            parameter.copy_(parameter[rows].clone())
    rename(model, [tiny.ID2LABEL[index] for index in ORDER])
    return model


def superset(model: PreTrainedModel) -> PreTrainedModel:
    """The same SegFormer with classes of its own in front, which win everywhere."""
    model = copy.deepcopy(model)
    old = classifier(model)
    new = nn.Conv2d(old.in_channels, len(EXTRA) + 8, 1)
    with torch.no_grad():
        new.weight.copy_(torch.cat([torch.zeros(len(EXTRA), *old.weight.shape[1:]), old.weight]))
        new.bias.copy_(torch.cat([torch.full([len(EXTRA)], 1e4), old.bias]))
    model.decode_head.classifier = new
    rename(model, [*EXTRA, *tiny.ID2LABEL.values()])
    return model.eval()


def assert_same_scores(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first.keys() == second.keys() and first["mean_iou"] > 0
    assert sum(score > 0 for score in first["per_class_iou"]) > 1, "one class everywhere would prove little"
    for name, value in first.items():
        pairs = zip(value, second[name], strict=True) if isinstance(value, list) else [(value, second[name])]
        assert all(a == b or math.isnan(a) and math.isnan(b) for a, b in pairs), name


@pytest.mark.parametrize("build", [tiny.tiny_segformer, tiny_mask2former])
def test_permuted_classes_score_the_same(build, tmp_path: Path) -> None:
    data, model = tiny.scenes()["validation"], spread(build())
    config = tiny.config(tmp_path)
    assert_same_scores(evaluate_model(model, config, data), evaluate_model(permuted(model), config, data))


def test_more_classes_score_the_same(tmp_path: Path) -> None:
    data, model = tiny.scenes()["validation"], spread(tiny.tiny_segformer())
    config = tiny.config(tmp_path)
    assert_same_scores(evaluate_model(model, config, data), evaluate_model(superset(model), config, data))


def test_classes_that_stand_for_one_are_scored_together(tmp_path: Path) -> None:
    """Against the sum of probabilities, worked out here."""
    data = tiny.load_dense_dataset(
        "synthetic", size=(64, 64), num_classes=6, num_images={"train": 1, "validation": 3}
    )["validation"]
    model = spread(tiny.tiny_segformer())
    groups = {"sky": [0], "ground": [1, 2], "building": [3], "tree": [4], "pole": [5], "traffic": [6, 7]}
    assert list(groups) == list(data.id2label.values())
    synonyms = {"traffic": ["person", "vehicle"], "ground": ["road", "ground"]}
    scores = evaluate_model(model, tiny.config(tmp_path), data, synonyms)

    metrics = SemanticMetrics(6)
    adapter = BCDTrainer(model=model, args=tiny.config(tmp_path)).distiller.student.eval()
    for sample in data:
        pixels = torch.from_numpy(np.array(sample["image"])).movedim(-1, 0)[None]
        with torch.no_grad():
            probabilities = adapter(pixels).logits.softmax(1)
        merged = torch.stack([probabilities[:, group].sum(1) for group in groups.values()], 1).log()
        merged = nn.functional.interpolate(merged, sample["label"].shape, mode="bilinear", align_corners=False)
        metrics.update(merged.argmax(1), torch.as_tensor(sample["label"])[None].long())
    assert scores["mean_iou"] == pytest.approx(metrics.compute()["mean_iou"], abs=1e-3)
    assert scores["mean_iou"] > 0


def test_a_model_that_lacks_classes_has_no_score(tmp_path: Path) -> None:
    data, model = tiny.scenes()["validation"], superset(tiny.tiny_segformer())
    rename(model, [*EXTRA, *list(tiny.ID2LABEL.values())[:-2], "pedestrians", "cars"])
    assert adapt(model).match(data.id2label).missing == ["person", "vehicle"]
    with pytest.raises(ValueError, match="the model's 11 classes are not the 8 of synthetic: it has none for"):
        evaluate_model(model, tiny.config(tmp_path), data)
    evaluate_model(model, tiny.config(tmp_path), data, {"person": ["pedestrians"], "vehicle": ["cars"]})


def test_features_alone_are_distilled_where_classes_are_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = superset(tiny.tiny_segformer())
    rename(teacher, [*EXTRA, *list(tiny.ID2LABEL.values())[:-1], "lorry"])
    with caplog.at_level("INFO", "hf_bcd"):
        run = tiny.trainer(tmp_path, teacher=teacher, max_steps=2)
    assert "missing: vehicle. So features are distilled" in caplog.text
    assert run.teacher is not None and not run.teacher.shares_labels and run.teacher.num_labels == 11
    run.train()
    assert all(math.isfinite(value) for value in tiny.history(run, "bcd/boundary") + tiny.history(run, "bcd/context"))


def test_by_default_scores_are_compared_where_the_teacher_has_the_classes(tmp_path: Path) -> None:
    lacking = superset(tiny.tiny_segformer())
    rename(lacking, [*EXTRA, *list(tiny.ID2LABEL.values())[:-1], "lorry"])
    config = tiny.config(tmp_path / "store", losses={"bcd": {}}, crop_size=32)
    own, stages = adapt(tiny.tiny_segformer()), ["stage1", "stage2", "stage3", "stage4"]
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8] * 4, "depths": [1] * 4}
    make_store(tmp_path / "store", build_reinforcer(ModelArguments(), config, tiny.scenes(), teacher=own), 1)
    teachers: dict[str, Any] = {
        "same classes": tiny.tiny_segformer(seed=1),
        "a class less": lacking,
        "features only": ResNetBackbone(ResNetConfig(**sizes, layer_type="basic", out_features=stages)),
        "a store of bcd only": Store(tmp_path / "store"),
    }
    found = {}
    for name, teacher in teachers.items():
        run = tiny.trainer(tmp_path / "run", teacher=teacher, crop_size=32)
        found[name] = list(run.distiller.criterion.losses)
    assert found.pop("same classes") == ["cwd", "bcd"]
    assert set(map(tuple, found.values())) == {("bcd",)} and len(found) == 3


class ClassScores(BCDLoss):
    needs = frozenset({"logits"})


def test_losses_of_class_scores_are_refused_where_classes_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOSSES, "scores", ClassScores)
    teacher = superset(tiny.tiny_segformer())
    rename(teacher, [*EXTRA, *list(tiny.ID2LABEL.values())[:-1], "lorry"])
    losses = {"bcd": {}, "scores": {}}
    message = r"no class for vehicle, but the losses scores compare.*--label_synonyms.*features only: .*\bbcd\b"
    with pytest.raises(ValueError, match=message):
        tiny.trainer(tmp_path, teacher=teacher, losses=losses)
    teacher.save_pretrained(tmp_path / "teacher")
    arguments = ModelArguments(teacher=str(tmp_path / "teacher"))
    with pytest.raises(ValueError, match=message):  # before a baseline is trained
        prepare_teacher(arguments, tiny.config(tmp_path, losses=losses), tiny.scenes())
    (tmp_path / "synonyms.json").write_text('{"vehicle": ["lorry"]}')
    arguments.label_synonyms = str(tmp_path / "synonyms.json")
    found = prepare_teacher(arguments, tiny.config(tmp_path, losses=losses), tiny.scenes())
    run = BCDTrainer(
        model=tiny.tiny_timm(),
        teacher_model=found,
        args=tiny.config(tmp_path, losses=losses),
        train_dataset=tiny.scenes()["train"],
        label_synonyms=str(tmp_path / "synonyms.json"),
    )
    assert run.teacher is not None and run.teacher.shares_labels


def test_a_backbone_without_a_trained_head_is_no_teacher(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "decoder_hidden_size": 8}
    folder = str(tmp_path / "encoder")
    SegformerModel(SegformerConfig(**sizes, num_attention_heads=[1] * 4)).save_pretrained(folder)
    with pytest.raises(
        ValueError, match="encoder is no finished SegformerForSemanticSegmentation: it lacks .* such as decode_head"
    ):
        prepare_teacher(ModelArguments(teacher=folder), tiny.config(tmp_path), tiny.scenes())
    assert build_model(ModelSpec(name_or_path=folder), tiny.ID2LABEL).config.num_labels == len(tiny.ID2LABEL)


@pytest.mark.slow
def test_a_run_reports_a_teacher_with_other_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its scores, its pictures and the map stand beside the student's."""
    teacher = superset(tiny.tiny_segformer())
    rename(teacher, [*EXTRA, *list(tiny.ID2LABEL.values())[:-1], "lorry"])
    teacher.save_pretrained(tmp_path / "teacher")
    (tmp_path / "synonyms.json").write_text('{"vehicle": ["lorry", "stage"]}')
    pictures: list[Any] = []
    original = semantic_segmentation.comparison_figure
    monkeypatch.setattr(
        semantic_segmentation,
        "comparison_figure",
        lambda samples, *rest, **options: pictures.extend(samples) or original(samples, *rest, **options),
    )
    options = {
        "teacher": tmp_path / "teacher", "label_synonyms": tmp_path / "synonyms.json", "dataset_name": "synthetic",
        "student": "{backbone: resnet10t, options: {head_channels: 8}}", "output_dir": tmp_path / "run", "max_steps": 1,
        "dataset_options": "{size: [48, 64], num_images: {train: 4, validation: 2, test: 2}}",
        "losses": "{bcd: {teacher_head: logits}}",
    }  # fmt: skip
    with caplog.at_level(logging.INFO):
        distill.main(tiny.command_line(**options))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert 0 <= results["teacher"]["mean_iou"] <= 1 and len(results["teacher"]["per_class_iou"]) == 8
    found = json.loads((tmp_path / "run" / "label_map.json").read_text())
    assert found["matches"]["vehicle"] == {"teacher": ["lorry", "stage"], "by": "file"}
    assert found["missing"] == [] and found["unused"] == EXTRA[:2]
    assert caplog.text.count("vehicle <- lorry + stage (by file)") == 1
    assert pictures and all((sample["predictions"]["teacher"] == 7).all() for sample in pictures)  # "stage" wins
