"""Kills `hf-bcd distill` at random moments with signal 9, resumes it, and compares its end with an undisturbed run.

    python scripts/kill.py --times 30 --seed 0

A small run of everything: a teacher trained here, a baseline, the student, evaluation, report, and a push to the local
Hub of the tests. Of three moments one is a time, one is just before a change (a file of the output folder opened for
writing, renamed or removed, a folder made or removed, a request to the Hub), and one just before a request of the push.
Prints a row for each moment: when, how far the run was, and whether weights, scores and pushed files are equal to the
bit, or why not. Ends with code 1 if one is not.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
# this folder goes: its evaluate.py would be taken for the library `evaluate`
sys.path[:] = [str(ROOT), str(ROOT / "tests"), *(path for path in sys.path if path != str(ROOT / "scripts"))]

from hub.server import HubServer  # type: ignore[import-not-found] # of the tests


ARGUMENTS = [
    "--config", str(ROOT / "examples" / "recipes" / "synthetic" / "resnet18_to_resnet10.yaml"),
    "--dataset_options.size", "[48, 64]", "--dataset_options.num_images", "{train: 8, validation: 2, test: 3}",
    "--teacher.options", "{head_channels: 8, backbone_kwargs: {channels: [8, 16, 16, 32]}}",
    "--student.options", "{head_channels: 8, backbone_kwargs: {channels: [8, 8, 16, 16], stem_width: 8}}",
    "--teacher_training", "{max_steps: 6}", "--max_steps", "10", "--crop_size", "48", "--calibration_images", "4",
    "--per_device_train_batch_size", "2", "--dataloader_num_workers", "0", "--logging_steps", "3", "--report_to", "none",
    "--save_strategy", "steps", "--save_steps", "2", "--eval_strategy", "steps", "--eval_steps", "5", "--use_cpu", "true",
    "--push_to_hub", "true", "--hub_strategy", "end",
]  # fmt: skip
RESUME = ["--resume_from_checkpoint", "true"]
MODELS = {"student": "", "teacher": "_teacher", "baseline": "_baseline"}
# audited changes of files, and the position of the path among their arguments
CHANGES = {"open": 0, "os.rename": 1, "os.remove": 0, "os.mkdir": 0, "os.rmdir": 0, "shutil.rmtree": 0}
PUSH = "push"
WRITING = os.O_WRONLY | os.O_RDWR


def main(argv: list[str] | None = None) -> int:
    """Kills and compares as the arguments say; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=30, help="number of moments")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args(argv)
    draw, unequal = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as temporary, HubServer(Path(temporary) / "hub") as hub:
        environment = hub.environment(Path(temporary) / "home")  # which the clients read when they are imported
        os.environ.clear()
        os.environ |= environment
        from hf_bcd.commands import distill  # noqa: F401 - the runs are forked from here

        whole = Path(temporary) / "whole"
        start = time.monotonic()
        counts = Path(temporary) / "counts"
        if code := finish(begin(whole, [], counts=counts)):
            sys.exit(f"the undisturbed run ended with code {code}: {last_line(whole)}")
        seconds, requests = time.monotonic() - start, json.loads(counts.read_text(encoding="utf-8"))
        pushing = [number for number, change in enumerate(requests) if change == PUSH]
        print(f"undisturbed: {seconds:.1f} s, {len(requests)} changes, {len(pushing)} of them requests of the push\n")
        for number in range(args.times):
            folder = Path(temporary) / f"killed_{number}"
            if number % 3:
                change = draw.choice(pushing) if number % 3 == 2 else draw.randrange(len(requests))
                moment = f"before change {change}"
                finish(begin(folder, [], dies_at=change))
            else:
                after = draw.uniform(0, seconds)
                moment = f"after {after:.2f} s"
                pid = begin(folder, [])
                time.sleep(after)
                os.kill(pid, signal.SIGKILL)
                finish(pid)
            phase = phase_of(folder)
            code = finish(begin(folder, RESUME))
            found = f"resuming ended with code {code}: {last_line(folder)}" if code else difference(folder, whole, hub)
            unequal += bool(found)
            print(f"{number + 1:>3}  {moment:<18}  {phase:<22}  {found or 'equal'}", flush=True)
            shutil.rmtree(folder)
    print(f"\n{args.times - unequal} of {args.times} equal to the bit, seed {args.seed}")
    return int(bool(unequal))


def begin(folder: Path, more: list[str], *, dies_at: int | None = None, counts: Path | None = None) -> int:
    """Starts a run in a process forked from this one, which has imported everything; its id.

    Args:
        folder: output folder; what it prints stands beside it.
        more: arguments of the command line.
        dies_at: number of the change before which it kills itself.
        counts: gets the kind of each change as JSON.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        output = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        from hf_bcd.commands import distill, run

        changes = audited(folder, dies_at)
        run(lambda: distill.main([*ARGUMENTS, "--output_dir", str(folder), *more]))
        if counts is not None:
            counts.write_text(json.dumps(changes), encoding="utf-8")
        code = 0
    except SystemExit as end:
        print(end.code, flush=True)
    except BaseException:  # the process ends below, whatever it was, and its log must say why
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def audited(folder: Path, dies_at: int | None) -> list[str]:
    """Lists the changes of a folder and the requests from now on, and ends the process before one of them."""
    from huggingface_hub.utils import get_session

    changes: list[str] = []

    def change(kind: str) -> None:
        if len(changes) == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        changes.append(kind)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in CHANGES or (event == "open" and not (arguments[2] or 0) & WRITING):
            return
        if str(arguments[CHANGES[event]]).startswith(str(folder)):
            change(event)

    def sent(self: Any, *arguments: Any, **options: Any) -> Any:
        change(PUSH if (folder / "README.md").exists() else "request")
        return send(self, *arguments, **options)

    sys.addaudithook(hook)
    client: Any = type(get_session())
    send, client.send = client.send, sent
    return changes


def finish(pid: int) -> int:
    """Waits for a process; its exit code, minus a signal's number if that has killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def phase_of(folder: Path) -> str:
    """How far a run has come, by its files."""
    if (folder / "README.md").exists():
        return "end"
    if (folder / "results.json").exists():
        return "report"
    if (folder / "model.safetensors").exists():
        return "saved, evaluation"
    started = [(name, folder / place) for name, place in MODELS.items() if any((folder / place).glob("checkpoint-*"))]
    if not started:
        return "start" if not (folder / "_teacher").exists() else "teacher, no checkpoint"
    order = ["teacher", "baseline", "student"]
    name, place = max(started, key=lambda item: order.index(item[0]))
    steps = max(int(path.name.partition("-")[2]) for path in place.glob("checkpoint-*"))
    return f"{name}, {'finished' if (place / 'recipe.json').exists() else f'step {steps} or later'}"


def difference(folder: Path, whole: Path, hub: HubServer) -> str:
    """What differs between two finished runs, and what they have pushed; empty if nothing does."""
    for name, place in MODELS.items():
        files = [path / place / "model.safetensors" for path in (folder, whole)]
        if files[0].read_bytes() != files[1].read_bytes():
            return f"the weights of the {name} differ"
    found, expected = (json.loads((path / "results.json").read_text(encoding="utf-8")) for path in (folder, whole))
    for results in (found, expected):
        del results["protocol"]["cost"]  # times
    if found != expected:
        return "the scores differ"
    pushed, others = (hub.files(f"tester/{path.name}") for path in (folder, whole))
    if pushed.keys() != others.keys():
        return f"the pushed files differ: {sorted(pushed.keys() ^ others.keys())}"
    stale = [name for name, content in pushed.items() if content != (folder / name).read_bytes()]
    return f"not pushed as they lie in the folder: {stale}" if stale else ""


def last_line(folder: Path) -> str:
    """The last line that the runs in a folder have printed."""
    lines = folder.with_suffix(".log").read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "")


if __name__ == "__main__":
    sys.exit(main())
