"""Nothing in a training step waits for the device or copies to it: all losses, all families, without a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parent / "pretended_accelerator.py"
# case -> where code of others copies, which this package cannot mend
OF_OTHERS = {
    "beit": "models/beit/modeling_beit.py",  # the index of its relative positions
    "data2vec": "models/data2vec/modeling_data2vec_vision.py",  # likewise
    "mask2former": "models/mask2former/modeling_mask2former.py",  # sizes of its levels
}


@pytest.fixture(scope="module")
def printed() -> list[str]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "losses", "models"], capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "at_least"), [("losses", 30), ("models", 20)])
def test_no_step_waits_or_copies(kind: str, at_least: int, printed: list[str]) -> None:
    (middle,) = (index for index, line in enumerate(printed) if " cases of losses, " in line)
    *lines, end = printed[: middle + 1] if kind == "losses" else printed[middle + 1 :]
    assert int(end.split()[0]) == len(lines) >= at_least
    wrong = [line for line in lines if not line.startswith("ok ")]
    assert [line for line in wrong if f" in {OF_OTHERS.get(line.split()[1], ':')}:" not in line] == []
    assert {line.split()[1] for line in wrong} == (OF_OTHERS.keys() if kind == "models" else set())
