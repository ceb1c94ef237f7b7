"""Segmentation heads over a pyramid of feature maps.

Every head takes the channels of the maps by nominal stride (`{4: 64, 8: 128, 16: 256, 32: 512}`) and the model's
configuration, and maps `{nominal stride: [B, C, h, w]}` to logits `[B, num_labels, h, w]` at its own stride. The
nominal stride is that of the undilated backbone, so that a level keeps its name when dilation keeps it finer. `strides`
says which maps a main head reads.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_timm_segmentation import TimmSegmentationConfig


class PooledBatchNorm2d(nn.BatchNorm2d):
    """Batch norm for pooled maps: where a channel has one value only, the running statistics normalise it.

    A map pooled to 1x1 from a batch of one image has no statistics, and the plain layer refuses to train on it.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.numel() == input.shape[1]:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(input)


def conv_norm_relu(
    in_channels: int,
    out_channels: int,
    kernel_size: int = 1,
    dilation: int = 1,
    norm: type[nn.BatchNorm2d] = nn.BatchNorm2d,
) -> nn.Sequential:
    """Convolution that keeps the size, batch norm, ReLU."""
    padding = dilation * (kernel_size // 2)
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, dilation=dilation, bias=False)
    return nn.Sequential(conv, norm(out_channels), nn.ReLU(inplace=True))


def classifier(in_channels: int, config: TimmSegmentationConfig) -> nn.Sequential:
    """Channel dropout and the 1x1 convolution to class scores."""
    return nn.Sequential(
        nn.Dropout2d(config.dropout), nn.Conv2d(in_channels, cast(int, config.num_labels), kernel_size=1)
    )


def resize_like(x: Tensor, reference: Tensor) -> Tensor:
    """`x` brought to the height and width of `reference`, bilinearly."""
    return F.interpolate(x, size=reference.shape[-2:], mode="bilinear", align_corners=False)


def average_bins(x: Tensor, bins: int) -> Tensor:
    """Means over a grid of `bins` x `bins` cells: `[B, C, h, w]` -> `[B, C, bins, bins]`.

    The cells are those of `adaptive_avg_pool2d`, whose ONNX export with dynamic height and width cannot be run;
    two matrix products can.
    """

    def weights(size: int) -> Tensor:  # of each position in the mean of each bin, `[bins, size]`
        # on the device: weights made on the host would be copied there at each step
        position, index = torch.arange(size, device=x.device), torch.arange(bins, device=x.device)[:, None]
        start, end = index * size // bins, ((index + 1) * size + bins - 1) // bins
        return ((position >= start) & (position < end)) / (end - start)

    rows, columns = (weights(size).to(x) for size in x.shape[-2:])
    return rows @ (x @ columns.T)


class PSPHead(nn.Module):
    """Pyramid pooling of the last map (Zhao et al., PSPNet, CVPR 2017).

    Widths as in the code of structured knowledge distillation (Liu et al., CVPR 2019): pooled branches and bottleneck
    have a quarter of the map's channels each.
    """

    required_strides = ()
    bins = (1, 2, 3, 6)

    def __init__(self, channels: dict[int, int], config: TimmSegmentationConfig):
        super().__init__()
        in_channels = channels[max(channels)]
        width = config.head_channels or in_channels // 4
        self.strides = [max(channels)]
        self.pools = nn.ModuleList(conv_norm_relu(in_channels, width, norm=PooledBatchNorm2d) for _ in self.bins)
        self.bottleneck = conv_norm_relu(in_channels + len(self.bins) * width, width, kernel_size=3)
        self.classifier = classifier(width, config)

    def forward(self, features: dict[int, Tensor]) -> Tensor:
        """Logits at the stride of the last map."""
        x = features[max(features)]
        branches = zip(self.pools, self.bins, strict=True)
        pooled = [resize_like(pool(average_bins(x, bins)), x) for pool, bins in branches]
        return self.classifier(self.bottleneck(torch.cat([x, *pooled], dim=1)))


class DeepLabV3PlusHead(nn.Module):
    """Atrous spatial pyramid pooling and a decoder at stride 4 (Chen et al., DeepLabV3+, ECCV 2018).

    The rates 6, 12, 18 belong to output stride 16 and scale with the map's resolution (12, 24, 36 at 8).
    """

    required_strides = (4,)
    rates_at_stride_16 = (6, 12, 18)
    low_level_channels = 48

    def __init__(self, channels: dict[int, int], config: TimmSegmentationConfig):
        super().__init__()
        in_channels = channels[max(channels)]
        width = config.head_channels or 256
        self.strides = [4, max(channels)]
        rates = [rate * 16 // config.output_stride for rate in self.rates_at_stride_16]
        self.point = conv_norm_relu(in_channels, width)
        self.atrous = nn.ModuleList(conv_norm_relu(in_channels, width, kernel_size=3, dilation=rate) for rate in rates)
        self.image = conv_norm_relu(in_channels, width, norm=PooledBatchNorm2d)
        self.project = conv_norm_relu((2 + len(rates)) * width, width)
        self.low_level = conv_norm_relu(channels[4], self.low_level_channels)
        self.decoder = nn.Sequential(
            conv_norm_relu(width + self.low_level_channels, width, kernel_size=3),
            conv_norm_relu(width, width, kernel_size=3),
        )
        self.classifier = classifier(width, config)

    def forward(self, features: dict[int, Tensor]) -> Tensor:
        """Logits at stride 4."""
        x = features[max(features)]
        image = self.image(x.mean(dim=(2, 3), keepdim=True)).expand(-1, -1, *x.shape[-2:])
        context = self.project(torch.cat([self.point(x), *(branch(x) for branch in self.atrous), image], dim=1))
        low_level = self.low_level(features[4])
        x = self.decoder(torch.cat([resize_like(context, low_level), low_level], dim=1))
        return self.classifier(x)


class FPNHead(nn.Module):
    """Light feature pyramid: lateral 1x1 convolutions summed top-down, smoothed once at stride 4.

    After Lin et al. (FPN, CVPR 2017) and Kirillov et al. (Panoptic FPN, CVPR 2019), without their head per level.
    """

    required_strides = (4,)

    def __init__(self, channels: dict[int, int], config: TimmSegmentationConfig):
        super().__init__()
        width = config.head_channels or 128
        self.strides = sorted(stride for stride in channels if stride >= 4)
        self.laterals = nn.ModuleList(nn.Conv2d(channels[stride], width, kernel_size=1) for stride in self.strides)
        self.smooth = conv_norm_relu(width, width, kernel_size=3)
        self.classifier = classifier(width, config)

    def forward(self, features: dict[int, Tensor]) -> Tensor:
        """Logits at stride 4."""
        maps = [lateral(features[stride]) for lateral, stride in zip(self.laterals, self.strides, strict=True)]
        x = maps.pop()
        while maps:
            finer = maps.pop()
            x = finer + resize_like(x, finer)
        return self.classifier(self.smooth(x))


class FCNHead(nn.Module):
    """Auxiliary classifier on the stage of nominal stride 16 (PSPNet, Sec. 3.3), half as wide as its input."""

    required_strides = (16,)

    def __init__(self, channels: dict[int, int], config: TimmSegmentationConfig):
        super().__init__()
        width = channels[16] // 2
        self.conv = conv_norm_relu(channels[16], width, kernel_size=3)
        self.classifier = classifier(width, config)

    def forward(self, features: dict[int, Tensor]) -> Tensor:
        """Logits at the stride of that stage."""
        return self.classifier(self.conv(features[16]))


HEADS = {"psp": PSPHead, "deeplabv3plus": DeepLabV3PlusHead, "fpn": FPNHead}
