"""JSON that every reader takes, whatever the scores are."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from hf_bcd.utils.files import check_folder, numbers, read_json, write_json
from hf_bcd.utils.messages import UserError


def test_what_is_no_number_is_null_and_comes_back(tmp_path: Path) -> None:
    scores = {"ap": 0.5, "ap_large": math.nan, "per_class": [1.0, math.nan], "count": 3, "bound": math.inf}
    write_json(tmp_path / "a.json", {"scores": scores, "teacher": None})

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    content = json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)
    assert content["scores"]["ap_large"] is None and content["teacher"] is None
    back = numbers(read_json(tmp_path / "a.json")["scores"])
    assert (
        back["ap"] == 0.5
        and back["count"] == 3
        and np.isnan([back["ap_large"], back["per_class"][1], back["bound"]]).all()
    )


def test_a_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(UserError, match=r"output_dir is .*a/b/c, but .*/a is a file; name a folder"):
        check_folder(tmp_path / "a/b/c", "output_dir")
    check_folder(tmp_path / "new/c", "output_dir")
