"""The card's example of use: the same code that a reader copies runs here first, on the saved folder."""

import io
import json
import logging
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
    MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES,
)

from ..data import DenseDataset
from ..models import MODEL_TYPES
from ..utils.text import one_line


logger = logging.getLogger(__name__)

PICTURE = "picture.jpg"
PIPELINE = """\
from transformers import pipeline

segment = pipeline("image-segmentation", model={model}{trust})
for region in segment({picture}{subtask}):  # a path, an address or a PIL image
    covered = region["mask"].histogram()[255] / (region["mask"].width * region["mask"].height)
    print(region["label"], f"{{covered:.1%}}")
"""
TENSORS = """\
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

processor = AutoImageProcessor.from_pretrained({model}{trust})
model = AutoModelForSemanticSegmentation.from_pretrained({model}{trust}).eval()
image = Image.open({picture}).convert("RGB")
with torch.no_grad():
    outputs = model(**processor(image, return_tensors="pt"))
(classes,) = processor.post_process_semantic_segmentation(outputs, [image.size[::-1]])
print(classes.shape, [model.config.id2label[index] for index in classes.unique().tolist()])
"""


def usage_snippets(folder: Path, repository: str, data: DenseDataset) -> list[str]:
    """Code that loads and runs the student, each piece with what it printed for the first picture of `data`.

    What cannot be run appears without output, and a warning is logged.

    Args:
        folder: the saved student.
        repository: what readers load it by.
        data: pictures to try it on.
    """
    config = json.loads((folder / "config.json").read_text())
    templates = [PIPELINE]
    if config["model_type"] in MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES:
        templates.append(TENSORS)
    snippets = [fill(template, repository, PICTURE, config) for template in templates]
    with tempfile.TemporaryDirectory() as temporary:
        picture = Path(temporary) / "picture.png"
        try:
            next(iter(data))["image"].save(picture)
            printed = [run(fill(template, str(folder), str(picture), config)) for template in templates]
        except Exception as error:  # the student is trained and saved; its card must not be what fails
            logger.warning("the card's example of use did not run (%s: %s)", type(error).__name__, one_line(error))
            return snippets
    return [snippet + comment(output) for snippet, output in zip(snippets, printed, strict=True)]


def fill(template: str, model: str, picture: str, config: dict) -> str:
    """The code for one model and picture."""
    # the architecture of our own models lies beside their weights; code of anybody else never runs here
    trust = ", trust_remote_code=True" if config["model_type"] in MODEL_TYPES else ""
    # by itself the pipeline would ask a universal model for panoptic segments
    subtask = ', subtask="semantic"' if config["model_type"] in MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES else ""
    return template.format(model=json.dumps(model), picture=json.dumps(picture), trust=trust, subtask=subtask)


def run(code: str) -> str:
    """What the code prints."""
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(io.StringIO()):  # progress bars of loading weights
        exec(compile(code, "<usage>", "exec"), {"__name__": "usage"})
    return printed.getvalue()


def comment(output: str) -> str:
    """Printed lines as comments."""
    return "".join(f"# {one_line(line)}\n" for line in output.splitlines())
