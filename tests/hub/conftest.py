"""The local Hub as a fixture, and processes in which the real clients talk to it."""

import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub.server import MARKER_TOKEN, HubServer


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    """A running Hub without repositories."""
    with HubServer(tmp_path / "hub") as server:
        yield server


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
