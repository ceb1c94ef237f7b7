"""ESPNet (Mehta et al., ESPNet: Efficient Spatial Pyramid of Dilated Convolutions, ECCV 2018), as a transformers model."""

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization

from .configuration_espnet import EspNetConfig
from .segmentation_model import SegmentationModel


DILATIONS = (1, 2, 4, 8, 16)
IMAGE_CHANNELS = 3
# new channels of each level; what it hands on also holds the shrunk image and the maps before its modules
WIDTHS = (16, 64, 128)
FEATURE_CHANNELS = (WIDTHS[0] + IMAGE_CHANNELS, 2 * WIDTHS[1] + IMAGE_CHANNELS, 2 * WIDTHS[2])
FEATURE_STRIDES = (2, 4, 8)
# not in the publication; that of the authors' weights
NORM_EPS = 1e-3
PRELU_SLOPE = 0.25


def norm_prelu(channels: int) -> nn.Sequential:
    """Batch norm and a leaky rectifier whose slope is learned per channel."""
    return nn.Sequential(nn.BatchNorm2d(channels, eps=NORM_EPS), nn.PReLU(channels, init=PRELU_SLOPE))


def conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    """Convolution without bias; at stride 1 it keeps the size, at stride 2 it halves it, rounding up."""
    padding = dilation * (kernel_size // 2)
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, bias=False)


def double(channels: int) -> nn.ConvTranspose2d:
    """Learned upsampling by 2."""
    return nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2, bias=False)


def crop(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """`x` without the last row or column by which doubling overshoots an odd size."""
    return x[..., : size[0], : size[1]]


class EspModule(nn.Module):
    """Efficient spatial pyramid: one reduction, dilated 3x3 convolutions in parallel, fused by running sums (Sec. 3).

    The reduction is 1x1, or 3x3 where it halves the resolution. The width that the number of branches leaves over goes
    to the undilated branch, which the sums therefore leave out. With fewer output channels than dilations, the largest
    dilations are dropped, one channel a branch. The input is added where its shape allows.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__()
        first, *others = DILATIONS[:out_channels]
        width = out_channels // (1 + len(others))
        self.reduce = conv(in_channels, width, kernel_size=1 if stride == 1 else 3, stride=stride)
        self.branches = nn.ModuleList([conv(width, out_channels - len(others) * width, 3, dilation=first)])
        self.branches.extend(conv(width, width, 3, dilation=dilation) for dilation in others)
        self.residual = stride == 1 and in_channels == out_channels
        self.norm = norm_prelu(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_channels, h, w]` -> `[B, out_channels, h / stride, w / stride]`."""
        reduced = self.reduce(x)
        undilated, *dilated = (branch(reduced) for branch in self.branches)
        fused = torch.cat([undilated, *accumulate(dilated)], dim=1)
        return self.norm(fused + x if self.residual else fused)


class EspLevel(nn.Module):
    """Halves the resolution, applies `depth` modules, and hands on the maps before and after them."""

    def __init__(self, in_channels: int, channels: int, depth: int, out_channels: int):
        super().__init__()
        self.downsample = EspModule(in_channels, channels, stride=2)
        self.blocks = nn.Sequential(*(EspModule(channels, channels) for _ in range(depth)))
        self.norm = norm_prelu(out_channels)

    def forward(self, x: Tensor, *image: Tensor) -> Tensor:
        """`[B, in_channels, h, w]` and perhaps the shrunk image -> `[B, out_channels, h / 2, w / 2]`."""
        before = self.downsample(x)
        return self.norm(torch.cat([self.blocks(before), before, *image], dim=1))


class EspNetEncoder(nn.Module):
    """Three levels of strides 2, 4 and 8; the first two also carry the image, shrunk by averaging."""

    def __init__(self, config: EspNetConfig):
        super().__init__()
        self.stem = nn.Sequential(conv(IMAGE_CHANNELS, WIDTHS[0], 3, stride=2), norm_prelu(WIDTHS[0]))
        self.stem_norm = norm_prelu(FEATURE_CHANNELS[0])
        self.level_4 = EspLevel(FEATURE_CHANNELS[0], WIDTHS[1], config.p, FEATURE_CHANNELS[1])
        self.level_8 = EspLevel(FEATURE_CHANNELS[1], WIDTHS[2], config.q, FEATURE_CHANNELS[2])
        self.shrink = nn.AvgPool2d(kernel_size=3, stride=2, padding=1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images `[B, 3, H, W]` -> maps `[B, FEATURE_CHANNELS[i], H / s, W / s]` with s = 2, 4, 8, rounded up."""
        half = self.shrink(image)
        stride_2 = self.stem_norm(torch.cat([self.stem(image), half], dim=1))
        stride_4 = self.level_4(stride_2, self.shrink(half))
        return stride_2, stride_4, self.level_8(stride_4)


class EspNetDecoder(nn.Module):
    """Class scores that are doubled and merged with those of the finer level, up to the input size."""

    def __init__(self, num_labels: int):
        super().__init__()
        fine, middle, coarse = FEATURE_CHANNELS
        self.coarse = nn.Sequential(
            conv(coarse, num_labels, 1), nn.BatchNorm2d(num_labels, eps=NORM_EPS), double(num_labels)
        )
        self.middle = conv(middle, num_labels, 1)
        self.merge_middle = nn.Sequential(
            norm_prelu(2 * num_labels),
            EspModule(2 * num_labels, num_labels),
            double(num_labels),
            norm_prelu(num_labels),
        )
        self.merge_fine = nn.Sequential(conv(num_labels + fine, num_labels, 3), norm_prelu(num_labels))
        self.classifier = double(num_labels)

    def forward(self, fine: Tensor, middle: Tensor, coarse: Tensor) -> Tensor:
        """Maps of strides 2, 4 and 8 -> logits of twice the size of the finest, `[B, num_labels, 2 h, 2 w]`."""
        x = crop(self.coarse(coarse), middle.shape[-2:])
        x = crop(self.merge_middle(torch.cat([self.middle(middle), x], dim=1)), fine.shape[-2:])
        return self.classifier(self.merge_fine(torch.cat([x, fine], dim=1)))


class EspNetForSemanticSegmentation(SegmentationModel):
    """ESPNet, or its encoder ESPNet-C, for semantic segmentation.

    Every convolution and its place follow the publication, and so do the parameter counts (see `EspNetConfig`).
    Ours: any number of classes (the original needs 5) and any image size (the original needs multiples of 8), and He
    initialisation. The decoder trains together with the encoder, not after it.

    Attributes:
        feature_channels: channels of each map in `hidden_states`.
        feature_strides: stride of each map.

    Args:
        config: the configuration.
    """

    config_class = EspNetConfig
    config: EspNetConfig
    feature_channels = FEATURE_CHANNELS
    feature_strides = FEATURE_STRIDES

    def __init__(self, config: EspNetConfig):
        super().__init__(config)
        num_labels: Any = config.num_labels
        self.encoder = EspNetEncoder(config)
        if config.decoder:
            self.decoder = EspNetDecoder(num_labels)
        else:
            self.classifier = conv(FEATURE_CHANNELS[-1], num_labels, 1)
        self.post_init()

    def score(self, pixel_values: Tensor) -> tuple[tuple[Tensor, ...], Tensor, None]:
        """Maps of strides 2, 4 and 8, and logits at the input's size, or at stride 8 without the decoder."""
        maps = self.encoder(pixel_values)
        if self.config.decoder:
            return maps, crop(self.decoder(*maps), pixel_values.shape[-2:]), None
        return maps, self.classifier(maps[-1]), None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers' initialisers do not touch what was loaded from a checkpoint
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            initialization.kaiming_normal_(module.weight, a=PRELU_SLOPE)
        elif isinstance(module, nn.PReLU):
            initialization.constant_(module.weight, PRELU_SLOPE)
        else:
            super()._init_weights(module)
