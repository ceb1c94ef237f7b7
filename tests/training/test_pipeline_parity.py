"""A saved student predicts, in another process that knows only its folder, what the trainer measured."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_segformer, tiny_timm, trainer

from hf_bcd import BCDTrainer
from hf_bcd.data.synthetic.scenes import SyntheticScenes


# even, odd, portrait, with the short side that students are resized to, longer than four times the short side
SIZES = [(48, 64), (37, 57), (133, 97), (40, 61), (33, 171)]
IMAGE_SIZES = [None, 40]

USE_SAVED_STUDENT = """
import sys
from pathlib import Path

import hf_bcd
import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, pipeline

for folder in map(Path, sys.argv[2:]):
    segment = pipeline("image-segmentation", str(folder))
    model = AutoModelForSemanticSegmentation.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    for path in sorted(Path(sys.argv[1]).glob("*.png")):
        results = segment(str(path))
        masks = np.stack([np.asarray(result["mask"]) > 0 for result in results])
        assert (masks.sum(0) == 1).all(), "masks overlap or leave gaps"
        ids = np.array([segment.model.config.label2id[result["label"]] for result in results])
        image = Image.open(path)
        with torch.no_grad():
            outputs = model(**processor(image, return_tensors="pt"))
        (classes,) = processor.post_process_semantic_segmentation(outputs, [image.size[::-1]])
        np.savez(folder / path.stem, pipeline=ids[masks.argmax(0)], auto=classes.numpy())
"""


@pytest.mark.slow
def test_saved_students_predict_what_the_trainer_predicts(tmp_path: Path) -> None:
    scenes = [SyntheticScenes(size=size, num_images=1, seed=1)[0] for size in SIZES]
    for index, scene in enumerate(scenes):
        scene["image"].save(tmp_path / f"{index}.png")

    expected: dict[Path, list[np.ndarray]] = {}
    for student, image_size in itertools.product((tiny_segformer, tiny_timm), IMAGE_SIZES):
        folder = tmp_path / f"{student.__name__}_{image_size}"
        run = trainer(folder, student(), max_steps=2, image_size=image_size)
        run.train()
        transform = run.task.eval_transform(run.processing_class)
        samples = [transform(scene) for scene in scenes]
        balance_classes(run, samples[0]["pixel_values"])
        run.save_model()
        assert "use_cache" not in (folder / "config.json").read_text() and not list(folder.glob("*.bin"))
        expected[folder] = [
            run.distiller.student.predict(sample["pixel_values"][None], [tuple(sample["labels"].shape)])[0].numpy()
            for sample in samples
        ]

    # sums over threads may be split in another way when there are more or fewer of them
    settings = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", USE_SAVED_STUDENT, str(tmp_path), *map(str, expected)]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]

    for folder, maps in expected.items():
        for index, (size, classes) in enumerate(zip(SIZES, maps, strict=True)):
            assert len(np.unique(classes)) >= 4, "too few classes for their maps to tell anything"
            saved = np.load(folder / f"{index}.npz")
            for way in ("pipeline", "auto"):
                assert saved[way].shape == classes.shape == size
                assert (saved[way] == classes).all(), f"{way}, {folder.name}, {size}: {(saved[way] != classes).mean()}"


def balance_classes(run: BCDTrainer, pixel_values: torch.Tensor) -> None:
    """Gives every class logits of mean 0 and deviation 1 on an image: after two steps one class would win everywhere."""
    classifier = [module for module in run.student.modules() if isinstance(module, torch.nn.Conv2d)][-1]
    with torch.no_grad():
        logits = run.distiller.student.eval()(pixel_values[None]).logits
        deviation, mean = torch.std_mean(logits, dim=(0, 2, 3))
        classifier.weight.div_(deviation[:, None, None, None])
        classifier.bias.sub_(mean).div_(deviation)
