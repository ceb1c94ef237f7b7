"""What an evaluation counts, whatever ran before it."""

from pathlib import Path
from typing import Any

import pytest
import tiny

from hf_bcd import SemanticMetrics
from hf_bcd.adapters import image_processor
from hf_bcd.tasks import task_of
from hf_bcd.training.evaluation import with_transform


def test_every_image_counts_even_if_training_drops_its_last_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, counted = tiny.scenes(4, validation=3), []
    compute = SemanticMetrics.compute

    def spy(self: SemanticMetrics) -> dict[str, Any]:
        counted.append(self._totals["confusion"].sum().item())
        return compute(self)

    monkeypatch.setattr(SemanticMetrics, "compute", spy)
    scores = []
    for drop in (False, True):
        run = tiny.trainer(tmp_path, teacher=None, data=data, dataloader_drop_last=drop)
        scores.append(run.evaluate()["eval_mean_iou"])
        assert run.args.dataloader_drop_last is drop
    assert scores[0] == scores[1]
    assert counted == [sum((sample["label"] != 255).sum() for sample in data["validation"])] * 2


@pytest.mark.parametrize("workers", [0, 1])
def test_predict_counts_its_own_images_alone(workers: int, tmp_path: Path) -> None:
    data = tiny.scenes(4, validation=3)
    options = {"dataloader_num_workers": workers, "dataloader_persistent_workers": workers > 0}
    run = tiny.trainer(tmp_path, teacher=None, data=data, per_device_eval_batch_size=4, **options)
    processor = image_processor(run.distiller.student, shortest_edge=None)
    other = with_transform(data["test"], task_of(data["test"]).eval_transform(processor), 0)
    expected = run.evaluate(other, metric_key_prefix="test")["test_mean_iou"]
    run.evaluate()
    assert run.predict(other).metrics["test_mean_iou"] == expected
    assert run.predict(data["test"]).metrics["test_mean_iou"] == expected
    assert run.evaluate(data["test"], metric_key_prefix="test")["test_mean_iou"] == expected
