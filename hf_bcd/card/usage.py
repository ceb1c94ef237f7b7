"""The card's examples of use, of which those of PyTorch run here first, on the saved folder; and its sections on exports."""

import io
import json
import logging
import re
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image
from transformers.models.auto.modeling_auto import MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES

from ..hub.exports import BEFORE, read_exports
from ..models import MODEL_TYPES
from ..tasks import TASKS
from ..tasks.base import Score
from ..utils.files import write_text
from ..utils.text import one_line
from .escaping import escape_markdown, render


logger = logging.getLogger(__name__)

EXPORT_SECTIONS = re.compile(r"^## (?:ONNX|Exported files)\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
AFTER_EXPORTS = re.compile(r"^## How it was |\Z", re.MULTILINE)


def usage_snippets(folder: Path, repository: str, templates: Sequence[str], picture: Image.Image | None) -> list[str]:
    """Code that loads and runs a student, each piece with its output for a picture.

    Without a picture, or where it does not run, the code appears without output; the latter is a warning.
    """
    snippets = [fill(template, folder, repository) for template in templates]
    printed = [""] * len(templates)
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "picture.png"
        try:
            if picture is not None:
                picture.save(file)
                printed = [_output(fill(template, folder, str(folder), str(file))) for template in templates]
        except Exception as error:  # the student is trained and saved; its card must not be what fails
            logger.warning("the card's example of use did not run (%s: %s)", type(error).__name__, one_line(error))
    return [code + output for code, output in zip(snippets, printed, strict=True) if code]


def fill(template: str, folder: Path, model: str, picture: str = "picture.jpg") -> str:
    """Code that runs the student of a folder, loaded by the name `model`."""
    universal = _model_type(folder) in MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES
    values = {"model": json.dumps(model), "picture": json.dumps(picture), "trust": _trust(folder)}
    return jinja2.Template(template, trim_blocks=True, keep_trailing_newline=True).render(values, universal=universal)


def _output(code: str) -> str:
    """Printed lines as comments."""
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(io.StringIO()):  # progress bars of loading weights
        exec(compile(code, "<usage>", "exec"), {"__name__": "usage"})
    return "".join(f"# {one_line(line)}\n" for line in printed.getvalue().splitlines())


def _model_type(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]


def _trust(folder: Path) -> str:
    # the architecture of our own models lies beside their weights; code of anybody else never runs here
    return ", trust_remote_code=True" if _model_type(folder) in MODEL_TYPES else ""


def export_sections(folder: Path, repository: str) -> str:
    """The sections about a student's exports, loaded by the name `repository`; empty if its weights have none."""
    reports = read_exports(folder)
    onnx = next((one for one in reports if (one["format"], one["precision"]) == ("onnx", "float32")), None)
    parts = [render("onnx.md", report=onnx, model=json.dumps(repository), trust=_trust(folder))] if onnx else []
    return "\n\n".join([*parts, *([exports_table(reports)] if reports else [])])


def exports_table(reports: Sequence[dict[str, Any]]) -> str:
    """The section with a row for each file: its size, its latency, and its score beside that of the student."""
    splits = dict.fromkeys(
        (split, one["dataset"]) for report in reports for split, one in report.get("scores", {}).items()
    )
    score = next(
        (
            s
            for task in TASKS.values()
            for s in task.scores
            for r in reports
            for one in r.get("scores", {}).values()
            if s.key in one["file"]
        ),
        None,
    )
    cells = []
    for report in reports:
        found = [report.get("scores", {}).get(split) for split, _ in splits]
        texts = [
            [score.text(one[name][score.key]) if one and score else "" for name in ("file", "pytorch")]
            for one in found
        ]
        cells.append([text for pair in texts for text in pair])
    titles = [f"{score.label}, {escape_markdown(split)}" for split, _ in splits] if score else []
    gains = [words for report in reports if score for words in gain_words(report, score)]
    return render("exports.md", reports=reports, titles=titles, cells=cells, gains=gains)


def gain_words(report: dict[str, Any], score: Score) -> list[str]:
    """What quantised steps brought a file on each split that it was scored on."""
    found = []
    for split, before in report.get(BEFORE, {}).items():
        changes, texts = [], []
        for one in (before, report["scores"][split]):
            own, file = (score.scale * one[name][score.key] for name in ("pytorch", "file"))
            changes.append(file - own)
            texts.append(f"{own:.2f} in PyTorch and {file:.2f} in int8")
        found.append(
            f"`{report['file']}` is of a student whose last steps were quantised: {score.title} on the {split} split was {texts[0]} before them "
            f"and is {texts[1]} now, so that int8 changed it by {changes[0]:+.2f} points before and changes it by {changes[1]:+.2f} now."
        )
    return found


def mention_exports(folder: Path) -> None:
    """Brings these sections in a student's README.md up to date; does nothing without a card."""
    path = folder / "README.md"
    if path.is_file():
        card = EXPORT_SECTIONS.sub("", path.read_text(encoding="utf-8"))
        sections = export_sections(folder, folder.resolve().name)
        place = next(AFTER_EXPORTS.finditer(card)).start()
        write_text(path, f"{card[:place].rstrip()}\n\n{sections}\n\n{card[place:]}".rstrip() + "\n")
