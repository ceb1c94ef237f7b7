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
from ..adapters.loading import ModelSpec, load_adapter, saved_size
from ..data.images import read_image, to_rgb, upright
from ..data.sources.layouts import EXTENSIONS
from ..data.unlabelled import picture_files
from ..export.opened import running
from ..export.students import open_export
from ..figures.predictions import contact_sheet
from ..tasks import TASKS, Task
from ..training.evaluation import on_cpu
from ..utils.files import write_json
from ..utils.messages import UserError
from .tiles import check_tiles, predict_tiled


logger = logging.getLogger(__name__)

ON_SHEET = 8


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
    `contact_sheet.png` some of both, `predictions.json` the classes and what was found in each picture.

    A picture is decoded as a whole, 3 bytes a pixel, and its map and overlay take about 10 more. Without tiles, the logits of the
    whole picture come on top; with tiles, those of one row of tiles.

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
        UserError: there are no pictures, one cannot be read, or tiles do not fit the model or the file.
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
    }
    spread = {index * len(files) // ON_SHEET for index in range(ON_SHEET)}
    sheet, present = [], set[int]()
    for number, path in enumerate(tqdm(files, desc="Pictures", disable=quiet)):
        image = decoded(path, tile is not None)
        size, name = (image.height, image.width), path.relative_to(root)
        if tile is not None:
            found: Any = predict_tiled(adapter, np.asarray(image), tile, overlap)
        else:
            pixels = transform.show(TF.pil_to_tensor(image))[None].to(adapter.image_mean.device)
            (found,) = adapter.predict(pixels, [size])
            found = on_cpu(found)
        if (mask := task.mask(found, len(adapter.id2label))) is not None:
            mask.save(placed(output_dir / "masks" / name))
        drawn = task.overlay(image, found, adapter.id2label, least_score)
        drawn.save(placed(output_dir / "overlays" / name))
        said = task.said(found, adapter.id2label, least_score)
        if number in spread:
            sheet.append((str(name), smaller(image), smaller(drawn)))
            present |= set(said["classes"])
        content["pictures"][name.as_posix()] = said
    write_json(output_dir / "predictions.json", content)
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


def decoded(path: Path, large: bool) -> Image.Image:
    """A picture in RGB as viewers show it; a `large` one also beyond Pillow's limit, since the user has named it."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None if large else limit
    try:
        return to_rgb(upright(read_image(path, str(path))), str(path))
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def placed(path: Path) -> Path:
    """A PNG file of this name, whose folder exists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_suffix(".png")


def smaller(image: Image.Image) -> Image.Image:
    """A copy that a sheet holds."""
    copy = image.copy()
    copy.thumbnail((800, 800))
    return copy
