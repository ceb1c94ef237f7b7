"""A teacher beside its labels is refused: every shift and flip is found, and none where there is none."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_timm

from hf_bcd import BCDConfig, BCDTrainer
from hf_bcd.data import load_dense_dataset
from hf_bcd.data.dataset import DenseDataset
from hf_bcd.training.alignment import alignment
from hf_bcd.utils.messages import UserError


SIZE = (64, 80)


def answered(seed: int, count: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels of scenes, and a teacher's classes: of stride 8, and wrong in a fifth of the places."""
    data = load_dense_dataset("synthetic", size=SIZE, num_images={"train": count}, seed=seed)["train"]
    labels = torch.stack([torch.from_numpy(data[index]["label"]) for index in range(count)]).long()
    scores = F.one_hot(labels.clamp_max(7), 8).permute(0, 3, 1, 2).float()
    coarse = F.interpolate(scores, scale_factor=1 / 8, mode="area")
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(coarse[:, :1].shape, generator=generator) < 0.2
    noise = torch.rand(coarse.shape, generator=generator)
    coarse = torch.where(wrong, noise, coarse)
    return F.interpolate(coarse, SIZE, mode="bilinear", align_corners=False).argmax(1), labels


@pytest.mark.parametrize("seed", range(5))
def test_answers_on_their_place_are_accepted(seed: int) -> None:
    found = alignment(*answered(seed), 8)
    assert found.better() is None
    assert max(found.means, key=lambda kind: found.means[kind]) == "as they are"


FAULTS = {
    "shifted sideways by 4": lambda x: x.roll(4, 2), "shifted sideways, by 4": lambda x: x.roll(-4, 2),
    "shifted up by 4": lambda x: x.roll(4, 1), "shifted down by 4": lambda x: x.roll(-4, 1),
    "flipped left to right": lambda x: x.flip(2), "flipped upside down": lambda x: x.flip(1),
}  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("remedy", FAULTS)
def test_every_shift_and_flip_is_found(seed: int, remedy: str) -> None:
    classes, labels = answered(seed)
    better = alignment(FAULTS[remedy](classes), labels, 8).better()
    assert better is not None
    assert better.split()[:2] == remedy.replace(",", "").split()[:2]  # of the distance, 4 give or take


@pytest.mark.parametrize("seed", range(3))
def test_a_teacher_that_knows_nothing_is_not_taken_for_a_shifted_one(seed: int) -> None:
    labels = answered(seed)[1]
    assert alignment(torch.full_like(labels, 3), labels, 8).better() is None
    assert alignment(torch.randint(0, 8, labels.shape), labels, 8).better() is None


@pytest.mark.parametrize("seed", range(3))
def test_a_teacher_that_is_mostly_wrong_is_not_taken_for_a_shifted_one(seed: int) -> None:
    """Few steps of training give such teachers, whose noise fits a little better on one of two sides."""
    labels = answered(seed)[1]
    wrong = torch.rand(labels.shape, generator=torch.Generator().manual_seed(seed)) < 0.65
    classes = torch.where(wrong, (labels + 1) % 8, labels).roll(4, 2)
    assert alignment(classes, labels, 8).better() is None


def test_void_pixels_and_pictures_do_not_count() -> None:
    classes, labels = answered(0)
    labels[0] = 255
    labels[:, :20] = 255
    found = alignment(classes, labels, 8)
    assert found.agreement[0].isnan().all()
    assert found.means["as they are"] > 0.7


class _Shifted(DenseDataset):
    def __getitem__(self, index: int) -> Any:
        sample = super().__getitem__(index)
        return {**sample, "label": FAULTS[self.source](torch.from_numpy(sample["label"])[None])[0].numpy()}


def _train(folder: Path, data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_timm()
    options = {
        "max_steps": 1,
        "crop_size": 64,
        "scale_min": 1.0,
        "scale_max": 1.0,
        "color_jitter": 0.0,
        "report_to": "none",
    }
    args = BCDConfig(str(folder), losses={"kd": {}}, eval_strategy="no", save_strategy="no", use_cpu=True, disable_tqdm=True,
                     dataloader_num_workers=0, **options)  # fmt: skip
    trainer = BCDTrainer(model, tiny_timm(seed=1), args, train_dataset=data)
    clean = load_dense_dataset("synthetic", size=(64, 64), num_images={"train": 12})["train"]
    clean = clean.with_transform(trainer.task.train_transform(args), seed=args.seed)

    def oracle(batch: Any, pixel_mask: Any = None) -> Any:
        labels = torch.stack([clean[index]["labels"] for index in batch["index"].tolist()]).long()
        output = trainer.teacher(batch["pixel_values"])
        output.logits = 8 * F.one_hot(labels.clamp_max(7), 8).permute(0, 3, 1, 2).float()
        return output

    monkeypatch.setattr(trainer.teacher, "for_batch", oracle)
    trainer.train()


def test_training_does_not_begin_with_masks_beside_their_pictures(tmp_path: Path, monkeypatch: Any) -> None:
    data = load_dense_dataset("synthetic", size=(64, 64), num_images={"train": 12})["train"]
    _train(tmp_path / "right", data, monkeypatch)
    shifted = _Shifted(data.rows, data.name, data.split, "shifted sideways by 4", data.id2label, data.rule)
    with pytest.raises(UserError, match="but on .* if they are shifted sideways by [345] pixels"):
        _train(tmp_path / "wrong", shifted, monkeypatch)


def test_a_teacher_below_the_commonest_class_is_named(tmp_path: Path, caplog: Any) -> None:
    data = load_dense_dataset("synthetic", size=(64, 64), num_images={"train": 4})["train"]
    options = {"max_steps": 1, "crop_size": 64, "report_to": "none", "eval_strategy": "no", "save_strategy": "no"}
    args = BCDConfig(
        str(tmp_path), losses={"kd": {}}, use_cpu=True, disable_tqdm=True, dataloader_num_workers=0, **options
    )
    with caplog.at_level(logging.WARNING):
        BCDTrainer(tiny_timm(), tiny_timm(seed=1), args, train_dataset=data).train()
    assert "less than always answering their commonest class" in caplog.text


def test_pictures_without_labels_say_nothing(tmp_path: Path) -> None:
    data = load_dense_dataset("synthetic", size=SIZE, num_images={"train": 4})["train"].without_labels()
    options = {"max_steps": 1, "crop_size": 64, "report_to": "none", "eval_strategy": "no", "save_strategy": "no"}
    args = BCDConfig(
        str(tmp_path), losses={"kd": {}}, use_cpu=True, disable_tqdm=True, dataloader_num_workers=0, **options
    )
    BCDTrainer(tiny_timm(), tiny_timm(seed=1), args, train_dataset=data).train()
    assert not (tmp_path / "teaching.json").exists()
