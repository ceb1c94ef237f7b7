"""Converts a RetinaNet, GFL, Mask R-CNN or Cascade Mask R-CNN of mmdetection into a folder that transformers, and a recipe's teacher, can load.

    hf-bcd convert-mmdet gfl_r50_fpn_1x_coco.pth --output teachers/gfl_r50

The file is read without running code from it.
"""

import argparse
from pathlib import Path

from ..adapters import build_adapter, image_processor
from ..adapters.mmdetection import convert_mmdetection, read_checkpoint
from ..utils.files import check_folder
from ..utils.messages import UserError


def main(argv: list[str] | None = None) -> None:
    """Converts the checkpoint that the arguments name; `argv` is the process's own command line by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help=".pth file of mmdetection 2 or 3")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to; must not hold a model yet")
    args = parser.parse_args(argv)
    check_folder(args.output, "--output")
    if (args.output / "config.json").exists():
        raise UserError(f"{args.output} holds a model already; name another folder.")
    model = convert_mmdetection(*read_checkpoint(args.checkpoint))
    model.save_pretrained(args.output)
    # the size at which mmdetection's models of COCO are tested
    image_processor(build_adapter(model), shortest_edge=800, longest_edge=1333).save_pretrained(args.output)
    config = model.config
    print(f"{args.output}: {config.head} on {config.backbone}, {config.num_labels} classes")
