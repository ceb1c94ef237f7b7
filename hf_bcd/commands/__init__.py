"""The console script `hf-bcd`, and how every command reports what went wrong."""

import ast
import gc
import inspect
import io
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from ..utils.messages import UserError


COMMANDS = {
    "distill": "distil a student from a teacher, or train it without one",
    "evaluate": "score a model on a labelled data set",
    "reinforce": "run a teacher once, and store its outputs for training",
    "check": "show what a data set holds",
    "methods": "list the distillation methods, or print one in full",
    "study": "run a grid of recipes, losses and seeds, and compare",
    "doctor": "say what a run's numbers tell about whether distillation can help",
    "export": "export a finished student to ONNX, OpenVINO, ..., in float32 or int8; check and time it",
    "predict": "run a student or an exported file on pictures, and draw what it finds",
    "convert-mmdet": "convert a detector of mmdetection for transformers",
    "push": "push the finished student of a folder to the Hub",
}
# commands that take the arguments of a run: their help is their docstring and these
OF_RUNS = ("distill", "evaluate", "reinforce")
# commands that several processes share
PARALLEL = (*OF_RUNS, "study")


def main() -> None:
    """Runs `hf-bcd COMMAND [ARGUMENTS]`."""
    name, arguments = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if name in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print(f"usage: hf-bcd COMMAND [ARGUMENTS]; --num_processes N with {', '.join(PARALLEL)}\n")
        print("\n".join(f"  {command:{width}}  {what}" for command, what in COMMANDS.items()))
    elif name in COMMANDS:
        sys.argv[0] = f"hf-bcd {name}"  # what --help calls the program
        if name in OF_RUNS and {"-h", "--help"} & set(arguments) and "--help_all" not in arguments:
            import_module("..runs.help", __name__).print_help(_docstring(f"{__name__}.{name}"))
        if name in PARALLEL:
            arguments, processes = _split_processes(arguments)
            if processes is not None:
                launch = import_module("..runs.launching", __name__).launch
                run(lambda: launch(name, arguments, processes))
                return
        start(name, arguments)
    else:
        sys.exit(f"error: no command {name!r}; choose one of {', '.join(COMMANDS)}")


def start(name: str, arguments: list[str] | None = None) -> None:
    """Imports a command, which takes seconds, and runs it; see `run`."""

    def command() -> None:
        module = import_module(f"{__name__}.{name.replace('-', '_')}")
        gc.freeze()  # every training starts with a collection, which would walk over all modules
        module.main(arguments)

    run(command)


def _split_processes(arguments: list[str]) -> tuple[list[str], str | None]:
    """The arguments without `--num_processes N`, and N."""
    rest, found, words = list[str](), None, iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name.replace("-", "_") == "__num_processes":
            found = value if equals else next(words, "")
        else:
            rest.append(word)
    return rest, found


def _docstring(module: str) -> str | None:
    """A module's docstring, read in its file: to import it would take seconds."""
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8")), clean=False)
    return None if text is None else inspect.cleandoc(text)


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
        if said := str(interrupt):  # a checkpoint was saved
            said += ". Run the same command with --resume_from_checkpoint true to continue."
        print(f"\n{said or 'interrupted.'}", file=sys.stderr)
        sys.exit(130)
