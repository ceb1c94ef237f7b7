"""Distils a small segmentation model from a large one; without arguments, the demo. `--help` says more."""

from pathlib import Path

from hf_bcd.cli import run
from hf_bcd.commands import distill


DEMO = Path(__file__).parent.parent / "examples" / "recipes" / "synthetic" / "resnet18_to_resnet10.yaml"

if __name__ == "__main__":
    run(lambda: distill.main(demo=DEMO))
