"""A folder as a finished run leaves it, in milliseconds."""

import json
from pathlib import Path

import torch
from tiny import tiny_segformer, tiny_timm
from transformers import PreTrainedModel, SegformerImageProcessor


CARD = "---\nlibrary_name: transformers\npipeline_tag: image-segmentation\n---\n\n# A student\n"
CARD += '\n```python\nsegment = pipeline("image-segmentation", model="x")\n```\n'
CARD += '```python\npipeline(model="x")\n```\n'
LEFT_OUT = (
    "training_args.bin", "optimizer.pt", "_baseline/model.safetensors", "_push/1/model.safetensors",
    "checkpoint-2/model.safetensors", "README.md.part", "figures/new.png.part", "runs/events.out.tfevents.1",
    ".cache/huggingface/x.lock", "trainer_state.json", "notes.py",
)  # fmt: skip


def finished(folder: Path, model: PreTrainedModel | None = None) -> Path:
    """Writes a student with card, results and a figure, among files that belong to this machine alone."""
    (model or tiny_segformer()).save_pretrained(folder)
    SegformerImageProcessor(size={"height": 48, "width": 64}).save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    (folder / "results.json").write_text(json.dumps({"student": {"mean_iou": 0.5}}))
    for name in ("figures/comparison.png", *LEFT_OUT):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return folder


def finished_timm(folder: Path) -> Path:
    """Likewise a student whose code is pushed along."""
    torch.manual_seed(0)
    return finished(folder, tiny_timm())
