"""Small data sets with masks of objects in every layout, for the tests of this folder."""

import json

import numpy as np
from boxed_folders import NAMES, SIZE, THINGS, coco, imagefolder, yolo
from pictures import save
from PIL import Image

from hf_bcd.utils.masks import encode


TASK = "instance-segmentation"


def drawn(left, top, width, height):
    """The mask of a thing whose lower left quarter is missing."""
    mask = np.zeros(SIZE[::-1], bool)
    mask[top : top + height, left : left + width] = True
    mask[top + height // 2 : top + height, left : left + width // 2] = False
    return mask


def outline(left, top, width, height):
    """The same as a polygon."""
    right, bottom, middle, half = left + width, top + height, left + width // 2, top + height // 2
    return [left, top, right, top, right, bottom, middle, bottom, middle, half, left, half]


def runs(one):
    return uncompressed(drawn(*one["bbox"]))


def uncompressed(mask):
    flat = mask.T.ravel()
    bounds = np.flatnonzero(np.diff(np.concatenate([[False], flat]))).tolist()
    return {"size": list(mask.shape), "counts": np.diff([0, *bounds, flat.size]).tolist()}


def compressed(one):
    rle = encode(drawn(*one["bbox"]))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def halves(one):
    """In two pieces, and with a polygon of two points."""
    left, top, width, height = one["bbox"]
    right, bottom, middle, half = left + width, top + height, left + width // 2, top + height // 2
    upper = [left, top, right, top, right, half, left, half]
    return [upper, [1, 1, 60, 60], [middle, half, right, half, right, bottom, middle, bottom]]


def yolo_outlines(root):
    yolo(root)
    for stem, things in THINGS.items():
        points = [(np.reshape(outline(*box), (-1, 2)) / SIZE).ravel() for *box, _ in things]
        lines = [f"{kind} {' '.join(map(str, line))}" for line, (*_, kind) in zip(points, things, strict=True)]
        (root / f"train/labels/{stem}.txt").write_text("\n".join(lines))
    (root / "data.yaml").write_text("names: [cat, dog, owl]")
    return root


def described(root, field="segmentation", form=lambda box: [outline(*box)]):
    imagefolder(root)
    lines = [json.loads(line) for line in (root / "train/metadata.jsonl").read_text().splitlines()]
    for line in lines:
        line["objects"][field] = [form(box) for box in line["objects"]["bbox"]]
    (root / "train/metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


def polygons(root, **options):
    return coco(root, segmentation=lambda one: [outline(*one["bbox"])], **options)


def id_maps(root, images="{}/images", maps="{}/instances", split="train", listed=True, things=THINGS, dtype=np.uint16):
    """Maps of instance ids, of which a file of the same stem names the classes."""
    for stem, some in things.items():
        save(root / images.format(split) / f"{stem}.jpg", SIZE)
        ids = np.zeros(SIZE[::-1], dtype)
        for number, (*box, _) in enumerate(some, 1):
            ids[drawn(*box)] = 40 * number
        save(root / maps.format(split) / f"{stem}.png", Image.fromarray(ids))
        if listed:
            classes = {40 * number: NAMES[kind] for number, (*_, kind) in enumerate(some, 1)}
            (root / maps.format(split) / f"{stem}.json").write_text(json.dumps(classes))
    return root
