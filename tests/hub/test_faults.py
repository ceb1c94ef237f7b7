"""Whatever the Hub does during a push: the student stays, the message says how to go on, and that works."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from hub.server import HubServer
from hub.student_folder import finished


UPLOAD = "^/lfs-storage/"
Push = Callable[..., tuple[str, str]]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return finished(tmp_path / "runs" / "my student")


def retry_command(message: str) -> list[str]:
    """The arguments of the command that an error message ends with."""
    found = re.search(r"The student lies in .+; try again with: hf-bcd push (.+)$", message)
    assert found, message
    return shlex.split(found[1])


@pytest.mark.parametrize(
    ("fault", "where", "cause"),
    [
        (401, "/api/repos/create", "wants a valid access token .HTTP 401.*hf auth login"),
        (403, "/api/repos/create", "HTTP 403.*write access"),
        (404, "/preupload/", "HTTP 404|does not exist"),
        (409, "/commit/", "changed by somebody else at the same moment .HTTP 409"),
        (413, UPLOAD, "larger than the Hub takes"),
        (429, "/info/lfs/objects/batch", "too many requests .HTTP 429.*try again in 1 seconds"),
        (500, "/api/repos/create", "the Hub has a problem .HTTP 500"),
        (500, "/api/validate-yaml", "HTTP 500"),
        (500, UPLOAD, "the Hub has a problem .HTTP 500"),
        (503, "/commit/", "the Hub has a problem .HTTP 503"),
        ("reset", UPLOAD, "the connection to http://127.0.0.1:.* broke off"),
        ("reset", "/commit/", "the connection to http://127.0.0.1:.* broke off"),
    ],
)
def test_a_failed_push_keeps_the_student_and_names_the_command_that_works(
    hub: HubServer, push: Push, folder: Path, fault: int | str, where: str, cause: str
) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.fail(fault, where)
    arguments = ["runs/my student", "tester/x", "--private", "--revision", "v1"]
    error, _ = push(*arguments)
    assert error.startswith("error: model tester/x") and re.search(cause, error), error
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    hub.clear_faults()
    assert retry_command(error) == arguments
    error, _ = push(*arguments)
    assert not error and list(hub.repos) == [("model", "tester/x")]
    repo = hub.repos["model", "tester/x"]
    assert repo.private and [commit.title for commit in repo.commits.values()] == ["initial commit", "Upload student"]
    assert hub.files("tester/x", "v1")["model.safetensors"] == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("fault", [429, 500, "reset", "slow"])
def test_a_short_disturbance_is_overcome(hub: HubServer, push: Push, fault: int | str) -> None:
    hub.fail(fault, UPLOAD, times=2, seconds=1)
    error, shown = push("runs/my student", "tester/x")
    assert not error and ("Retry" in shown or fault == "slow"), "the wait must not be silent"
    assert len(hub.repos["model", "tester/x"].commits) == 2


def test_nobody_waits_an_hour_for_a_rate_limit(hub: HubServer, push: Push) -> None:
    hub.fail(429, "/info/lfs/objects/batch", seconds=3600)
    error, _ = push("runs/my student", "tester/x")
    assert "try again in 3600 seconds" in error
    assert sum("batch" in request.path for request in hub.requests) == 1


def test_no_network(push: Push, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    error, _ = push("runs/my student", "tester/x")
    assert "no connection to http://127.0.0.1:9" in error
    assert retry_command(error) == ["runs/my student", "tester/x"]
