"""A hook of mkdocs: pages and pictures of the site that lie elsewhere, or that the code itself knows."""

import inspect
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files


ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "hf_bcd" / "examples" / "studies" / "results"
FROM_DOCS = "../hf_bcd/examples/studies/results/"


def on_files(files: Files, config: Any) -> Files:
    """Adds the changelog, the paper index, the functions of losses and the pictures of studies."""
    from hf_bcd import losses  # imports torch
    from hf_bcd.runs.methods import paper_index

    exported = [getattr(losses, name) for name in losses.__all__]
    functions = [f"::: {item.__module__}.{item.__name__}" for item in exported if inspect.isfunction(item)]
    files.append(File.generated(config, "functions.md", content="\n\n".join(["# Losses as functions", *functions])))
    files.append(File.generated(config, "changelog.md", content=(ROOT / "CHANGELOG.md").read_text(encoding="utf-8")))
    files.append(File.generated(config, "papers.md", content=paper_index()))
    for picture in sorted(RESULTS.rglob("*.png")):
        place = f"results/{picture.relative_to(RESULTS).as_posix()}"
        files.append(File.generated(config, place, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Points links to pictures of studies, which on GitHub lead out of docs/, to their copies."""
    return markdown.replace(f"]({FROM_DOCS}", "](results/")
