"""Two gloo processes train on one stream of an odd number of shards of unequal length."""

import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import tiny
import torch

from hf_bcd.data import load_dense_dataset


WORKER = Path(__file__).parent / "streaming_worker.py"


@pytest.mark.slow
def test_ranks_share_the_images_and_go_on_together(tmp_path: Path) -> None:
    data = tiny.parquet_scenes(tmp_path / "data", [5, 3, 3])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_DATASETS_CACHE": str(tmp_path / "cache"),
    }  # fmt: skip
    command = [*launcher, str(WORKER), str(tmp_path), "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]

    stored = [zlib.crc32(sample["image"].tobytes()) for sample in load_dense_dataset(data)["train"]]
    epochs = []
    for rank in ranks:
        assert rank["steps"] == 10 and rank["shards"] == 3
        assert rank["images"][:4] == ranks[0]["images"][:4], "ranks calibrate the teacher on different images"
        trained = rank["images"][4:]
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
