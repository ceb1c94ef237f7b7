import time

import pytest
import torch
from tiny import tiny_segformer, tiny_timm
from torch import Tensor, nn

from hf_bcd.utils.costs import (
    MAX_REPEATS,
    count_macs,
    count_parameters,
    device_name,
    measure_costs,
    time_forward,
    weight_bytes,
)


class Net(nn.Module):
    """A convolution, attention and a classifier whose costs can be worked out by hand."""

    def __init__(self, pause: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.classifier = nn.Linear(8, 5, bias=False)
        self.tied = self.classifier
        self.pause, self.calls = pause, 0

    def forward(self, pixel_values: Tensor) -> Tensor:
        assert not torch.is_grad_enabled() and not self.training
        self.calls += 1
        time.sleep(self.pause)
        tokens = self.norm(self.conv(pixel_values)).flatten(2).mT
        return self.classifier(nn.functional.scaled_dot_product_attention(tokens, tokens, tokens))


def test_macs_worked_out_by_hand() -> None:
    # 16 x 12 positions after the convolution; two products of 192 x 192 x 8 in the attention
    positions = 16 * 12
    expected = positions * 8 * 3 * 9 + 2 * positions * positions * 8 + positions * 8 * 5
    assert count_macs(Net().eval(), torch.zeros(1, 3, 32, 24)) == expected
    assert count_macs(Net().eval(), torch.zeros(2, 3, 32, 24)) == 2 * expected


def test_parameters_and_bytes_count_shared_weights_once() -> None:
    model = Net()
    assert count_parameters(model) == 3 * 8 * 9 + 8 + 16 + 40
    # two running statistics of 8 float32 and one int64 counter are saved as well
    assert weight_bytes(model) == 4 * (3 * 8 * 9 + 8 + 16 + 40 + 16) + 8
    assert weight_bytes(model.half()) == 2 * (3 * 8 * 9 + 8 + 16 + 40 + 16) + 8


def test_bytes_are_those_of_the_saved_file(tmp_path) -> None:
    tiny_timm().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert weight_bytes(tiny_timm()) == file.stat().st_size - header


@pytest.mark.parametrize(("pause", "budget", "runs"), [(0.02, 0.05, 2), (0.03, 0.0, 1), (0.0, 60.0, MAX_REPEATS)])
def test_timing_keeps_its_budget(pause: float, budget: float, runs: int) -> None:
    model = Net(pause).eval()
    seconds = time_forward({"net": (model, torch.zeros(1, 3, 8, 8))}, budget)["net"]
    assert all(second >= pause for second in seconds)
    assert 1 <= len(seconds) <= runs and model.calls == 2 * len(seconds)
    if pause == 0:
        assert len(seconds) == MAX_REPEATS


def test_models_take_turns() -> None:
    slow, fast = Net(0.02).eval(), Net().eval()
    image = torch.zeros(1, 3, 8, 8)
    seconds = time_forward({"slow": (slow, image), "fast": (fast, image)}, budget=0.05)
    assert slow.calls == fast.calls == 2 * len(seconds["slow"])
    assert min(seconds["slow"]) > max(0.02, min(seconds["fast"]))


def test_costs_restore_each_models_mode() -> None:
    trained, evaluated = Net().train(), Net().eval()
    image = torch.zeros(1, 3, 32, 24)
    costs = measure_costs({"a": (trained, image), "b": (evaluated, image[..., :16])}, budget=0.01)
    assert trained.training and not evaluated.training
    assert costs["a"]["size"] == [32, 24] and costs["b"]["size"] == [32, 16]
    assert costs["a"]["batch_size"] == 1 and costs["a"]["dtype"] == "float32"
    assert costs["a"]["macs"] == count_macs(trained.eval(), image)
    assert costs["a"]["latency_ms"] > 0 and costs["a"]["repeats"] >= 1


@pytest.mark.parametrize("build", [tiny_timm, tiny_segformer])
def test_costs_of_real_architectures(build) -> None:
    (cost,) = measure_costs({"model": (build(), torch.zeros(1, 3, 64, 96))}, budget=0.0).values()
    doubled = count_macs(build().eval(), torch.zeros(1, 3, 128, 96))
    assert cost["parameters"] == sum(parameter.numel() for parameter in build().parameters())
    # attention is quadratic, the rest linear in the number of positions
    assert 1.9 * cost["macs"] < doubled < 4 * cost["macs"]


def test_the_device_has_a_name() -> None:
    assert device_name(torch.device("cpu")).strip()
