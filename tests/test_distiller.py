"""The one module that is wrapped: precision, compilation and what it returns."""

from pathlib import Path

import pytest
import tiny
import torch

from hf_bcd.adapters import build_adapter
from hf_bcd.distiller import Distiller
from hf_bcd.losses.criterion import DistillationCriterion
from hf_bcd.losses.task import segmentation_loss
from hf_bcd.outputs import DenseOutput


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
    loss = forward(batch["pixel_values"], batch["labels"], teacher)["loss"]
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


def test_compilation_keeps_the_loss(tmp_path: Path) -> None:
    distiller, batch, teacher = prepared(tmp_path)
    expected, expected_gradient = loss_and_gradient(distiller, batch, teacher)
    # tracing and autograd as for the real compiler, without minutes of code generation
    compiled = torch.compile(distiller, backend="aot_eager")
    loss, gradient = loss_and_gradient(distiller, batch, teacher, call=compiled)
    assert loss == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=1e-4)
    # the decay is a buffer, so another step of the schedule does not compile again
    distiller.begin_step(2, 4)
    with torch.compiler.set_stance("fail_on_recompile"):
        later, _ = loss_and_gradient(distiller, batch, teacher, call=compiled)
    assert later < loss


def test_without_labels_the_student_only_predicts(tmp_path: Path) -> None:
    distiller, batch, _ = prepared(tmp_path)
    with torch.no_grad():
        output = distiller.eval()(batch["pixel_values"])
        with torch.autocast("cpu", torch.bfloat16):  # predictions are those of the exported model, in full precision
            same = distiller(batch["pixel_values"])
    assert output.keys() == {"logits"} and output["logits"].dtype == torch.float32
    assert torch.equal(output["logits"], same["logits"])


def test_an_all_void_batch_gives_a_connected_zero(tmp_path: Path) -> None:
    distiller, batch, teacher = prepared(tmp_path)
    batch["labels"] = torch.full_like(batch["labels"], 255)
    loss, gradient = loss_and_gradient(distiller, batch, teacher)
    assert loss == 0 and (gradient == 0).all() and len(gradient) > 0


def test_the_auxiliary_loss_counts_and_is_logged_with_its_weight() -> None:
    sample = tiny.TensorSamples(1)[0]
    pixel_values, labels = sample["pixel_values"][None].repeat(2, 1, 1, 1), sample["labels"][None].repeat(2, 1, 1)
    student = build_adapter(tiny.tiny_timm(auxiliary_head=True, dropout=0.0)).train()
    outputs = Distiller(student, DistillationCriterion({}, {}, []))(pixel_values, labels)
    auxiliary = segmentation_loss(student(pixel_values).auxiliary_logits, labels)
    torch.testing.assert_close(outputs["terms"]["loss_auxiliary"], 0.4 * auxiliary.detach())
    torch.testing.assert_close(outputs["loss"].detach(), sum(outputs["terms"].values()))
