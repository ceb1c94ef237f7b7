"""Images a second on one core: decoding and augmentation as here, and as in the example script of transformers."""

import io
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from PIL import Image

from hf_bcd.data import DenseDataset, TrainTransform, collate, keep_in_memory
from hf_bcd.data.dataset import Row
from hf_bcd.data.synthetic.scenes import SyntheticScenes

from .measuring import compare, ratio


IMAGES = 24
BATCH = 8
EXAMPLE = "transformers' example: crop, flip"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def encoded_scenes(size: tuple[int, int]) -> DenseDataset:
    """Photographs as JPEG and masks as PNG, in memory, so that no disk is measured."""
    scenes, rows = SyntheticScenes(num_images=IMAGES, split="train", size=size), []
    for index in range(IMAGES):
        scene = scenes[index]
        image, mask = io.BytesIO(), io.BytesIO()
        scene["image"].save(image, "JPEG", quality=90)
        Image.fromarray(scene["label"]).save(mask, "PNG")
        rows.append(Row(image.getvalue(), mask.getvalue(), f"image {index}", f"mask {index}"))
    return DenseDataset(rows, "benchmark", "train", "scenes", scenes.id2label)


def example_batches(data: DenseDataset, crop: int) -> Callable[[], None]:
    """What transformers' run_semantic_segmentation.py does to training images: pad, crop, flip, normalise, stack."""
    import albumentations as A  # type: ignore[import-not-found]
    from albumentations.pytorch import ToTensorV2  # type: ignore[import-not-found]

    transform = A.Compose(
        [
            A.PadIfNeeded(min_height=crop, min_width=crop, border_mode=0),
            A.RandomCrop(height=crop, width=crop),
            A.HorizontalFlip(p=0.5),
            A.Normalize(mean=MEAN, std=STD, max_pixel_value=255.0),
            ToTensorV2(),
        ]
    )

    def run() -> None:
        for start in range(0, len(data), BATCH):
            pixel_values, labels = [], []
            for index in range(start, min(start + BATCH, len(data))):
                row = data.rows[index]
                image, mask = (Image.open(io.BytesIO(file)) for file in row[:2])  # type: ignore[arg-type]
                transformed = transform(image=np.array(image.convert("RGB")), mask=np.array(mask))
                pixel_values.append(transformed["image"])
                labels.append(transformed["mask"])
            torch.stack(pixel_values).to(torch.float)
            torch.stack(labels).to(torch.long)

    return run


def our_batches(data: DenseDataset, transform: TrainTransform) -> Callable[[], None]:
    """The same with our transforms; images and labels stay uint8, because they are converted on the device."""
    transformed = data.with_transform(transform)

    def run() -> None:
        for start in range(0, len(data), BATCH):
            collate([transformed[index] for index in range(start, min(start + BATCH, len(data)))])

    return run


def data_rows(repeats: int, size: tuple[int, int] = (512, 683), crop: int = 512) -> list[dict[str, Any]]:
    """One row a pipeline over the same files, with images a second beside those of transformers' example.

    That one needs `pip install albumentations`; without it its row and the ratios are missing.
    """
    data = encoded_scenes(size)
    cached = keep_in_memory(data)
    plain, full = TrainTransform(crop, scale=(1.0, 1.0), jitter=0, max_class_share=1.0), TrainTransform(crop)
    pipelines = {
        "crop, flip": our_batches(data, plain),
        "crop, flip, cached": our_batches(cached, plain),
        "scale, crop, flip, jitter": our_batches(data, full),
        "scale, crop, flip, jitter, cached": our_batches(cached, full),
    }
    if find_spec("albumentations") is not None:
        pipelines[EXAMPLE] = example_batches(data, crop)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        measured = compare(pipelines, torch.device("cpu"), repeats)  # the first call of each fills the cache
    finally:
        torch.set_num_threads(threads)
    rows = []
    for name, measurement in measured.items():
        row: dict[str, Any] = {"images_per_second": IMAGES / measurement.median, name: measurement.as_dict()}
        if EXAMPLE in measured:
            row["times_the_example"] = 1 / ratio(measurement, measured[EXAMPLE])
        rows.append(row)
    return rows
