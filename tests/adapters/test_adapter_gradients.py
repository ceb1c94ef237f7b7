"""As a student, every family trains all of what it does not freeze."""

import pytest
import torch
from adapter_tiny_models import MODELS, images, tiny_model

from hf_bcd.adapters import build_adapter
from hf_bcd.outputs import LabelMaps


@pytest.mark.parametrize("name", MODELS)
def test_exactly_the_unused_parameters_are_frozen(name: str) -> None:
    adapter = build_adapter(tiny_model(name)).train()
    size = adapter.fixed_size or (64, 96)
    labels = torch.randint(0, adapter.num_labels, (2, *size))
    output = adapter(images(*size), LabelMaps(labels, adapter.num_labels))
    (sum(output.task_losses.values()) + output.logits.square().mean()).backward()
    without_gradient = {key for key, p in adapter.model.named_parameters() if p.grad is None}
    adapter.freeze_unused()
    assert {key for key, p in adapter.model.named_parameters() if not p.requires_grad} == without_gradient
