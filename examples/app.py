"""Looks at students in the browser: picture, mask, overlay, boundaries, latency, and two students beside each other.

    pip install 'hf_bcd[app]'
    python examples/app.py runs/x
    python examples/app.py runs/x me/segformer-b0-bcd --port 7860

Each student is a folder or a Hub id: of label maps, boxes or masks of objects. `--trust_remote_code` runs code that lies in a Hub repository.
"""

import argparse
import statistics
import time
from functools import lru_cache
from typing import Any

import gradio as gr
import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from hf_bcd.adapters import DenseAdapter
from hf_bcd.adapters.loading import load_adapter
from hf_bcd.losses.boundary import score_changes
from hf_bcd.runs.predicting import shown_as_saved
from hf_bcd.tasks import TASKS, Task
from hf_bcd.training.evaluation import on_cpu
from hf_bcd.utils.messages import UserError


REPEATS = 5
LEAST_SCORE = 0.5  # of an object that is shown
HEIGHT = 300  # pixels of a picture on the page
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@lru_cache(maxsize=4)
def load(name: str, trust_remote_code: bool) -> tuple[DenseAdapter, Task, Any]:
    """A student, its task and the transform that shows it a picture."""
    adapter = load_adapter(name, trust_remote_code=trust_remote_code).float().to(DEVICE).eval()
    task = TASKS[adapter.task]
    return adapter, task, shown_as_saved(name, adapter, task, None, trust_remote_code)


@torch.no_grad()
def look(name: str, picture: Image.Image, trust_remote_code: bool) -> dict[str, Any]:
    """Mask, overlay and boundaries of a picture, uint8 `[H, W, 3]`, with the classes found and milliseconds a pass.

    Detectors and models of instances have boxes and masks over the picture, no map of classes and no boundaries of it.
    """
    adapter, task, transform = load(name, trust_remote_code)
    shown = transform.show(TF.pil_to_tensor(picture))[None].to(DEVICE)
    seconds = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        outputs = adapter(shown)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    size = (picture.height, picture.width)
    found = on_cpu(adapter.predict(shown, [size])[0])
    mask, boundary = task.mask(found, len(adapter.id2label)), None
    if mask is not None and outputs.logits is not None:
        changes = score_changes(outputs.logits)[:, None]
        field = (
            torch.nn.functional.interpolate(changes / changes.amax().clamp_min(1e-6), size, mode="bilinear")[0, 0]
            .cpu()
            .numpy()
        )
        boundary = (255 * colormaps["inferno"](field)[..., :3]).astype(np.uint8)
    return {
        "mask": None if mask is None else np.asarray(mask.convert("RGB")),
        "overlay": np.asarray(task.overlay(picture, found, adapter.id2label, LEAST_SCORE)),
        "boundary": boundary,
        "classes": [adapter.id2label[index] for index in task.said(found, adapter.id2label, LEAST_SCORE)["classes"]],
        "milliseconds": 1000 * statistics.median(seconds[1:]),  # the first pass allocates
    }


def show(first: str, second: str, picture: Image.Image | None, trust_remote_code: bool) -> tuple[Any, ...]:
    """What the page shows: mask, overlay and boundaries of the first student, both overlays, and their numbers."""
    if picture is None:
        raise gr.Error("Choose a picture first.")
    picture = picture.convert("RGB")
    names = [name.strip() for name in (first, second) if name.strip()]
    if not names:
        raise gr.Error("Name a student: a folder or a Hub id.")
    try:
        found = {name: look(name, picture, trust_remote_code) for name in names}
    except (UserError, OSError) as error:
        raise gr.Error(str(error)) from error
    rows = [f"| {name} | {one['milliseconds']:.1f} | {', '.join(one['classes'])} |" for name, one in found.items()]
    table = "\n".join(["| student | ms a pass | classes in the picture |", "|---|--:|---|", *rows])
    ours, theirs = found[names[0]], found[names[-1]]
    left = ours["overlay"] if len(found) > 1 else np.asarray(picture)
    return ours["mask"], ours["overlay"], ours["boundary"], (left, theirs["overlay"]), table


def page(first: str = "", second: str = "", trust_remote_code: bool = False) -> gr.Blocks:
    """The page, with the names of students filled in."""
    with gr.Blocks(title="hf_bcd students") as blocks:
        gr.Markdown("# Students of hf_bcd")
        with gr.Row():
            one = gr.Textbox(first, label="Student: folder or Hub id", elem_id="first")
            other = gr.Textbox(second, label="Second student, to compare", elem_id="second")
        with gr.Row():
            picture = gr.Image(type="pil", label="Picture", elem_id="picture", height=HEIGHT)
            mask = gr.Image(label="Mask", elem_id="mask", format="png", height=HEIGHT)
            overlay = gr.Image(label="Overlay", elem_id="overlay", format="png", height=HEIGHT)
            boundary = gr.Image(label="Boundaries", elem_id="boundary", format="png", height=HEIGHT)
        button = gr.Button("Run", variant="primary", elem_id="run")
        numbers = gr.Markdown(elem_id="numbers")
        slider = gr.ImageSlider(label="First student | second student (picture | student for one)", elem_id="slider")
        inputs = [one, other, picture, gr.State(trust_remote_code)]
        button.click(show, inputs, [mask, overlay, boundary, slider, numbers])
    return blocks


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("students", nargs="*", help="one or two: folders or Hub ids")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--trust_remote_code", action="store_true", help="run a student's own code")
    args = parser.parse_args()
    if len(args.students) > 2:
        parser.error(f"{len(args.students)} students; name one or two")
    page(*[*args.students, "", ""][:2], args.trust_remote_code).launch(server_port=args.port)
