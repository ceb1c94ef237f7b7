"""Training steps with a stored teacher beside plain ones and ones with the teacher that runs."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from hf_bcd.adapters import adapt
from hf_bcd.data import DenseDatasets, load_dense_dataset
from hf_bcd.models import TimmSegmentationModel
from hf_bcd.runs.arguments import ModelArguments
from hf_bcd.runs.reinforce import build_reinforcer, make_store
from hf_bcd.stores import Store
from hf_bcd.training.config import BCDConfig
from hf_bcd.training.hardware import has_bfloat16
from hf_bcd.training.trainer import BCDTrainer

from .measuring import compare, ratio


BATCH, CLASSES = 8, 8
LOSSES: dict[str, dict[str, Any]] = {"cwd": {"cwd": {}}, "bcd": {"bcd": {}}, "cwd + bcd": {"cwd": {}, "bcd": {}}}


def model(head: str, seed: int, **options: Any) -> TimmSegmentationModel:
    """MobileNetV2 under a head, from random weights."""
    torch.manual_seed(seed)
    return TimmSegmentationModel.from_backbone("mobilenetv2_100", head=head, num_labels=CLASSES, **options)


def stored_rows(device: torch.device, repeats: int, side: int) -> list[dict[str, Any]]:
    """Seconds of whole training steps, their data and optimizer included: the pair of the CamVid study, in bfloat16 where
    the device has it.

    Args:
        device: where to train.
        repeats: steps that are timed.
        side: of the square crops.
    """
    half = device.type != "cpu" or has_bfloat16()
    data = load_dense_dataset("synthetic", num_images={"train": 2 * BATCH}, size=(side, 4 * side // 3))
    train = data["train"]
    teacher = model("deeplabv3plus", 0, output_stride=16)
    teacher.config.id2label = dict(train.id2label)
    rows = []
    with tempfile.TemporaryDirectory() as folder:

        def config(losses: dict[str, Any]) -> BCDConfig:
            return BCDConfig(
                folder, losses=losses, crop_size=side, max_steps=1000, bf16=half, report_to="none", eval_strategy="no",
                dataloader_num_workers=0, per_device_train_batch_size=BATCH, teacher_dtype="bfloat16" if half else "float32", calibration_images=BATCH,
                disable_tqdm=True, use_cpu=device.type == "cpu",
            )  # fmt: skip

        def step(losses: dict[str, Any], given: Any) -> Callable[[], object]:
            trainer = BCDTrainer(model("fpn", 1), given, config(losses), train)
            trainer.calibrate()
            trainer.create_optimizer_and_scheduler(1000)
            wrapped, batches = trainer._wrap_model(trainer.model), endless(trainer)
            optimizer: Any = trainer.optimizer
            trainer.current_gradient_accumulation_steps = 1

            def run() -> None:
                batch = next(batches)
                trainer.training_step(wrapped, batch, trainer._get_num_items_in_batch([batch], trainer.args.device))
                optimizer.step()
                optimizer.zero_grad()

            return run

        store_folder = Path(folder) / "store"
        made = build_reinforcer(
            ModelArguments(), config(LOSSES["cwd + bcd"]), DenseDatasets({"train": train}), teacher=adapt(teacher)
        )
        make_store(store_folder, made, views=2)
        store = Store(store_folder)
        size = sum(path.stat().st_size for path in store.shards) / (store.views * store.images)
        steps = {"plain": step({"cwd": {}}, None)}
        for name, losses in LOSSES.items():
            steps |= {f"{name}, running": step(losses, teacher), f"{name}, stored": step(losses, store)}
        measured = compare(steps, device, repeats)
        for name in LOSSES:
            found = {kind: measured[f"{name}, {kind}"] for kind in ("running", "stored")}
            rows.append(
                {
                    "losses": name, "side": side, "bytes_a_view": round(size), "plain": measured["plain"].as_dict(),
                    **{kind: one.as_dict() for kind, one in found.items()},
                    **{f"{kind}_ratio": ratio(one, measured["plain"]) for kind, one in found.items()},
                }
            )  # fmt: skip
    return rows


def endless(trainer: BCDTrainer) -> Iterator[dict[str, Any]]:
    """Whole batches, epoch after epoch."""
    epoch = 0
    while True:
        trainer.train_dataset.set_epoch(epoch)  # type: ignore[union-attr]
        yield from trainer.get_train_dataloader()
        epoch += 1
