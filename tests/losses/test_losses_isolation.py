"""The losses need only torch and never make the host wait for the device."""

import subprocess
import sys

import pytest
import torch
from host_sync import no_host_synchronisation

from hf_bcd.losses import LOSSES
from hf_bcd.losses.recipe import ALWAYS_OFFERED


@pytest.mark.parametrize(
    "synchronise",
    [
        lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: float(x.sum()), lambda x: x[x > 0],
        lambda x: x.nonzero(), lambda x: torch.where(x > 0), lambda x: x.masked_select(x > 0), lambda x: x.unique(),
        lambda x: torch.equal(x, x), lambda x: x.cpu(), lambda x: x.tolist(), lambda x: x.numpy(),
        lambda x: "grew" if x.sum() > 1 else "stayed",
    ],
)  # fmt: skip
def test_the_guard_notices(synchronise):
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match="waits for the device"), no_host_synchronisation():
        synchronise(x)


FOREIGN = ("transformers", "timm", "datasets", "accelerate", "torchvision", "PIL", "huggingface_hub", "matplotlib")
# importing what has the value None fails
WITHOUT_FOREIGN = f"import sys; sys.modules.update(dict.fromkeys({FOREIGN}))\n"


def run_code(code: str) -> str:
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.strip()


PLAIN_LOOP = """
import torch
from torch.nn import Conv2d
from torch.nn.functional import cross_entropy
from hf_bcd.losses import CWDLoss, Pair
from hf_bcd.outputs import DenseOutput, LabelMaps

torch.manual_seed(0)
images, labels = torch.rand(2, 3, 16, 16), torch.randint(0, 4, (2, 16, 16))
student, teacher = Conv2d(3, 4, 3, padding=1), Conv2d(3, 4, 5, padding=2).requires_grad_(False)
loss, optimizer, values = CWDLoss(Pair({}, {}, 4, ())), torch.optim.SGD(student.parameters(), 0.5), []
for _ in range(8):
    scores = student(images)
    terms = loss(DenseOutput({}, scores), DenseOutput({}, teacher(images)), LabelMaps(labels, 4))
    optimizer.zero_grad()
    (cross_entropy(scores, labels) + 3 * terms["cwd"]).backward()
    optimizer.step()
    loss.after_step()
    values.append(terms["cwd"].item())
print(values[-1] < 0.8 * values[0])
"""

ALL_LOSSES = """
from hf_bcd.losses import LOSSES, build_criterion
from hf_bcd.outputs import FeatureSpec

specs = {"stride_4": FeatureSpec(8, 4), "stride_8": FeatureSpec(8, 8)}
small = {"cirkd": {"memory_mib": 0.01}, "bcd": {"channels": 8, "reduced_channels": 4}}
targets = LabelMaps(torch.randint(0, 3, (1, 32, 32)), 3)
offers = frozenset({"features", "labels", "logits", "task_loss", "head"})
for name in (name for name, loss in LOSSES.items() if loss.needs <= offers):  # others need a detector
    outputs = [
        DenseOutput({k: torch.rand(1, c, 32 // s, 32 // s) for k, (c, s) in specs.items()}, torch.rand(1, 3, 8, 8))
        for _ in range(2)
    ]
    outputs[1].head = lambda levels: levels["stride_4"][:, :3]
    outputs[0].logits.requires_grad_()
    outputs[0].features = {k: x.requires_grad_() for k, x in outputs[0].features.items()}
    criterion = build_criterion({name: small.get(name, {})}, specs, specs, num_labels=3, offers=offers)
    total, terms = criterion({"loss_task": outputs[0].logits.square().mean()}, *outputs, targets)
    total.backward()
    criterion.after_step()
    print(name)
"""


@pytest.mark.slow
def test_a_plain_loop_of_pytorch_and_every_loss_need_nothing_but_torch():
    improved, *computed = run_code(WITHOUT_FOREIGN + PLAIN_LOOP + ALL_LOSSES).split()
    of_pixels = [name for name, loss in LOSSES.items() if loss.needs <= ALWAYS_OFFERED | {"head"}]
    assert improved == "True" and computed == of_pixels
