"""The streamed relation divergence as Triton kernels, for CUDA devices.

The first kernel, run for student and teacher, leaves the log-sum-exp of every row of a Gram matrix. The second recomputes
the tiles of both matrices; their differences are the divergence, and because a Gram matrix is symmetric, both roles of the
student's features become one product: with `d_ij = q_ij - p_ij`, the gradient of row i is `sum_j (d_ij + d_ji) x_j`, and
`d_ji` needs the Gram entry of `d_ij` and the log-sum-exps of row j. No atomics, so results repeat bit by bit; five products
of n x n x C altogether against four by autograd. Exponents are to the base 2, as the hardware takes them.

Where the shared memory holds all channels of a tile's rows (`resident`: Hopper, half precision, at most 256 channels), they
are loaded once, and the student's columns once for both of their products. Per byte that it then reads, the first kernel
does 128 operations and the second 192; otherwise, at 256 channels, they do 64 and 39.

Why not attention kernels: `P X` and `Q X` are attention outputs and `Pᵀ X`, `Qᵀ X` their gradients with respect to the
values, but four attentions and two backward passes cost three times the products, the diagonal needs a dense mask
(scaled_dot_product_attention, which then leaves its fast path, and returns no log-sum-exp) or compilation
(flex_attention), and the divergence would be a small difference of bfloat16 outputs.

Run so far: all kernels in Triton's interpreter on a CPU, against the PyTorch version, and Triton's compiler for
compute capability 8.6, 9.0, 10.0 and 12.0, where they fit into shared memory and, in bfloat16, spill no register.
Not run so far: any GPU; speed and tile sizes are untested. Hence the comparison before the first use, see `relation`.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .functional import row_weights


RESIDENT_CHANNELS = 256
RESIDENT_SHARED_MEMORY = 220 * 1024
# launch settings by (rows are resident, products in half precision)
LSE_TILES = {
    (True, True): {"BLOCK_R": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2},
    (False, True): {"BLOCK_R": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
    (False, False): {"BLOCK_R": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
}
DIVERGENCE_TILES = {
    (True, True): {"BLOCK_R": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
    (False, True): {"BLOCK_R": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2},
    (False, False): {"BLOCK_R": 64, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2},
}

# triton.jit functions see globals only if they are constexpr
_LOWEST = tl.constexpr(-1e30)  # finite, so that the first tile of a row may be masked altogether


@triton.jit
def _load(x, rows, channels, positions, num_channels):
    """Some rows and channels of `x [positions, num_channels]`, zeros outside of it."""
    inside = (rows < positions)[:, None] & (channels < num_channels)[None, :]
    return tl.load(x + rows[:, None] * num_channels + channels[None, :], mask=inside, other=0.0)


@triton.jit
def _gram(left, right, PRECISION: tl.constexpr):
    return tl.dot(left, tl.trans(right), input_precision=PRECISION)


@triton.jit
def _streamed_gram(
    x, rows, columns, positions, num_channels,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Inner products `[BLOCK_R, BLOCK_N]` in float32 between some rows and columns of `x`, a few channels at a time."""
    gram = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
    for start in range(0, num_channels, BLOCK_K):
        channels = start + tl.arange(0, BLOCK_K)
        left = _load(x, rows, channels, positions, num_channels)
        right = _load(x, columns, channels, positions, num_channels)
        gram = tl.dot(left, tl.trans(right), acc=gram, input_precision=PRECISION)
    return gram


@triton.jit
def _counts(valid, rows, columns, positions):
    """Which entries of a tile take part: off the diagonal, in a valid column."""
    in_columns = tl.load(valid + columns, mask=columns < positions, other=0) != 0
    return in_columns[None, :] & (rows[:, None] != columns[None, :])


@triton.jit
def _lse_kernel(
    features, valid, scale, lse, peak, positions, num_channels,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Per row the log-sum-exp, to the base 2, of `scale` times the Gram matrix, and the softmax's largest entry."""
    image = tl.program_id(1).to(tl.int64)
    features += image * positions * num_channels
    valid += image * positions
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    factor = tl.load(scale)

    largest = tl.zeros((BLOCK_R,), dtype=tl.float32) + _LOWEST
    total = tl.zeros((BLOCK_R,), dtype=tl.float32)
    if RESIDENT:
        channels = tl.arange(0, BLOCK_K)
        own = _load(features, rows, channels, positions, num_channels)
    for start in range(0, positions, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        if RESIDENT:
            gram = _gram(own, _load(features, columns, channels, positions, num_channels), PRECISION)
        else:
            gram = _streamed_gram(
                features, rows, columns, positions, num_channels, BLOCK_R, BLOCK_N, BLOCK_K, PRECISION
            )
        logits = tl.where(_counts(valid, rows, columns, positions), factor * gram, 2 * _LOWEST)
        new = tl.maximum(largest, tl.max(logits, axis=1))
        total = total * tl.exp2(largest - new) + tl.sum(tl.exp2(logits - new[:, None]), axis=1)
        largest = new

    out = image * positions + rows
    inside = rows < positions
    tl.store(lse + out, largest + tl.log2(total), mask=inside)
    tl.store(peak + out, 1.0 / total, mask=inside)


@triton.jit
def _divergence_kernel(
    student, teacher, valid, scale, student_lse, teacher_lse, weight, divergence, gradient, positions,
    student_channels, teacher_channels, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, RESIDENT: tl.constexpr, WITH_GRADIENT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Per row the divergence, to the base 2, and for some channels the gradient of `weight` times that in nat."""
    image = tl.program_id(1).to(tl.int64)
    student += image * positions * student_channels
    teacher += image * positions * teacher_channels
    valid += image * positions
    student_lse += image * positions
    teacher_lse += image * positions
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    channels = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = rows < positions
    factor = tl.load(scale)
    s_lse = tl.load(student_lse + rows, mask=inside, other=0.0)
    t_lse = tl.load(teacher_lse + rows, mask=inside, other=0.0)

    excess = tl.zeros((BLOCK_R,), dtype=tl.float32)  # sum of p (t - s)
    result = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    if RESIDENT:
        of_teacher = tl.arange(0, BLOCK_T)
        t_own = _load(teacher, rows, of_teacher, positions, teacher_channels)
        s_own = _load(student, rows, channels, positions, student_channels)
    for start in range(0, positions, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        features = _load(student, columns, channels, positions, student_channels)
        if RESIDENT:
            t = factor * _gram(t_own, _load(teacher, columns, of_teacher, positions, teacher_channels), PRECISION)
            s = factor * _gram(s_own, features, PRECISION)
        else:
            t = factor * _streamed_gram(
                teacher, rows, columns, positions, teacher_channels, BLOCK_R, BLOCK_N, BLOCK_K, PRECISION
            )
            s = factor * _streamed_gram(
                student, rows, columns, positions, student_channels, BLOCK_R, BLOCK_N, BLOCK_K, PRECISION
            )
        counts = _counts(valid, rows, columns, positions)
        p = tl.where(counts, tl.exp2(t - t_lse[:, None]), 0.0)
        excess += tl.sum(p * (t - s), axis=1)
        if WITH_GRADIENT:
            in_columns = columns < positions
            s_column = tl.load(student_lse + columns, mask=in_columns, other=0.0)
            t_column = tl.load(teacher_lse + columns, mask=in_columns, other=0.0)
            # in this order equal relations have no gradient at all
            difference = tl.exp2(s - s_lse[:, None]) - p
            difference += tl.exp2(s - s_column[None, :]) - tl.exp2(t - t_column[None, :])
            difference = tl.where(counts, difference, 0.0)
            result = tl.dot(difference.to(features.dtype), features, acc=result, input_precision=PRECISION)

    out = image * positions + rows
    if tl.program_id(2) == 0:
        tl.store(divergence + out, excess + s_lse - t_lse, mask=inside)
    if WITH_GRADIENT:
        # of an image's rows the valid ones weigh the same, so the weight of row i stands for that of row j as well
        row_weight = tl.load(weight + out, mask=inside, other=0.0)
        result = tl.where(row_weight[:, None] > 0, result * row_weight[:, None], 0.0)
        tl.store(
            gradient + out[:, None] * student_channels + channels[None, :],
            result.to(gradient.dtype.element_ty),
            mask=inside[:, None] & (channels < student_channels)[None, :],
        )


def _block(channels: int) -> int:
    return min(RESIDENT_CHANNELS, max(16, triton.next_power_of_2(channels)))


def launch_settings(
    half: bool, student_channels: int, teacher_channels: int, shared_memory: int
) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Settings of the log-sum-exp kernel for the student's and the teacher's features, and of the divergence kernel.

    Args:
        half: whether products run in half precision.
        shared_memory: bytes that a program can have.
    """
    fits = half and max(student_channels, teacher_channels) <= RESIDENT_CHANNELS
    resident = fits and shared_memory >= RESIDENT_SHARED_MEMORY
    student, teacher = _block(student_channels), _block(teacher_channels)
    lse, divergence = LSE_TILES[resident, half], DIVERGENCE_TILES[resident, half]
    return (
        {"BLOCK_K": student, "RESIDENT": resident, **lse},
        {"BLOCK_K": teacher, "RESIDENT": resident, **lse},
        {"BLOCK_K": student, "BLOCK_T": teacher, "BLOCK_C": student, "RESIDENT": resident, **divergence},
    )


def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)  # not with ROCm


def stream_relation_triton(
    student: Tensor, teacher: Tensor, tau: Tensor, mask: Tensor | None, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The result of `relation.stream_relation` for `literal=False`.

    Products run in the features' precision, bfloat16 or float16, and add up in float32. Float32 features are split into
    three TF32 products, which keep float32's accuracy, or go through one where PyTorch's own products may
    (`torch.set_float32_matmul_precision`).
    """
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    out_dtype, student, teacher = student.dtype, student.to(dtype).contiguous(), teacher.to(dtype).contiguous()
    batch, positions, student_channels = student.shape
    weight = row_weights(student.float(), mask, mean=True)
    valid = torch.ones_like(weight, dtype=torch.uint8) if mask is None else mask.to(torch.uint8).contiguous()
    student_lse, teacher_lse, divergence, peak, student_peak = weight.new_empty(5, batch, positions)
    gradient = torch.empty_like(student, dtype=out_dtype) if with_gradient else student.new_empty(0, dtype=out_dtype)

    half = dtype != torch.float32
    *of_lse, tiles = launch_settings(half, student_channels, teacher.shape[-1], _shared_memory(student.device))
    options = {
        "PRECISION": "tf32x3" if not half and torch.get_float32_matmul_precision() == "highest" else "tf32",
        "enable_fp_fusion": True,
    }
    scale = math.log2(math.e) / tau.float()
    for features, lse, largest, settings in (
        (student, student_lse, student_peak, of_lse[0]),
        (teacher, teacher_lse, peak, of_lse[1]),
    ):
        grid = (triton.cdiv(positions, settings["BLOCK_R"]), batch)
        _lse_kernel[grid](features, valid, scale, lse, largest, positions, features.shape[-1], **settings, **options)
    # without a gradient one block of channels suffices, and its features only serve the resident form
    blocks = triton.cdiv(student_channels, tiles["BLOCK_C"]) if with_gradient else 1
    grid = (triton.cdiv(positions, tiles["BLOCK_R"]), batch, blocks)
    _divergence_kernel[grid](
        student, teacher, valid, scale, student_lse, teacher_lse, weight / tau, divergence, gradient, positions,
        student_channels, teacher.shape[-1], **tiles, **{"WITH_GRADIENT": with_gradient}, **options,
    )  # fmt: skip
    keep = weight > 0  # the others may be NaN
    return (
        (divergence * math.log(2) * weight).masked_fill(~keep, 0).sum(dim=-1),
        (peak * weight).masked_fill(~keep, 0).sum(dim=-1),
        gradient,
    )
