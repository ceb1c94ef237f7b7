"""The streamed relation divergence as two Triton kernels, for CUDA devices.

The first kernel walks along every row of both Gram matrices with an online log-sum-exp and leaves, per row, the two
log-sum-exps, the divergence and the teacher's peak. The second recomputes the tiles and, because a Gram matrix is
symmetric, turns both roles of the student's features into one product: with `d_ij = q_ij - p_ij`, the gradient of row i
is `sum_j (d_ij + d_ji) x_j`, and `d_ji` needs the Gram entry of `d_ij` and the log-sum-exps of row j. No atomics, so
results repeat bit by bit; five products of n x n x C altogether against four by autograd.

Why not attention kernels: `P X` and `Q X` are attention outputs and `Pᵀ X`, `Qᵀ X` their gradients with respect to the
values, but four attentions and two backward passes cost three times the products, the diagonal needs a dense mask
(scaled_dot_product_attention, which then leaves its fast path, and returns no log-sum-exp) or compilation
(flex_attention), and the divergence would be a small difference of bfloat16 outputs.

What has been run: both kernels in Triton's interpreter on a CPU, against the PyTorch version, and Triton's compiler for
compute capability 8.0, 8.6 and 9.0, where they need 32 to 80 KiB of shared memory (consumer Ampere has 99) and, in
bfloat16, spill no register. What has not: any GPU; speed and tile sizes are untested.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .functional import row_weights


# launch settings by whether the products run in half precision
ROW_TILES = {
    True: {"BLOCK_R": 128, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
    False: {"BLOCK_R": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
}
GRADIENT_TILES = {
    True: {"BLOCK_R": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2},
    False: {"BLOCK_R": 64, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2},
}

# triton.jit functions see globals only if they are constexpr
_LOWEST = tl.constexpr(-1e30)  # finite, so that the first tile of a row may be masked altogether


@triton.jit
def _gram_tile(
    x, rows, columns, positions, channels,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Inner products `[BLOCK_R, BLOCK_N]` in float32 between some rows and columns of `x [positions, channels]`."""
    gram = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
    for start in range(0, channels, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        in_k = k < channels
        left = tl.load(
            x + rows[:, None] * channels + k[None, :], mask=(rows < positions)[:, None] & in_k[None, :], other=0.0
        )
        right = tl.load(
            x + columns[None, :] * channels + k[:, None],
            mask=(columns < positions)[None, :] & in_k[:, None],
            other=0.0,
        )
        gram = tl.dot(left, right, acc=gram, input_precision=PRECISION)
    return gram


@triton.jit
def _counts(valid, rows, columns, positions):
    """Which entries of a tile take part: off the diagonal, in a valid column."""
    in_columns = tl.load(valid + columns, mask=columns < positions, other=0) != 0
    return in_columns[None, :] & (rows[:, None] != columns[None, :])


@triton.jit
def _row_kernel(
    student, teacher, valid, tau, student_lse, teacher_lse, divergence, peak, positions, student_channels,
    teacher_channels, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    student += image * positions * student_channels
    teacher += image * positions * teacher_channels
    valid += image * positions
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inverse_tau = 1.0 / tl.load(tau)

    student_max = tl.zeros((BLOCK_R,), dtype=tl.float32) + _LOWEST
    teacher_max = tl.zeros((BLOCK_R,), dtype=tl.float32) + _LOWEST
    student_sum = tl.zeros((BLOCK_R,), dtype=tl.float32)
    teacher_sum = tl.zeros((BLOCK_R,), dtype=tl.float32)
    excess = tl.zeros((BLOCK_R,), dtype=tl.float32)  # sum of p (t - s), still to be divided by teacher_sum
    for start in range(0, positions, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        counts = _counts(valid, rows, columns, positions)
        t = inverse_tau * _gram_tile(
            teacher, rows, columns, positions, teacher_channels, BLOCK_R, BLOCK_N, BLOCK_K, PRECISION
        )
        s = inverse_tau * _gram_tile(
            student, rows, columns, positions, student_channels, BLOCK_R, BLOCK_N, BLOCK_K, PRECISION
        )
        new_max = tl.maximum(student_max, tl.max(tl.where(counts, s, _LOWEST), axis=1))
        exponentials = tl.where(counts, tl.exp(s - new_max[:, None]), 0.0)
        student_sum = student_sum * tl.exp(student_max - new_max) + tl.sum(exponentials, axis=1)
        student_max = new_max
        new_max = tl.maximum(teacher_max, tl.max(tl.where(counts, t, _LOWEST), axis=1))
        exponentials = tl.where(counts, tl.exp(t - new_max[:, None]), 0.0)
        rescale = tl.exp(teacher_max - new_max)
        teacher_sum = teacher_sum * rescale + tl.sum(exponentials, axis=1)
        excess = excess * rescale + tl.sum(exponentials * (t - s), axis=1)
        teacher_max = new_max

    s_lse = student_max + tl.log(student_sum)
    t_lse = teacher_max + tl.log(teacher_sum)
    out = image * positions + rows
    inside = rows < positions
    tl.store(student_lse + out, s_lse, mask=inside)
    tl.store(teacher_lse + out, t_lse, mask=inside)
    tl.store(divergence + out, excess / teacher_sum + s_lse - t_lse, mask=inside)
    tl.store(peak + out, 1.0 / teacher_sum, mask=inside)


@triton.jit
def _gradient_kernel(
    student, teacher, valid, tau, student_lse, teacher_lse, weight, gradient, positions, student_channels,
    teacher_channels, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    student += image * positions * student_channels
    teacher += image * positions * teacher_channels
    valid += image * positions
    student_lse += image * positions
    teacher_lse += image * positions
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    channels = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside, in_channels = rows < positions, channels < student_channels
    inverse_tau = 1.0 / tl.load(tau)
    s_lse = tl.load(student_lse + rows, mask=inside, other=0.0)
    t_lse = tl.load(teacher_lse + rows, mask=inside, other=0.0)

    result = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for start in range(0, positions, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        in_columns = columns < positions
        t = inverse_tau * _gram_tile(
            teacher, rows, columns, positions, teacher_channels, BLOCK_R, BLOCK_N, BLOCK_K, PRECISION
        )
        s_column = tl.load(student_lse + columns, mask=in_columns, other=0.0)
        t_column = tl.load(teacher_lse + columns, mask=in_columns, other=0.0)
        difference = -tl.exp(t - t_lse[:, None]) - tl.exp(t - t_column[None, :])
        s = inverse_tau * _gram_tile(
            student, rows, columns, positions, student_channels, BLOCK_R, BLOCK_N, BLOCK_K, PRECISION
        )
        difference += tl.exp(s - s_lse[:, None]) + tl.exp(s - s_column[None, :])
        difference = tl.where(_counts(valid, rows, columns, positions), difference, 0.0)
        features = tl.load(
            student + columns[:, None] * student_channels + channels[None, :],
            mask=in_columns[:, None] & in_channels[None, :], other=0.0,
        )  # fmt: skip
        result = tl.dot(difference.to(features.dtype), features, acc=result, input_precision=PRECISION)

    # of an image's rows the valid ones weigh the same, so the weight of row i stands for that of row j as well
    row_weight = tl.load(weight + image * positions + rows, mask=inside, other=0.0)
    result = tl.where(row_weight[:, None] > 0, result * (row_weight * inverse_tau)[:, None], 0.0)
    tl.store(
        gradient + (image * positions + rows)[:, None] * student_channels + channels[None, :],
        result.to(gradient.dtype.element_ty), mask=inside[:, None] & in_channels[None, :],
    )  # fmt: skip


def channel_block(channels: int) -> int:
    """How many channels of its rows a program of the gradient kernel accumulates in registers."""
    return min(256, max(16, triton.next_power_of_2(channels)))


def stream_relation_triton(
    student: Tensor, teacher: Tensor, tau: Tensor, mask: Tensor | None, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What `relation.stream_relation` returns for `literal=False`.

    Products run in the features' precision, bfloat16 or float16, and add up in float32. Float32 features are split into
    three TF32 products, which keep float32's accuracy, or go through one where PyTorch's own products may
    (`torch.set_float32_matmul_precision`).
    """
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    out_dtype, student, teacher = student.dtype, student.to(dtype).contiguous(), teacher.to(dtype).contiguous()
    batch, positions, student_channels = student.shape
    weight = row_weights(student.float(), mask, mean=True)
    valid = torch.ones_like(weight, dtype=torch.uint8) if mask is None else mask.to(torch.uint8).contiguous()
    student_lse, teacher_lse, divergence, peak = weight.new_empty(4, batch, positions)
    gradient = torch.empty_like(student, dtype=out_dtype) if with_gradient else student.new_empty(0, dtype=out_dtype)

    half = dtype != torch.float32
    options = {
        "PRECISION": "tf32x3" if not half and torch.get_float32_matmul_precision() == "highest" else "tf32",
        "enable_fp_fusion": True,
    }
    tensors = (student, teacher, valid, tau.float(), student_lse, teacher_lse)
    sizes = (positions, student_channels, teacher.shape[-1])
    grid = (triton.cdiv(positions, ROW_TILES[half]["BLOCK_R"]), batch)
    _row_kernel[grid](*tensors, divergence, peak, *sizes, **ROW_TILES[half], **options)
    if with_gradient:
        tiles = {**GRADIENT_TILES[half], "BLOCK_C": channel_block(student_channels)}
        blocks = triton.cdiv(positions, tiles["BLOCK_R"]), triton.cdiv(student_channels, tiles["BLOCK_C"])
        _gradient_kernel[(blocks[0], batch, blocks[1])](*tensors, weight, gradient, *sizes, **tiles, **options)
    keep = weight > 0  # the others may be NaN
    return (
        (divergence * weight).masked_fill(~keep, 0).sum(dim=-1),
        (peak * weight).masked_fill(~keep, 0).sum(dim=-1),
        gradient,
    )
