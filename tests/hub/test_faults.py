"""Whatever the Hub does during a push: the student stays, the message says how to go on, and that works."""

import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub.server import MARKER_TOKEN, HubServer
from hub.student_folder import finished


pytestmark = pytest.mark.slow

UPLOAD = "^/lfs-storage/"


def hf_bcd(
    hub: HubServer, folder: Path, *arguments: object, patient: bool = False
) -> subprocess.CompletedProcess[str]:
    """Runs `hf-bcd ARGUMENTS` in a folder; no token may be seen."""
    command = [sys.executable, "-m", "hf_bcd", *map(str, arguments)]
    environment = hub.environment(folder / "home", patient=patient)
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=200)
    assert MARKER_TOKEN not in done.stdout + done.stderr
    return done


def retry_command(message: str) -> list[str]:
    """The arguments of the command that an error message ends with."""
    found = re.search(r"The student lies in .+; try again with: (hf-bcd push .+)$", message.strip())
    assert found, message
    return shlex.split(found[1])[1:]


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
    hub: HubServer, tmp_path: Path, fault: int | str, where: str, cause: str
) -> None:
    folder = finished(tmp_path / "runs" / "my student")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.fail(fault, where)
    failed = hf_bcd(hub, tmp_path, "push", "runs/my student", "tester/x", "--private", "--revision", "v1")
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    error = failed.stderr.strip().splitlines()[-1]
    assert error.startswith("error: model tester/x") and re.search(cause, error), error
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    hub.clear_faults()
    arguments = retry_command(error)
    assert arguments == ["push", "runs/my student", "tester/x", "--private", "--revision", "v1"]
    again = hf_bcd(hub, tmp_path, *arguments)
    assert again.returncode == 0, again.stderr
    assert list(hub.repos) == [("model", "tester/x")]
    repo = hub.repos["model", "tester/x"]
    assert repo.private and [commit.title for commit in repo.commits.values()] == ["initial commit", "Upload student"]
    assert hub.files("tester/x", "v1")["model.safetensors"] == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("fault", [429, 500, "reset"])
def test_a_short_disturbance_is_overcome(hub: HubServer, tmp_path: Path, fault: int | str) -> None:
    finished(tmp_path / "x")
    hub.fail(fault, UPLOAD, times=2)
    done = hf_bcd(hub, tmp_path, "push", "x", "tester/x")
    assert done.returncode == 0, done.stderr
    assert "Retry" in done.stderr or "Retrying" in done.stderr, "the wait must not be silent"
    assert len(hub.repos["model", "tester/x"].commits) == 2


def test_a_slow_hub_is_waited_for(hub: HubServer, tmp_path: Path) -> None:
    finished(tmp_path / "x")
    hub.fail("slow", UPLOAD, seconds=3)
    done = hf_bcd(hub, tmp_path, "push", "x", "tester/x", patient=True)
    assert done.returncode == 0, done.stderr


def test_nobody_waits_an_hour_for_a_rate_limit(hub: HubServer, tmp_path: Path) -> None:
    finished(tmp_path / "x")
    hub.fail(429, "/info/lfs/objects/batch", seconds=3600)
    start = time.monotonic()
    done = hf_bcd(hub, tmp_path, "push", "x", "tester/x", patient=True)
    assert done.returncode == 1 and "try again in 3600 seconds" in done.stderr
    assert time.monotonic() - start < 100
    assert sum("batch" in request.path for request in hub.requests) == 1


def test_no_network(hub: HubServer, tmp_path: Path) -> None:
    finished(tmp_path / "x")
    environment = hub.environment(tmp_path / "home") | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "hf_bcd", "push", "x", "tester/x"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert "no connection to http://127.0.0.1:9" in done.stderr
    assert retry_command(done.stderr.strip().splitlines()[-1]) == ["push", "x", "tester/x"]
