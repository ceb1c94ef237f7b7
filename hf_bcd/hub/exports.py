"""Exported files in a student's folder: where they lie, and which belong to its weights."""

import hashlib
import logging
from pathlib import Path
from typing import Any

from ..utils.files import read_json


logger = logging.getLogger(__name__)

EXTENSIONS = {"onnx": "onnx", "openvino": "xml", "litert": "tflite", "executorch": "pte", "coreml": "mlpackage"}
PRECISIONS = ("float32", "float16", "int8")
BEFORE = "scores_before_quantised_steps"  # in a report: as `scores`, of the student as it was before


def model_file(form: str, precision: str = "float32") -> str:
    """Path of an exported model in a student's folder; transformers.js, Optimum and the Hub's viewers know the ONNX ones."""
    return f"{form}/model{_suffix(precision)}.{EXTENSIONS[form]}"


def report_file(form: str, precision: str = "float32") -> str:
    """Path of the report on it."""
    return f"{form}/export{_suffix(precision)}.json"


def _suffix(precision: str) -> str:
    return "" if precision == "float32" else f"_{precision}"


def weights_digest(folder: Path) -> str:
    """SHA-256 of a student's weights; tells whether an export belongs to them."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("model*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read_export(folder: Path, form: str = "onnx", precision: str = "float32") -> dict[str, Any] | None:
    """The report on an export of a student; None if there is none, it failed, or the weights have changed since."""
    path = folder / report_file(form, precision)
    if not path.is_file():
        return None
    report, model = dict(read_json(path)), folder / model_file(form, precision)
    if "files" not in report:
        logger.warning("%s is the report of an earlier version and is left out; run `hf-bcd export` again.", path)
        return None
    if report["weights_sha256"] == weights_digest(folder):
        return report
    logger.warning("%s belongs to other weights and is left out; run `hf-bcd export` again.", model)
    return None


def read_exports(folder: Path) -> list[dict[str, Any]]:
    """The reports on all exports of a student, see `read_export`."""
    found = [read_export(folder, form, precision) for form in EXTENSIONS for precision in PRECISIONS]
    return [report for report in found if report is not None]
