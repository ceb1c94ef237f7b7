"""Divergence between the self-relations of two feature maps, exactly and in linear memory.

The relation of n positions is an n x n matrix, but a row of its softmax needs only that row. So blocks of rows pass by:
each yields its part of the loss and, because the gradient with respect to the Gram matrix is known in closed form
(`q - p` for a Kullback-Leibler divergence), of the student's gradient too. The backward pass keeps only this
gradient, as large as the features; nothing n x n ever exists. The products are autograd's: a Gram
matrix each for student and teacher, and the student's features once as rows and once as columns of its own.
"""

import logging
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from .functional import at_least_float32, check_tau, full_precision, mask_fill_value, row_weights


logger = logging.getLogger(__name__)

PROOF_POSITIONS, PROOF_TOLERANCE = 300, 0.05  # more than two tiles of rows; products may be in bfloat16 or TF32
BLOCK_BYTES = 16 * 2**20  # of the four blocks of rows that a pass works in, together: what stays in a cache is fastest


class Relation(NamedTuple):
    """Result of `relation_divergence`: means over the valid rows of each image, `[B]`."""

    divergence: Tensor  # in nat
    peak: Tensor  # the teacher's largest probability, without gradient


def relation_divergence(
    student: Tensor, teacher: Tensor, *, tau: float | Tensor = 1.0, mask: Tensor | None = None
) -> Relation:
    """KL divergence between the row softmaxes of two Gram matrices, diagonals and masked positions left out.

    `P = softmax_j(<x_i, x_j> / tau)` for teacher and student; the result is the mean over rows i of `KL(P_teacher,i ‖
    P_student,i)`. Memory beyond the inputs: a gradient of the student's size and `BLOCK_BYTES`. On CUDA a Triton kernel
    does the same where Triton is installed (`relation_triton`).

    Args:
        student: features `[B, n, C]`, scaled so that their inner product is the relation.
        teacher: features `[B, n, C']`, constant.
        tau: temperature, > 0, constant.
        mask: `[B, n]`, True where valid. Other positions count neither as rows nor as columns.

    Returns:
        Divergence and peak probability per image, float32 (float64 for float64 features) whatever autocast says; both 0
        for an image with fewer than two valid positions. Can be differentiated once, in reverse mode.

    Raises:
        UserError: as `check_tau`.
        NotImplementedError: under forward-mode differentiation (`torch.func.jvp`).
    """
    divergence, peak = _apply(student, teacher, tau, mask, literal=False)
    return Relation(divergence, peak.detach())


def literal_divergence(
    student: Tensor, teacher: Tensor, *, tau: float | Tensor = 1.0, mask: Tensor | None = None
) -> Tensor:
    """Cross-entropy between row softmaxes of `softmax_j(<x_i, x_j>) / tau`, a softmax over a softmax, summed over rows.

    Streamed as `relation_divergence`, with its arguments; the diagonal counts here.

    Returns:
        `[B]`, about n·log(n) for n valid positions whatever the student does; 0 without a valid one.
    """
    return _apply(student, teacher, tau, mask, literal=True)[0]


def _apply(
    student: Tensor, teacher: Tensor, tau: float | Tensor, mask: Tensor | None, literal: bool
) -> tuple[Tensor, Tensor]:
    check_tau(tau)
    if not torch.compiler.is_compiling() and any(unpack_dual(x).tangent is not None for x in (student, teacher)):
        # the operator would drop the tangent and give a derivative of 0
        raise NotImplementedError("relation_divergence has no forward-mode derivative; take torch.autograd.grad.")
    dtype = torch.promote_types(student.dtype, torch.float32)
    # a full tensor, not torch.tensor: that would make the host wait for the device
    tau = (
        tau.detach().to(student.device, dtype)
        if isinstance(tau, Tensor)
        else torch.full((), tau, dtype=dtype, device=student.device)
    )
    with_gradient = torch.is_grad_enabled() and student.requires_grad
    divergence, peak, _ = _relation(student, teacher.detach(), tau, mask, literal, with_gradient)
    return divergence, peak


# an operator, so that torch.compile sees one node instead of an unrolled loop
@torch.library.custom_op("hf_bcd::relation", mutates_args=())
@full_precision
def _relation(
    student: Tensor, teacher: Tensor, tau: Tensor, mask: Tensor | None, literal: bool, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Value `[B]`, teacher's peak `[B]` and, if asked for, the gradient of every image's value `[B, n, C]`."""
    if not literal and _has_kernel(student):
        try:
            if not _kernels_proven:
                _prove_kernels(student, teacher, tau, mask)
            return _run_kernel(student, teacher, tau, mask, with_gradient)
        except (torch.OutOfMemoryError, torch.AcceleratorError):  # PyTorch would only meet the same
            raise
        except Exception as error:  # a compiler, a driver and a cache folder can fail in as many ways
            _give_up_kernels(error)
    return stream_relation(student, teacher, tau, mask, literal, with_gradient)


_kernels_work, _kernels_proven = True, False


def _has_kernel(features: Tensor) -> bool:
    """Whether the Triton kernels run on these features: CUDA, at least Ampere, not float64."""
    if not features.is_cuda or features.dtype == torch.float64 or find_spec("triton") is None:
        return False
    return _kernels_work and torch.cuda.get_device_capability(features.device) >= (8, 0)


def _run_kernel(
    student: Tensor, teacher: Tensor, tau: Tensor, mask: Tensor | None, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from .relation_triton import stream_relation_triton

    with torch.cuda.device(student.device):  # Triton launches on the current one
        return stream_relation_triton(student, teacher, tau, mask, with_gradient)


def _prove_kernels(student: Tensor, teacher: Tensor, tau: Tensor, mask: Tensor | None) -> None:
    """Compares the kernels with PyTorch at some positions of the first image, with the mask and without.

    Once in a process, because it waits for the device; again if there was no gradient to compare.

    Raises:
        ArithmeticError: if value, peak or gradient differ by more than rounding to bfloat16 explains.
    """
    global _kernels_proven
    student, teacher = (x[:1, :PROOF_POSITIONS].contiguous() for x in (student, teacher))
    floors = {"value": 1e-4, "peak": 1e-4, "gradient": 1e-4 * student.float().norm() / student.shape[1]}
    for valid in (None,) if mask is None else (None, mask[:1, :PROOF_POSITIONS].contiguous()):
        ours = _run_kernel(student, teacher, tau, valid, True)
        expected = stream_relation(student, teacher, tau, valid, False, True)
        for (name, floor), a, b in zip(floors.items(), ours, expected, strict=True):
            a, b = a.double().nan_to_num(), b.double().nan_to_num()
            error, size = (a - b).norm(), b.norm()
            if error > PROOF_TOLERANCE * size + floor:
                raise ArithmeticError(f"its {name} differs from PyTorch's by {error.item():.2g} of {size.item():.2g}")
        _kernels_proven = _kernels_proven or bool(expected[2].isfinite().all() & expected[2].any())


def _give_up_kernels(error: Exception) -> None:
    """Triton builds its launcher with a C compiler, which slim containers lack; and a driver may be too old for it."""
    global _kernels_work
    _kernels_work = False
    logger.warning(
        "Triton is of no use here (%s: %s); the context loss takes PyTorch's kernels instead, more slowly. Triton needs a "
        "C compiler (`apt install gcc`) and a driver that fits the installed PyTorch.",
        type(error).__name__,
        (str(error).splitlines() or ["no message"])[0],
    )


@_relation.register_fake
def _(student, teacher, tau, mask, literal, with_gradient):
    value = student.new_empty(student.shape[0], dtype=torch.promote_types(student.dtype, torch.float32))
    gradient = student.new_empty(student.shape if with_gradient else 0)
    return value, torch.empty_like(value), gradient


def _keep_gradient(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2])


def _backward(ctx, grad_value, grad_peak, grad_gradient):
    if grad_gradient is not None:
        raise RuntimeError(
            "the relation divergence can be differentiated once only; use relation_divergence_reference for second "
            "derivatives."
        )
    (gradient,) = ctx.saved_tensors
    grad_student = None if grad_value is None else (gradient * grad_value[:, None, None]).to(gradient.dtype)
    return grad_student, None, None, None, None, None


_relation.register_autograd(_backward, setup_context=_keep_gradient)


def stream_relation(
    student: Tensor, teacher: Tensor, tau: Tensor, mask: Tensor | None, literal: bool, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The result of `_relation`, on any device, in plain PyTorch. Autograd must not record it."""
    dtype = student.dtype
    student = at_least_float32(student).contiguous()
    teacher = teacher.to(student.dtype).contiguous()
    batch, positions, _ = student.shape
    weight = row_weights(student, mask, mean=not literal)
    images, rows = _block_shape(batch, positions, student.element_size())
    workspace = student.new_empty(4, images * rows * positions)
    value, peak = student.new_zeros(batch), student.new_zeros(batch)
    gradient = torch.zeros_like(student) if with_gradient else student.new_empty(0)

    for image in range(0, batch, images):
        these = slice(image, image + images)
        fill = mask_fill_value(student.dtype)
        hidden = None if mask is None else weight.new_zeros(()).where(mask[these, None, :], fill)
        for row in range(0, positions, rows):
            block = slice(row, row + rows)
            shape = (*weight[these, block].shape, positions)
            blocks = [buffer[: shape[0] * shape[1] * positions].view(shape) for buffer in workspace]
            hide = partial(_hide, columns=hidden, diagonal=None if literal else row)
            for x, gram in ((teacher, blocks[0]), (student, blocks[1])):
                queries = x[these, block] if literal else x[these, block] / tau
                hide(torch.bmm(queries, x[these].mT, out=gram))
            function = _literal_rows if literal else _divergence_rows
            row_values, row_peaks, difference = function(blocks, tau, hide, with_gradient)
            value[these] += (row_values * weight[these, block]).sum(dim=-1)
            peak[these] += (row_peaks * weight[these, block]).sum(dim=-1)
            if with_gradient:
                scale = (weight[these, block] / tau)[:, :, None]
                gradient[these, block] += torch.bmm(difference, student[these]).mul_(scale)
                gradient[these].baddbmm_(difference.mT, student[these, block] * scale)
    return value, peak, gradient.to(dtype)


def _hide(logits: Tensor, columns: Tensor | None, diagonal: int | None) -> Tensor:
    """Takes masked columns and a diagonal out of a softmax over `logits`, in place."""
    if columns is not None:
        # so low that what it is added to is rounded away; five times as fast as masked_fill_
        logits.add_(columns)
    if diagonal is not None:
        logits.diagonal(diagonal, 1, 2).fill_(mask_fill_value(logits.dtype))
    return logits


def _block_shape(batch: int, positions: int, element_size: int) -> tuple[int, int]:
    """How many images and rows a block has: whole images if they fit, else at least 64 rows of one."""
    fitting = BLOCK_BYTES // (4 * element_size * positions)
    if fitting >= positions:
        return min(batch, fitting // positions), positions
    return 1, max(64, fitting)


# Both functions below turn the logits in the first two of four blocks `[b, r, n]`, hidden already, into the value and the
# teacher's peak of every row `[b, r]` and the gradient of the value with respect to the student's logits `[b, r, n]`. They
# overwrite the blocks. A softmax anew instead of exp(log_softmax): MKL's exp takes four times as long where it underflows,
# and hidden entries do.
_Hide = Callable[[Tensor], Tensor]


def _divergence_rows(blocks: list[Tensor], tau: Tensor, hide: _Hide, with_gradient: bool) -> tuple[Tensor, ...]:
    teacher, student, first, second = blocks
    log_p = torch.log_softmax(teacher, -1, out=first)
    log_q = torch.log_softmax(student, -1, out=second)
    log_ratio = torch.sub(log_p, log_q, out=second)
    p = torch.softmax(teacher, -1, out=first)
    value, peak = log_ratio.mul_(p).sum(dim=-1), p.amax(dim=-1)
    return value, peak, torch.softmax(student, -1, out=teacher).sub_(p) if with_gradient else p


def _literal_rows(blocks: list[Tensor], tau: Tensor, hide: _Hide, with_gradient: bool) -> tuple[Tensor, ...]:
    teacher, student, outer, inner = blocks
    torch.softmax(teacher, -1, out=inner)
    hide(torch.div(inner, tau, out=outer))
    p = torch.softmax(outer, -1, out=teacher)
    torch.softmax(student, -1, out=inner)
    hide(torch.div(inner, tau, out=outer))
    log_q = torch.log_softmax(outer, -1, out=student)
    value, peak = -log_q.mul_(p).sum(dim=-1), p.amax(dim=-1)
    if with_gradient:
        difference = torch.softmax(outer, -1, out=student).sub_(p)
        # through the inner softmax s: s ⊙ (d - <d, s>)
        mean = torch.mul(difference, inner, out=outer).sum(dim=-1, keepdim=True)
        return value, peak, difference.sub_(mean).mul_(inner)
    return value, peak, p


def relation_divergence_reference(
    student: Tensor, teacher: Tensor, *, tau: float | Tensor = 1.0, mask: Tensor | None = None
) -> Relation:
    """`relation_divergence` as the formula reads, by autograd, with several `[B, n, n]` matrices: for comparisons."""
    teacher = teacher.detach()
    positions = student.shape[1]
    hidden = torch.eye(positions, dtype=torch.bool, device=student.device)
    if mask is not None:
        hidden = hidden | ~mask[:, None, :]
    fill = mask_fill_value(student.dtype)
    log_q = (student @ student.mT / tau).masked_fill(hidden, fill).log_softmax(dim=-1)
    log_p = (teacher @ teacher.mT / tau).masked_fill(hidden, fill).log_softmax(dim=-1)
    rows = (log_p.exp() * (log_p - log_q)).masked_fill(hidden, 0).sum(dim=-1)
    weight = row_weights(student, mask, mean=True)
    peak = log_p.amax(dim=-1).exp()
    return Relation((rows * weight).sum(dim=-1), (peak * weight).sum(dim=-1))
