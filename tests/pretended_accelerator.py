"""A device that only pretends to compute: on it a step shows mixes of devices, waits and copies without a GPU.

Registering it changes PyTorch for good, so this runs in a process of its own: `python pretended_accelerator.py losses models`. Every case prints a line that starts with `ok` or `FAILED`, and after each kind a line says how many there were.
"""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Backend(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:  # `torch.autocast` asks
        return [torch.bfloat16, torch.float16]


backend_registration._setup_privateuseone_for_python_backend("pretended", backend_module=_Backend())
torch._C._set_only_lift_cpu_tensors(True)  # tensors made of lists pass through the CPU, as with a GPU
DEVICE = torch.device("pretended:0")


class NoCopies(TorchDispatchMode):
    """Fails where an operator meets tensors of two devices, scalars apart; FakeTensorMode finds mixes and waits only."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        copies = "copy" in func._schema.name
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        met = {x.device.type for x in tensors if x.dim() or copies}
        if len(met) > 1:
            raise RuntimeError(f"{func} copies between {', '.join(sorted(met))}")
        return out


def pretend(module: nn.Module) -> nn.Module:
    """Moves a module to the device, inside FakeTensorMode."""
    for table in [table for m in module.modules() for table in (m._parameters, m._buffers)]:
        for key, value in table.items():
            if value is not None:
                fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=DEVICE)
                table[key] = nn.Parameter(fake, value.requires_grad) if isinstance(value, nn.Parameter) else fake
    return module


def losses() -> Iterator[tuple[str, Callable[[], None]]]:
    """A step of every loss: forward, backward and what ends it."""
    from losses import test_loss_contract as contract

    from hf_bcd.outputs import DenseOutput, LabelMaps

    def run(name: str, options: dict[str, Any]) -> None:
        criterion = contract.build(name, options)
        with FakeTensorMode():
            pretend(criterion)

            def moved(specs: Any, grad: bool) -> DenseOutput:
                sizes = {level: (spec.channels, contract.SIZE // spec.stride) for level, spec in specs.items()}
                features = {
                    key: torch.empty(4, c, s, s, device=DEVICE, requires_grad=grad) for key, (c, s) in sizes.items()
                }
                side = contract.SIZE // 4
                logits = torch.empty(4, contract.NUM_LABELS, side, side, device=DEVICE, requires_grad=grad)
                return DenseOutput(features, logits)

            student, teacher = moved(contract.STUDENT, True), moved(contract.TEACHER, False)
            kernels = {
                level: torch.empty(contract.NUM_LABELS, spec.channels, 1, 1, device=DEVICE)
                for level, spec in contract.TEACHER.items()
            }

            def head(levels: dict[str, Tensor]) -> Tensor:
                scores = [nn.functional.conv2d(x, kernels[level]) for level, x in levels.items()]
                return sum(nn.functional.interpolate(x, teacher.logits.shape[-2:]) for x in scores)  # type: ignore[return-value]

            teacher.head = head
            ids = torch.empty(4, contract.SIZE, contract.SIZE, dtype=torch.int64, device=DEVICE)
            targets, zero = LabelMaps(ids, contract.NUM_LABELS), torch.zeros((), device=DEVICE)
            with NoCopies():
                for _ in range(2):
                    task = {"loss_task": zero + student.logits.square().mean() + student.features["stride_16"].sum()}
                    criterion(task, student, teacher, targets)[0].backward()
                    criterion.after_step()

    for number, (name, options) in enumerate(contract.CASES):
        yield f"{name}-{number}", lambda name=name, options=options: run(name, options)


def models() -> Iterator[tuple[str, Callable[[], None]]]:
    """A training step of every family and of every head, and a forward pass in evaluation mode."""
    from adapters.adapter_tiny_models import LABELS, MODELS, timm_segmentation, tiny_model

    from hf_bcd.adapters import build_adapter
    from hf_bcd.outputs import LabelMaps

    def run(build: Callable[[], Any]) -> None:
        adapter = build_adapter(build())
        with FakeTensorMode():
            pretend(adapter)
            pixels = torch.empty(2, 3, 96, 96, device=DEVICE)
            targets = LabelMaps(torch.empty(2, 96, 96, dtype=torch.int64, device=DEVICE), len(LABELS))
            with NoCopies():
                output = adapter.train()(pixels, targets)
                torch.stack([*output.task_losses.values()]).sum().backward()
                with torch.no_grad():
                    adapter.eval()(pixels)

    for name in MODELS:
        yield name, lambda name=name: run(lambda: tiny_model(name))
    for head in ("psp", "deeplabv3plus", "fpn"):
        yield f"timm {head}", lambda head=head: run(lambda: timm_segmentation(head=head))


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "losses")]
    torch.set_num_threads(1)
    for kind in sys.argv[1:]:
        failed, number = 0, 0
        for case, call in {"losses": losses, "models": models}[kind]():
            number += 1
            try:
                call()
                print("ok", case)
            except Exception as error:  # whatever it is, the case is reported and the next one runs
                failed += 1
                frames = traceback.extract_tb(error.__traceback__)
                places = [
                    f
                    for f in frames
                    if {"hf_bcd", "transformers"} & {*Path(f.filename).parts} and f.filename != __file__
                ]
                place = (
                    f"{'/'.join(Path(places[-1].filename).parts[-3:])}:{places[-1].lineno}" if places else "unknown"
                )
                print("FAILED", case, f"in {place}: {type(error).__name__}:", *str(error).splitlines()[:1])
        print(f"{number} cases of {kind}, {failed} failed", flush=True)
    os._exit(0)  # torch's threads end badly beside a device that is none
