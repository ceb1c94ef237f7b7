"""Recipes, the command line and what wins over what."""

import dataclasses
import json
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml
from PIL import Image

from hf_bcd.adapters.specs import ModelSpec
from hf_bcd.data.boxes import FORMATS
from hf_bcd.runs.arguments import build_arguments, named_teachers, parse_arguments, read_arguments
from hf_bcd.runs.experiment import load_data
from hf_bcd.runs.fields import DataArguments
from hf_bcd.runs.help import SHOWN, shown_options
from hf_bcd.training.config import BCDConfig
from hf_bcd.training.options import PRESETS, BCDOptions
from hf_bcd.utils.messages import UserError


ROOT = Path(__file__).parents[2]
CPU = ["--use_cpu", "true", "--report_to", "none"]


def write(path: Path, **content: object) -> str:
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_defaults(tmp_path: Path) -> None:
    recipe = write(tmp_path / "r.yaml", student="a/b", learning_rate=0.5, max_steps=7, losses={"bcd": {"radius": 5}})
    model, _, config = parse_arguments(["--config", recipe, "--max_steps", "3", *CPU])
    assert (model.student, config.learning_rate, config.max_steps, config.crop_size) == ("a/b", 0.5, 3, 512)
    assert config.losses == {"bcd": {"radius": 5}}


def test_a_value_typed_again_as_the_default_still_wins(tmp_path: Path) -> None:
    recipe = write(tmp_path / "r.yaml", student="a/b", with_baseline=True, crop_size=96)
    model, _, config = parse_arguments(["--config", recipe, "--crop_size=512", "--with_baseline", "false", *CPU])
    assert config.crop_size == 512 and model.with_baseline is False


@pytest.mark.parametrize("word", ["none", "null"])
def test_the_command_line_undoes_what_a_recipe_says(word: str, tmp_path: Path) -> None:
    recipe = write(
        tmp_path / "r.yaml", student="a/b", square_size=640, optim_args="momentum=0.5", lr_milestones=[1, 2]
    )
    argv = ["--config", recipe, "--square-size", word, "--optim", "adamw_torch", f"--optim_args={word}", *CPU]
    _, _, config = parse_arguments([*argv, "--image_size", word, "--image_size=96", "--lr_milestones", "3", "4"])
    assert (config.square_size, config.optim_args, config.image_size) == (None, None, 96)
    assert config.lr_milestones == [3, 4] and config.report_to == []
    _, _, config = parse_arguments([*argv, "--lr_milestones", word, "--square_size", "32"])
    assert config.lr_milestones is None and config.square_size == 32
    _, _, config = parse_arguments([*argv[:2], "--activation_checkpointing", "--square_size", word, *CPU])
    assert config.activation_checkpointing is True and config.square_size is None


def test_fields_of_mappings_can_be_set_one_by_one(tmp_path: Path) -> None:
    recipe = write(
        tmp_path / "r.yaml",
        student={"backbone": "mobilenetv2_100", "head": "fpn"},
        losses={"bcd": {"radius": 5, "weight": {"boundary": 3.0}}},
    )
    argv = ["--config", recipe, "--student.weights", "file.safetensors", "--losses.bcd.weight.boundary=7", *CPU]
    model, _, config = parse_arguments(argv)
    assert ModelSpec.parse(model.student, "student").weights == "file.safetensors"
    assert ModelSpec.parse(model.student, "student").backbone == "mobilenetv2_100"
    assert config.losses == {"bcd": {"radius": 5, "weight": {"boundary": 7}}}


def test_mappings_are_read_as_yaml_or_json() -> None:
    argv = ["--student", "{backbone: resnet18, output_stride: 8}", "--losses", '{"bcd": {"kappa": 0.25}}', *CPU]
    model, _, config = parse_arguments(argv)
    assert ModelSpec.parse(model.student, "student").output_stride == 8
    assert config.losses == {"bcd": {"kappa": 0.25}}


def test_the_paper_preset_is_literal() -> None:
    _, _, config = parse_arguments(["--student", "a/b", "--preset", "paper", *CPU])
    assert config.loss_options["bcd"].weights == {"boundary": 10.0, "context": 50.0}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lerning_rate", "1"], "Did you mean 'learning_rate'"),
        (["--losess.bcd.radius", "1"], "Did you mean 'losses'"),
        (["--config", "missing.yaml"], "missing.yaml: no such file"),
        (["--student", "a/b", "--crop_size", "0"], "crop_size is 0; it must be a number of at least 1"),
        (["--student", "a/b", "--scale_min", "3"], "scale_min 3.0 exceeds scale_max 2.0"),
    ],
)
def test_mistakes_on_the_command_line_are_named(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arguments([*argv, *CPU])


def test_task_and_format_of_boxes_reach_the_data(tmp_path: Path) -> None:
    lines = [{"file_name": "a.png", "objects": {"bbox": [[10, 10, 30, 30]], "category": ["cat"]}}]
    (tmp_path / "train").mkdir()
    Image.new("RGB", (100, 80)).save(tmp_path / "train" / "a.png")
    (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))

    def corners(*argv: str) -> list[list[float]]:
        _, data, _ = parse_arguments(["--student", "a/b", "--data_dir", str(tmp_path), *argv, *CPU])
        return load_data(data)["train"][0]["boxes"].tolist()

    with pytest.raises(UserError, match=r"could be xywh or xyxy.*--box_format xywh"):
        corners()
    assert corners("--box_format", "xywh") == [[10, 10, 40, 40]]
    assert corners("--box_format", "xyxy", "--task", "object-detection") == [[10, 10, 30, 30]]
    with pytest.raises(UserError, match=r"task is 'boxes'; data sets have"):
        corners("--task", "boxes")


@pytest.mark.parametrize("options", ["{task: object-detection}", "{config: a, box_format: xywh}"])
def test_options_of_one_data_set_are_not_those_of_all(options: str) -> None:
    _, data, _ = parse_arguments(["--dataset_name", "synthetic", "--dataset_options", options, *CPU])
    with pytest.raises(
        UserError, match=r"dataset_options sets .*own instead \(--(task|box_format, --dataset_config)\)"
    ):
        load_data(data)


def test_a_run_that_can_give_no_scores_says_so(caplog: pytest.LogCaptureFixture) -> None:
    for numbers in ("{train: 2, validation: 1}", "{train: 2}"):
        assert "no scores" not in caplog.text
        options = ["--dataset_options.num_images", numbers, "--dataset_options.size", "[48, 64]"]
        load_data(parse_arguments(["--dataset_name", "synthetic_detection", *options, *CPU])[1])
    assert "synthetic_detection has neither a test nor a validation split with truth" in caplog.text


def test_unknown_keys_of_a_recipe_are_errors_that_name_the_file(tmp_path: Path) -> None:
    recipe = write(tmp_path / "r.yaml", student="a/b", crop_sise=96)
    with pytest.raises(ValueError, match=r"r\.yaml: unknown key 'crop_sise'\. Did you mean 'crop_size'"):
        parse_arguments(["--config", recipe, *CPU])


def test_a_recipe_starts_from_others_and_its_keys_win_each_with_its_whole_value(tmp_path: Path) -> None:
    (tmp_path / "families").mkdir()
    write(tmp_path / "root.yaml", student="a/b", crop_size=96, seed=1, losses={"bcd": {"radius": 5}})
    write(tmp_path / "families" / "middle.yaml", base="../root.yaml", crop_size=64, losses={"kd": {}})
    leaf = write(tmp_path / "leaf.yaml", base="families/middle.yaml", losses={"cwd": {"weight": 5}}, seed=2)
    model, _, config = parse_arguments(["--config", leaf, "--seed", "3", *CPU])
    assert (model.student, config.crop_size, config.seed) == ("a/b", 64, 3)
    assert config.losses == {"cwd": {"weight": 5}}


def test_a_recipe_that_starts_from_itself_names_the_circle(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one.yaml", base="two.yaml"), write(tmp_path / "two.yaml", base="./one.yaml")
    with pytest.raises(ValueError, match=rf"its own base: {one} -> {two} -> {one}\."):
        parse_arguments(["--config", one, *CPU])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"base": "missing.yaml"}, r"r\.yaml: base .*missing\.yaml: no such file"),
        ({"base": ["a.yaml"]}, r"r\.yaml: base is \['a\.yaml'\]"),
        ({"base": "wrong.yaml"}, r"wrong\.yaml: unknown key 'crop_sise'"),
        ({"bases": "wrong.yaml"}, r"r\.yaml: unknown key 'bases'\. Did you mean 'base'"),
        ({"base": "list.yaml"}, r"list\.yaml: expected a mapping of arguments, found list"),
    ],
)
def test_mistakes_in_a_chain_of_recipes_name_the_file(content: dict, message: str, tmp_path: Path) -> None:
    write(tmp_path / "wrong.yaml", crop_sise=96)
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(ValueError, match=message):
        parse_arguments(["--config", write(tmp_path / "r.yaml", **content), *CPU])


def test_the_command_line_can_take_the_teacher_out_of_a_recipe(tmp_path: Path) -> None:
    recipe = write(tmp_path / "r.yaml", student="a/b", teacher={"backbone": "resnet18"})
    assert parse_arguments(["--config", recipe, "--teacher", "none", *CPU])[0].teacher is None


# ---- Several teachers ----------------------------------------------------------------------------------------------

LISTED = "[nvidia/segformer-b4, {backbone: resnet18.a1, head: none, pretrained: true}]"


def teachers(*argv: str, **recipe: object) -> dict[str, tuple[object, object]]:
    found = named_teachers(build_arguments(read_arguments([*argv, *CPU], recipe={"student": "a/b", **recipe}))[0])
    return {name: (one.teacher, one.teacher_store) for name, one in found.items()}


def test_teachers_are_listed_by_the_last_part_of_their_names() -> None:
    backbone = {"backbone": "resnet18.a1", "head": "none", "pretrained": True}
    expected = {"segformer-b4": ("nvidia/segformer-b4", None), "resnet18_a1": (backbone, None)}
    assert teachers("--teacher", LISTED) == expected
    assert teachers(teacher=["nvidia/segformer-b4", backbone]) == expected
    assert teachers("--teacher_store", "[stores/a, me/b@main]") == {
        "a": (None, "stores/a"), "b": (None, "me/b@main"),
    }  # fmt: skip


def test_a_single_store_replaces_a_single_teacher_and_lists_add_up() -> None:
    assert teachers("--teacher_store", "s/b", teacher="me/a") == {"": ("me/a", "s/b")}
    both = {"a": ("me/a", None), "b": (None, "s/b")}
    assert teachers("--teacher_store", "[s/b]", teacher="me/a") == both
    assert teachers("--teacher_store", "s/b", teacher=["me/a"]) == both
    assert teachers("--teacher", "none", "--teacher_store", "[s/a, s/b]", teacher=["me/a", "me/b"]).keys() == {
        "a",
        "b",
    }
    assert teachers("--teacher_store", "none", teacher="me/a", teacher_store=["s/b"]) == {"": ("me/a", None)}
    assert teachers("--teacher", "none", teacher=["me/a", "me/b"]) == {}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--teacher", "[me/a, you/a]"], "the teachers me/a and you/a would both be called 'a'"),
        (
            ["--teacher", "[me/a.b]", "--teacher_store", "[s/a_b]"],
            "the teachers me/a.b and s/a_b would both be called",
        ),
        (["--teacher", "[me/cwd, me/a]"], "a teacher is called 'cwd'; a name is .* no loss's name"),
        (
            ["--teacher", "[me/a, {backbone: resnet18}]"],
            "resnet18 with the head fpn .* not trained yet: train it first",
        ),
        (["--teacher", "[me/a, 3]"], "teacher is 3; give a Hub id"),
        (["--teacher", "[]"], "teacher is an empty list"),
        (["--teacher", "[me/a"], "--teacher is no valid YAML"),
        (["--teacher_store", "[3]"], "teacher_store is .*3.*; it must be a list or text"),
        (["--teacher", "[me/a, me/b]", "--teacher.revision", "x"], "sets a field of teacher, .* and no mapping"),
    ],
)
def test_lists_of_teachers_that_make_no_sense(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        teachers(*argv)


def test_losses_of_each_teacher_may_be_changed_one_by_one() -> None:
    losses = {"nvidia/segformer.b4": {"cwd": {}}, "b": {"bcd": {"radius": 5}}}
    config = build_arguments(read_arguments(["--losses.b.bcd.radius", "4", *CPU], recipe={"losses": losses}))[2]
    assert list(config.loss_options) == ["segformer_b4/cwd", "b/bcd"]
    assert config.loss_options["b/bcd"].options["radius"] == 4
    own = config.for_teacher("b")
    assert own.losses == {"bcd": {"radius": 4}} and list(own.loss_options) == ["bcd"]


def test_an_option_may_be_called_on() -> None:
    _, _, config = parse_arguments(["--student", "a/b", "--losses", "{cwd: {on: features}}", *CPU])
    assert config.losses == {"cwd": {"on": "features"}}


def test_values_of_a_recipe_mean_what_they_look_like(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("student: a/b\nlearning_rate: 1e-4\neval_strategy: no\nteacher_training: {learning_rate: 2E-3}\n")
    model, _, config = parse_arguments(["--config", str(path), "--teacher_training.weight_decay", "5e-5", *CPU])
    assert config.learning_rate == 1e-4 and config.eval_strategy == "no"
    assert model.teacher_training == {"learning_rate": 2e-3, "weight_decay": 5e-5}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("preset", "papper", "unknown preset 'papper'. Did you mean 'paper'"),
        ("teacher_dtype", "bfloat", "unknown teacher_dtype 'bfloat'. Did you mean 'bfloat16'"),
    ],
)
def test_unknown_choices_of_a_recipe_are_errors(key: str, value: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arguments(["--config", write(tmp_path / "r.yaml", student="a/b", **{key: value}), *CPU])


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("max_steps: '2'", "max_steps", 2),
        ("max_steps: 2.0", "max_steps", 2),
        ("learning_rate: '1e-4'", "learning_rate", 1e-4),
        ("learning_rate: 1", "learning_rate", 1),
        ("fp16: 'false'", "fp16", False),
    ],
)
def test_numbers_of_a_recipe_may_stand_in_quotes(text: str, name: str, value: object, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"student: a/b\n{text}\n")
    found = getattr(parse_arguments(["--config", str(path), *CPU])[2], name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_steps: abc", "max_steps is 'abc'; it must be a whole number"),
        ("max_steps: 2.5", "max_steps is 2.5; it must be a whole number"),
        ("max_steps: true", "max_steps is True; it must be a whole number"),
        ("color_jitter: [1]", r"color_jitter is \[1\]; it must be a number"),
        ("bf16: maybe", "bf16 is 'maybe'; it must be true or false"),
        ("losses: {cwd: {weight: 3", r"r\.yaml is no valid YAML: .* line 3"),
        ("losses: '{cwd: {weight: 3'", "losses is no valid YAML"),
    ],
)
def test_malformed_recipes_are_errors_that_say_where(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"student: a/b\n{text}\n")
    with pytest.raises(ValueError, match=message):
        parse_arguments(["--config", str(path), *CPU])


def test_lists_of_a_recipe_stay_lists(tmp_path: Path) -> None:
    recipe = write(tmp_path / "r.yaml", student="a/b", ignore_labels=[0, 255], report_to=["none"])
    _, data, config = parse_arguments(["--config", recipe, "--use_cpu", "true"])
    assert data.ignore_labels == [0, 255] and config.report_to == []


def test_a_plateau_is_one_of_the_best_metric(tmp_path: Path) -> None:
    config = parse_arguments(["--student", "a/b", "--lr_scheduler_type", "reduce_lr_on_plateau", *CPU])[2]
    assert (config.metric_for_best_model, config.lr_scheduler_kwargs) == ("first_score", {"mode": "max"})


def test_only_the_polynomial_schedule_has_the_papers_options(tmp_path: Path) -> None:
    def options(*argv: str) -> object:
        return parse_arguments(["--student", "a/b", *argv, *CPU])[2].lr_scheduler_kwargs or {}

    assert options() == {"power": 0.9, "lr_end": 0.0}
    assert options("--lr_scheduler_kwargs", "{power: 1.0}") == {"power": 1.0}
    assert options("--lr_scheduler_type", "cosine") == {}
    recipe = write(tmp_path / "r.yaml", lr_scheduler_kwargs={"power": 0.9, "lr_end": 0.0})
    assert options("--config", recipe, "--lr_scheduler_type", "linear") == {}


def test_a_run_is_as_long_as_was_said_last(tmp_path: Path) -> None:
    recipe = write(tmp_path / "r.yaml", student="a/b", max_steps=7)

    def length(*argv: str) -> tuple[int, float]:
        config = parse_arguments([*argv, *CPU])[2]
        return config.max_steps, config.num_train_epochs

    assert length("--student", "a/b")[0] == 40_000
    assert length("--student", "a/b", "--num_train_epochs", "5") == (-1, 5)
    assert length("--config", recipe, "--num_train_epochs", "0.5") == (-1, 0.5)
    assert length("--config", recipe)[0] == 7
    nearer = write(tmp_path / "n.yaml", base="r.yaml", num_train_epochs=5)
    assert length("--config", nearer) == (-1, 5)
    assert length("--config", write(tmp_path / "o.yaml", base="n.yaml", max_steps=3))[0] == 3
    with pytest.raises(ValueError, match="--max_steps and --num_train_epochs exclude each other"):
        length("--config", recipe, "--num_train_epochs", "5", "--max_steps", "3")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max_steps", "0"], "max_steps is 0; train for at least one step"),
        (["--max_steps", "3", "--warmup_steps", "3"], "warmup_steps 3.* takes 3 of 3 max_steps"),
        (["--label_smoothing_factor", "0.3"], "label_smoothing_factor is 0.3"),
        (["--neftune_noise_alpha", "5"], "neftune_noise_alpha is 5"),
        (["--remove_unused_columns", "true"], "remove_unused_columns is True"),
    ],
)
def test_what_would_fail_in_the_middle_of_a_run_fails_before_it(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arguments(["--student", "a/b", *argv, *CPU])


@pytest.mark.parametrize("given", [3, ["resnet18"]])
def test_a_model_is_a_name_or_a_mapping(given: object) -> None:
    with pytest.raises(ValueError, match="student is .*; give a Hub id, a folder, or a mapping"):
        ModelSpec.parse(given, "student")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="options of student is .*; it must be a mapping"):
        ModelSpec.parse({"backbone": "resnet18", "options": given}, "student")


def test_unknown_fields_of_a_model_are_errors() -> None:
    with pytest.raises(ValueError, match="unknown field of student 'backbon'. Did you mean 'backbone'"):
        ModelSpec.parse({"backbon": "resnet18"}, "student")
    with pytest.raises(ValueError, match="either name_or_path"):
        ModelSpec.parse({"head": "psp"}, "teacher")
    with pytest.raises(ValueError, match="either name_or_path"):
        ModelSpec.parse({"backbone": "resnet18", "name_or_path": "a/b"}, "teacher")


def test_a_dotted_flag_changes_the_losses_in_force() -> None:
    paper = read_arguments(["--data_dir", "x", "--preset", "paper", "--losses.bcd.radius", "5"])["losses"]
    assert paper["bcd"]["mode"] == "paper" and paper["bcd"]["radius"] == 5
    added = read_arguments(["--data_dir", "x", "--losses.cwd.temperature", "2"])["losses"]
    assert (
        added == {"bcd": {}, "cwd": {"optional": True, "temperature": 2}} and "radius" not in PRESETS["paper"]["bcd"]
    )


def test_without_arguments_the_default_recipe_is_in_force(tmp_path: Path) -> None:
    recipe = write(tmp_path / "demo.yaml", student="a/b", max_steps=5)
    assert parse_arguments(["--max_steps", "2", *CPU], default_config=recipe)[0].student == "a/b"
    assert parse_arguments(["--student", "c/d", *CPU], default_config=recipe)[2].max_steps == 40_000


def test_help_shows_our_arguments_and_hides_inherited_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--help"], description="Distils.")
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in ("student", "teacher", "losses", "crop_size", "output_dir", "config"))
    assert "--torch_empty_cache_steps" not in text and "--help_all" in text
    assert len(text.splitlines()) < 240


def test_help_says_of_the_arguments_what_the_parser_takes() -> None:
    """`--help` reads inherited arguments in the source of transformers, without importing it."""
    assert dict(BCDOptions.__annotations__).keys() | SHOWN == {f.name for f in dataclasses.fields(shown_options())}
    real = {f.name: f for f in dataclasses.fields(BCDConfig)}
    for ours in dataclasses.fields(shown_options()):
        theirs = real[ours.name]
        assert (ours.default, ours.default_factory, ours.metadata["help"]) == (
            theirs.default, theirs.default_factory, theirs.metadata["help"]
        )  # fmt: skip
        if ours.name in SHOWN:  # parsers change the types of the others in place
            assert get_type_hints(BCDConfig)[ours.name] == ours.type


def test_help_names_every_format_of_boxes() -> None:
    (field,) = (f for f in dataclasses.fields(DataArguments) if f.name == "box_format")
    assert field.metadata["help"].endswith(f": {', '.join(FORMATS)}.")


RECIPES = (path for path in (ROOT / "examples" / "recipes").rglob("*.yaml") if not path.name.startswith("_"))


@pytest.mark.parametrize("recipe", sorted(RECIPES), ids=lambda path: path.stem)
def test_every_recipe_parses(recipe: Path) -> None:
    model, data, config = parse_arguments(["--config", str(recipe), *CPU])
    ModelSpec.parse(model.student or "", "student")
    assert config.output_dir and (data.dataset_name or data.data_dir)
    first = recipe.read_text().splitlines()
    assert any("accelerate launch scripts/distill.py" in line for line in first if line.startswith("#"))
