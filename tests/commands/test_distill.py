"""What the command says of arguments that it makes nothing of."""

from pathlib import Path

import pytest
from tiny import config

from hf_bcd.commands import distill
from hf_bcd.runs.arguments import DataArguments, ModelArguments
from hf_bcd.utils.messages import UserError


class Loaded(Exception):
    """The run has come as far as its data."""


@pytest.mark.parametrize("teacher", [None, "some/teacher"])
def test_what_is_of_teachers_has_no_effect_without_one_and_a_line_says_so(
    teacher: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def load_data(args: DataArguments) -> None:
        raise Loaded

    monkeypatch.setattr(distill, "load_data", load_data)
    recipe = {"losses": {"kd": {}}, "unlabelled_dir": "more", "max_steps": 2, "unlabelled_share": 0.3}
    with pytest.raises(Loaded):
        distill.distill(ModelArguments(teacher=teacher), DataArguments(), config(tmp_path), recipe)
    assert ("no teacher, so these have no effect: losses, unlabelled_dir" in caplog.text) is (teacher is None)
    assert "unlabelled_share has no effect" in caplog.text


def test_checkpoints_of_an_earlier_run_are_found_before_the_data(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1/trainer_state.json").write_text("{}")
    with pytest.raises(UserError, match=r"checkpoint-1 is left of an earlier run"):
        distill.distill(ModelArguments(), DataArguments(data_dir="nowhere"), config(tmp_path), {})
