"""The local Hub keeps its tests honest: bad cards are refused, and a call that it does not know fails the test."""

import json
import socket
from urllib.parse import urlsplit

import pytest
from hub import card_rules
from hub.server import HubServer


RESULT = {"task": {"type": "image-segmentation"}, "dataset": {"type": "me/d", "name": "d"}}
METRICS = [{"type": "mean_iou", "value": 0.5}]


def card(metadata: object) -> str:
    return f"---\n{json.dumps(metadata)}\n---\n# Title\n"


class TestCardRules:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("---\na: b: c\n---\n", "mapping values"),
            ("---\na: 1\na: 2\n---\n", "duplicated mapping key a"),
            ("---\n- a\n---\n", "must be a mapping"),
            (card({"license": "my own"}), '"license" must be one of'),
            (card({"base_model": "/home/me/runs/x"}), '"base_model" with value "/home/me/runs/x" is not valid'),
            (card({"datasets": ["me/d", "a b"]}), '"datasets[1]" with value "a b" is not valid'),
            (card({"tags": "one"}), '"tags" must be an array of strings'),
            (card({"model-index": [{"results": []}]}), '"model-index[0].name" is required'),
            (card({"model-index": [{"name": "x"}]}), '"model-index[0].results" is required'),
            (card({"model-index": [{"name": "x", "results": [RESULT]}]}), "results[0].metrics"),
            (card({"model-index": [{"name": "x", "results": [{"metrics": METRICS}]}]}), "results[0].task.type"),
        ],
    )
    def test_bad_card(self, content: str, message: str) -> None:
        errors, _ = card_rules.check(content)
        assert any(message in error for error in errors), errors


class TestServer:
    def test_a_call_it_does_not_know_is_an_error_of_the_test(self, tmp_path) -> None:
        with pytest.raises(RuntimeError, match="unknown call: GET /api/nonsense"), HubServer(tmp_path) as hub:
            with socket.create_connection(("127.0.0.1", urlsplit(hub.url).port)) as connection:
                connection.sendall(b"GET /api/nonsense HTTP/1.1\r\nHost: x\r\n\r\n")
                assert b"501" in connection.recv(100)
