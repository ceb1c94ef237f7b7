"""The detectors' losses in two processes: their mean is the loss of both images in one."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models.tiny_detectors import HEADS, confident, tiny
from processes import run_ranks


# so unlike each other that a division by each rank's own counts would show
LABELS = [
    {
        "class_labels": torch.tensor([0, 1, 2]),
        "boxes": torch.tensor([[0.3, 0.4, 0.3, 0.4], [0.6, 0.5, 0.5, 0.4], [0.5, 0.5, 0.9, 0.8]]),
    },
    {"class_labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)},
]


def terms(head: str, images: slice) -> dict[str, torch.Tensor]:
    pixel_values = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    model = confident(tiny(head))
    return model(pixel_values[images], labels=LABELS[images]).loss_dict


def of_rank() -> dict[str, dict[str, torch.Tensor]]:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    return {head: terms(head, slice(rank, rank + 1)) for head in HEADS}


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    first, second = run_ranks(tmp_path, of_rank)
    for head in HEADS:
        for name, value in terms(head, slice(None)).items():
            torch.testing.assert_close((first[head][name] + second[head][name]) / 2, value, msg=f"{head} {name}")
