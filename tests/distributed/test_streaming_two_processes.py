"""Two gloo processes train on one stream of an odd number of shards of unequal length."""

import zlib
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from processes import run_ranks

from hf_bcd.data import load_dense_dataset
from hf_bcd.runs.arguments import DataArguments
from hf_bcd.runs.experiment import load_data


def train(folder: Path) -> dict[str, Any]:
    """Which images this rank trained on, and what came out."""
    arguments = DataArguments(dataset_name=str(folder / "data"), streaming=True, shuffle_buffer=4)
    model = tiny.freeze_batchnorm(tiny.tiny_timm(dropout=0.0))
    options = {"max_steps": 10, "per_device_train_batch_size": 1}
    run = tiny.trainer(folder / "run", model=model, data=load_data(arguments), **options)
    transform = run.train_dataset.transform
    run.train_dataset.transform = lambda sample: {**transform(sample), "image": zlib.crc32(sample["image"].tobytes())}
    collate, images = run.data_collator, []

    def recording(samples):
        images.extend([sample["index"], sample["image"]] for sample in samples)
        return collate(samples)

    run.data_collator = recording
    run.train()
    run.data_collator = collate
    return {
        "images": images,
        "steps": run.state.global_step,
        "parameters": {name: p.detach() for name, p in run.distiller.named_parameters()},
        "scores": run.evaluate()["eval_mean_iou"],
        "shards": run.train_dataset.dataset.rows.num_shards,
    }


@pytest.mark.slow
def test_ranks_share_the_images_and_go_on_together(tmp_path: Path) -> None:
    data = tiny.parquet_scenes(tmp_path / "data", [5, 3, 3])
    stored = [zlib.crc32(sample["image"].tobytes()) for sample in load_dense_dataset(data)["train"]]
    ranks = run_ranks(tmp_path, train, tmp_path)
    epochs = []
    for rank in ranks:
        assert rank["steps"] == 10 and rank["shards"] == 3
        # four to compare the teacher with the labels, and again to calibrate it
        assert rank["images"][:8] == ranks[0]["images"][:8], "ranks look at different images before training"
        trained = rank["images"][8:]
        indices = [index for index, _ in trained]
        end = next(i for i in range(1, len(indices)) if indices[i] < indices[i - 1])
        assert end < 10, "training ended before this rank came to its second epoch"
        epochs.append([image for _, image in trained[:end]])
    assert sorted(epochs[0] + epochs[1]) == sorted(stored)
    assert len(epochs[0]) != len(epochs[1]), "the ranks should have started their second epochs at different steps"
    first, second = ranks
    for name, parameter in first["parameters"].items():
        assert torch.equal(parameter, second["parameters"][name]), name
    assert first["scores"] == second["scores"]
