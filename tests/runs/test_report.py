"""What a run leaves behind, from models that were really trained and scored."""

import json
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
from hf_bcd.runs import experiment
from hf_bcd.runs import report as reporting
from hf_bcd.tasks.semantic_segmentation import SemanticSegmentation


PRIVATE, TOKEN = "private-marker-folder", "hf_" + "MarkerOfAToken" * 2


def finished_run(folder: Path, roles: tuple[str, ...] = ("teacher", "baseline", "student"), **changes):
    """A student after a step of training, saved and scored beside its teacher and its baseline."""
    data = tiny.scenes(validation=5)
    options = {} if "teacher" in roles else {"teacher": None}
    run = tiny.trainer(folder, data=data, max_steps=1, hub_token=TOKEN, **options, **changes)
    run.train()
    run.save_model(str(folder), _internal_call=True)
    models = {
        "teacher": adapt(tiny.tiny_timm((8, 16, 16, 32), seed=1)),
        "baseline": adapt(tiny.tiny_timm(seed=2)),
        "student": load_adapter(str(folder)),
    }
    models = {role: models[role] for role in roles}
    scores = {name: experiment.evaluate_model(model, run.args, data["validation"]) for name, model in models.items()}
    return run, models, scores, data


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(PRIVATE) / "my-student"
    recipe = {
        "output_dir": str(folder), "data_dir": str(folder / "data"), "hub_token": TOKEN, "max_steps": 1,
        "student": {"backbone": "resnet10t", "head": "fpn"}, "dataset_name": "synthetic",
    }  # fmt: skip
    run, models, scores, data = finished_run(folder)
    reporting.write_report(run, models, scores, data, "validation", recipe)
    assert run.has_card
    return folder


@pytest.fixture(scope="module")
def card(report: Path) -> str:
    return (report / "README.md").read_text()


@pytest.mark.slow
def test_the_metadata_repeats_what_was_measured(report: Path, card: str) -> None:
    assert card_rules.check(card) == ([], [])
    metadata, results = ModelCard(card).data, json.loads((report / "results.json").read_text())
    assert (metadata.library_name, metadata.pipeline_tag) == ("transformers", "image-segmentation")
    assert {"knowledge-distillation", "semantic-segmentation", "hf_bcd", "bcd"} <= set(metadata.tags)
    assert metadata.base_model is None and metadata.datasets is None and metadata.license is None
    assert metadata.eval_results is not None
    values = {result.metric_type: result.metric_value for result in metadata.eval_results}
    assert {"mean_iou", "boundary_iou", "completeness"} <= values.keys()
    for score in SemanticSegmentation.scores:
        assert values[score.key] == pytest.approx(score.scale * results["student"][score.key], abs=1e-3), score
    for result in metadata.eval_results:
        assert (result.dataset_name, result.dataset_split) == ("synthetic", "validation")
        assert result.dataset_args == {"num_images": 5, "num_labels": 8, "classes_averaged": 8}
        assert result.metric_name.endswith("(%)") or result.metric_type == "fragments"


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_nothing_is_missing_private_or_made_up(report: Path, card: str) -> None:
    for text in (card, (report / "results.json").read_text()):
        assert PRIVATE not in text and TOKEN not in text and "hf_Marker" not in text
        assert str(Path.home()) + "/" not in text and "/tmp" not in text
    body = ModelCard(card).text
    assert not re.search(r"\b(nan|None|n/a|inf|TODO|Undefined)\b", body)
    for section in ("Results", "Use", "How it was distilled", "Data", "Licence", "Limits", "Reproduce", "Citation"):
        assert f"\n## {section}\n" in body
    assert "\ndata_dir: path/to/data_dir\nmax_steps: 1\nstudent:\n" in body
    assert "zhang2024bcd" in body and "random weights" in body
    assert "person" in tiny.ID2LABEL.values() and "identify persons" not in body, "drawn people have no privacy"


@pytest.mark.slow
def test_every_picture_is_in_the_repository(report: Path, card: str) -> None:
    shown = re.findall(r"!\[[^]]*\]\(([^)]*)\)", card)
    assert shown[0] == "figures/comparison.png" and len(shown) == 3
    for path in shown:
        with Image.open(report / path) as picture:
            assert min(picture.size) > 100


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_model_trained_alone_is_not_called_distilled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, models, scores, data = finished_run(tmp_path / "alone", ("student",))

    def card(scores: dict, split: str | None) -> str:
        reporting.write_report(run, models, scores, data, split)
        text = (tmp_path / "alone" / "README.md").read_text()
        assert card_rules.check(text) == ([], [])
        return text

    text = card(scores, "validation")
    assert "did not run" not in caplog.text and "This code ran" in text and "|  | model |\n" in text
    assert "istill" not in ModelCard(text).text and "teacher" not in ModelCard(text).text
    assert "knowledge-distillation" not in ModelCard(text).data.tags

    broken = SemanticSegmentation.snippets[0] + "raise RuntimeError('no such luck')\n"
    monkeypatch.setattr(SemanticSegmentation, "snippets", (broken,))
    text = card({}, None)
    assert "example of use did not run (RuntimeError: no such luck)" in caplog.text
    assert 'pipeline("image-segmentation", model="alone"' in text and "This code ran" not in text
    assert "\n# " not in "".join(re.findall(r"```python\n(.*?)```", text, re.S))
    assert "model-index" not in text and "## Results" not in text and "mIoU" not in text, "nothing was measured"
    assert json.loads((tmp_path / "alone" / "results.json").read_text()) == {}


@pytest.mark.slow
def test_a_run_without_bcd_compares_predictions_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, models, scores, data = finished_run(tmp_path / "student", losses={"cwd": {}})
    drawn: list = []
    draw = run.task.comparison
    monkeypatch.setattr(
        run.task, "comparison", lambda *args, **more: drawn.append((args[0], more)) or draw(*args, **more)
    )
    reporting.write_report(run, models, scores, data, "validation")
    assert [path.name for path in (tmp_path / "student" / "figures").iterdir()] == ["comparison.png"]
    card = (tmp_path / "student" / "README.md").read_text()
    assert re.findall(r"!\[[^]]*\]\(([^)]*)\)", card) == ["figures/comparison.png"]
    assert "shu2021channel" in card and "zhang2024bcd" not in card
    ((samples, more),) = drawn
    assert [list(sample["predictions"]) for sample in samples] == 4 * [["teacher", "baseline", "distilled"]]
    assert more["errors"] == ["distilled"]


@pytest.mark.slow
def test_a_figure_that_fails_leaves_results_and_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, models, scores, data = finished_run(tmp_path / "student", ("student",))
    monkeypatch.setattr(reporting, "write_figures", lambda *_: 1 / 0)
    reporting.write_report(run, models, scores, data, "validation")
    assert "no figures, because one failed: ZeroDivisionError" in caplog.text
    assert (tmp_path / "student" / "README.md").is_file()
    assert json.loads((tmp_path / "student" / "results.json").read_text())["student"] == scores["student"]


def test_a_universal_model_is_asked_for_classes_and_not_for_panoptic_segments(tmp_path: Path) -> None:
    run = BCDTrainer(model=mask2former(), args=tiny.config(tmp_path))
    run.save_model(str(tmp_path))
    picture = tiny.scenes()["validation"][0]["image"]
    snippets = usage.usage_snippets(tmp_path, "me/student", SemanticSegmentation.snippets, picture)
    assert len(snippets) == 1 and 'segment("picture.jpg", subtask="semantic")' in snippets[0]
    call = usage.fill(SemanticSegmentation.call, tmp_path, "x")
    assert call == 'pipeline("image-segmentation", "x")("picture.jpg", subtask="semantic")'
    (covered,) = [re.findall(r"^# .* (\d+\.\d)%$", snippets[0], re.M)]
    assert sum(map(float, covered)) == pytest.approx(100, abs=1)


def test_how_images_were_shown_in_words(tmp_path: Path) -> None:
    data = tiny.scenes()["validation"]

    def words(model, image_size: int | None) -> str:
        config = tiny.config(tmp_path, image_size=image_size)
        return reporting.protocol(data, build_adapter(model), config, {"classes_averaged": 8})["input"]

    assert words(tiny.tiny_segformer(), None) == "original size"
    assert words(tiny.tiny_segformer(), 40) == "short side resized to 40, aspect ratio kept"
    assert words(dpt(), 64) == "resized to 64 x 64 (width x height), whatever its aspect ratio"
