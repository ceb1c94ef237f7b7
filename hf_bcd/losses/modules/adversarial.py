"""Holistic distillation by a discriminator of class scores (WGAN-GP; Liu et al., https://arxiv.org/abs/1903.04197)."""

from collections.abc import Callable
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ...outputs import DenseOutput, Targets
from ...utils.distributed import all_reduce_sum
from ...utils.messages import UserError
from ..base import DistillationLoss, Pair
from ..kd import kd_loss
from ..ld import box_response_loss, heads_of
from ..ops.functional import full_precision, on_teacher_grid, resize, spatial_size, standardize
from .noise import SharedNoise


class SpectralConv2d(nn.Conv2d):
    """Convolution whose weight, as a matrix `[out, in · k²]`, is divided by its largest singular value."""

    left: Tensor

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, padding: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding)
        self.register_buffer("left", F.normalize(torch.randn(out_channels), dim=0))
        if not self.left.is_meta:  # a probe of a recipe, on which each product takes a hundred times as long
            for _ in range(10):
                self.follow()

    def _right(self) -> Tensor:
        return F.normalize(self.weight.detach().flatten(1).mT @ self.left, dim=0)

    @torch.no_grad()
    def follow(self) -> None:
        """One power iteration towards the left singular vector of the present weight."""
        self.left.copy_(F.normalize(self.weight.flatten(1) @ self._right(), dim=0))

    def forward(self, input: Tensor) -> Tensor:
        largest = self.left @ self.weight.flatten(1) @ self._right()
        return self._conv_forward(input, self.weight / largest, self.bias)


class SelfAttention(nn.Module):
    """Self-attention of positions (SAGAN): `x + gamma · softmax(q kᵀ) v`, gamma 0 at first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(1, channels // 8)
        self.query, self.value = nn.Conv2d(channels, inner, 1), nn.Conv2d(channels, channels, 1)
        # softmax would cancel a bias, whose gradient of rounding errors Adam would blow up
        self.key = nn.Conv2d(channels, inner, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Attends over `[B, channels, h, w]`; a fused kernel would lack the second derivative."""
        query, key, value = (layer(x).flatten(2) for layer in (self.query, self.key, self.value))
        return x + self.gamma * (value @ (query.mT @ key).softmax(dim=2).mT).view_as(x)


class Discriminator(nn.Module):
    """One number for the class scores of each image, high for the teacher's.

    The official layers: four spectrally normalised 4x4 convolutions of stride 2 with LeakyReLU(0.1), self-attention
    behind the third and the fourth, a 4x4 convolution to one number. Three things differ. Scores are resized to 64 x 64,
    which these layers need (the official code always has 65 x 65). And the official batch norm of the scores, which would
    tie images and ranks together, is a standardisation of each image over its classes and valid positions. And the power
    iteration moves once a step, not once a pass.

    Args:
        num_labels: number of classes.
        channels: channels of the first layer; each further layer doubles them.
    """

    size = (64, 64)

    def __init__(self, num_labels: int, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for depth, (before, after) in enumerate(pairwise([num_labels, *(channels * 2**i for i in range(4))])):
            layers += [SpectralConv2d(before, after, 4, stride=2, padding=1), nn.LeakyReLU(0.1)]
            if depth >= 2:
                layers.append(SelfAttention(after))
        # differences of scores would cancel a bias, as above
        self.layers = nn.Sequential(*layers, nn.Conv2d(8 * channels, 1, 4, bias=False))

    def forward(self, scores: Tensor, mask: Tensor) -> Tensor:
        """Judges `[B, num_labels, h, w]`, whose positions outside `mask` `[B, h, w]` do not count: `[B]`."""
        mask = mask[:, None]
        x = standardize(scores, (1, 2, 3), mask, over_ranks=False).masked_fill(~mask, 0)
        return self.layers(resize(x, self.size)).flatten()


def gradient_penalty(
    judge: Callable[[Tensor], Tensor], student: Tensor, teacher: Tensor, fraction: float | Tensor
) -> Tensor:
    """`(‖gradient of judge‖ - 1)²` between two maps `[B, ...]`: `[B]` (WGAN-GP, https://arxiv.org/abs/1704.00028).

    `judge` makes one number of each image; its gradient is taken at `fraction · teacher + (1 - fraction) · student`. The
    result is differentiable with respect to what `judge` holds.
    """
    between = torch.lerp(student, teacher, fraction).detach().requires_grad_()
    (slope,) = torch.autograd.grad(judge(between).sum(), between, create_graph=True)
    # 0 at a slope of 0, where the gradient of the root of a sum of squares is not finite
    return (torch.linalg.vector_norm(slope.flatten(1), dim=1) - 1).square()


class Adversary(nn.Module):
    """A discriminator with its own training: `mean over images of D(teacher) - D(student)`, to be made small.

    The constant `D(teacher)`, which the official term leaves out, makes it 0 where both agree and an estimate of the
    Wasserstein distance. The discriminator learns on every batch that is seen with gradients, by
    `D(student) - D(teacher) + 10 · gradient_penalty`, and moves in `after_step`, by Adam with the official rates (4e-4;
    0.9, 0.99), which stay constant. Its weights are no trainable parameters, so the run's optimizer and data parallelism
    do not touch them; they and Adam's moments are saved with the loss.

    Args:
        num_labels: number of classes.
        channels: channels of the discriminator's first layer, 64 in the official code.
        seed: seed of the interpolation between student and teacher.
    """

    learning_rate, betas, eps, penalty_weight = 4e-4, (0.9, 0.99), 1e-8, 10.0

    mean: Tensor
    square: Tensor

    def __init__(self, num_labels: int, channels: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.discriminator = Discriminator(num_labels, channels).requires_grad_(False)
        self.noise = SharedNoise(seed)
        size = sum(parameter.numel() for parameter in self.discriminator.parameters())
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("square", torch.zeros(size))
        self._learnt: Tensor | None = None  # sum over this step's batches of (gradient, 1)

    @full_precision
    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """How far the discriminator can tell the student's scores from the teacher's.

        Args:
            student: class scores `[B, num_labels, h, w]`.
            teacher: `[B, num_labels, h', w']`, to whose grid the student's are resized; they receive no gradient.
            mask: `[B, h', w']`, True where valid.

        Returns:
            Scalar, 0 for equal scores; float32 or float64.
        """
        student, teacher, mask = on_teacher_grid(student, teacher, mask)
        student, teacher = (scores.masked_fill(~mask[:, None], 0) for scores in (student, teacher))
        if torch.is_grad_enabled():
            self._learn(student.detach(), teacher, mask)  # type: ignore[call-arg]
        return (self.discriminator(teacher, mask) - self.discriminator(student, mask)).mean()

    # torch.compile cannot differentiate twice
    @torch.compiler.disable
    def _learn(self, student: Tensor, teacher: Tensor, mask: Tensor) -> None:
        weights = {name: weight.detach().requires_grad_() for name, weight in self.discriminator.named_parameters()}

        def judge(scores: Tensor) -> Tensor:
            return functional_call(self.discriminator, weights, (scores, mask))

        fraction = self.noise.draw(1).to(student.dtype)
        penalty = self.penalty_weight * gradient_penalty(judge, student, teacher, fraction)
        # images without a valid pixel: an exact 0, not a rounding error that Adam would blow up
        loss = (judge(student) - judge(teacher) + penalty).masked_fill(~mask.flatten(1).any(dim=1), 0).mean()
        gradients = torch.autograd.grad(loss, list(weights.values()))
        learnt = torch.cat([*(gradient.flatten() for gradient in gradients), loss.new_ones(1)])
        self._learnt = learnt if self._learnt is None else self._learnt + learnt

    @torch.no_grad()
    def after_step(self) -> None:
        """One step of Adam with the mean gradient of all ranks' batches since the last."""
        self.noise.advance()
        if self._learnt is None:
            return
        learnt, self._learnt = all_reduce_sum(self._learnt), None
        # scores that overflowed in half precision: the scaler skips the student's step, this skips the discriminator's
        gradient, (slow, slower) = (learnt[:-1] / learnt[-1]).nan_to_num(0.0, 0.0, 0.0), self.betas
        self.mean.lerp_(gradient, 1 - slow)
        self.square.lerp_(gradient.square(), 1 - slower)
        steps = self.noise.step.to(gradient.dtype)
        root = (self.square / (1 - slower**steps)).sqrt() + self.eps
        change = self.learning_rate * self.mean / (1 - slow**steps) / root
        weights = list(self.discriminator.parameters())
        for weight, part in zip(weights, change.split([weight.numel() for weight in weights]), strict=True):
            weight -= part.view_as(weight)
        for layer in self.discriminator.modules():
            if isinstance(layer, SpectralConv2d):
                layer.follow()


class AdversarialLoss(DistillationLoss):
    """A method that has an `Adversary` on the class scores as one of its terms."""

    adversarial: ClassVar[str] = "adversarial"  # name of this term
    response: ClassVar[str]  # name of the term of the class scores themselves
    keeps = "discriminator"

    def __init__(self, pair: Pair, discriminator_channels: int, on: str = "pixels") -> None:
        super().__init__(pair)
        if on not in ("pixels", "boxes", "features"):
            raise UserError(f"on is {on!r}; choose pixels, boxes or features.")
        if on != "pixels":  # whose scores are no picture, or none at all
            scores = {"dense", "classes"} if on == "boxes" else set()
            self.needs, discriminator_channels = frozenset({"features", *scores}), 0
        if on == "features":
            self.weights = {term: weight for term, weight in self.weights.items() if term != self.response}
        self.on = on
        if discriminator_channels < 0:
            raise UserError(f"discriminator_channels is {discriminator_channels!r}; it must be >= 0.")
        self.adversary = None
        if discriminator_channels:
            self.adversary = Adversary(pair.num_labels, discriminator_channels, pair.seed)
        else:
            self.weights = {term: weight for term, weight in self.weights.items() if term != self.adversarial}

    def adversarial_term(self, student: Tensor, teacher: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """The term of the scores of both models, or none without a discriminator."""
        return {} if self.adversary is None else {self.adversarial: self.adversary(student, teacher, mask)}

    def responses(self, student: DenseOutput, teacher: DenseOutput, targets: Targets) -> dict[str, Tensor]:
        """The terms of the class scores: `response`, of pixels or of a detector's priors, and the adversarial one of pixels."""
        if self.on == "features":
            return {}
        if self.on == "boxes":
            ours, theirs = heads_of(student, teacher)
            return {self.response: box_response_loss(ours.class_logits, theirs.class_logits)}
        mask = targets.valid(spatial_size(teacher.logits))
        response = {self.response: kd_loss(student.logits, teacher.logits, mask=mask)}
        return response | self.adversarial_term(student.logits, teacher.logits, mask)

    def after_step(self) -> None:
        if self.adversary is not None:
            self.adversary.after_step()
