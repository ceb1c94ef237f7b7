"""What lies in a student's `onnx` folder, in the words of its card and for a push."""

import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Any

from ..card.escaping import code_block, escape_markdown
from ..models import MODEL_TYPES


logger = logging.getLogger(__name__)

# where transformers.js, Optimum and the Hub's viewers look
FOLDER, MODEL_FILE, REPORT_FILE = "onnx", "model.onnx", "export.json"
SECTION = re.compile(r"^## ONNX\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
NEXT_SECTION = re.compile(r"^## How it was ", re.MULTILINE)
EXAMPLE = """\
import onnxruntime
from huggingface_hub import hf_hub_download
from PIL import Image
from transformers import AutoImageProcessor

processor = AutoImageProcessor.from_pretrained({model}{trust})
session = onnxruntime.InferenceSession(hf_hub_download({model}, filename="onnx/model.onnx"))
images = processor(Image.open("picture.jpg").convert("RGB"){resize}, return_tensors="np")
(logits,) = session.run(None, {{"pixel_values": images["pixel_values"]}})
"""


def weights_digest(folder: Path) -> str:
    """SHA-256 of a student's weights; tells whether an export belongs to them."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("model*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read_export(folder: Path) -> dict[str, Any] | None:
    """The report on a student's export; None if there is none, it failed, or the weights have changed since."""
    path = folder / FOLDER / REPORT_FILE
    if not path.is_file():
        return None
    report = json.loads(path.read_text())
    if report["weights_sha256"] == weights_digest(folder):
        return report
    logger.warning("%s belongs to other weights and is left out; run `hf-bcd export` again.", path.parent)
    return None


def onnx_files(folder: Path) -> list[str]:
    """Paths of a student's export, relative to its folder; none if `read_export` finds none."""
    if read_export(folder) is None:
        return []
    files = [MODEL_FILE, f"{MODEL_FILE}.data", REPORT_FILE]  # weights of more than 1.5 GB lie apart
    return [f"{FOLDER}/{name}" for name in files if (folder / FOLDER / name).is_file()]


def onnx_section(folder: Path, repository: str) -> str:
    """The card's section about a student's export; empty if `read_export` finds none.

    Args:
        folder: the student's folder.
        repository: what readers load it by.
    """
    report = read_export(folder)
    if report is None:
        return ""
    parity, latency, (height, width) = report["parity"], report["latency_ms"], report["size"]
    free = "Batch, height and width are free."
    resize = ""
    if report["fixed_because"]:
        free = f"The batch is free; images must have {height} x {width} pixels, because {report['fixed_because']}."
        resize = f', do_resize=True, size={{"height": {height}, "width": {width}}}'
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    trust = ", trust_remote_code=True" if model_type in MODEL_TYPES else ""
    example = EXAMPLE.format(model=json.dumps(repository), trust=trust, resize=resize)
    return f"""## ONNX

`{FOLDER}/{MODEL_FILE}` (opset {report["opset"]}, {report["bytes"] / 1e6:.1f} MB) maps `pixel_values` to `logits`. {escape_markdown(free)}

{code_block(example, "python")}

On random images of {", ".join(f"{h} x {w}" for h, w in parity["sizes"])} pixels its logits differ from those of PyTorch by at most {parity["max_difference"]:.1e} (largest logit {parity["max_logit"]:.3g}), and {100 * parity["argmax_agreement"]:.2f} % of the positions get the same class. Latency: {latency["onnxruntime"]:.3g} ms in onnxruntime, {latency["pytorch"]:.3g} ms in PyTorch ({height} x {width} pixels, one image, float32, {escape_markdown(report["device"])}, threads: {report["threads"]}; median of {report["repeats"]} passes). `{FOLDER}/{REPORT_FILE}` has these numbers."""


def mention_in_card(folder: Path) -> None:
    """Brings the section about the export in a student's README.md up to date; does nothing without a card."""
    path = folder / "README.md"
    if not path.is_file():
        return
    card = SECTION.sub("", path.read_text())
    section, place = onnx_section(folder, folder.resolve().name), NEXT_SECTION.search(card)
    start = place.start() if place else len(card)
    path.write_text(f"{card[:start].rstrip()}\n\n{section}\n\n{card[start:]}".rstrip() + "\n")
