"""The one module that is wrapped: precision, compilation and what it returns."""

from pathlib import Path

import pytest
import tiny
import torch

from hf_bcd.outputs import DenseOutput, LabelMaps
from hf_bcd.training.distiller import Distiller


def prepared(folder: Path) -> tuple[Distiller, dict[str, torch.Tensor], DenseOutput]:
    """A calibrated distiller without dropout, a batch, and the teacher's output on it."""
    data = {"train": tiny.TensorSamples(4)}
    run = tiny.trainer(folder, model=tiny.freeze_batchnorm(tiny.tiny_segformer()), data=data)
    run.calibrate()
    batch = run.data_collator([run.train_dataset[i] for i in range(2)])
    assert run.teacher is not None
    return run.distiller.train(), batch, run.teacher(batch["pixel_values"])


def loss_and_gradient(
    distiller: Distiller, batch: dict, teacher: DenseOutput, call=None
) -> tuple[float, torch.Tensor]:
    distiller.zero_grad()
    forward = distiller if call is None else call
    loss = forward(batch["pixel_values"], LabelMaps(batch["labels"], 8), teacher)["loss"]
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in distiller.parameters() if p.grad is not None])
    return loss.item(), gradient


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_the_loss_by_rounding_only(dtype: torch.dtype, tmp_path: Path) -> None:
    distiller, batch, teacher = prepared(tmp_path)
    exact, exact_gradient = loss_and_gradient(distiller, batch, teacher)
    with torch.autocast("cpu", dtype):
        rounded, gradient = loss_and_gradient(distiller, batch, teacher)
    assert rounded == pytest.approx(exact, rel=0.02)
    assert gradient.isfinite().all()
    assert torch.cosine_similarity(gradient, exact_gradient, dim=0) > 0.98


@pytest.mark.slow
def test_compilation_keeps_the_loss(tmp_path: Path) -> None:
    distiller, batch, teacher = prepared(tmp_path)
    expected, expected_gradient = loss_and_gradient(distiller, batch, teacher)
    # tracing and autograd as for the real compiler, without minutes of code generation
    compiled = torch.compile(distiller, backend="aot_eager")
    loss, gradient = loss_and_gradient(distiller, batch, teacher, call=compiled)
    assert loss == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=1e-4)
    # the decay is a buffer, so another step of the schedule does not compile again
    distiller.criterion.begin_step(2, 4)
    with torch.compiler.set_stance("fail_on_recompile"):
        later, _ = loss_and_gradient(distiller, batch, teacher, call=compiled)
    assert later < loss
