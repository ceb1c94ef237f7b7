"""What an evaluation counts, whatever ran before it."""

from pathlib import Path

import pytest
import tiny
import torch
from adapters.adapter_tiny_models import resnet, upernet
from torch import nn

from hf_bcd import BCDTrainer
from hf_bcd.training.preparation import eval_transform, with_transform


def test_every_image_counts_even_if_training_drops_its_last_batch(tmp_path: Path) -> None:
    data, scores = tiny.scenes(4, validation=3), []
    for drop in (False, True):
        run = tiny.trainer(tmp_path, teacher=None, data=data, dataloader_drop_last=drop)
        result = run.evaluate()
        scores.append((run.metrics._totals["confusion"].sum().item(), result["eval_mean_iou"]))
        assert run.args.dataloader_drop_last is drop
    assert scores[0] == scores[1]
    valid = sum((sample["label"] != 255).sum() for sample in data["validation"])
    assert scores[1][0] == valid


@pytest.mark.parametrize("drop", [False, True])
def test_predict_counts_its_own_images_alone(drop: bool, tmp_path: Path) -> None:
    data = tiny.scenes(4, validation=3)
    run = tiny.trainer(tmp_path, teacher=None, data=data, dataloader_drop_last=drop, per_device_eval_batch_size=4)
    other = with_transform(data["test"], eval_transform(run.distiller.student, None), 0)
    expected = run.evaluate(other, metric_key_prefix="test")["test_mean_iou"]
    run.evaluate()
    assert run.predict(other).metrics["test_mean_iou"] == expected
    assert run.predict(data["test"]).metrics["test_mean_iou"] == expected


def test_logits_of_a_model_that_upsamples_them_itself_are_upsampled_twice_here_too(tmp_path: Path) -> None:
    """As `pipeline` does with UperNet: to the size of the model's input, then to that of the picture."""
    torch.manual_seed(0)
    run = BCDTrainer(model=upernet(resnet()), args=tiny.config(tmp_path))
    sample = {"pixel_values": torch.randint(0, 256, (3, 41, 59), dtype=torch.uint8), "labels": torch.zeros(83, 119)}
    with torch.no_grad():
        pixels = run.distiller.student.normalize(sample["pixel_values"][None])
        logits = run.student.eval()(pixels).logits
    assert logits.shape[-2:] == (41, 59)
    expected = nn.functional.interpolate(logits, (83, 119), mode="bilinear").argmax(dim=1)[0]
    assert torch.equal(run.predict_classes(sample), expected)
