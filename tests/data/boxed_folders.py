"""Small data sets with boxes in every layout, for the tests of this folder."""

import json

from pictures import save
from PIL import Image


SIZE = (100, 80)
NAMES = ("cat", "dog", "owl")
# left, top, width, height and class of the things in each picture
THINGS = {
    "a": [(10, 20, 30, 40, 0), (50, 10, 45, 30, 2)],
    "b": [(60, 30, 20, 10, 1)],
    "c": [(5, 5, 90, 70, 1), (70, 40, 25, 35, 0), (40, 8, 8, 50, 2)],
}


def corners(things):
    return [[left, top, left + width, top + height] for left, top, width, height, _ in things]


def coco(folder, things=THINGS, file="annotations/instances_train.json", images="train", ids=(0, 1, 2), **changes):
    """A folder in COCO's layout; a value of `changes` replaces that key of every annotation, or is called with it."""
    annotations, entries = [], []
    for number, (stem, some) in enumerate(things.items(), 1):
        save(folder / images / f"{stem}.jpg", SIZE)
        entries.append({"id": number, "file_name": f"{stem}.jpg", "width": SIZE[0], "height": SIZE[1]})
        for *box, kind in some:
            one = {"id": len(annotations) + 1, "image_id": number, "bbox": box, "category_id": ids[kind], "iscrowd": 0}
            one["area"] = box[2] * box[3]
            annotations.append(one | {key: change(one) for key, change in changes.items()})
    categories = [{"id": index, "name": name} for index, name in zip(ids, NAMES, strict=True)]
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": entries, "annotations": annotations, "categories": categories}))
    return folder


def yolo(folder, things=THINGS, images="train/images", labels="train/labels", lines=None):
    for stem, some in things.items():
        save(folder / images / f"{stem}.png", SIZE)
        text = "".join(
            f"{kind} {(left + width / 2) / SIZE[0]} {(top + height / 2) / SIZE[1]} {width / SIZE[0]} {height / SIZE[1]}\n"
            for left, top, width, height, kind in some
        )
        file = folder / labels / f"{stem}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text if lines is None else lines)
    return folder


def voc(folder, things=THINGS, annotations="Annotations", images="JPEGImages", extra=""):
    for stem, some in things.items():
        save(folder / images / f"{stem}.jpg", SIZE)
        objects = "".join(
            f"<object><name>{NAMES[kind]}</name>{extra}<bndbox><xmin>{left + 1}</xmin><ymin>{top + 1}</ymin>"
            f"<xmax>{left + width}</xmax><ymax>{top + height}</ymax></bndbox></object>"
            for left, top, width, height, kind in some
        )
        file = folder / annotations / f"{stem}.xml"
        file.parent.mkdir(parents=True, exist_ok=True)
        size = f"<size><width>{SIZE[0]}</width><height>{SIZE[1]}</height></size>"
        file.write_text(f"<annotation>{size}{objects}</annotation>")
    return folder


def imagefolder(folder, things=THINGS, names=NAMES):
    lines = []
    for stem, some in things.items():
        save(folder / f"train/{stem}.png", SIZE)
        objects = {"bbox": [box for *box, _ in some], "category": [names[kind] for *_, kind in some]}
        lines.append(json.dumps({"file_name": f"{stem}.png", "objects": objects}))
    (folder / "train/metadata.jsonl").write_text("\n".join(lines))
    return folder


def picture():
    return Image.new("RGB", SIZE, (10, 20, 30))
