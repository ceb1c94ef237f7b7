"""The outcomes that a wrong input may have."""

import logging
import re
from collections.abc import Callable
from typing import Any

import pytest

from hf_bcd.utils.messages import UserError


def told(kind: str, words: str, action: Callable[[], Any], caplog: pytest.LogCaptureFixture) -> None:
    """Runs an action that must end as expected: in one `error` line, a logged `warning`, or the right `result`."""
    with caplog.at_level(logging.WARNING, "hf_bcd"):
        if kind == "error":
            with pytest.raises(UserError) as caught:
                action()
            message = str(caught.value)
            assert re.search(words, message), message
            assert "\n" not in message and len(message) < 1000, message
            return
        result = repr(action())
    warnings = [record.getMessage() for record in caplog.records]
    if kind == "warning":
        assert any(re.search(words, message) for message in warnings), warnings
    else:
        assert re.search(words, result), result
