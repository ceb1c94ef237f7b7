"""Exports a finished student to ONNX, checks the file against PyTorch and measures its latency.

    hf-bcd export runs/x                                # writes runs/x/onnx/model.onnx and export.json
    hf-bcd export runs/x --size 512 1024
    hf-bcd export me/x --output_dir exported/x

Needs `pip install 'hf_bcd[export]'`. `hf-bcd push runs/x me/x` takes the file along.
"""

import argparse

from transformers.hf_argparser import string_to_bool

from ..card.usage import mention_export
from ..export.onnx import export_student
from ..hub.pushing import ONNX_MODEL
from ..utils.messages import UserError


def main(argv: list[str] | None = None) -> None:
    """Exports the student that the arguments name; `argv` is the process's own command line by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", help="output folder of a finished run, or Hub id")
    parser.add_argument("--output_dir", help="folder to write to; the student's own, or runs/<name> for a Hub id")
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="size to check and time with")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument(
        "--trust_remote_code",
        type=string_to_bool,
        nargs="?",
        const=True,
        default=False,
        help="run the model's own code",
    )
    args = parser.parse_args(argv)
    if args.size is not None and min(args.size) < 1:
        raise UserError(f"--size is {args.size[0]} x {args.size[1]}; height and width must be at least 1 pixel.")
    folder, report = export_student(
        args.student,
        args.output_dir,
        size=args.size,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
    )
    mention_export(folder)
    parity, latency, (height, width) = report["parity"], report["latency_ms"], report["size"]
    print(f"{folder / ONNX_MODEL}: {report['bytes'] / 1e6:.1f} MB, opset {report['opset']}")
    fixed = report["fixed_because"]
    free = f"fixed at {height} x {width}, because {fixed}" if fixed else "free"
    if "matched" in parity:
        print(f"height and width: {free}")
        print(
            "NOT compared with PyTorch: it finds nothing in random images. Compare both on pictures of yours"
            if not parity["detections"]
            else f"{parity['matched']} of {parity['detections']} detections are those of PyTorch, boxes within "
            f"{parity['max_pixels']:.1e} pixels, scores within {parity['max_score']:.1e}"
            + (f", masks with an IoU of at least {parity['min_mask_iou']:.4f}" if "min_mask_iou" in parity else "")
        )
    else:
        print(f"height and width: {free}; batch: free")
        print(
            f"largest difference to PyTorch {parity['max_difference']:.1e} at logits up to {parity['max_logit']:.3g}; "
            f"same class at {100 * parity['argmax_agreement']:.2f} % of the positions"
        )
    print(f"latency at {height} x {width}: {latency['onnxruntime']:.1f} ms, PyTorch {latency['pytorch']:.1f} ms")
