"""Runs a student, or an exported file of it, on pictures and draws what it finds.

    hf-bcd predict runs/x pictures/ --output out/
    hf-bcd predict runs/x pictures/ --output out/ --backend onnx --precision int8
    hf-bcd predict me/x aerial.tif --output out/ --tile 512 --overlap 64

Writes `out/masks` (PNG whose values are class ids), `out/overlays`, `out/contact_sheet.png` and `out/predictions.json`. Tiles
are cut at the picture's own resolution and blended where they overlap; overlays then have at most 4096 pixels a side. After
`pip install 'hf_bcd[large]'`, tiles of JPEG, PNG and TIFF files are read as they are needed, so that pictures may be larger than
memory; other files, and all without it, are decoded as a whole, 3 bytes a pixel.
"""

import argparse
from pathlib import Path

from ..hub.exports import EXTENSIONS, PRECISIONS
from ..runs.help import add_trust_argument
from ..runs.predicting import predict_pictures
from ..training.hardware import limit_threads
from ..utils.files import check_folder
from ..utils.messages import UserError


def main(argv: list[str] | None = None) -> None:
    """Predicts what the arguments name; `argv` is the process's own command line by default."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("student", help="output folder of a finished run, or Hub id")
    parser.add_argument("pictures", type=Path, help="folder with pictures at any depth, or one picture")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--backend", choices=EXTENSIONS, help="run the file of `hf-bcd export` instead of the weights")
    parser.add_argument("--precision", choices=PRECISIONS, help="of that file; float32 by default")
    parser.add_argument("--image_size", type=int, help="short side to resize to; that of the student's processor")
    parser.add_argument("--tile", type=int, help="cut pictures into tiles of this side, in pixels")
    parser.add_argument("--overlap", type=int, help="pixels that neighbouring tiles have in common (64)")
    parser.add_argument("--threshold", type=float, default=0.5, help="score from which an object is drawn and listed")
    add_trust_argument(parser)
    args = parser.parse_args(argv)
    if args.precision is not None and args.backend is None:
        raise UserError(f"--precision {args.precision} is of an exported file; say which one with --backend.")
    if args.tile is None and args.overlap is not None:
        raise UserError(f"--overlap is {args.overlap}, but only tiles overlap; give --tile, or leave it out.")
    if args.tile is not None and args.image_size is not None:
        raise UserError("--tile cuts pictures at their own size, and --image_size changes it; leave one out.")
    if args.image_size is not None and args.image_size < 1:
        raise UserError(f"--image_size is {args.image_size}; the short side must be at least 1 pixel.")
    if not 0 <= args.threshold <= 1:
        raise UserError(f"--threshold is {args.threshold:g}; scores lie in 0..1.")
    check_folder(args.output, "--output")
    limit_threads()
    content = predict_pictures(
        args.student,
        args.pictures,
        args.output,
        form=args.backend,
        precision=args.precision or "float32",
        image_size=args.image_size,
        tile=args.tile,
        overlap=64 if args.overlap is None else args.overlap,
        least_score=args.threshold,
        trust_remote_code=args.trust_remote_code,
    )
    lost = f", {len(content['unreadable'])} cannot be read" if content["unreadable"] else ""
    print(f"{args.output}: {len(content['pictures'])} pictures{lost}")
