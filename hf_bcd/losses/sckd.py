"""Student customised distillation (Zhu and Wang, ICCV 2021, https://doi.org/10.1109/ICCV48922.2021.00501)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..outputs import DenseOutput, FeatureSpec
from ..utils.distributed import all_reduce_sum
from .base import DistillationLoss
from .ops.functional import at_least_float32


# of a loss before its gradients are taken: those of means over pixels would be 0 in half precision
SCALE = 2.0**16

Hosts = Mapping[str, Mapping[str, Any] | None]
DEFAULT_HOST: Hosts = {"kd": {}}


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


def _read_hosts(host: Hosts) -> dict[str, Any]:
    from .recipe import read_losses  # whose table of losses this one is in

    if not (isinstance(host, Mapping) and host):
        raise ValueError(f"host of loss 'sckd' is {host!r}; it must map losses to options, as in {{ifvd: {{}}}}.")
    hosts = read_losses(host)
    for name, loss in hosts.items():
        if "task_loss" in loss.cls.needs:
            raise ValueError(f"sckd cannot host {name!r}, which looks at the task's loss itself; host what it hosts.")
        if loss.measured:
            raise ValueError(f"sckd opens and closes the terms of {name!r}, so `weight: auto` cannot measure them.")
    return hosts


class SCKDLoss(DistillationLoss):
    """Other losses, each term of which counts in a step only where it agrees with the task, see `sckd_gate`.

    Defined here with gradients with respect to the student's deepest feature level or, where the term or the task does
    not depend on that, its logits, because those with respect to its parameters, which the paper compares, would take
    for each term one more backward pass through the student and, between ranks, one more exchange of all gradients. A
    term that depends on neither, such as a discriminator's own, always counts. Each forward pass decides for itself, so
    accumulated batches decide one by one; without gradients, everything counts.

    The terms are those of the hosts, named `host/term`, and so are the weights. A student under `torch.compile` hides how
    its logits depend on its features, so that is a `ValueError`.

    Args:
        student_specs: feature levels of the student.
        teacher_specs: feature levels of the teacher.
        num_labels: number of the student's classes.
        host: the gated losses, as in a recipe's `losses`: name -> options with `weight` and `decay`; `kd` by default.
        threshold: φ; 0 as in the paper, in [-1, 1).
        head_levels: the teacher's levels that its head reads.
        ignore_index: void label.
        seed: seed of what the hosts draw at random.
    """

    weights = {"kd/kd": 1.0}
    needs = frozenset({"logits", "task_loss"})
    transfers = "what its host does, where that agrees with the task"
    source = "https://doi.org/10.1109/ICCV48922.2021.00501"
    checked = "no official code: the paper's gate and threshold; where gradients are compared is our reading"
    citation = (
        "@inproceedings{zhu2021student,\n"
        "  title={Student Customized Knowledge Distillation: Bridging the Gap Between Student and Teacher},\n"
        "  author={Zhu, Yichen and Wang, Yi},\n"
        "  booktitle={ICCV},\n"
        "  year={2021}\n"
        "}"
    )

    @classmethod
    def default_weights(cls, host: Hosts = DEFAULT_HOST, **options: Any) -> dict[str, float]:
        hosts = _read_hosts(host)
        return {f"{name}/{term}": value for name, loss in hosts.items() for term, value in loss.weights.items()}

    @classmethod
    def needed(cls, host: Hosts = DEFAULT_HOST, **options: Any) -> frozenset[str]:
        return frozenset({"task_loss"}).union(
            *(loss.cls.needed(**loss.options) for loss in _read_hosts(host).values())
        )

    @classmethod
    def decays_with(cls, host: Hosts = DEFAULT_HOST, **options: Any) -> bool:
        decays = {name: loss.decays for name, loss in _read_hosts(host).items()}
        if len(set(decays.values())) > 1:
            raise ValueError(f"r(t) multiplies all hosts of sckd or none, but decay is {decays}; give all the same.")
        return any(decays.values())

    def __init__(
        self,
        student_specs: Mapping[str, FeatureSpec],
        teacher_specs: Mapping[str, FeatureSpec],
        *,
        num_labels: int,
        host: Hosts = DEFAULT_HOST,
        threshold: float = 0.0,
        head_levels: Sequence[str] | None = None,
        ignore_index: int = 255,
        seed: int = 0,
    ) -> None:
        from .recipe import build_criterion

        super().__init__()
        if not -1 <= threshold < 1:
            raise ValueError(f"threshold is {threshold!r}; a cosine can exceed it only if it is in [-1, 1).")
        self.threshold = threshold
        # never called itself: the criterion around this loss weights the hosts' terms
        self.hosts = build_criterion(
            host,
            student_specs,
            teacher_specs,
            num_labels=num_labels,
            ignore_index=ignore_index,
            seed=seed,
            offers=self.needed(host),
            head_levels=head_levels,
        )

    def forward(
        self, student: DenseOutput, teacher: DenseOutput, labels: Tensor, *, task_loss: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Terms of the hosts, 0 where the gate is closed; `task_loss` is the task's weighted loss, with its graph."""
        if task_loss is None:
            raise ValueError("sckd compares gradients with those of the task; pass its loss as task_loss.")
        terms = {name: host(student, teacher, labels) for name, host in self.hosts.losses.items()}
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

    def calibrate(
        self,
        batches: list[tuple[DenseOutput, Tensor]],
        progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    ) -> None:
        self.hosts.calibrate(batches, progress)

    def after_step(self) -> None:
        self.hosts.after_step()


def _gradients(loss: Tensor, points: list[Tensor]) -> Sequence[Tensor | None]:
    """Gradient of a scalar with respect to each point, None where it does not depend on it."""
    if not loss.requires_grad:
        return [None] * len(points)
    scale = torch.full_like(loss, SCALE)
    return torch.autograd.grad(loss, points, grad_outputs=scale, retain_graph=True, allow_unused=True)
