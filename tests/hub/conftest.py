"""The local Hub as a fixture, and processes in which the real clients talk to it."""

import site
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub.server import MARKER_TOKEN, OTHER_TOKEN, HubServer
from huggingface_hub import close_session

from hf_bcd.commands import push as command
from hf_bcd.commands import run


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    """A running Hub without repositories."""
    with HubServer(tmp_path / "hub") as server:
        yield server


@pytest.fixture
def push(
    hub: HubServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> Iterator[Callable[..., tuple[str, str]]]:
    """`hf-bcd push ARGUMENTS` in this process: `push(*arguments)` gives the error, perhaps empty, and all that was shown.

    Uploads read these settings when they need them; other calls of the clients do when they are imported. Waits between
    attempts are cut to 10 ms. No token may be shown.
    """
    for name, value in {
        "ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setenv("HF_TOKEN", MARKER_TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.01)))
    close_session()

    def call(*arguments: object) -> tuple[str, str]:
        error = ""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # huggingface_hub uploads as httpx used to
            try:
                run(lambda: command.main([str(argument) for argument in arguments]))
            except SystemExit as end:
                error = str(end.code)
        shown = error + "".join(capsys.readouterr()) + caplog.text
        assert MARKER_TOKEN not in shown and OTHER_TOKEN not in shown and "\n" not in error
        return error, shown

    yield call
    close_session()


@pytest.fixture
def run_python(hub: HubServer, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs code in a process that uses the local Hub, because the clients read their settings when imported.

    `run_python(code, *args, token=..., check=True, home=..., **variables)`: `args` are the code's `sys.argv[1:]`, `home`
    is its `HF_HOME` (one per test unless given), `variables` are added to its environment.
    """

    def run(
        code: str,
        *args: object,
        token: str | None = MARKER_TOKEN,
        check: bool = True,
        home: Path = tmp_path / "hf_home",
        **variables: str,
    ) -> subprocess.CompletedProcess[str]:
        environment = hub.environment(home, token) | {"PYTHONWARNINGS": "default"} | variables
        process = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        if check and process.returncode != 0:
            pytest.fail(f"exit status {process.returncode}\n{process.stdout}\n{process.stderr}")
        return process

    return run


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the same packages, except hf_bcd."""
    folder = tmp_path_factory.mktemp("elsewhere")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    # a folder named in a .pth file is searched, but its own .pth files, editable installs among them, are not read
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return folder / "bin" / "python"
