"""What lies beside a store: the teacher's scores, the card, and the pictures where they are wanted."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from ..card.store_card import write_store_card
from ..data import DenseDataset, DenseDatasets
from ..stores.store import Store, scores_file
from ..utils.files import read_json, write_json
from ..utils.messages import UserError
from .experiment import evaluate_model, final_split
from .reinforce import Reinforcer


def score_teacher(folder: Path, reinforcer: Reinforcer, data: DenseDatasets, name: str = "") -> None:
    """Writes a teacher's scores on the split of final numbers beside a store, so that runs can report them."""
    split, path = final_split(data), folder / scores_file(name)
    label_map = reinforcer.teacher.label_map
    if split is None or path.is_file() or label_map is None or not label_map.is_complete:
        return
    scores = evaluate_model(reinforcer.teacher.adapter, reinforcer.config, data[split], reinforcer.synonyms)
    if reinforcer.config.should_save:
        write_json(path, {"split": split, "image_size": reinforcer.config.image_size, "scores": scores})


def summary(folder: Path) -> str:
    """A few lines on a finished store."""
    store = Store(folder)
    size = sum(path.stat().st_size for path in store.shards)
    rows = store.views * store.images
    lines = [
        f"{folder}: {store.views} views of {store.images} pictures, {size / 1e6:.1f} MB, {size / rows / 1e3:.1f} KB a view"
    ]
    for name, column in store.content["columns"].items():
        shape = " x ".join(map(str, column["shape"]))
        lines.append(f"  {name:24} {shape:18} {column['codec']:14} {column['error']:.2g} ({column['measure']})")
    return "\n".join([*lines, f"hf-bcd distill --teacher_store {folder} ..."])


def describe_store(folder: Path, repo_id: str | None = None) -> None:
    """Writes the card of a finished store."""
    store = Store(folder)
    paths = {name: folder / scores_file(name) for name in store.teachers}
    scores = {name: read_json(path) for name, path in paths.items() if path.is_file()}
    teachers = {name: part.content for name, part in store.parts.items()}
    size = sum(path.stat().st_size for path in store.shards)
    write_store_card(folder, store.content, teachers, scores, size, repo_id)


def write_pictures(folder: Path, reinforcer: Reinforcer) -> None:
    """Copies the training pictures and their label maps beside a store, without loss, as tables that `datasets` reads.

    Raises:
        UserError: the pictures have no label maps but boxes.
    """
    import datasets

    split: Any = reinforcer.dataset.dataset
    if not isinstance(split, DenseDataset):
        raise UserError(f"--with_images copies label maps; {split.name} has boxes. Leave it out.")
    if split.labelled:
        raise UserError("--with_images copies pictures that all have labels, or none; leave it out.")

    def rows() -> Iterator[dict[str, Any]]:
        for index in range(len(split)):
            sample = split[index]
            row = {"image": _png(sample["image"])}
            yield row if split.labelled == 0 else row | {"label": _png(Image.fromarray(sample["label"]))}

    columns = ("image",) if split.labelled == 0 else ("image", "label")
    features = datasets.Features({name: datasets.Image() for name in columns})
    table: Any = datasets.Dataset.from_generator(rows, features=features)
    (folder / "pictures").mkdir(exist_ok=True)
    table.to_parquet(str(folder / "pictures" / "train-00000-of-00001.parquet"))
    write_json(folder / "id2label.json", {str(index): name for index, name in split.id2label.items()})


def _png(picture: Image.Image) -> dict[str, Any]:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}
