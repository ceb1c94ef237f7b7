"""Every wrong input of the table ends as it says: in one line, in a warning, or in the right value."""

import logging
import re
from collections import Counter
from pathlib import Path

import pytest
from runs import CASES

from hf_bcd import BCDTrainer
from hf_bcd.utils.messages import MAX_MESSAGE, UserError


def test_the_table_is_as_large_as_promised() -> None:
    kinds = Counter(kind for kind, _, _ in CASES.values())
    assert len(CASES) >= 70 and set(kinds) == {"error", "warning", "result"}


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_input_ends_as_the_table_says(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, regex, function = CASES[name]
    monkeypatch.setattr(BCDTrainer, "train", lambda *_, **__: pytest.fail("it began to train"))
    caplog.set_level(logging.WARNING)
    if kind == "error":
        with pytest.raises(UserError) as caught:
            function(tmp_path)
        message = str(caught.value)
        assert re.search(regex, message), message
        assert "\n" not in message and 10 < len(message) <= MAX_MESSAGE, message
    else:
        found = str(function(tmp_path))
        assert re.search(regex, found if kind == "result" else caplog.text), caplog.text or found
