"""What an evaluation counts, whatever ran before it."""

from pathlib import Path

import pytest
import tiny

from hf_bcd.preparation import eval_transform, with_transform


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
