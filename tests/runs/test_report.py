"""What a run leaves behind, from models that were really trained and scored."""

import json
import logging
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import tiny
from adapters.adapter_tiny_models import dpt, mask2former
from hub import card_rules
from huggingface_hub import ModelCard
from PIL import Image

from hf_bcd import BCDTrainer
from hf_bcd.adapters import adapt, build_adapter
from hf_bcd.adapters.loading import load_adapter
from hf_bcd.card import usage
from hf_bcd.card.model_card import METRICS
from hf_bcd.card.provenance import Origin, describe_schedule
from hf_bcd.runs import baseline, experiment
from hf_bcd.runs import report as reporting
from hf_bcd.runs.arguments import DataArguments, ModelArguments


PRIVATE, TOKEN = "private-marker-folder", "hf_" + "MarkerOfAToken" * 2


def finished_run(folder: Path, teacher: bool = True, **changes):
    """A student after a step of training, saved and scored beside its teacher and its baseline."""
    data = tiny.scenes(validation=5)
    run = tiny.trainer(
        folder, data=data, max_steps=1, hub_token=TOKEN, **({} if teacher else {"teacher": None}), **changes
    )
    run.train()
    run.save_model(str(folder), _internal_call=True)
    models = {"student": load_adapter(str(folder))}
    if teacher:
        models = {
            "teacher": adapt(tiny.tiny_timm((8, 16, 16, 32), seed=1)),
            "baseline": adapt(tiny.tiny_timm(seed=2)),
            **models,
        }
    scores = {name: experiment.evaluate_model(model, run.args, data["validation"]) for name, model in models.items()}
    return run, models, scores, data


def origin_of(folder: Path) -> Origin:
    arguments = (
        "--output_dir",
        str(folder),
        "--data_dir",
        str(folder / "data"),
        "--hub_token",
        TOKEN,
        "--max_steps",
        "1",
    )
    student = {"backbone": "resnet10t", "head": "fpn"}
    return Origin(
        "hf-bcd distill", arguments, ModelArguments(student=student), DataArguments(dataset_name="synthetic")
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(PRIVATE) / "my-student"
    run, models, scores, data = finished_run(folder)
    reporting.write_report(run, models, scores, data, "validation", origin_of(folder))
    assert run.has_card
    return folder


@pytest.fixture(scope="module")
def card(report: Path) -> str:
    return (report / "README.md").read_text()


def test_the_metadata_repeats_what_was_measured(report: Path, card: str) -> None:
    assert card_rules.check(card) == ([], [])
    metadata, results = ModelCard(card).data, json.loads((report / "results.json").read_text())
    assert (metadata.library_name, metadata.pipeline_tag) == ("transformers", "image-segmentation")
    assert {"knowledge-distillation", "semantic-segmentation", "hf_bcd", "bcd"} <= set(metadata.tags)
    assert metadata.base_model is None and metadata.datasets is None and metadata.license is None
    assert metadata.eval_results is not None
    values = {result.metric_type: result.metric_value for result in metadata.eval_results}
    assert values.keys() <= {*METRICS, "fragments"} and {"mean_iou", "boundary_iou", "completeness"} <= values.keys()
    for name, value in values.items():
        factor = 1 if name == "fragments" else 100
        assert value == pytest.approx(factor * results["student"][name], abs=1e-3), name
    for result in metadata.eval_results:
        assert (result.dataset_name, result.dataset_split) == ("synthetic", "validation")
        assert result.dataset_args["num_images"] == 5 and "cost" not in result.dataset_args
        assert result.metric_name.endswith("(%)") or result.metric_type == "fragments"


def test_results_have_the_promised_names_and_the_cost_of_each_model(report: Path) -> None:
    results = json.loads((report / "results.json").read_text())
    assert results.keys() == {"teacher", "baseline", "student", "protocol"}
    protocol = results["protocol"]
    assert protocol["num_images"] == 5 and protocol["num_labels"] == 8 and protocol["device"]["threads"] >= 1
    assert protocol["cost"].keys() == {"teacher", "baseline", "student"}
    for name, cost in protocol["cost"].items():
        assert cost["size"] == [48, 64] and cost["latency_ms"] > 0, name
    assert protocol["cost"]["baseline"]["macs"] == protocol["cost"]["student"]["macs"]
    assert protocol["cost"]["teacher"]["parameters"] > protocol["cost"]["student"]["parameters"]


def test_every_number_of_the_headline_table_was_measured(report: Path, card: str) -> None:
    results = json.loads((report / "results.json").read_text())
    rows = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| ")]
    table = {row[0]: row[1:] for row in rows if len(row) == 4}
    assert table["mIoU (%)"] == [
        f"{100 * results[name]['mean_iou']:.2f}" for name in ("teacher", "baseline", "student")
    ]
    costs = [results["protocol"]["cost"][name] for name in ("teacher", "baseline", "student")]
    for title, key, unit in (
        ("parameters (M)", "parameters", 1e6),
        ("GMACs", "macs", 1e9),
        ("weights (MB)", "weight_bytes", 1e6),
    ):
        assert [float(cell) for cell in table[title]] == pytest.approx([cost[key] / unit for cost in costs], rel=6e-3)
    per_class = results["student"]["per_class_iou"]
    for index, name in tiny.ID2LABEL.items():
        assert table[name][2] == f"{100 * per_class[index]:.2f}"


def test_nothing_is_missing_private_or_made_up(report: Path, card: str) -> None:
    for text in (card, (report / "results.json").read_text()):
        assert PRIVATE not in text and TOKEN not in text and "hf_Marker" not in text
        assert str(Path.home()) + "/" not in text and "/tmp" not in text
    body = ModelCard(card).text
    assert not re.search(r"\b(nan|None|n/a|inf|TODO|Undefined)\b", body)
    for section in ("Results", "Use", "How it was distilled", "Data", "Licence", "Limits", "Reproduce", "Citation"):
        assert f"\n## {section}\n" in body
    assert "hf-bcd distill --output_dir my-student --data_dir path/to/data_dir --max_steps 1\n" in body
    assert "zhang2024bcd" in body and "random weights" in body
    assert "person" in tiny.ID2LABEL.values() and "identify persons" not in body, "drawn people have no privacy"


def test_every_picture_is_in_the_repository(report: Path, card: str) -> None:
    shown = re.findall(r"!\[[^]]*\]\(([^)]*)\)", card)
    assert shown[0] == "figures/comparison.png" and len(shown) == 3
    for path in shown:
        with Image.open(report / path) as picture:
            assert min(picture.size) > 100


def test_the_code_of_the_card_prints_what_the_card_says(report: Path, card: str, tmp_path: Path) -> None:
    snippets = re.findall(r"```python\n(.*?)```", card, re.S)
    assert len(snippets) == 2
    tiny.scenes(validation=5)["validation"][0]["image"].save(tmp_path / "picture.png")
    for snippet in snippets:
        code = snippet.replace('"my-student"', repr(str(report))).replace(
            '"picture.jpg"', repr(str(tmp_path / "picture.png"))
        )
        assert code.count(str(report)) >= 1 and str(tmp_path) in code
        printed = StringIO()
        with redirect_stdout(printed):
            exec(code, {})
        promised = re.findall(r"^# (.*)$", snippet, re.M)
        assert promised and promised == printed.getvalue().splitlines()
    assert re.search(r"# \w+ \d+\.\d%", snippets[0])


def test_a_card_whose_code_does_not_run_is_written_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, models, scores, data = finished_run(tmp_path / "student", teacher=False)
    monkeypatch.setattr(usage, "TENSORS", usage.TENSORS + "raise RuntimeError('no such luck')\n")
    with caplog.at_level(logging.WARNING, "hf_bcd"):
        reporting.write_report(run, models, scores, data, "validation")
    assert "example of use did not run (RuntimeError: no such luck)" in caplog.text
    card = (tmp_path / "student" / "README.md").read_text()
    assert 'pipeline("image-segmentation", model="student"' in card
    assert "\n# " not in "".join(re.findall(r"```python\n(.*?)```", card, re.S)) and "This code ran" not in card


def test_a_universal_model_is_asked_for_classes_and_not_for_panoptic_segments(tmp_path: Path) -> None:
    run = BCDTrainer(model=mask2former(), args=tiny.config(tmp_path))
    run.save_model(str(tmp_path))
    snippets = usage.usage_snippets(tmp_path, "me/student", tiny.scenes()["validation"])
    assert len(snippets) == 1 and 'segment("picture.jpg", subtask="semantic")' in snippets[0]
    (covered,) = [re.findall(r"^# .* (\d+\.\d)%$", snippets[0], re.M)]
    assert sum(map(float, covered)) == pytest.approx(100, abs=1)
    assert reporting.loading_lines(str(tmp_path)).endswith('("picture.jpg", subtask="semantic")')


def test_how_images_were_shown_in_words(tmp_path: Path) -> None:
    data = tiny.scenes()["validation"]

    def words(model, image_size: int | None) -> str:
        config = tiny.config(tmp_path, image_size=image_size)
        return reporting.protocol(data, build_adapter(model), config, {"classes_averaged": 8})["input"]

    assert words(tiny.tiny_segformer(), None) == "original size"
    assert words(tiny.tiny_segformer(), 40) == "short side resized to 40, aspect ratio kept"
    assert words(dpt(), 64) == "resized to 64 x 64 (width x height), whatever its aspect ratio"


def test_the_schedule_in_words(tmp_path: Path) -> None:
    options = {"teacher": None, "max_steps": 2, "max_grad_norm": 0.5, "warmup_steps": 1, "image_size": 40}
    run = tiny.trainer(tmp_path, optim="adamw_torch", learning_rate=1e-3, **options)
    run.train()
    words = describe_schedule(run)
    assert words["optimizer"] == "adamw_torch (betas (0.9, 0.999), eps 1e-08)"  # and not SGD's momentum
    assert words["learning rate"] == "0.001, polynomial schedule after 1 step of warm-up"
    assert words["gradient clipping"] == "norm 0.5"
    assert words["augmentation"].startswith("short side to 40, then scale 0.5 to 2")


def test_a_model_trained_alone_is_not_called_distilled(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, models, scores, data = finished_run(tmp_path / "alone", teacher=False)
    with caplog.at_level(logging.WARNING, "hf_bcd"):
        reporting.write_report(run, models, scores, data, "validation")
    assert "did not run" not in caplog.text
    card = (tmp_path / "alone" / "README.md").read_text()
    assert "istill" not in ModelCard(card).text and "teacher" not in ModelCard(card).text
    assert "knowledge-distillation" not in ModelCard(card).data.tags
    assert "| model |" in card and "This code ran" in card


def test_without_evaluation_data_the_card_has_no_numbers(tmp_path: Path) -> None:
    run, models, _, data = finished_run(tmp_path / "student")
    reporting.write_report(run, models, {}, data, None)
    card = (tmp_path / "student" / "README.md").read_text()
    assert card_rules.check(card) == ([], [])
    assert "model-index" not in card and "## Results" not in card and "mIoU" not in card
    assert json.loads((tmp_path / "student" / "results.json").read_text()) == {}


def test_the_comparison_shows_teacher_baseline_and_student_in_this_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, models, _, data = finished_run(tmp_path / "student")
    drawn: dict = {}
    monkeypatch.setattr(
        reporting, "comparison_figure", lambda samples, *_, **more: drawn.update(samples=samples, **more)
    )
    reporting.write_figures(run, models, data["validation"], tmp_path / "figures")
    assert [list(sample["predictions"]) for sample in drawn["samples"]] == 4 * [["teacher", "baseline", "distilled"]]
    assert drawn["errors"] == ["distilled"]


def test_a_run_without_bcd_has_no_pictures_of_what_bcd_compares(tmp_path: Path) -> None:
    run, models, scores, data = finished_run(tmp_path / "student", losses={"cwd": {}})
    reporting.write_report(run, models, scores, data, "validation")
    assert [path.name for path in (tmp_path / "student" / "figures").iterdir()] == ["comparison.png"]
    card = (tmp_path / "student" / "README.md").read_text()
    assert card_rules.check(card) == ([], [])
    assert re.findall(r"!\[[^]]*\]\(([^)]*)\)", card) == ["figures/comparison.png"]
    assert "shu2021channel" in card and "zhang2024bcd" not in card


# ---- A finished student to compare with ------------------------------------------------------------------------------


def test_a_finished_baseline_is_loaded(tmp_path: Path) -> None:
    model = tiny.tiny_timm(seed=3)
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\ntags:\n- hf_bcd\n---\n")
    loaded = baseline.load_baseline(ModelArguments(teacher="me/t", baseline=str(tmp_path)), tiny.scenes())
    assert loaded is not None
    assert all((value == loaded.state_dict()[name]).all() for name, value in model.state_dict().items())
    assert baseline.load_baseline(ModelArguments(), tiny.scenes()) is None


def test_a_baseline_of_other_classes_is_refused(tmp_path: Path) -> None:
    model = tiny.tiny_timm()
    model.config.id2label = {**tiny.ID2LABEL, 0: "ground", 1: "sky"}
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"predicts 8 classes \(ground, sky, .*synthetic has 8 \(sky, ground"):
        baseline.load_baseline(ModelArguments(teacher="me/t", baseline=str(tmp_path)), tiny.scenes())


def test_a_baseline_that_was_distilled_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\ntags:\n- knowledge-distillation\n---\n")
    with pytest.raises(ValueError, match="was distilled itself"):
        baseline.load_baseline(ModelArguments(teacher="me/t", baseline=str(tmp_path)), tiny.scenes())


def test_a_baseline_on_the_hub_that_was_distilled_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text("---\ntags:\n- knowledge-distillation\n---\n")
    monkeypatch.setattr(baseline, "cached_file", lambda name, file: str(tmp_path / file) if name == "me/x" else None)
    with pytest.raises(ValueError, match="--baseline me/x was distilled itself"):
        baseline.load_baseline(ModelArguments(teacher="me/t", baseline="me/x"), tiny.scenes())


@pytest.mark.parametrize("options", [{"baseline": "runs/y"}, {"with_baseline": True}])
def test_without_a_teacher_there_is_nothing_to_compare(options: dict) -> None:
    with pytest.raises(ValueError, match="name a --teacher too, or leave --baseline out"):
        baseline.load_baseline(ModelArguments(**options), tiny.scenes())


def test_a_finished_and_a_new_baseline_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="--baseline runs/y and --with_baseline exclude each other"):
        baseline.load_baseline(ModelArguments(teacher="me/t", baseline="runs/y", with_baseline=True), tiny.scenes())
