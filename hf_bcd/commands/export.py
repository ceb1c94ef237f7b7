"""Exports a finished student to a file for a runtime, checks it against PyTorch and measures its latency.

    hf-bcd export runs/x                                # writes runs/x/onnx/model.onnx and export.json
    hf-bcd export runs/x --precision int8 --data_dir path/to/data
    hf-bcd export runs/x --format openvino --precision float16 --size 512 1024
    hf-bcd export me/x --output_dir exported/x

Each format needs its packages: `pip install 'hf_bcd[onnx]'`, and so on. int8 finds its scales with training pictures of the
run's data, which its `recipe.yaml` names, or options of data as in `hf-bcd distill` (--data_dir, --dataset_name,
--image_size, ...). With data, file and student are scored on the validation split. `hf-bcd push runs/x me/x` takes the files along.
"""

import argparse
from typing import Any

from ..export.targets import TARGETS, target_of
from ..hub.exports import BEFORE, EXTENSIONS, PRECISIONS, model_file
from ..runs.exporting import CALIBRATION_IMAGES, data_arguments, export_run, load_run_data
from ..runs.help import add_trust_argument
from ..tasks import TASKS
from ..utils.files import check_folder
from ..utils.messages import UserError


def main(argv: list[str] | None = None) -> None:
    """Exports the student that the arguments name; `argv` is the process's own command line by default."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("student", help="output folder of a finished run, or Hub id")
    parser.add_argument("--format", choices=EXTENSIONS, default="onnx", help="kind of file")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="float32", help="of weights; int8 also of what is computed"
    )
    parser.add_argument(
        "--calibration_images",
        type=int,
        default=CALIBRATION_IMAGES,
        help="training pictures that find the scales of int8",
    )
    parser.add_argument("--output_dir", help="folder to write to; the student's own, or runs/<name> for a Hub id")
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="size to check and time with")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    add_trust_argument(parser)
    args, rest = parser.parse_known_args(argv)
    if args.size is not None and min(args.size) < 1:
        raise UserError(f"--size is {args.size[0]} x {args.size[1]}; height and width must be at least 1 pixel.")
    if args.output_dir is not None:
        check_folder(args.output_dir, "--output_dir")
    target_of(args.format, args.precision)  # before any data are read
    found, of_data = data_arguments(args.student, rest), dict[str, Any]()
    # a file that needs no pictures is written even where those of the run are gone
    if found is not None and (rest or args.precision == "int8"):
        data_args, config, synonyms = found
        of_data = {"data": load_run_data(args.student, data_args), "config": config, "synonyms": synonyms}
    folder, report = export_run(
        args.student,
        args.format,
        args.precision,
        **of_data,
        calibration_images=args.calibration_images,
        output_dir=args.output_dir,
        size=args.size,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
    )
    print(f"{folder / model_file(args.format, args.precision)}: {summary(report)}")


def summary(report: dict[str, Any]) -> str:
    """What a report says, in lines."""
    parity, fixed, (height, width) = report["parity"], report["fixed_because"], report["size"]
    size = f"{report['bytes'] / 1e6:.1f} MB, PyTorch {report['pytorch_bytes'] / 1e6:.1f} MB"
    lines = [size + (f", opset {report['opset']}" if "opset" in report else "")]
    batch = "; batch: free" if TARGETS[report["format"]].from_onnx and "matched" not in (parity or {}) else ""
    lines += [f"height and width: {f'fixed at {height} x {width}, because {fixed}' if fixed else 'free'}{batch}"]
    if parity is None:
        lines += [f"NOT run: {report['title']} files run on other machines. Compare both there before you rely on it"]
    elif "matched" in parity:
        lines += [
            "NOT compared with PyTorch: it finds nothing in random images. Compare both on pictures of yours"
            if not parity["detections"]
            else f"{parity['matched']} of {parity['detections']} detections are those of PyTorch, boxes within "
            f"{parity['max_pixels']:.1e} pixels, scores within {parity['max_score']:.1e}"
            + (f", masks with an IoU of at least {parity['min_mask_iou']:.4f}" if "min_mask_iou" in parity else "")
        ]
    else:
        lines += [
            f"largest difference to PyTorch {parity['max_difference']:.1e} at logits up to {parity['max_logit']:.3g}; "
            f"same class at {100 * parity['argmax_agreement']:.2f} % of the positions of random images"
        ]
    if latency := report.get("latency_ms"):
        own, threads = latency[report["runtime"]], f"{report['threads']} thread"
        lines += [f"latency at {height} x {width}: {own:.1f} ms, PyTorch {latency['pytorch']:.1f} ms ({threads})"]
    for split, scores in report.get("scores", {}).items():
        lines += [f"{split} split of {scores['dataset']}: {in_words(scores)}"]
        if before := report.get(BEFORE, {}).get(split):
            lines += [f"the student before its quantised steps: {in_words(before)}"]
    return "\n".join(lines)


def in_words(scores: dict[str, Any]) -> str:
    """The first score of a file beside that of its student."""
    score = next(one for task in TASKS.values() for one in task.scores if one.key in scores["file"])
    file, own = (score.text(scores[name][score.key]) for name in ("file", "pytorch"))
    same = scores.get("argmax_agreement")
    return f"{score.label} {file}, PyTorch {own}" + (
        f"; same class at {100 * same:.2f} % of the pixels" if same else ""
    )
