"""The card's words and metadata, from records that the tests state."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from hub import card_rules
from huggingface_hub import ModelCard

from hf_bcd.card.model_card import three_digits, write_card
from hf_bcd.card.record import RANDOM, DataRecord, ModelRecord, RunRecord


HOSTILE = dict(
    enumerate(
        [
            "a|b`c`",
            "<script>alert(1)</script>",
            "one\n---\n# two",
            '\'"q": {yaml: [1',
            "[l](http://evil.example)",
            "{{ 7 * 7 }}{% raw %}",
            "```` \u2028 </details>",
            "!!python/object/apply:os.system [ls]",
        ]
    )
)
PROTOCOL = {
    "dataset": "d", "split": "test", "num_images": 2, "num_labels": 8, "classes_averaged": 8, "input": "original size",
    "label_rule": "ids", "inference": "Whole image.", "logits": "Up-sampled.", "boundary_f@d": "F.",
    "boundary_iou": "2 %.", "connectivity": "8-connected.", "ignore_index": 255,
}  # fmt: skip
DATA = DataRecord("d", None, None, None, None, {"train": 8, "validation": None}, "the stored ids are the class ids")
COST = {
    "parameters": 2_000_000, "macs": 10**9, "latency_ms": 1.5, "weight_bytes": 8_000_000, "size": [64, 64],
    "batch_size": 1, "dtype": "float32", "repeats": 9,
}  # fmt: skip


def scores(mean_iou: float, **more: object) -> dict[str, Any]:
    return {"mean_iou": mean_iou, "overall_accuracy": 0.5, "per_class_iou": [mean_iou] * 8, **more}


def record(**changes: Any) -> RunRecord:
    """A distilled student that nobody has scored."""
    models = {"teacher": ModelRecord("Big"), "student": ModelRecord("Small")}
    return RunRecord(**{"repository": "me/x", "task": "semantic-segmentation", "id2label": tiny.ID2LABEL, "models": models, "data": DATA} | changes)  # fmt: skip


def scored(**values: dict[str, Any]) -> RunRecord:
    models = {name: ModelRecord(name) for name in ("teacher", *values)}
    return record(models=models, results={**values, "protocol": PROTOCOL})


def card(run: RunRecord, folder: Path) -> str:
    """README.md of the record, which the Hub must accept."""
    write_card(folder, run)
    text = (folder / "README.md").read_text()
    assert card_rules.check(text) == ([], [])
    return text


def test_what_was_warned_of_before_training_stands_in_the_card(tmp_path: Path) -> None:
    text = card(record(data=DATA._replace(notes=["the 16 masks show no 'pole'"])), tmp_path)
    assert "- warned of before training: the 16 masks show no 'pole'" in text


# ---- Scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("teacher", "baseline", "student", "words"),
    [
        (0.8, 0.6, 0.65, "raised mIoU by 5.00 points** (60.00 to 65.00). That closes 25 % of the gap of 20.00 points"),
        (0.8, 0.6, 0.85, "closes 125 % of the gap"),
        (0.8, 0.65, 0.646, "**Distillation lowered mIoU by 0.40 points in this run** (65.00 to 64.60)."),
        (0.8, 0.65, 0.65, "left mIoU unchanged in this run"),
        (0.5, 0.6, 0.65, "The teacher itself is no better than the undistilled student here."),
        (None, 0.6, 0.65, "raised mIoU by 5.00 points** (60.00 to 65.00). This is one run"),
        (0.8, None, 0.65, "does not tell what distillation added"),
    ],
)
def test_verdict(teacher: float | None, baseline: float | None, student: float, words: str, tmp_path: Path) -> None:
    values = {"teacher": teacher, "baseline": baseline, "student": student}
    text = card(scored(**{name: scores(value) for name, value in values.items() if value is not None}), tmp_path)
    assert words in text
    assert ("closes" in text) == (teacher is not None and baseline is not None and student > baseline < teacher)


@pytest.mark.parametrize(
    ("baseline", "words"),
    [
        (ModelRecord("b", trained_here=True), "trained without the teacher on the same images"),
        (ModelRecord("b", trained_here=False), "a finished one; its training is not known"),
        (
            ModelRecord("b", "me/plain", trained_here=False),
            "[me/plain](https://huggingface.co/me/plain); its training",
        ),
        (ModelRecord("b"), None),
    ],
)
def test_the_making_of_the_baseline(baseline: ModelRecord, words: str | None, tmp_path: Path) -> None:
    run = scored(teacher=scores(0.8), baseline=scores(0.6), student=scores(0.7))
    text = card(replace(run, models={**run.models, "baseline": baseline}), tmp_path)
    assert words in text if words else "undistilled student is" not in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.00196, "0.00196"), (3.746, "3.75"), (64.1, "64.1"), (1234.5, "1234"), (0.0, "0"), (9.999, "10.00")],
)
def test_three_digits(value: float, text: str) -> None:
    assert three_digits(value) == text


def test_classes_that_do_not_occur_are_left_out(tmp_path: Path) -> None:
    iou = [0.5, math.nan, 0.1, 0.3, 0.2, 0.4, 0.6, 0.7]
    teacher = scores(0.9, per_class_iou=[0.9] + 7 * [math.nan])
    text = card(scored(teacher=teacher, student=scores(0.4, per_class_iou=iou)), tmp_path)
    assert "\n| sky | 90.00 | 50.00 |\n| road |  | 10.00 |\n| building |" in text
    assert "\n1 of the 8 classes occur neither" in text
    assert "**The 5 worst classes** (IoU of the student, %): road 10.00, tree 20.00, building 30.00," in text
    few = card(scored(student=scores(0.4, per_class_iou=iou[:5] + 3 * [math.nan])), tmp_path)
    assert "worst classes" not in few


def test_the_table_leaves_out_what_nobody_measured(tmp_path: Path) -> None:
    run = scored(teacher=scores(0.5), student={"per_class_iou": [math.nan] * 8, "connectivity": math.nan})
    protocol = {**PROTOCOL, "cost": {"student": COST}, "device": {"name": "a | device", "threads": 1}}
    text = card(replace(run, results={**run.results, "protocol": protocol}), tmp_path)
    assert "| GMACs |  | 1.00 |" in text and "| mIoU (%) | 50.00 |  |" in text and "| connectivity" not in text
    assert "on a \\| device, 1 thread. Latency is the median of 9 passes" in text
    protocol["cost"]["teacher"] = {**COST, "size": [512, 512]}
    text = card(replace(run, results={**run.results, "protocol": protocol}), tmp_path)
    assert "| latency (ms) | 1.50 (512 x 512) | 1.50 (64 x 64) |" in text and "| weights (MB) | 8.00 | 8.00 |" in text


# ---- Metadata --------------------------------------------------------------------------------------------------------


def test_metadata_of_a_student_from_the_hub(tmp_path: Path) -> None:
    models = {
        "teacher": ModelRecord("T", "nvidia/segformer-b4", "0123456789abcdef", "nvidia/segformer-b4"),
        "student": ModelRecord("S", start="nvidia/mit-b0"),
    }
    data = DATA._replace(repository="me/data", revision="abc")
    results = {"student": scores(0.51234567, fragments=1.5), "protocol": PROTOCOL}
    text = card(record(models=models, data=data, results=results), tmp_path)
    metadata = ModelCard(text).data.to_dict()
    assert metadata["base_model"] == "nvidia/mit-b0" and metadata["base_model_relation"] == "finetune"
    assert metadata["datasets"] == ["me/data"]
    assert {"teacher:nvidia/segformer-b4", "knowledge-distillation", "semantic-segmentation"} <= {*metadata["tags"]}
    (result,) = metadata["model-index"][0]["results"]
    assert result["dataset"]["type"] == "me/data" and result["dataset"]["revision"] == "abc"
    assert result["dataset"]["args"]["num_images"] == 2
    found = {m["type"]: (m["value"], m["name"]) for m in result["metrics"]}
    assert found["mean_iou"] == (51.235, "mIoU (%)") and found["fragments"] == (1.5, "fragments")
    # its terms forbid commercial use
    assert metadata["license"] == "other" and metadata["license_name"].startswith("NVIDIA Source Code License")
    assert metadata["license_link"] == "https://github.com/NVlabs/SegFormer/blob/master/LICENSE"
    assert "> [!WARNING]\n> **Not for commercial use.** [nvidia/mit-b0]" in text
    assert (
        "distilled from a teacher ([nvidia/segformer-b4](https://huggingface.co/nvidia/segformer-b4) @ 0123456789ab)"
        in text
    )
    assert "- student: S, from [nvidia/mit-b0](https://huggingface.co/nvidia/mit-b0)\n" in text
    assert "[me/data](https://huggingface.co/datasets/me/data) @ abc\n" in text


@pytest.mark.parametrize(
    ("student", "teacher", "licence", "words"),
    [
        ({"start": "timm/resnet18.a1_in1k"}, {"start_words": RANDOM}, "apache-2.0", "these weights: apache-2.0"),
        ({"start": "timm/resnet18.a1_in1k"}, {}, "apache-2.0", "from [timm/resnet18"),
        ({"start": "timm/resnet18.a1_in1k"}, {"start_words": "local weights"}, None, "no licence has been chosen"),
        ({"start_words": RANDOM}, {"start": "someone/teacher"}, None, "someone/teacher): unknown: read its card"),
        ({}, {"start": "timm/convnextv2_atto.fcmae_ft_in1k", "trained_here": True}, "other",
         "trained first on the same images from [timm/convnextv2\\_atto"),
    ],
)  # fmt: skip
def test_a_licence_follows_from_those_that_are_known(
    student: dict, teacher: dict, licence: str | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    models = {"teacher": ModelRecord("T", **teacher), "student": ModelRecord("S", **student)}
    text = card(record(models=models), tmp_path)
    assert ModelCard(text).data.license == licence and words in text
    assert ("[!WARNING]" in text) == (licence == "other")
    assert ModelCard(text).data.base_model == student.get("start")


# ---- Sections --------------------------------------------------------------------------------------------------------


def test_without_scores_and_teacher_nothing_is_said_of_them(tmp_path: Path) -> None:
    text = card(record(models={"student": ModelRecord("S")}), tmp_path)
    body = ModelCard(text).text
    assert "istill" not in body and "teacher" not in body and "knowledge-distillation" not in text
    assert (
        "## Results" not in body and "mIoU" not in body and "numbers above" not in body and "model-index" not in text
    )
    assert "Citation" not in body and "recipe" not in body and "- loss: supervised loss\n" in body
    assert "- images: train: 8, validation: streamed\n" in body
    assert "\n# x\n" in body


def test_the_card_of_unknown_data_says_so(tmp_path: Path) -> None:
    body = ModelCard(card(record(data=None), tmp_path)).text
    assert "on images that this card knows nothing about. It predicts one of 8 classes for each pixel." in body
    assert "Their origin and their terms are not known here." in body


def test_the_card_speaks_of_a_method_only_where_it_was_used(tmp_path: Path) -> None:
    cwd = {
        "source": "https://arxiv.org/abs/2011.13256",
        "citation": "@a{cwd}",
        "options": {"level": "x_y"},
        "temperatures": {"": 1.5},
    }
    kd = {"source": "https://doi.org/10.1/x", "citation": "@a{cwd}", "options": {}, "temperatures": {}}
    text = card(
        record(
            weights={"cwd/cwd": 5.0, "kd/kd": 1}, methods={"cwd": cwd, "kd": kd}, figures=["figures/comparison.png"]
        ),
        tmp_path,
    )
    assert "- loss: supervised loss + 5 · cwd/cwd + 1 · kd/kd\n" in text and "r(t)" not in text and "BCD" not in text
    assert "- method of cwd: [arXiv:2011.13256](https://huggingface.co/papers/2011.13256)\n" in text
    assert "- method of kd: [doi.org/10.1/x](https://doi.org/10.1/x)\n" in text
    assert "- options of cwd: level = x\\_y\n" in text and "- temperatures of cwd at the end:  1.5\n" in text
    assert text.count("@a{cwd}") == 1 and "![Predictions](figures/comparison.png)" in text
    assert {"cwd", "kd"} <= {*ModelCard(text).data.tags}
    bcd = card(record(decays=["bcd"], figures=["figures/boundaries.png", "figures/relations.png"]), tmp_path)
    assert "the terms of bcd are multiplied by r(t)" in bcd
    assert "BCD's boundary loss sees them" in bcd and "BCD's context loss sees them" in bcd


@pytest.mark.parametrize(("name", "warned"), [("camvid", True), ("synthetic", False)])
def test_photographs_of_people(name: str, warned: bool, tmp_path: Path) -> None:
    data = DATA._replace(name=name, page="https://a.example/x", licence="CC BY-NC 4.0")
    text = card(record(data=data, id2label={0: "Sky", 1: "Pedestrian"}), tmp_path)
    assert ("identify persons" in text) == warned
    assert f"- data set: [{name}](https://a.example/x)\n" in text and "- terms of the data: CC BY-NC 4.0\n" in text


# ---- Values that are not ours ----------------------------------------------------------------------------------------


def hostile() -> RunRecord:
    """A run whose name, data set, models and classes have names that mean something in YAML, Markdown and HTML."""
    wicked = "x\n---\nlicense: mit\r\n\u2028--- \x00"
    name = "data\n---\n<i>|`"
    return record(
        repository=f"me/run `|<b>\n---\nx: [{wicked}",
        id2label=HOSTILE,
        models={role: ModelRecord(f"{wicked}|<b>", start_words=RANDOM, levels={"a|<b>": 1}) for role in ("teacher", "student")},
        data=DATA._replace(name=name, images={"a\n# b": 1}, label_rule="<u>", page=wicked, licence="*|\n# x"),
        results={
            "teacher": scores(0.6),
            "student": scores(0.5),
            "protocol": {**PROTOCOL, "dataset": name, wicked: wicked, "split": wicked, "label_rule": wicked},
        },
        weights={"<i>|": 1.0},
        methods={"`m`": {"source": "x](javascript:x)", "citation": "```\n# y", "options": {"<b>": "|"}, "temperatures": {}}},
        classes="<s>",
        schedule={"optimizer": "<a>|"},
        recipe="run_name: '```` </details>'",
        hardware="<b>\n# z",
    )  # fmt: skip


def test_hostile_values_stay_values(tmp_path: Path) -> None:
    text = card(hostile(), tmp_path)
    metadata = ModelCard(text).data
    assert metadata.license is None and metadata.model_name.startswith("run `|<b> --- x: [x --- license: mit")
    assert metadata.eval_results[0].dataset_name == "data --- <i>|`"
    body = ModelCard(text).text
    assert "49" not in re.findall(r"index</summary>(.*?)</details>", body, re.S)[0]
    outside = re.sub(r"(?ms)^(`{3,})\w*\n.*?^\1$", "", body)
    assert set(re.findall(r"<[^>]*>", outside)) == {"<details>", "</details>", "<summary>", "</summary>"}
    assert outside.count("<details>") == outside.count("</details>") == 2
    assert not re.search(r"(?m)^(---|# two|x: \[)", outside) and "http://evil" not in outside
    for line in outside.splitlines():
        if line.startswith("| "):
            assert len(re.findall(r"(?<!\\)\|", line)) == 4, line


def test_hostile_cards_render_as_one_document(tmp_path: Path) -> None:
    markdown_it = pytest.importorskip("markdown_it")
    parser = markdown_it.MarkdownIt("commonmark").enable("table")
    tokens = parser.parse(ModelCard(card(hostile(), tmp_path)).text)
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert headings[1:] == [
        "Results", "Use", "How it was distilled", "Data", "Licence", "Limits", "Reproduce", "Citation",
    ]  # fmt: skip
    inline = [child for token in tokens for child in token.children or []]
    assert {child.type for child in inline} <= {
        "text", "text_special", "softbreak", "strong_open", "strong_close", "em_open", "em_close", "code_inline",
        "html_inline",
    }  # fmt: skip


# ---- Several teachers ----------------------------------------------------------------------------------------------


def of_two(**results: Any) -> RunRecord:
    models = {
        "teacher": ModelRecord("Seg", "nvidia/mit-b5", "abc", "nvidia/mit-b5", name="mit-b5", levels={"stride_4": 8}),
        "teacher_2": ModelRecord("Dino", "timm/vit_base_patch14_dinov2.lvd142m", None, "timm/vit_base_patch14_dinov2.lvd142m", name="dino"),
        "baseline": ModelRecord("Small", trained_here=True),
        "student": ModelRecord("Small"),
    }  # fmt: skip
    method = {"source": "https://arxiv.org/abs/2011.13256", "citation": "@x", "options": {}, "temperatures": {}}
    return record(
        models=models, weights={"mit-b5/cwd/cwd": 3.0, "dino/pkd/pkd": 1.0}, results=results, classes="dino: has none",
        methods={"mit-b5/cwd": method, "dino/pkd": method},
    )  # fmt: skip


def test_the_card_of_two_teachers_names_both(tmp_path: Path) -> None:
    text = card(of_two(), tmp_path)
    metadata = ModelCard(text).data
    link = "https://huggingface.co/"
    timm = "timm/vit\\_base\\_patch14\\_dinov2.lvd142m"
    assert f"distilled from the teachers [nvidia/mit-b5]({link}nvidia/mit-b5) @ abc and [{timm}]" in text
    assert f"- teacher 1, mit-b5 in the names of its losses: [nvidia/mit-b5]({link}nvidia/mit-b5) @ abc" in text
    assert f"- teacher 2, dino in the names of its losses: [{timm}]" in text
    assert "supervised loss + 3 · mit-b5/cwd/cwd + 1 · dino/pkd/pkd" in text
    assert "- method of mit-b5/cwd: " in text and "- method of dino/pkd: " in text
    assert "- feature levels of teacher 1: stride\\_4 (8 channels)" in text and "of the student: " in text
    assert "It learned from its teachers' outputs and inherits their mistakes." in text
    for tag in ("teacher:nvidia/mit-b5", "teacher:timm/vit_base_patch14_dinov2.lvd142m", "cwd", "pkd"):
        assert tag in metadata.tags
    assert "mit-b5/cwd" not in metadata.tags
    # the stricter of the two licences, with its reason
    assert metadata.license_name.startswith("NVIDIA Source Code License") and "**Not for commercial use.**" in text
    assert f"- [{timm}]" in text.split("## Licence")[1]


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (0.7, 0.8, "of the gap of 20.00 points to teacher 2, the best one with scores."),
        (0.7, None, "That closes 50 % of the gap of 10.00 points to teacher 1, the best one with scores."),
        (0.5, 0.55, "Teacher 2, the best one with scores, is no better than the undistilled student here."),
        (None, None, "(60.00 to 65.00). The undistilled student is the same model, trained without the teachers on"),
    ],
)
def test_scores_of_two_teachers_have_columns_and_a_verdict(
    first: float | None, second: float | None, words: str, tmp_path: Path
) -> None:
    given = {"teacher": first, "teacher_2": second, "baseline": 0.6, "student": 0.65}
    results = {role: scores(value) for role, value in given.items() if value is not None}
    text = card(of_two(**results, protocol=PROTOCOL), tmp_path)
    assert words in text
    shown = [f"teacher {number}" for number, value in ((1, first), (2, second)) if value is not None]
    assert f"|  | {' | '.join([*shown, 'student, not distilled', 'student, distilled'])} |" in text
