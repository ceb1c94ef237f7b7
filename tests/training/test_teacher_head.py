"""What losses need of a teacher beside its outputs: its head, and gradients of the task; offered, or refused early."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from adapters.adapter_tiny_models import mobilenet_v2

from hf_bcd import TimmSegmentationModel
from hf_bcd.runs.arguments import ModelArguments
from hf_bcd.runs.baseline import prepare_teacher


def decided_teacher() -> TimmSegmentationModel:
    """A random classifier predicts nearly the same everywhere."""
    teacher = tiny.tiny_timm((8, 16, 16, 32), seed=1)
    with torch.no_grad():
        teacher.head.classifier[-1].weight.mul_(20)
    return teacher


@pytest.mark.parametrize("losses", [{"crosskd": {}}, {"sckd": {"threshold": -1, "host": {"crosskd": {}}}}])
def test_the_students_features_are_trained_through_the_teachers_head(losses: dict[str, Any], tmp_path: Path) -> None:
    teacher, data = decided_teacher(), {"train": tiny.TensorSamples(2)}
    run = tiny.trainer(tmp_path, teacher=teacher, data=data, losses=losses, max_steps=20, learning_rate=0.01)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    run.train()
    (term,) = run.distiller.criterion.weights
    values = tiny.history(run, term)
    assert values[-1] < 0.3 * values[0]
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize(
    ("losses", "compiled", "message"),
    [
        ({"crosskd": {}}, False, "loss 'crosskd' needs head"),
        ({"sckd": {"host": {"crosskd": {}}}}, False, "loss 'sckd' needs head"),
        ({"sckd": {}}, True, "loss 'sckd' needs task_loss"),
    ],
)
def test_what_cannot_be_offered_is_refused_before_a_baseline_is_trained(
    losses: dict[str, Any], compiled: bool, message: str, tmp_path: Path
) -> None:
    config = tiny.config(tmp_path, losses=losses, torch_compile=compiled)
    teacher = mobilenet_v2(32, tf_padding=True, **tiny.labels())
    with pytest.raises(ValueError, match=message):
        tiny.trainer(tmp_path, teacher=teacher, losses=losses, torch_compile=compiled)
    teacher.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match=f"{message}.*another loss: .*bcd"):
        prepare_teacher(ModelArguments(teacher=str(tmp_path / "teacher")), config, tiny.scenes())


@pytest.mark.slow
def test_compilation_sees_through_the_head(tmp_path: Path) -> None:
    data = {"train": tiny.TensorSamples(4)}
    model = tiny.freeze_batchnorm(tiny.tiny_segformer())
    run = tiny.trainer(tmp_path, model=model, teacher=decided_teacher(), data=data, losses={"crosskd": {}})
    batch = run.data_collator([run.train_dataset[i] for i in range(2)])
    targets = run.task.targets(batch, 8)
    distiller, teacher = run.distiller.train(), run.teacher
    assert teacher is not None
    expected = distiller(batch["pixel_values"], targets, teacher(batch["pixel_values"]))["loss"]
    compiled = torch.compile(distiller, backend="aot_eager")
    loss = compiled(batch["pixel_values"], targets, teacher(batch["pixel_values"]))["loss"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(batch["pixel_values"], targets, teacher(batch["pixel_values"]))["loss"].backward()
    assert not any(parameter.grad is not None for parameter in teacher.parameters())
