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
from PIL import Image

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

for kind in sys.argv[1:]:
    repo = f"tester/{kind}"
    detect = pipeline("object-detection", repo, trust_remote_code=True)
    boxes = [[one["score"], one["label"], *one["box"].values()] for one in detect("picture.jpg", threshold=0.0)]
    if kind == "masks":
        segment = pipeline("image-segmentation", repo, trust_remote_code=True)
        found = segment("picture.jpg", subtask="instance", threshold=0.0)
        np.savez("masks.npz", *[np.asarray(one["mask"]) > 0 for one in found])
    Path(f"{kind}.json").write_text(json.dumps(boxes))
    blocks = re.findall(r"(?ms)^```python$(.*?)^```$", Path(hf_hub_download(repo, "README.md")).read_text())
    assert len(blocks) == 2
    for block in blocks:
        exec(block, {})
"""
# both in one process, because importing takes seconds
DISTILL = """
import json, sys
from hf_bcd.commands import run
from hf_bcd.commands import distill

for argv in json.loads(sys.argv[1]):
    run(lambda: distill.main(argv))
"""


@pytest.fixture(scope="module")
def world(elsewhere: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a user who has distilled and pushed both students, and of another who has used them."""
    folder = tmp_path_factory.mktemp("world")
    with HubServer(folder / "hub") as hub:

        def run(*command: object, home: str, **variables: str) -> None:
            environment = hub.environment(folder / home, MARKER_TOKEN) | {"ACCELERATE_USE_CPU": "true"} | variables
            done = subprocess.run(
                list(map(str, command)), env=environment, cwd=folder, capture_output=True, text=True, timeout=400
            )
            assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-4000:]

        lines = [
            [
                "--config", str(ROOT / "examples" / "recipes" / "synthetic" / recipe), "--output_dir", kind, "--push_to_hub",
                "--hub_model_id", f"tester/{kind}", "--hub_private_repo", "true", *DATA, *SHORT,
                "--student.options.score_threshold", "0.0",
            ]
            for kind, recipe in RECIPES.items()
        ]  # fmt: skip
        run(sys.executable, "-c", DISTILL, json.dumps(lines), home="home")
        for kind in RECIPES:
            files = hub.files(f"tester/{kind}")
            assert {"model.safetensors", "README.md", "results.json", "figures/comparison.png"} <= files.keys()
            assert not any(name.startswith("_") for name in files), "teacher and baseline stay at home"
        SyntheticScenes(size=(37, 57), num_images=1, seed=1)[0]["image"].save(folder / "picture.jpg", quality=100)
        run(elsewhere, "-c", USE, *RECIPES, home="elsewhere", PYTHONPATH="")
    return folder


@pytest.mark.parametrize("kind", RECIPES)
def test_round_trip(kind: str, world: Path, tmp_path: Path) -> None:
    model: Any = load_adapter(str(world / kind))
    data = (tiny.instances if kind == "masks" else tiny.boxes)(size=(37, 57))
    trainer = tiny.trainer(
        tmp_path / "again", model=model, teacher=None, data={"train": data["train"]}, image_size=48, crop_size=512
    )
    with Image.open(world / "picture.jpg") as image:
        transform = trainer.task.eval_transform(trainer.processing_class)
        pixel_values = transform({**data["test"][0], "image": image.convert("RGB")})["pixel_values"][None]
    (expected,) = model.eval().predict(pixel_values, [(37, 57)])
    rows = json.loads((world / f"{kind}.json").read_text())
    assert len(rows) == len(expected["scores"]) > 5
    # of equal scores in any order; the pipeline cuts fractions off
    ours = np.concatenate([expected["scores"][:, None].numpy(), expected["boxes"].numpy()], 1)
    theirs = np.array([[row[0], *row[2:]] for row in rows])
    gaps = np.abs(theirs[:, None] + [0, 0.5, 0.5, 0.5, 0.5] * np.sign(ours)[None] - ours[None]).max(-1).min(1)
    assert gaps.max() <= 0.5 + 1e-3
    if kind == "masks":
        found = np.load(world / "masks.npz")
        # the pipeline gives a pixel to the best instance that has it
        taken, painted = np.zeros((37, 57), bool), []
        for mask in map(decode, expected["masks"]):
            painted.append(mask & ~taken)
            taken |= mask
        painted = [mask for mask in painted if mask.any()]
        assert len(found.files) == len(painted) > 3
        union = np.any([found[name] for name in found.files], axis=0)
        assert (union == taken).mean() >= 0.999
