"""Quantisation-aware steps: a student's last ones compute with weights and inputs as an int8 file will have them.

torch's own operators for fake quantisation, in hooks: torchao's workflows for training take linear layers only, or a traced
graph, which is no model of transformers any more. In the files BatchNorm is folded into convolutions; its factor changes
the scale of a channel and not its steps, so that weights are quantised before it here; its statistics stay. Length and rate are those
that NVIDIA recommends with Wu et al., "Integer Quantization for Deep Learning Inference" (arXiv:2004.09602): a tenth of the steps,
from a hundredth of the learning rate.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..utils.distributed import is_distributed


PART = 0.1  # of a run's steps
RATE = 0.01  # of the learning rate, with which they begin
FOLDER = "_before_int8"  # in the output folder: the student before them, never pushed
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear, nn.ConvTranspose2d)
STEPS = 255  # of 8 bits without a sign
LARGEST = {
    False: 64,
    True: 127,
}  # integer of a weight, by whether it has a filter for each channel: see `export.onnx.write`
SMALLEST = 1e-12  # scale of a channel or an input that is nothing but zeros


def steps_before(total: int) -> int:
    """The number of a run's steps before those that are quantised: nine tenths, and at least one."""
    return max(1, total - max(1, round(PART * total)))


def fake_weight(weight: Tensor, axis: int, largest: int) -> Tensor:
    """A weight as int8 with a scale for each output channel and without an offset holds it; gradients pass unchanged.

    Args:
        weight: floating point, of any shape.
        axis: of its output channels.
        largest: the integer that holds the largest absolute value of a channel.
    """
    others = [place for place in range(weight.ndim) if place != axis]
    scale = (weight.detach().abs().amax(others) / largest).clamp_min(SMALLEST)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zero, axis, -largest, largest)


def fake_input(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """What 8 bits without a sign hold of values between `low` <= 0 and `high` >= 0; others get no gradient."""
    scale = ((high - low) / STEPS).clamp_min(SMALLEST)
    zero = (-low / scale).round().clamp(0, STEPS).int()
    return torch.fake_quantize_per_tensor_affine(values.float(), scale, zero, 0, STEPS).to(values.dtype)


class FakeQuantizer(nn.Module):
    """Fake quantisation of a student's convolutions and linear layers, while it trains and `active` says so.

    The range of each layer's input is that of all it has seen, as static quantisation will find it.

    Args:
        student: gets the hooks; its parameters and state stay as they are.
    """

    low: Tensor
    high: Tensor

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.active = False
        layers = [layer for layer in student.modules() if isinstance(layer, LAYERS)]
        self.register_buffer("low", torch.zeros(len(layers)))
        self.register_buffer("high", torch.zeros(len(layers)))
        for place, layer in enumerate(layers):
            layer.register_forward_pre_hook(partial(self._before, place))
            layer.register_forward_hook(_after, always_call=True)

    def _before(self, place: int, layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Any, ...] | None:
        if not (self.active and layer.training):
            return None
        values, *rest = inputs
        with torch.no_grad():
            least, most = values.detach().float().aminmax()
            self.low[place] = torch.minimum(self.low[place], least)
            self.high[place] = torch.maximum(self.high[place], most)
        axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
        weight: Tensor = layer.weight  # type: ignore[assignment]
        depthwise = getattr(layer, "groups", 1) == weight.shape[0] > 1 == weight.shape[1]
        # found before the parameter of that name, which optimizer and checkpoints go on to see
        layer.__dict__["weight"] = fake_weight(weight, axis, LARGEST[depthwise])
        return fake_input(values, self.low[place], self.high[place]), *rest

    def after_step(self) -> None:
        """Gives all processes the ranges of all of them."""
        if self.active and is_distributed():
            dist.all_reduce(self.low, dist.ReduceOp.MIN)
            dist.all_reduce(self.high, dist.ReduceOp.MAX)


def _after(layer: nn.Module, inputs: Any, output: Any) -> None:
    layer.__dict__.pop("weight", None)


def restarted(scheduler: Any, first: int, total: int) -> None:
    """Lets a schedule of `first` steps, a `LambdaLR`, begin again at a hundredth of its highest rate, and fall to 0 at `total`."""

    def shape(before: Callable[[int], float], step: int) -> float:
        return before(step) if step < first else RATE * max(0, total - step) / (total - first)

    scheduler.lr_lambdas = [partial(shape, before) for before in scheduler.lr_lambdas]


class QuantizationCallback(TrainerCallback):
    """Begins the quantised steps, after saving the student as it is without them.

    Args:
        quantizer: of the student.
        save: saves it in a folder.
    """

    def __init__(self, quantizer: FakeQuantizer, save: Callable[[Path], None]) -> None:
        self.quantizer, self.save = quantizer, save

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        first = steps_before(state.max_steps)
        if state.global_step == first and state.is_world_process_zero:
            self.save(Path(args.output_dir or ".") / FOLDER)
        self.quantizer.active = state.global_step >= first

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.quantizer.active = False
