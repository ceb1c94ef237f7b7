"""Gradient norms of the terms at the student, and weights that follow from them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...utils.distributed import all_reduce_sum


FIRST_STEP, LAST_STEP = 50, 150


def squared_gradients(terms: Mapping[str, Tensor], features: Tensor) -> Tensor:
    """Squared norms of the gradients of K scalars with respect to one map of the student: `[K]`, float32.

    Their graphs are kept; a term that does not depend on the map has 0.
    """
    squares = []
    for value in terms.values():
        (gradient,) = torch.autograd.grad(value, features, retain_graph=True, allow_unused=True)
        squares.append(value.new_zeros(()) if gradient is None else gradient.float().square().sum())
    return torch.stack(squares).float()


class GradientBalance(nn.Module):
    """Weights that give each term a fixed share of the task loss's gradient, measured once, early in training.

    Over steps 50 to 150 (of a run of less than 400 steps, its second and third eighth) the norms of the
    gradients at the student's last stage are averaged; from then on `weight = share · |task| / |term|`. Until then, and
    for a term without a gradient there, the initial weights hold. r(t) comes on top.

    Args:
        initial: term -> weight until the measurement ends.
        shares: term -> share of the task's gradient, for the same terms.
    """

    weights: Tensor
    sums: Tensor
    shares: Tensor

    def __init__(self, initial: Mapping[str, float], shares: Mapping[str, float]) -> None:
        super().__init__()
        self.terms = list(initial)
        self.register_buffer("weights", torch.tensor([float(initial[term]) for term in self.terms]))
        self.register_buffer("sums", torch.zeros(len(self.terms) + 1))  # the task's norm is the first
        self.register_buffer("shares", torch.tensor([float(shares[term]) for term in self.terms]), persistent=False)
        self.measuring = self._ends = False
        # plain attribute: DDP would overwrite a buffer with rank 0's
        self._squares: Tensor | None = None

    def by_term(self) -> dict[str, Tensor]:
        """Term -> weight in force, a scalar on the device."""
        return dict(zip(self.terms, self.weights.unbind(), strict=True))

    def begin_step(self, step: int, total: int) -> None:
        """Says which optimizer step of how many comes next, counted from 1."""
        first, last = (min(bound, total * eighths // 8) for bound, eighths in ((FIRST_STEP, 1), (LAST_STEP, 3)))
        self.measuring, self._ends = first <= step <= last, step == last

    def observe(self, squares: Tensor) -> None:
        """Adds the squared norms `[1 + K]` of one forward pass, the task's first, to the sums of the current step."""
        # divided by ranks and accumulated batches the sum would be that of the whole batch; the ratios are the same
        self._squares = squares.detach() if self._squares is None else self._squares + squares.detach()

    def after_step(self) -> None:
        """Ends an optimizer step, on all ranks at once; the last one of the measurement sets the weights."""
        if self._squares is None:
            return
        self.sums += all_reduce_sum(self._squares).sqrt()
        self._squares = None
        if self._ends:
            task, terms = self.sums[0], self.sums[1:]
            measured = (task > 0) & (terms > 1e-6 * task)  # less is rounding, and its weight would be without bounds
            wanted = self.shares * task / torch.where(measured, terms, 1.0)
            self.weights.copy_(torch.where(measured, wanted, self.weights))
