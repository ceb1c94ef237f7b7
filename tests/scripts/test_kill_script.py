"""A run that is killed at any moment goes on to the same end; scripts/kill.py does it as often as one likes."""

import subprocess
import sys
from pathlib import Path

import pytest


KILL = Path(__file__).parents[2] / "scripts" / "kill.py"


@pytest.mark.slow
def test_runs_killed_at_three_random_moments_end_equal() -> None:
    command = [sys.executable, str(KILL), "--times", "3", "--seed", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "3 of 3 equal to the bit" in done.stdout, done.stdout + done.stderr
