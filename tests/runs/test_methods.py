"""`hf-bcd methods`: what it prints is what the code does."""

import json
import re
from pathlib import Path

import pytest
import torch

from hf_bcd.adapters import build_adapter
from hf_bcd.commands.methods import main
from hf_bcd.losses import LOSSES
from hf_bcd.losses.recipe import options_of
from hf_bcd.models import TimmSegmentationModel
from hf_bcd.runs import methods
from hf_bcd.runs.arguments import parse_arguments
from hf_bcd.utils.yaml import yaml_text


DOCS = Path(__file__).parents[2] / "docs"


COSTS = {
    "device": "a device", "torch": "9.9", "dtype": "float32", "batch": 8, "side": 512,
    "methods": {"kd": {"ms": 12.345, "mib": 67.8}, "cwd": {"ms": 0.5, "mib": None}},
}  # fmt: skip


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


def test_the_list_and_the_table_have_each_method_and_its_costs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "costs.json").write_text(json.dumps(COSTS))
    monkeypatch.setattr(methods, "COSTS", tmp_path / "costs.json")
    main([])
    text = capsys.readouterr().out
    assert set(re.findall(r"^(\w+): ", text, re.M)) >= set(LOSSES)
    assert max(map(len, text.splitlines())) <= 118
    assert re.search(r"^kd: .*\n.*\nneeds: logits; extra parameters \(M\): none; 12 ms; 68 MiB\n", text, re.M)
    assert re.search(r"^cwd: .*\n.*\nneeds: .* none; 0\.5 ms\n", text, re.M)
    assert "batch 8 of 512 x 512 pixels, float32, a device, PyTorch 9.9." in " ".join(text.split())
    lines = [line for line in methods.table(COSTS).splitlines() if line.startswith("|")]
    assert len(lines) == len(LOSSES) + 2 and {line.count("|") - line.count("\\|") for line in lines} == {9}
    assert any("| none | 12 | 68 | the pixel-wise" in line for line in lines)


def test_extra_parameters_are_counted() -> None:
    criterion = methods.reference_criterion({"bcd": {}})
    trained, frozen = (
        sum(p.numel() for p in criterion.parameters() if p.requires_grad == kind) / 1e6 for kind in (True, False)
    )
    found = {name: methods.describe(name, {})["extra parameters (M)"] for name in ("bcd", "kd", "fitnet")}
    assert found == {"bcd": f"{trained:.2f} + {frozen:.2f}", "kd": "none", "fitnet": f"{(512 + 1) * 2048 / 1e6:.2f}"}


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_page_tells_everything_and_its_recipe_is_the_default(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([name])
    cls, text = LOSSES[name], capsys.readouterr().out.rstrip("\n")
    assert text.startswith(f"{name}: {cls.transfers}\n{cls.source}\n") and text.endswith(cls.citation)
    assert cls.checked in " ".join(text.split()) and methods.description(cls) in text
    for option, default in options_of(cls).items():
        assert f"\n  {option} = {yaml_text(default)}: " in text, f"{cls.__name__} says nothing about {option}"
    for function in methods.functions_of(cls):
        assert f"\n{function.__name__}\n  {methods.description(function).split()[0]}" in text
    assert methods.functions_of(cls), "no pure function of it is exported"

    written = re.search(r"with its defaults written out:\n  (losses: .*)", text)
    (tmp_path / "recipe.yaml").write_text(f"student: a/b\n{written and written[1]}\n")
    _, _, config = parse_arguments(
        ["--config", str(tmp_path / "recipe.yaml"), "--use_cpu", "true", "--report_to", "none"]
    )
    ours, default = (methods.reference_criterion(losses) for losses in (config.loss_options, {name: {}}))
    assert ours.weights == default.weights and ours.decays == default.decays
    shapes = [[(key, x.shape) for key, x in criterion.state_dict().items()] for criterion in (ours, default)]
    assert shapes[0] == shapes[1]


def test_an_unknown_method_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown method 'slimsegg'. Did you mean 'slimseg'"):
        main(["slimsegg"])


def test_the_paper_index_has_each_equation_and_default() -> None:
    text = methods.paper_index()
    for name, cls in LOSSES.items():
        part = text.partition(f"## {name}\n")[2].partition("\n## ")[0]
        assert methods.description(cls) in part and cls.citation in part and cls.source in part
        for option, default in options_of(cls).items():
            assert f"| `{option}` | `{yaml_text(default)}` | " in part
