"""How many positions of BCD's grid are boundary, at several sizes of crops, and what its boundary maps look like there."""

import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from hf_bcd.adapters import FrozenTeacher
from hf_bcd.adapters.loading import load_adapter
from hf_bcd.adapters.specs import ModelSpec
from hf_bcd.figures.bcd import boundary_figure
from hf_bcd.losses.bcd import BOUNDARY, BCDLoss, regions_of
from hf_bcd.losses.boundary import different_neighbour
from hf_bcd.losses.ops.functional import grid_size
from hf_bcd.outputs import DenseOutput, LabelMaps
from hf_bcd.tasks import task_of
from hf_bcd.training.config import BCDConfig
from hf_bcd.training.teaching import calibrate, prepare

from .absorb import seen_by


def boundary_shares(
    teacher: str,
    data: Any,
    sides: Sequence[int],
    image_size: int,
    options: dict[str, Any],
    arguments: dict[str, Any],
    path: Path,
    batches: int,
) -> list[dict[str, Any]]:
    """A row for each size of crops: the share of boundary in BCD's map, in the teacher's classes and in the labels.

    Args:
        teacher: folder or Hub id of a trained one.
        data: splits; crops are of `train`, the picture of `validation`.
        sides: of the crops.
        image_size: short side of the pictures at the first of them; it grows with the others.
        options: of BCD.
        arguments: further ones of the training.
        path: PNG file of the maps of one picture.
        batches: of eight crops, which are measured; others calibrate.
    """
    train, sample = data["train"], data["validation"][0]
    task, rows, maps = task_of(train), [], {}
    square = sample["image"].crop(central(sample["image"].size))
    for side in sides:
        with tempfile.TemporaryDirectory() as folder:
            sizes = {"crop_size": side, "image_size": round(image_size * side / sides[0])}
            args = BCDConfig(
                folder, losses={"bcd": options}, report_to="none", disable_tqdm=True, **sizes, **arguments
            )
            own, other = (load_adapter(ModelSpec(teacher), task=task.name) for _ in range(2))
            ours, theirs, criterion = prepare(own, other, args, train)
            ours, criterion, loss = ours.to(args.device).eval(), criterion.to(args.device), criterion.losses["bcd"]
            assert isinstance(theirs, FrozenTeacher) and isinstance(loss, BCDLoss)
            size = grid_size((side, side), loss.stride)
            transformed = train.with_transform(task.train_transform(args), args.seed)
            calibrate(criterion, theirs, transformed, task, args, ours.num_labels)
            shares: dict[str, list[Tensor]] = {"map": [], "classes": [], "labels": []}
            for _, known, targets in itertools.islice(seen_by(ours, theirs, transformed, task, args), batches):
                found = loss.digest(known, targets)
                assert found is not None and isinstance(known, DenseOutput) and isinstance(targets, LabelMaps)
                valid = targets.valid(size)
                labels = targets.class_masks(size).byte().argmax(dim=1)
                classes, _ = regions_of(known, targets, size)
                differs = (different_neighbour(ids, loss.radius, valid) for ids in (classes, labels))
                for name, one in zip(shares, (found[BOUNDARY], *differs), strict=True):
                    shares[name].append(one[valid].float())
            means = {name: torch.cat(parts).mean().item() for name, parts in shares.items()}
            rows.append({**sizes, **options, "positions": size[0] * size[1], **means})

            shown = TF.pil_to_tensor(square.resize((side, side)))[None].to(args.device)
            with torch.no_grad():
                output = theirs.for_batch({"pixel_values": shown})
                everywhere = torch.ones(1, *size, dtype=torch.bool, device=shown.device)
                drawn = loss.teacher_boundary(output, loss.teacher_head(output.features, size), everywhere)
            maps[f"crops of {side} pixels"] = drawn[0].cpu()
    boundary_figure(square, maps, path)
    return rows


def central(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The largest square in the middle of a picture of (width, height)."""
    side, (width, height) = min(size), size
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side
