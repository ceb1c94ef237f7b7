"""From a demo of boxes, or of masks, to a student on the Hub that the pipelines run where hf_bcd is not installed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hub.server import MARKER_TOKEN, HubServer

from hf_bcd.adapters.loading import load_adapter
from hf_bcd.data.synthetic.scenes import SyntheticScenes
from hf_bcd.utils.masks import decode


pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RECIPES = {
    "boxes": "gfl_resnet18_to_gfl_resnet10.yaml",
    "masks": "mask_rcnn_resnet18_to_mask_rcnn_resnet10.yaml",
}
DATA = ["--dataset_options.size", "[48, 64]", "--dataset_options.num_images", "{train: 8, validation: 2, test: 3}"]
SHORT = [
    "--image_size", "48", "--max_steps", "3", "--warmup_steps", "1", "--teacher_training.max_steps", "2",
    "--per_device_train_batch_size", "2", "--calibration_images", "4", "--dataloader_num_workers", "0", "--disable_tqdm", "true",
]  # fmt: skip
# somebody else's environment: both pipelines where there are masks, and the card's code
USE = """
import json, re, sys
from importlib.util import find_spec
from pathlib import Path

assert find_spec("hf_bcd") is None, "this environment was meant to lack hf_bcd"
import numpy as np
from huggingface_hub import hf_hub_download
from transformers import pipeline

repo, masks = sys.argv[1], sys.argv[2] == "masks"
detect = pipeline("object-detection", repo, trust_remote_code=True)
boxes = [[one["score"], one["label"], *one["box"].values()] for one in detect("picture.jpg", threshold=0.0)]
if masks:
    segment = pipeline("image-segmentation", repo, trust_remote_code=True)
    found = segment("picture.jpg", subtask="instance", threshold=0.0)
    np.savez("masks.npz", *[np.asarray(one["mask"]) > 0 for one in found])
Path("boxes.json").write_text(json.dumps(boxes))
blocks = re.findall(r"(?ms)^```python$(.*?)^```$", Path(hf_hub_download(repo, "README.md")).read_text())
assert len(blocks) == 2
for block in blocks:
    exec(block, {})
"""


@pytest.mark.parametrize("kind", RECIPES)
def test_round_trip(kind: str, elsewhere: Path, tmp_path: Path) -> None:
    with HubServer(tmp_path / "hub") as hub:

        def run(*command: object, home: str, **variables: str) -> None:
            environment = hub.environment(tmp_path / home, MARKER_TOKEN) | {"ACCELERATE_USE_CPU": "true"} | variables
            done = subprocess.run(
                list(map(str, command)), env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=400
            )
            assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-4000:]

        recipe = ROOT / "examples" / "recipes" / "synthetic" / RECIPES[kind]
        push = ("--push_to_hub", "--hub_model_id", f"tester/{kind}", "--hub_private_repo", "true")
        run(
            sys.executable, ROOT / "scripts" / "distill.py", "--config", recipe, "--output_dir", "out", *push, *DATA, *SHORT,
            "--student.options.score_threshold", "0.0", home="home",
        )  # fmt: skip
        files = hub.files(f"tester/{kind}")
        assert {"model.safetensors", "README.md", "results.json", "figures/comparison.png"} <= files.keys()
        assert not any(name.startswith("_") for name in files), "teacher and baseline stay at home"
        scene = SyntheticScenes(size=(37, 57), num_images=1, seed=1)[0]
        scene["image"].save(tmp_path / "picture.jpg", quality=100)
        run(elsewhere, "-c", USE, f"tester/{kind}", kind, home="elsewhere", PYTHONPATH="")

    model: Any = load_adapter(str(tmp_path / "out"))
    data = (tiny.instances if kind == "masks" else tiny.boxes)(size=(37, 57))
    trainer = tiny.trainer(
        tmp_path / "again", model=model, teacher=None, data={"train": data["train"]}, image_size=48, crop_size=512
    )
    from PIL import Image

    with Image.open(tmp_path / "picture.jpg") as image:
        transform = trainer.task.eval_transform(trainer.processing_class)
        pixel_values = transform({**data["test"][0], "image": image.convert("RGB")})["pixel_values"][None]
    (expected,) = model.eval().predict(pixel_values, [(37, 57)])
    rows = json.loads((tmp_path / "boxes.json").read_text())
    assert len(rows) == len(expected["scores"]) > 5
    # of equal scores in any order; the pipeline cuts fractions off
    ours = np.concatenate([expected["scores"][:, None].numpy(), expected["boxes"].numpy()], 1)
    theirs = np.array([[row[0], *row[2:]] for row in rows])
    gaps = np.abs(theirs[:, None] + [0, 0.5, 0.5, 0.5, 0.5] * np.sign(ours)[None] - ours[None]).max(-1).min(1)
    assert gaps.max() <= 0.5 + 1e-3
    if kind == "masks":
        found = np.load(tmp_path / "masks.npz")
        # the pipeline gives a pixel to the best instance that has it
        taken, painted = np.zeros((37, 57), bool), []
        for mask in map(decode, expected["masks"]):
            painted.append(mask & ~taken)
            taken |= mask
        painted = [mask for mask in painted if mask.any()]
        assert len(found.files) == len(painted) > 3
        union = np.any([found[name] for name in found.files], axis=0)
        assert (union == taken).mean() >= 0.999
