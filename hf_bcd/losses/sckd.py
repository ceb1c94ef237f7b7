"""Student customised distillation (Zhu and Wang, ICCV 2021, https://doi.org/10.1109/ICCV48922.2021.00501)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..outputs import DenseOutput, Targets
from ..utils.distributed import all_reduce_sum
from ..utils.messages import UserError
from .base import CalibrationBatches, DistillationLoss, Pair, Progress
from .ops.functional import at_least_float32


if TYPE_CHECKING:
    from .criterion import DistillationCriterion


# of a loss before its gradients are taken: a mean over pixels would have gradients of 0 in half precision
SCALE = 2.0**16


def sckd_gate(task: Tensor, term: Tensor, *, threshold: float = 0.0) -> Tensor:
    """Whether a term pulls the student the way the task does: 1 if `cos(task, term) > threshold`, else 0.

    Args:
        task: gradient of the task's loss with respect to some tensor of the student, any shape; other ranks hold that
            of their own images, and the cosine is that of the whole batch.
        term: gradient of the term with respect to the same tensor, the same shape.
        threshold: in [-1, 1).

    Returns:
        Scalar without a graph, the same on all ranks; a gradient of zeros has cosine 0.
    """
    task, term = at_least_float32(task.detach()), at_least_float32(term.detach())
    products = torch.stack([(task * term).sum(), task.square().sum(), term.square().sum()])
    product, task_square, term_square = all_reduce_sum(products)
    lengths = task_square.sqrt() * term_square.sqrt()
    cosine = product / lengths.clamp_min(torch.finfo(lengths.dtype).tiny)
    return (cosine > threshold).to(cosine.dtype)


class SCKDLoss(DistillationLoss):
    """Other losses, each term of which counts in a step only where it agrees with the task, see `sckd_gate`.

    Defined here with gradients with respect to the student's deepest feature level or, where the term or the task does
    not depend on that, its logits, because gradients with respect to its parameters, which the paper compares, would take
    for each term one more backward pass through the student and, between ranks, one more exchange of all gradients. A
    term that depends on neither, such as a discriminator's own, always counts. Each forward pass decides for itself, so
    accumulated batches decide one by one; without gradients, everything counts.

    Terms and weights are the hosts', named `host/term`. A student under `torch.compile` hides how its logits depend on
    its features: a `ValueError`.

    Args:
        host: the gated losses, in a recipe as its `losses`: name -> options with `weight` and `decay`.
        threshold: φ; 0 as in the paper, in [-1, 1).
    """

    weights = {"kd/kd": 1.0}
    needs = frozenset({"logits", "task_loss"})
    nested = {"host": {"kd": {}}}
    transfers = "what its host does, where that agrees with the task"
    checked = "no official code: the paper's gate and threshold; where gradients are compared is our reading; each forward pass decides, so accumulated batches need not add up to one"
    reference = "zhu2021student"

    def __init__(self, pair: Pair, *, host: "DistillationCriterion", threshold: float = 0.0) -> None:
        super().__init__(pair)
        if not -1 <= threshold < 1:
            raise UserError(f"threshold is {threshold!r}; a cosine can exceed it only if it is in [-1, 1).")
        hosts = host.by_name()
        decays = {name: name in host.decays for name in hosts}
        if len(set(decays.values())) > 1:
            raise UserError(f"r(t) multiplies all hosts of sckd or none, but decay is {decays}; give all the same.")
        if host.balance is not None:
            raise UserError("sckd opens and closes the terms of its hosts, so `weight: auto` cannot measure them.")
        for name, loss in hosts.items():
            if "task_loss" in loss.needs:
                raise UserError(
                    f"sckd cannot host {name!r}, which looks at the task's loss itself; host what it hosts."
                )
        self.threshold = threshold
        self.hosts = host  # never called itself: the criterion around this loss weights the hosts' terms
        self.weights, self.decays = host.weights, any(decays.values())
        self.needs = frozenset({"task_loss"}).union(*(loss.needs for loss in hosts.values()))

    def forward(
        self, student: DenseOutput, teacher: DenseOutput, targets: Targets, *, task_loss: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Terms of the hosts, 0 where the gate is closed; `task_loss` is the task's weighted loss, with its graph."""
        if task_loss is None:
            raise ValueError("sckd compares gradients with the task's; pass its loss as task_loss.")
        terms = {name: host(student, teacher, targets) for name, host in self.hosts.by_name().items()}
        deepest = list(student.features.values())[-1]
        if deepest.grad_fn is not None and deepest.grad_fn is student.logits.grad_fn:
            raise ValueError("sckd cannot see into a compiled student; set torch_compile to false.")
        points = [point for point in (deepest, student.logits) if point.requires_grad]
        if torch.is_grad_enabled() and task_loss.requires_grad and points:
            task = _gradients(task_loss, points)
            terms = {name: self._gated(name, values, task, points) for name, values in terms.items()}
        return {f"{name}/{term}": value for name, values in terms.items() for term, value in values.items()}

    def _gated(
        self, name: str, terms: dict[str, Tensor], task: Sequence[Tensor | None], points: list[Tensor]
    ) -> dict[str, Tensor]:
        gated = {}
        for term, value in terms.items():
            for ours, its in zip(task, _gradients(value, points), strict=True):
                if ours is not None and its is not None:
                    gated[term] = sckd_gate(ours, its, threshold=self.threshold) * value
                    break
        if not gated and len(points) == 2:
            raise ValueError(
                f"sckd has no gradients to compare for its host {name!r}: the task's loss and a term of that host must "
                "both depend on the student's deepest feature level, or both on its logits. Host another loss."
            )
        return terms | gated

    @property
    def needs_calibration(self) -> bool:
        return self.hosts.needs_calibration

    def calibrate(self, batches: CalibrationBatches, progress: Progress = iter) -> None:
        self.hosts.calibrate(batches, progress)

    def after_step(self) -> None:
        self.hosts.after_step()


def _gradients(loss: Tensor, points: list[Tensor]) -> Sequence[Tensor | None]:
    """Gradient of a scalar with respect to each point, None where it does not depend on it."""
    if not loss.requires_grad:
        return [None] * len(points)
    scale = torch.full_like(loss, SCALE)
    return torch.autograd.grad(loss, points, grad_outputs=scale, retain_graph=True, allow_unused=True)
