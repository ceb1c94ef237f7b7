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
    folder: Path,
    content: Mapping[str, Any],
    teachers: Mapping[str, Mapping[str, Any]],
    scores: Mapping[str, Mapping[str, Any]],
    size: int,
    repo_id: str | None = None,
) -> None:
    """Writes README.md of a store.

    Args:
        folder: of the store.
        content: its `store.json`, with the columns of all teachers.
        teachers: what it says of each teacher, by name; "" for a single one.
        scores: `split` and `scores` of teachers by name, where they were measured.
        size: bytes of its files.
        repo_id: the name by which readers load it; a placeholder by default.
    """
    task, known = TASKS[content["task"]], CATALOG.get(content["dataset"])
    first = task.scores[0]
    made = {name: one["teacher"] for name, one in teachers.items()}
    starts = [one["repo_id"] for one in made.values() if one["repo_id"]]
    terms = {name: licence_of(one["repo_id"]) if one["repo_id"] else None for name, one in made.items()}
    shown = [
        {
            "name": name,
            "link": teacher_link(made[name]),
            "dtype": made[name]["dtype"],
            "losses": one["losses"],
            "terms": terms[name],
            "score": f"{first.title} {first.text(scores[name]['scores'][first.key])} on the split {scores[name]['split']}"
            if name in scores
            else "",
        }
        for name, one in teachers.items()
    ]
    rows = content["images"] * content["views"]
    pictures = (folder / "pictures").is_dir()
    configs = [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}], "default": True}
    ]
    if pictures:
        configs.append({"config_name": "pictures", "data_files": [{"split": "train", "path": "pictures/*.parquet"}]})
    licence: dict[str, Any] = dict(student_licence(list(terms.values()))) if starts else {}
    metadata = DatasetCardData(
        **licence,
        task_categories=[task.pipeline_tag],
        tags=[
            "hf_bcd",
            "knowledge-distillation",
            "stored-teacher",
            *(f"teacher:{one_line(start)}" for start in starts),
        ],
        size_categories=[next((words for most, words in SIZES if rows < most), "n>10M")],
        configs=configs,
    )
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
        teachers=shown,
        pictures=pictures,
        page=known and known.source,
        data_licence=known and known.licence,
        command=f"hf-bcd distill --teacher_store {name} {source} \\\n    --student nvidia/mit-b0 {flags} --output_dir runs/mine",
        snippet=SNIPPET.format(name=json.dumps(name), loaded=loaded, arguments=arguments),
        size=size,
        bytes_a_view=size / rows,
    )
    write_text(folder / "README.md", text)


def teacher_link(made: Mapping[str, Any]) -> str:
    """A teacher in Markdown: its repository and commit, or its kind."""
    if not made["repo_id"]:
        return escape_markdown(made["name"])
    return hub_link(made["repo_id"]) + (f" @ {made['revision'][:12]}" if made["revision"] else "")
