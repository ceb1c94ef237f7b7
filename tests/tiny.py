"""Tiny models and data that tests of the trainer share."""

import itertools
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import SegformerConfig, SegformerForSemanticSegmentation, TrainerCallback

from hf_bcd import BCDConfig, BCDTrainer, TimmDetectionModel, TimmSegmentationModel
from hf_bcd.data import DenseDatasets, load_dense_dataset


ID2LABEL = {0: "sky", 1: "ground", 2: "road", 3: "building", 4: "tree", 5: "pole", 6: "person", 7: "vehicle"}


def labels() -> dict[str, Any]:
    return {"id2label": ID2LABEL, "label2id": {name: index for index, name in ID2LABEL.items()}}


def tiny_timm(channels: tuple[int, ...] = (8, 8, 16, 16), seed: int = 0, **config: Any) -> TimmSegmentationModel:
    torch.manual_seed(seed)
    return TimmSegmentationModel.from_backbone(
        "resnet10t",
        head="fpn",
        head_channels=8,
        backbone_kwargs={"channels": list(channels), "stem_width": 8},
        **labels(),
        **config,
    )


def tiny_segformer(seed: int = 0, width: int = 8) -> SegformerForSemanticSegmentation:
    torch.manual_seed(seed)
    config = SegformerConfig(
        hidden_sizes=[width, width, 2 * width, 2 * width],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
        drop_path_rate=0.0,
        classifier_dropout_prob=0.0,
        **labels(),
    )
    return SegformerForSemanticSegmentation(config)


def scenes(train: int = 8, validation: int = 3, size: tuple[int, int] = (48, 64)) -> DenseDatasets:
    return load_dense_dataset("synthetic", size=size, num_images={"train": train, "validation": validation, "test": 2})


def boxes(train: int = 8, validation: int = 3, size: tuple[int, int] = (48, 64)) -> DenseDatasets:
    """The same scenes with boxes around persons and vehicles."""
    numbers = {"train": train, "validation": validation, "test": 2}
    return load_dense_dataset("synthetic_detection", size=size, num_images=numbers)


def instances(train: int = 8, validation: int = 3, size: tuple[int, int] = (48, 64)) -> DenseDatasets:
    """The same with their masks."""
    numbers = {"train": train, "validation": validation, "test": 2}
    return load_dense_dataset("synthetic_instances", size=size, num_images=numbers)


def tiny_detector(head: str = "gfl", seed: int = 0, **config: Any) -> TimmDetectionModel:
    torch.manual_seed(seed)
    small = {"neck_channels": 8, "head_channels": 8, "head_convs": 2, "norm_groups": 2, "strides": [8, 16, 32]}
    if head in ("mask_rcnn", "cascade_mask_rcnn"):
        small |= {
            "strides": [4, 8, 16, 32],
            "fc_channels": 16,
            "proposals": 50,
            "rois_per_image": 16,
            "mask_stride": 2,
        }
    names = {0: "person", 1: "vehicle"}
    return TimmDetectionModel.from_backbone(
        "resnet10t",
        head=head,
        backbone_kwargs={"channels": [8, 8, 16, 16], "stem_width": 8},
        **{**small, "id2label": names, "label2id": {name: index for index, name in names.items()}, **config},
    )


def parquet_scenes(folder: Path, shards: list[int], validation: int = 2, seed: int = 0) -> Path:
    """A folder of Parquet files with the given numbers of training scenes, and the names of their classes."""
    (folder / "data").mkdir(parents=True)
    (folder / "id2label.json").write_text(json.dumps(ID2LABEL))
    numbers = {"train": sum(shards), "validation": validation}
    data = load_dense_dataset("synthetic", size=(48, 64), num_images=numbers, seed=seed)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    for split, sizes in (("train", shards), ("validation", [validation])):
        samples = iter(data[split])
        for number, size in enumerate(sizes):
            columns: dict[str, list] = {"image": [], "label": []}
            for sample in itertools.islice(samples, size):
                columns["image"].append(sample["image"])
                columns["label"].append(Image.fromarray(sample["label"].astype(np.uint8)))
            table = datasets.Dataset.from_dict(columns, features=features)
            table.to_parquet(folder / "data" / f"{split}-{number:05d}-of-{len(sizes):05d}.parquet")
    return folder


def tensors(sample: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A canonical sample as a batch holds it, without any transform."""
    return {
        "pixel_values": torch.from_numpy(np.array(sample["image"])).permute(2, 0, 1),
        "labels": torch.from_numpy(sample["label"]),
    }


def config(folder: Path, **changes: Any) -> BCDConfig:
    """Arguments of a run of a few steps on one CPU thread."""
    options = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "crop_size": 48,
        "calibration_images": 4,
        "logging_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "use_cpu": True,
    }
    return BCDConfig(**(options | changes))


def trainer(folder: Path, model: Any = None, teacher: Any = "default", data: Any = None, **changes: Any) -> BCDTrainer:
    data = scenes() if data is None else data
    return BCDTrainer(
        model=tiny_timm() if model is None else model,
        teacher_model=tiny_timm((8, 16, 16, 32), seed=1) if teacher == "default" else teacher,
        args=config(folder, **changes),
        train_dataset=data["train"],
        eval_dataset=data.get("validation"),
    )


def command_line(**options: Any) -> list[str]:
    """Arguments of a command that trains on crops of 48 pixels of tiny images, and keeps nothing on the way."""
    quick = {
        "crop_size": 48, "per_device_train_batch_size": 2, "calibration_images": 4, "eval_strategy": "no",
        "save_strategy": "no", "dataloader_num_workers": 0, "report_to": "none", "disable_tqdm": "true", "use_cpu": "true",
    }  # fmt: skip
    return [text for name, value in (quick | options).items() for text in (f"--{name}", str(value))]


def history(run: BCDTrainer, key: str = "loss") -> list[float]:
    return [entry[key] for entry in run.state.log_history if key in entry]


class StopAt(TrainerCallback):
    """Ends training at a step, with a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = control.should_save = True


def freeze_batchnorm(model: torch.nn.Module) -> torch.nn.Module:
    """Batch statistics differ between a batch and its halves by nature; fixed ones let the rest be compared."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True, module=module: module  # type: ignore[method-assign]
    return model


class TensorSamples(torch.utils.data.Dataset):
    """Fixed random images and labels, optionally with very unequal void shares."""

    def __init__(self, count: int, size: int = 48, void: bool = False, repeat: int = 1) -> None:
        generator = np.random.default_rng(0)
        self.images = torch.from_numpy(generator.integers(0, 256, (count, 3, size, size), dtype=np.uint8))
        self.labels = torch.from_numpy(generator.integers(0, 8, (count, size, size)))
        if void:
            for index in range(count):
                self.labels[index, : size * (index % 4) // 4] = 255
        self.repeat = repeat

    def __len__(self) -> int:
        return len(self.images) * self.repeat

    def __getitem__(self, index: int) -> dict[str, Any]:
        inner = index % len(self.images)
        return {"index": index, "pixel_values": self.images[inner], "labels": self.labels[inner]}
