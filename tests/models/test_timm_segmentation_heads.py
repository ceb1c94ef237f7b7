import pytest
import torch
from torch.nn import functional as F

from hf_bcd.models import TimmSegmentationConfig
from hf_bcd.models.heads import HEADS, DeepLabV3PlusHead, PooledBatchNorm2d, PSPHead, average_bins


CHANNELS = {2: 4, 4: 8, 8: 12, 16: 16, 32: 20}


@pytest.mark.parametrize("bins", PSPHead.bins)
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (7, 13), (60, 33)])
def test_average_bins_is_adaptive_pooling(bins, size):
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(average_bins(x, bins), F.adaptive_avg_pool2d(x, bins))


def test_average_bins_exports_with_dynamic_size():
    class Pool(torch.nn.Module):
        def forward(self, x):
            return average_bins(x, 3)

    dynamic = torch.export.Dim.DYNAMIC
    exported = torch.export.export(Pool(), (torch.randn(2, 3, 9, 13),), dynamic_shapes={"x": {2: dynamic, 3: dynamic}})
    x = torch.randn(2, 3, 8, 17)
    torch.testing.assert_close(exported.module()(x), F.adaptive_avg_pool2d(x, 3))


def test_pooled_norm_of_one_value_uses_running_statistics():
    norm = PooledBatchNorm2d(3)
    norm.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    norm.running_var.fill_(4.0)
    x = torch.randn(1, 3, 1, 1, requires_grad=True)
    y = norm(x)
    torch.testing.assert_close(y.flatten(), (x.flatten() - torch.tensor([1.0, 2.0, 3.0])) / 2, rtol=1e-4, atol=1e-4)
    y.sum().backward()
    assert norm.weight.grad.abs().min() > 0
    assert norm.num_batches_tracked == 0


@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (1, 3, 1, 2)])
def test_pooled_norm_of_more_values_is_batch_norm(shape):
    ours, plain = PooledBatchNorm2d(3), torch.nn.BatchNorm2d(3)
    x = torch.randn(shape)
    torch.testing.assert_close(ours(x), plain(x))
    torch.testing.assert_close(ours.running_var, plain.running_var)


@pytest.mark.parametrize("head", HEADS)
def test_psp_predicts_at_the_last_map_and_the_others_at_stride_4(head):
    model = HEADS[head](CHANNELS, TimmSegmentationConfig(num_labels=5, head_channels=8))
    features = {stride: torch.randn(2, c, -(-65 // stride), -(-97 // stride)) for stride, c in CHANNELS.items()}
    assert model(features).shape == ((2, 5, 3, 4) if head == "psp" else (2, 5, 17, 25))


@pytest.mark.parametrize("head", HEADS)
def test_half_precision(head):
    model = HEADS[head](CHANNELS, TimmSegmentationConfig(num_labels=5, head_channels=8)).to(torch.bfloat16)
    features = {stride: torch.randn(2, c, 64 // stride, 64 // stride).bfloat16() for stride, c in CHANNELS.items()}
    assert model(features).dtype == torch.bfloat16


@pytest.mark.parametrize("output_stride, rates", [(8, [12, 24, 36]), (16, [6, 12, 18]), (32, [3, 6, 9])])
def test_atrous_rates_follow_the_output_stride(output_stride, rates):
    head = DeepLabV3PlusHead(CHANNELS, TimmSegmentationConfig(output_stride=output_stride))
    assert [branch[0].dilation[0] for branch in head.atrous] == rates


def test_psp_pools_have_a_quarter_of_the_channels():
    head = PSPHead(CHANNELS, TimmSegmentationConfig())
    assert [pool[0].weight.shape[:2] for pool in head.pools] == [(5, 20)] * 4
    assert head.bottleneck[0].weight.shape == (5, 20 + 4 * 5, 3, 3)
