"""Predictions for a folder of pictures: masks, overlays, a sheet of some of them, and what was found in JSON."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF
from tqdm.auto import tqdm

from ..adapters import DenseAdapter, image_processor
from ..adapters.loading import load_adapter, saved_size
from ..adapters.specs import ModelSpec
from ..data.rows import DecodedRows, VipsRows, open_rows
from ..data.sources.layouts import EXTENSIONS
from ..data.unlabelled import picture_files
from ..export.opened import running
from ..export.students import open_export
from ..figures.predictions import contact_sheet, palette_file
from ..tasks import TASKS, Task
from ..tasks.semantic_segmentation import pixels_said
from ..training.evaluation import on_cpu
from ..utils.files import write_json
from ..utils.messages import UserError
from .tiles import check_tiles, predict_tiled


logger = logging.getLogger(__name__)

ON_SHEET = 8
LARGEST_OVERLAY = 4096  # pixels of a side, with tiles


def predict_pictures(
    source: str,
    pictures: Path,
    output_dir: Path,
    *,
    form: str | None = None,
    precision: str = "float32",
    image_size: int | None = None,
    tile: int | None = None,
    overlap: int = 64,
    least_score: float = 0.5,
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Runs a student, or an exported file of it, on pictures, and writes what it finds.

    `masks/` has palette PNGs whose values are class ids, `overlays/` the pictures with classes, boxes or masks over them,
    `contact_sheet.png` some of both, `predictions.json` the classes, what was found in each picture, and which ones
    cannot be read: they are left out with a warning.

    Without tiles, a picture is decoded as a whole, and its logits, map and overlay lie in memory. With tiles, its rows are read as
    they are needed if pyvips is installed, the map is written as it is found, and the overlay has at most 4096 pixels a side.

    Args:
        source: the student's folder or Hub id.
        pictures: a folder, or a single picture.
        output_dir: folder to write to.
        form: format of the exported file; None runs PyTorch.
        precision: precision of the file.
        image_size: short side that pictures are resized to; by default what the student's image processor does.
        tile: side of the tiles that each picture is cut into, at its own resolution; None shows it as a whole.
        overlap: how many pixels neighbouring tiles have in common.
        least_score: score from which an object is drawn and listed.
        trust_remote_code: run model code that lies in the repository.
        quiet: without a progress bar.

    Returns:
        The contents of `predictions.json`.

    Raises:
        UserError: there are no pictures, none can be read, or tiles do not fit the model or the file.
    """
    files, root = named_pictures(pictures)
    adapter = load_adapter(ModelSpec.parse(source, "student"), trust_remote_code=trust_remote_code).float().eval()
    task = TASKS[adapter.task]
    if tile is not None:
        check_tiles(tile, overlap)
        if task.mask(np.zeros((1, 1), np.uint8), 1) is None:
            raise UserError(f"--tile is for label maps, but {source} is for {task.title}; leave it out.")
    if form is not None:
        file, _ = open_export(Path(source), form, precision)
        if tile is not None and file.size not in (None, (tile, tile)):
            raise UserError(
                f"the file takes pictures of {file.size[0]} x {file.size[1]} pixels only; leave --tile out."
            )
        adapter = running(adapter, file)
    else:
        adapter = adapter.to("cuda" if torch.cuda.is_available() else "cpu")
    transform = shown_as_saved(source, adapter, task, image_size, trust_remote_code)
    content: dict[str, Any] = {
        "model": source,
        "backend": form or "pytorch",
        "id2label": adapter.id2label,
        "pictures": {},
        "unreadable": {},
    }
    spread = {index * len(files) // ON_SHEET for index in range(ON_SHEET)}
    sheet, present = [], set[int]()
    for number, path in enumerate(tqdm(files, desc="Pictures", disable=quiet)):
        name = path.relative_to(root)
        try:
            if tile is not None:
                file = placed(output_dir / "masks" / name)
                image, found, counts = predict_rows(adapter, open_rows(path), file, tile, overlap, quiet)
                said = pixels_said(counts, adapter.id2label)
            else:
                image = DecodedRows(path).image
                pixels = transform.show(TF.pil_to_tensor(image))[None].to(adapter.image_mean.device)
                found: Any = on_cpu(adapter.predict(pixels, [(image.height, image.width)])[0])
                said = task.said(found, adapter.id2label, least_score)
                if (mask := task.mask(found, len(adapter.id2label))) is not None:
                    mask.save(placed(output_dir / "masks" / name))
        except UserError as error:
            if path is files[-1] and not content["pictures"]:
                raise
            logger.warning("left out: %s", error)
            content["unreadable"][name.as_posix()] = str(error)
            continue
        drawn = task.overlay(image, found, adapter.id2label, least_score)
        drawn.save(placed(output_dir / "overlays" / name))
        if number in spread:
            sheet.append((str(name), smaller(image), smaller(drawn)))
            present |= set(said["classes"])
        content["pictures"][name.as_posix()] = said
    write_json(output_dir / "predictions.json", content)
    if sheet:
        contact_sheet(sheet, sorted(present), adapter.id2label, output_dir / "contact_sheet.png")
    return content


def named_pictures(source: Path) -> tuple[list[Path], Path]:
    """The pictures of a folder, or the single one, and the folder that their names start from.

    Raises:
        UserError: there are none, or two have names that differ in their endings only.
    """
    if source.is_file():
        return [source], source.parent
    if not source.is_dir():
        raise UserError(f"{source}: no such file or folder.")
    files = picture_files(source)
    if not files:
        raise UserError(f"{source} holds no pictures ({', '.join(EXTENSIONS)}).")
    stems: dict[Path, Path] = {}
    for path in files:
        if (other := stems.setdefault(path.with_suffix(""), path)) is not path:
            raise UserError(f"{path} and {other} would give the same file of predictions; rename one.")
    return files, source


def shown_as_saved(source: str, adapter: DenseAdapter, task: Task, image_size: int | None, trust: bool) -> Any:
    """The transform with which evaluation shows pictures to a model, at the size of its own image processor."""
    args = SimpleNamespace(image_size=image_size, square_size=None, image_longest=1333)
    if image_size is None:
        saved = saved_size(source, revision=adapter.revision, trust_remote_code=trust)
        squares = "height" in adapter.processor_options(None).get("size", {})
        vars(args).update(task.size_args(saved, squares))
    return task.eval_transform(image_processor(adapter, **task.processor_size(args)))


def predict_rows(
    adapter: DenseAdapter, picture: DecodedRows | VipsRows, file: Path, tile: int, overlap: int, quiet: bool
) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """Writes the label map of a large picture row by row.

    Returns:
        Picture and map, made smaller if they have more than 4096 pixels a side, and how many pixels each class has.
    """
    factor = -(-max(picture.width, picture.height) // LARGEST_OVERLAY)
    counts, kept, top = np.zeros(256, np.int64), [], 0
    with (
        palette_file(file, picture.width, picture.height, len(adapter.id2label)) as write,
        tqdm(total=picture.height, desc=file.stem, unit="row", leave=False, disable=quiet) as bar,
    ):
        for rows in predict_tiled(adapter, picture, tile, overlap):
            write(rows)
            counts += np.bincount(rows.ravel(), minlength=256)
            kept.append(rows[-top % factor :: factor, ::factor])
            top += len(rows)
            bar.update(len(rows))
    return picture.reduced(factor), np.concatenate(kept), counts


def placed(path: Path) -> Path:
    """A PNG file of this name, whose folder exists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_suffix(".png")


def smaller(image: Image.Image) -> Image.Image:
    """A copy that a sheet holds."""
    copy = image.copy()
    copy.thumbnail((800, 800))
    return copy
