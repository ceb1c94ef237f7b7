"""Frequency attention (Pham et al., WACV 2024, https://arxiv.org/abs/2403.05894)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..outputs import DenseOutput, Targets
from ..utils.messages import UserError
from .base import DistillationLoss, Pair
from .modules.connectors import BatchStandardize, Projection
from .ops.functional import full_precision, mean_squared_error, on_teacher_grid, spatial_size


def _interpolation(frequencies: Tensor, nodes: int) -> Tensor:
    """Linear interpolation from `nodes` even places over [-1/2, 1/2] to `frequencies` `[n]`: `[n, nodes]`."""
    places = (frequencies + 0.5) * (nodes - 1)
    return (1 - (places[:, None] - torch.arange(nodes, device=places.device)).abs()).clamp_min(0)


def spectral_filter(x: Tensor, spectrum: Tensor, cutoff: float) -> Tensor:
    """Weights the high frequencies of every channel of `x` `[B, C, h, w]`: `Re IFFT(HPF · W · FFT(x))`.

    Args:
        x: float32 or float64.
        spectrum: real and imaginary part of W at F x F frequencies, even over [-1/2, 1/2] cycles a position along each
            axis, interpolated to the grid's: `[2, C, F, F]`.
        cutoff: HPF removes the frequencies below this fraction of the highest along both axes.
    """
    rows, columns = (torch.fft.fftfreq(side, dtype=x.dtype, device=x.device) for side in x.shape[-2:])
    nodes = spectrum.shape[-1]
    real, imaginary = _interpolation(rows, nodes) @ spectrum @ _interpolation(columns, nodes).mT
    passes = (rows.abs()[:, None] >= cutoff / 2) | (columns.abs() >= cutoff / 2)
    transformed = torch.fft.fft2(x, norm="ortho") * (torch.complex(real, imaginary) * passes)
    return torch.fft.ifft2(transformed, norm="ortho").real


class FrequencyAttention(nn.Module):
    """Global spectral branch and local 1x1 convolution, batch normalisation, ReLU: from student's to teacher's channels.

    `ReLU(BN(g1 · M · Re IFFT(HPF · W · FFT(x)) + g2 · L · x))`. Officially W is one complex matrix per frequency,
    of a fixed grid: 2.7e8 numbers for 256 channels at 64 x 64. Here it is factorised into a diagonal matrix per
    frequency, interpolated from F x F of them, and a 1x1 convolution M for all: `2 F² C_s + C_s C_t` real numbers beside
    the local branch's, for grids of any size; 0.3 + 1.0 million for 512 and 2048 channels. W is 1 at first, so that
    the branch starts as the high-pass filter.
    """

    def __init__(self, in_channels: int, out_channels: int, frequencies: int, cutoff: float) -> None:
        super().__init__()
        self.cutoff = cutoff
        # real and imaginary part as real numbers: optimizers, `.double()` and safetensors treat them like any others
        self.spectrum = nn.Parameter(torch.zeros(2, in_channels, frequencies, frequencies))
        nn.init.ones_(self.spectrum[0])
        self.mix = Projection(in_channels, out_channels, bias=False)
        self.local = Projection(in_channels, out_channels, bias=False)  # BN would remove one
        self.rates = nn.Parameter(torch.full((2,), 0.5))
        self.norm = BatchStandardize(out_channels)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`[B, in_channels, h, w]` and `[B, h, w]`, True where valid -> `[B, out_channels, h, w]`."""
        x = x.masked_fill(~mask[:, None], 0)  # the transform mixes all positions
        attended = self.mix(spectral_filter(x, self.spectrum, self.cutoff))
        return self.norm(self.rates[0] * attended + self.rates[1] * self.local(x), mask).relu()


@full_precision
def fam_loss(student: Tensor, teacher: Tensor, attention: FrequencyAttention, *, mask: Tensor) -> Tensor:
    """Frequency attention: `mean over images, valid positions and channels of (attention(s) - t)²`.

    Args:
        student: features `[B, C_s, h, w]`; `teacher` `[B, C_t, h', w']` and `mask` are as in `on_teacher_grid`.
        attention: trained along with the student.

    Returns:
        Scalar >= 0; float32 or float64.
    """
    student, teacher, mask = on_teacher_grid(student, teacher, mask, same_channels=False)
    return mean_squared_error(attention(student, mask), teacher, mask)


class FAMLoss(DistillationLoss):
    """`fam_loss`, summed over feature levels.

    Defined here for dense maps, because the official code classifies small images: spectral weights are factorised (see
    `FrequencyAttention`), the high-pass filter is symmetric around frequency 0, and each level follows its own, without
    the cross-stage attention that the official code takes from ReviewKD.

    Args:
        levels: level names; all that both models have by default, as the official code guides all four stages.
        frequencies: spectral weights along each axis; ours, an odd number so that one belongs to frequency 0.
        cutoff: fraction of low frequencies that the high-pass filter removes; official 0.1. A side of n positions has the
            frequencies k / n: up to 20 positions, 0.1 removes the mean of a channel only.
    """

    weights = {"fam": 1.0}
    needs = frozenset({"features"})
    transfers = "features and their high frequencies at every level"
    checked = (
        "official code, for classification: same filter, branches, reduction and ImageNet weight; factorised spectral "
        "weights and void pixels ours, up to 20 positions a side the filter removes the mean only, no cross-stage attention, no warm-up; "
        "normalised over a forward pass, so accumulated batches do not add up to one"
    )
    reference = "pham2024frequency"

    def __init__(
        self, pair: Pair, *, levels: Sequence[str] | None = None, frequencies: int = 17, cutoff: float = 0.1
    ) -> None:
        super().__init__(pair)
        if frequencies < 2 or not 0 < cutoff < 1:
            raise UserError(f"frequencies is {frequencies!r} and cutoff {cutoff!r}; they must be > 1 and in (0, 1).")
        self.attention = nn.ModuleDict()
        for level in [pair.level(name) for name in levels or pair.levels or [None]]:
            self.attention[level] = FrequencyAttention(*pair.channels(level), frequencies, cutoff)

    def forward(self, student: DenseOutput, teacher: DenseOutput, targets: Targets) -> dict[str, Tensor]:
        losses = []
        for level, attention in self.attention.items():
            ours, theirs = student.features[level], teacher.features[level]
            mask = targets.valid(spatial_size(theirs))
            losses.append(fam_loss(ours, theirs, attention, mask=mask))  # type: ignore[arg-type]
        return {"fam": torch.stack(losses).sum()}
