"""The losses need torch alone and never make the host wait for the device."""

import subprocess
import sys

import pytest
import torch
from host_sync import no_host_synchronisation
from loss_references import dense_output, random_labels

from hf_bcd.losses import build_criterion, segmentation_loss
from hf_bcd.outputs import FeatureSpec


SPECS = {"stride_4": FeatureSpec(4, 4), "stride_8": FeatureSpec(6, 8)}
CONFIGURATIONS = [("stable", "calibrated"), ("stable", "logits"), ("paper", "orthogonal")]


@pytest.mark.parametrize(
    "synchronise",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: float(x.sum()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 0),
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: "grew" if x.sum() > 1 else "stayed",
    ],
)
def test_the_guard_notices(synchronise):
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match="waits for the device"), no_host_synchronisation():
        synchronise(x)


def training_step(mode: str, teacher_head: str, device: str = "cpu"):
    """Criterion and one step of it, everything on the device beforehand."""
    torch.manual_seed(0)
    options = {"mode": mode, "teacher_head": teacher_head, "channels": 8, "reduced_channels": 4}
    criterion = build_criterion({"bcd": options}, SPECS, SPECS, num_labels=3).to(device)
    student, teacher = (dense_output(SPECS, 2, 32, 3, seed=seed) for seed in (0, 100))
    for output in (student, teacher):
        output.features = {name: x.to(device) for name, x in output.features.items()}
        output.logits = output.logits.to(device)
    student.logits.requires_grad_()
    labels = random_labels(2, 32, 32, num_labels=3).to(device)
    labels[:, :9] = 255

    def step() -> None:
        task = {"loss_task": segmentation_loss(student.logits, labels)}
        total, _ = criterion(task, student, teacher, labels)
        total.backward()
        criterion.after_step()

    return criterion, step


@pytest.mark.parametrize(("mode", "teacher_head"), CONFIGURATIONS)
def test_a_training_step_never_waits_for_the_device(mode, teacher_head):
    criterion, step = training_step(mode, teacher_head)
    with no_host_synchronisation():
        step()
    assert all(p.grad is not None for p in criterion.parameters() if p.requires_grad)


@pytest.mark.gpu
@pytest.mark.parametrize(("mode", "teacher_head"), CONFIGURATIONS)
def test_cuda_reports_no_synchronisation(mode, teacher_head):
    criterion, step = training_step(mode, teacher_head, "cuda")
    step()  # lets the libraries set themselves up
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.grad is not None for p in criterion.parameters() if p.requires_grad)


def test_losses_import_torch_alone():
    foreign = ("transformers", "timm", "datasets", "accelerate", "torchvision", "PIL", "huggingface_hub", "matplotlib")
    code = f"import sys, hf_bcd.losses; print([m for m in {foreign} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
