"""The card of a stored teacher, as a data set of the Hub."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCardData

from ..data.sources.catalog import CATALOG
from ..tasks import TASKS
from ..utils.files import write_text
from ..utils.text import one_line
from .escaping import escape_markdown, hub_link, render
from .licences import licence_of, student_licence


SNIPPET = """\
from hf_bcd import BCDConfig, BCDTrainer, load_dense_dataset
from hf_bcd.stores import Store

store = Store.open({name})
data = load_dense_dataset({loaded})
trainer = BCDTrainer(student, store, BCDConfig("runs/mine", {arguments}), data["train"], data["validation"])"""
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))


def write_store_card(
    folder: Path, content: Mapping[str, Any], scores: Mapping[str, Any], size: int, repo_id: str | None = None
) -> None:
    """Writes README.md of a store.

    Args:
        folder: of the store.
        content: its `store.json`.
        scores: `split` and `scores` of the teacher, where they were measured.
        size: bytes of its files.
        repo_id: the name by which readers load it; a placeholder by default.
    """
    made, task, known = content["teacher"], TASKS[content["task"]], CATALOG.get(content["dataset"])
    start = made["repo_id"]
    terms = licence_of(start) if start else None
    teacher = escape_markdown(made["name"])
    if start:
        teacher = hub_link(start) + (f" @ {made['revision'][:12]}" if made["revision"] else "")
    rows = content["images"] * content["views"]
    pictures = (folder / "pictures").is_dir()
    configs = [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}], "default": True}
    ]
    if pictures:
        configs.append({"config_name": "pictures", "data_files": [{"split": "train", "path": "pictures/*.parquet"}]})
    licence: dict[str, Any] = dict(student_licence([terms])) if start else {}
    metadata = DatasetCardData(
        **licence,
        task_categories=[task.pipeline_tag],
        tags=[
            "hf_bcd",
            "knowledge-distillation",
            "stored-teacher",
            *([f"teacher:{one_line(start)}"] if start else []),
        ],
        size_categories=[next((words for most, words in SIZES if rows < most), "n>10M")],
        configs=configs,
    )
    first = task.scores[0]
    name = repo_id or "path/to/store"
    keys = ("image_size", "crop_size", "scale_min", "scale_max", "color_jitter", "square_size")
    arguments = ", ".join(
        f"{key}={content['transform'][key]!r}" for key in keys if content["transform"][key] is not None
    )
    flags = " ".join(f"--{key} {content['transform'][key]}" for key in keys if content["transform"][key] is not None)
    source = f"--dataset_name {name} --dataset_config pictures" if pictures else "--data_dir path/to/pictures"
    loaded = f'{json.dumps(name)}, config="pictures"' if pictures else '"path/to/pictures"'
    if known is not None and not pictures:
        source, loaded = f"--dataset_name {content['dataset']}", json.dumps(content["dataset"])
    text = render(
        "store.md",
        metadata=metadata.to_yaml(),
        name=name.rpartition("/")[2] if repo_id else "Stored teacher",
        content=content,
        teacher=teacher,
        terms=terms,
        pictures=pictures,
        page=known and known.source,
        data_licence=known and known.licence,
        command=f"hf-bcd distill --teacher_store {name} {source} \\\n    --student nvidia/mit-b0 {flags} --output_dir runs/mine",
        snippet=SNIPPET.format(name=json.dumps(name), loaded=loaded, arguments=arguments),
        size=size,
        bytes_a_view=size / rows,
        scores=f"{first.title} {first.text(scores['scores'][first.key])} on the split {scores['split']}"
        if scores
        else "",
    )
    write_text(folder / "README.md", text)
