"""`hf-bcd methods`: what it prints is what the code does."""

import re
from pathlib import Path

import pytest
import torch

from hf_bcd.adapters import build_adapter
from hf_bcd.commands.methods import main
from hf_bcd.losses import LOSSES
from hf_bcd.models import TimmSegmentationModel
from hf_bcd.runs import methods
from hf_bcd.runs.arguments import parse_arguments


DOCS = Path(__file__).parents[2] / "docs"
each_method = pytest.mark.parametrize("name", sorted(LOSSES))


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> dict:
    measured = {"kd": {"ms": 12.345, "mib": 67.8}, "cwd": {"ms": 0.5, "mib": None}}
    facts = {"device": "a device", "torch": "9.9", "dtype": "float32", "batch": 8, "side": 512}
    monkeypatch.setattr(methods, "read_costs", lambda: facts | {"methods": measured})
    monkeypatch.setattr("hf_bcd.commands.methods.read_costs", methods.read_costs)
    return facts | {"methods": measured}


def test_the_page_in_docs_is_what_the_code_prints(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--markdown"])
    assert capsys.readouterr().out == (DOCS / "methods.md").read_text(), (
        "write it again: hf-bcd methods --markdown > docs/methods.md"
    )


def test_the_reference_pair_is_that_of_the_paper() -> None:
    specs = []
    for backbone, options in (("resnet18", {"head_channels": 256}), ("resnet101", {})):
        with torch.device("meta"):
            model = TimmSegmentationModel.from_backbone(
                backbone, head="psp", output_stride=8, num_labels=methods.NUM_LABELS, **options
            )
        adapter = build_adapter(model)
        specs.append(dict(adapter.feature_specs))
        assert adapter.head_levels == methods.HEAD_LEVELS
    assert specs == [methods.STUDENT, methods.TEACHER]


def test_the_table_has_a_row_for_each_method_and_its_costs(costs: dict, capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    text = capsys.readouterr().out
    assert set(re.findall(r"^(\w+) ", text, re.M)) >= set(LOSSES) and max(map(len, text.splitlines())) <= 118
    assert re.search(r"^kd .* none +12 +68 ", text, re.M) and re.search(r"^cwd .* none +0\.5 ", text, re.M)
    assert "batch 8 of 512 x 512 pixels, float32, a device, PyTorch 9.9." in " ".join(text.split())
    lines = [line for line in methods.markdown(costs).splitlines() if line.startswith("|")]
    assert len(lines) == len(LOSSES) + 2 and {line.count("|") - line.count("\\|") for line in lines} == {8}
    assert any("| none | 12 | 68 | the pixel-wise" in line for line in lines)


def test_extra_parameters_are_counted() -> None:
    row = methods.describe("bcd", None)
    criterion = methods.reference_criterion({"bcd": {}})
    trained = sum(p.numel() for p in criterion.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in criterion.parameters() if not p.requires_grad)
    assert row.parameters == f"{trained / 1e6:.2f} + {frozen / 1e6:.2f}" and row.needs == "features"
    assert methods.describe("kd", None).parameters == "none"
    assert methods.describe("fitnet", None).parameters == f"{(512 + 1) * 2048 / 1e6:.2f}"


@each_method
def test_a_page_tells_everything_there_is_to_know(name: str) -> None:
    cls, text = LOSSES[name], methods.page(name, None)
    assert text.startswith(f"{name}: {cls.transfers}\n{cls.source}\n") and text.endswith(cls.citation)
    assert cls.checked in " ".join(text.split())
    for paragraph in methods.description(cls).split("\n\n"):
        assert paragraph in text
    described = methods.argument_help(cls)
    for option, default in methods.options_of(cls).items():
        assert described.get(option), f"the docstring of {cls.__name__} says nothing about {option}"
        assert f"\n  {option} = {methods.yaml_text(default)}: " in text
    for function in methods.functions_of(cls):
        assert f"\n{function.__name__}\n  {methods.description(function).split()[0]}" in text
    assert methods.functions_of(cls), "no pure function of it is exported"


@each_method
def test_the_recipe_line_of_a_page_is_the_default(name: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"student: a/b\n{methods.recipe_line(name)}\n")
    _, _, config = parse_arguments(["--config", str(recipe), "--use_cpu", "true", "--report_to", "none"])
    written, default = (methods.reference_criterion(losses) for losses in (config.loss_options, {name: {}}))
    assert written.weights == default.weights and written.decays == default.decays
    assert [(key, x.shape) for key, x in written.state_dict().items()] == [
        (key, x.shape) for key, x in default.state_dict().items()
    ]


def test_an_unknown_method_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown method 'slimsegg'. Did you mean 'slimseg'"):
        main(["slimsegg"])
