"""Measures speed and memory as ratios within one run, and what the machine itself can do.

    python scripts/benchmark.py losses            # context loss over 256 to 32,768 positions, boundary loss, all methods
    python scripts/benchmark.py methods --methods kd,cwd --write_costs docs/methods_cost.json
    python scripts/benchmark.py step --side 128   # a whole step with BCD beside teacher and student alone
    python scripts/benchmark.py stored            # a step with a stored teacher beside a plain one and a running one
    python scripts/benchmark.py all --output_dir runs/benchmark
    python scripts/benchmark.py absorb --student runs/x --teacher runs/x/teacher --data_dir path/to/data  # how much of a loss connectors remove
    python scripts/benchmark.py boundaries --teacher runs/x/teacher --data_dir path/to/data  # how much of a crop is boundary to BCD

Prints tables, writes benchmark.json, and for `losses` a plot. Leave the machine alone meanwhile.
"""

import argparse
import platform
import sys
from pathlib import Path
from typing import Any

import torch


HERE = str(Path(__file__).parent)
# this folder goes last: its evaluate.py would be taken for the library `evaluate`
sys.path[:] = [*(path for path in sys.path if path != HERE), HERE]

from benchmarks.absorb import absorb_rows
from benchmarks.boundaries import boundary_shares
from benchmarks.data import data_rows
from benchmarks.evaluation import evaluation_rows
from benchmarks.losses import SIZES, boundary_row, relation_rows
from benchmarks.measuring import machine_rates
from benchmarks.methods import costs_of, method_row
from benchmarks.plot import plot_relation
from benchmarks.step import PAIRS, mask_rcnn_row, step_row
from benchmarks.stored import stored_rows

from hf_bcd.commands import run
from hf_bcd.losses import LOSSES
from hf_bcd.runs.arguments import DataArguments
from hf_bcd.runs.experiment import load_data
from hf_bcd.runs.methods import tasks_of
from hf_bcd.utils.costs import device_name
from hf_bcd.utils.files import write_json


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmarks that the command line names; `argv` is the process's own by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what", choices=["losses", "methods", "step", "stored", "data", "eval", "absorb", "boundaries", "all"]
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--largest", type=int, default=SIZES[-1], help="most positions of the context loss")
    of_pixels = sorted(name for name in LOSSES if "segmentation" in tasks_of(name))
    parser.add_argument(
        "--methods", default=",".join(of_pixels), help="methods to measure; by default all for label maps"
    )
    parser.add_argument("--write_costs", type=Path, help="also write the methods' costs to this file, for their table")
    parser.add_argument(
        "--side", type=int, default=None, help="crop: 512, for the whole step 512 on a GPU and 128 on the CPU"
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=None,
        help="images: 8 for the boundary loss and on a GPU; on the CPU 2 for the whole step and 1 for a method",
    )
    parser.add_argument("--maps", type=int, default=2000, help="label maps of the evaluation")
    parser.add_argument("--mean_iou", default="mean_iou", help="metric for evaluate.load: Hub name or a local script")
    parser.add_argument("--student", help="of `absorb`: folder or Hub id of a trained student")
    parser.add_argument("--teacher", help="of `absorb` and `boundaries`: likewise")
    parser.add_argument("--dataset_name", help="of both: Hub id or known name of the data")
    parser.add_argument("--data_dir", help="of both: folder of the data")
    parser.add_argument("--image_size", type=int, help="of both: short side of the pictures, for the first of --sides")
    parser.add_argument("--sides", default="176,352,512", help="of `boundaries`: sizes of crops")
    parser.add_argument("--radius", type=int, default=3, help="of `boundaries`: option of bcd")
    parser.add_argument("--stride", type=int, default=8, help="of `boundaries`: likewise")
    parser.add_argument("--steps", type=int, default=150, help="of `absorb`: training steps of the connectors")
    args = parser.parse_args(argv)
    if args.what == "absorb" and not (args.student and args.teacher):
        parser.error("absorb needs --student and --teacher, both trained")
    if args.what == "boundaries" and not args.teacher:
        parser.error("boundaries needs a trained --teacher")

    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    results: dict[str, Any] = {"machine": machine(device, dtype)}
    print(f"{results['machine']['device']}, {results['machine']['threads']} threads, PyTorch {torch.__version__}")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    chosen = ("losses", "step", "stored", "data", "eval") if args.what == "all" else (args.what,)
    for name in chosen:
        results[name] = RUNS[name](args, device, dtype)
        print_rows(name, results[name])
        write_json(args.output_dir / "benchmark.json", results)
        if name == "losses":
            plot_relation(results[name], args.output_dir / "relation.png")
        if name in ("losses", "methods") and args.write_costs is not None:
            write_json(args.write_costs, costs_of(results[name][-1], results["machine"], device))


def _losses(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    sizes = tuple(size for size in SIZES if size <= args.largest)
    batch = 8 if args.batch is None else args.batch
    rows = relation_rows(device, dtype, args.repeats, sizes)
    return [*rows, boundary_row(device, args.repeats, batch, args.side or 512), *_methods(args, device, dtype)]


def _methods(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    batch = args.batch or (8 if device.type == "cuda" else 1)
    return [method_row(args.methods.split(","), device, dtype, args.repeats, batch, args.side or 512)]


def _step(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    on_gpu = device.type == "cuda"
    side, batch = args.side or (512 if on_gpu else 128), args.batch or (8 if on_gpu else 2)
    rows = [step_row(pair, device, args.repeats, batch, side) for pair in PAIRS]
    return [*rows, mask_rcnn_row(device, args.repeats, batch, side)]


def _absorb(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    train = load_data(DataArguments(dataset_name=args.dataset_name, data_dir=args.data_dir))["train"]
    sizes = {"crop_size": args.side or 176, "image_size": args.image_size, "use_cpu": device.type == "cpu"}
    return absorb_rows(args.methods.split(","), args.student, args.teacher, train, sizes, args.steps)


def _boundaries(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    data = load_data(DataArguments(dataset_name=args.dataset_name, data_dir=args.data_dir))
    sides, path = [int(side) for side in args.sides.split(",")], args.output_dir / "boundaries.png"
    cpu, options = {"use_cpu": device.type == "cpu"}, {"radius": args.radius, "stride": args.stride}
    image_size = args.image_size or sides[0]
    return boundary_shares(args.teacher, data, sides, image_size, options, cpu, path, args.repeats)


RUNS = {
    "losses": _losses,
    "methods": _methods,
    "step": _step,
    "absorb": _absorb,
    "boundaries": _boundaries,
    "stored": lambda args, device, dtype: stored_rows(device, args.repeats, args.side or 176),
    "data": lambda args, device, dtype: data_rows(args.repeats),
    "eval": lambda args, device, dtype: evaluation_rows(
        args.maps, compared=min(20, args.maps), mean_iou=args.mean_iou
    ),
}


def machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What was measured on."""
    return {
        "device": device_name(device),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        **machine_rates(device, dtype),
    }


def print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    """For each row what it is about, then one line a measurement: median and spread, memory, ratios."""
    print(f"\n{title}\n  {'':34}{'median ms':>11}{'fastest':>11}{'slowest':>11}{'MiB':>9}  ratios")
    for row in rows:
        print("  " + ", ".join(f"{key} {_number(value)}" for key, value in row.items() if not isinstance(value, dict)))
        for name, values in row.items():
            if isinstance(values, dict):
                times = "".join(f"{1e3 * values[key]:11.1f}" for key in ("median", "low", "high"))
                memory = "-" if values["peak_bytes"] is None else f"{values['peak_bytes'] / 2**20:.0f}"
                ratios = {key: value for key, value in values.items() if key.endswith("_ratio") or "share" in key}
                shown = ", ".join(f"{key.replace('_', ' ')} {value:.3f}" for key, value in ratios.items())
                print(f"    {name:32}{times}{memory:>9}  {shown}".rstrip())


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    run(main)
