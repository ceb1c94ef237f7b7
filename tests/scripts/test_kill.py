"""A run that is killed at a random moment ends as if it had not been."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_killed_runs_end_as_undisturbed_ones() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "kill.py"), "--times", "2", "--seed", "1"]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0 and "2 of 2 equal to the bit, seed 1" in done.stdout, done.stdout + done.stderr
