"""The console script `hf-bcd`, and how every command reports what went wrong."""

import io
import sys
from collections.abc import Callable
from importlib import import_module

from .utils.messages import UserError


COMMANDS = {
    "distill": "distil a student from a teacher, or train it without one",
    "evaluate": "score a model on a labelled data set",
    "reinforce": "run a teacher once, and store its outputs for training",
    "check": "show what a data set holds",
    "methods": "list the distillation methods, or print one in full",
    "benchmark": "measure speed and memory of losses, steps, data and metrics",
    "study": "run a grid of recipes, losses and seeds, and compare",
    "doctor": "say what a run's numbers tell about whether distillation can help",
    "export": "export a finished student to ONNX, OpenVINO, ..., in float32 or int8; check and time it",
    "predict": "run a student or an exported file on pictures, and draw what it finds",
    "convert-mmdet": "convert a detector of mmdetection for transformers",
    "push": "push the finished student of a folder to the Hub",
}


def main() -> None:
    """Runs `hf-bcd COMMAND [ARGUMENTS]`."""
    name, arguments = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if name in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print(
            "usage: hf-bcd COMMAND [ARGUMENTS]; several processes: accelerate launch -m hf_bcd COMMAND [ARGUMENTS]\n"
        )
        print("\n".join(f"  {command:{width}}  {what}" for command, what in COMMANDS.items()))
    elif name in COMMANDS:
        sys.argv[0] = f"hf-bcd {name}"  # what --help calls the program
        command = import_module(f".commands.{name.replace('-', '_')}", __package__)
        run(lambda: command.main(arguments))
    else:
        sys.exit(f"error: no command {name!r}; choose one of {', '.join(COMMANDS)}")


def run(command: Callable[[], None]) -> None:
    """Runs a command; a user's mistake and diverged training become one line and exit code 1, Ctrl-C exit code 130."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a class name that the terminal cannot show
    try:
        command()
    except (UserError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as interrupt:
        print(f"\n{interrupt}. Run the same command with --resume_from_checkpoint true to continue.", file=sys.stderr)
        sys.exit(130)
