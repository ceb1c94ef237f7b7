"""Says what a finished run's numbers tell about whether distillation can help there.

    hf-bcd doctor runs/x

Looks at the scores of teacher, baseline and student, the pull of each term (with --log_gradients true in the run), and how well
the teacher's classes agree with the labels.
"""

import argparse
from pathlib import Path

from ..runs.doctor import diagnose


def main(argv: list[str] | None = None) -> None:
    """Prints the diagnosis of the run that the arguments name; `argv` is the process's own command line by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output folder of a finished run")
    print("\n".join(diagnose(parser.parse_args(argv).folder)))
