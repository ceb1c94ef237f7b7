"""Models as `torch.onnx` can export them with free height and width: the same function, in other operations."""

import copy
import warnings
from functools import partial
from typing import Any, ClassVar

import torch
from timm.layers.conv2d_same import Conv2dSame, conv2d_same
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..models.heads import average_bins


INT64, BOOL = 7, 9  # ONNX's numbers of types
OPSET = 18  # which the exporter itself writes; later ones only by conversion


class LogitsModel(nn.Module):
    """From `pixel_values` to `logits`, in evaluation mode, without the layers that the exporter cannot leave open.

    Pyramid pooling becomes two matrix products, since an exported `adaptive_avg_pool2d` only runs at the size it was
    exported with. TensorFlow's padding becomes an attribute of the convolution: computed from the size, it makes the
    shapes of a deep network terms so large that exporting does not come to an end. The model itself stays as it is.

    Args:
        model: the model.
        free_size: whether height and width are to stay open; else convolutions compute their padding as they do.
    """

    outputs: tuple[str, ...] = ("logits",)
    free_batch: ClassVar[bool] = True

    def __init__(self, model: PreTrainedModel, free_size: bool = True):
        super().__init__()
        self.model = copy.deepcopy(model)
        # MobileNetV2 of transformers computes its padding from the size, unless its configuration says no
        tensorflow = free_size and getattr(model.config, "tf_padding", False)
        if tensorflow:
            self.model.config.tf_padding = False
        for layer in self.model.modules():
            bins = layer.output_size if isinstance(layer, nn.AdaptiveAvgPool2d) else None
            if isinstance(bins, int) and bins > 1:
                vars(layer).update(forward=partial(average_bins, bins=bins))
            elif isinstance(layer, nn.Conv2d) and (
                (free_size and type(layer) is Conv2dSame) or (tensorflow and max(layer.stride) > 1)
            ):
                padded = partial(same_convolution, layer, list(layer.stride))
                # with stride and kernel 1, so that whoever pads for this layer adds nothing
                vars(layer).update(forward=padded, stride=(1, 1), kernel_size=(1, 1))
            elif isinstance(layer, nn.Conv2d) and tensorflow:  # a constant at stride 1
                layer.padding = tuple(d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
        self.eval()

    def forward(self, pixel_values: Tensor) -> Any:
        """`[B, 3, H, W]` -> `[B, num_labels, h, w]`."""
        return self.model(pixel_values=pixel_values).logits


class DetectionsModel(LogitsModel):
    """From `pixel_values` of one picture to what finds its objects: for most families DETR's, suppression of boxes included.

    Args:
        model: the model.
        outputs: names of its outputs, see `DenseAdapter.exported`.
    """

    free_batch = False

    def __init__(self, model: PreTrainedModel, outputs: tuple[str, ...]):
        super().__init__(model)
        self.outputs = outputs

    def forward(self, pixel_values: Tensor) -> Any:
        """`[1, 3, H, W]` -> the outputs in their order."""
        found = self.model(pixel_values=pixel_values)
        return tuple(found[name] for name in self.outputs)


def why_fixed(model: PreTrainedModel) -> str | None:
    """Why a model's height and width cannot even be tried to leave open; None if they can."""
    for module in model.modules():
        pads = type(module).__name__.endswith("Same") and type(module) is not Conv2dSame
        if pads and getattr(module, "stride", 1) not in (1, (1, 1)):  # at stride 1 the padding is a constant
            return f"its {type(module).__name__} computes its padding from the size"
    return None


def same_convolution(layer: nn.Conv2d, stride: list[int], x: Tensor) -> Tensor:
    """A convolution with TensorFlow's padding, whatever the layer's own."""
    y = convolve_same(x, layer.weight, stride, list(layer.dilation), layer.groups)
    return y if layer.bias is None else y + layer.bias[:, None, None]


@torch.library.custom_op("hf_bcd::convolve_same", mutates_args=())
def convolve_same(x: Tensor, weight: Tensor, stride: list[int], dilation: list[int], groups: int) -> Tensor:
    """Convolution without bias whose output has the input's size divided by the stride, rounded up."""
    return conv2d_same(x, weight, None, (stride[0], stride[1]), (0, 0), (dilation[0], dilation[1]), groups)


@convolve_same.register_fake
def _(x: Tensor, weight: Tensor, stride: list[int], dilation: list[int], groups: int) -> Tensor:
    height, width = ((size + step - 1) // step for size, step in zip(x.shape[2:], stride, strict=True))
    return x.new_empty(x.shape[0], weight.shape[0], height, width)


@torch.no_grad()  # with gradients, attention is traced with another memory layout, in which views fail
def to_onnx(model: LogitsModel, pixel_values: Tensor, dynamic_size: bool) -> Any:
    """The model as an `ONNXProgram`, where the model's `free_batch` says so with free batch, and perhaps height and width.

    The example `[B, 3, H, W]` then has at least two images, for 1 is exported as a constant.

    Raises:
        torch.onnx.errors.OnnxExporterError: if that cannot be done.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from onnxscript import opset18

    def onnx_convolve_same(x: Any, weight: Any, stride: Any, dilation: Any, groups: Any) -> Any:
        return opset18.Conv(x, weight, auto_pad="SAME_UPPER", strides=stride, dilations=dilation, group=groups)

    def onnx_is_all_true(x: Any) -> Any:  # of a check that transformers leaves in its real-time detectors
        numbers: Any = opset18.Cast(x, to=INT64)
        smallest: Any = opset18.ReduceMin(numbers, keepdims=0)
        return opset18.Cast(smallest, to=BOOL)

    free = {**({0: "batch"} if model.free_batch else {}), **({2: "height", 3: "width"} if dynamic_size else {})}
    with warnings.catch_warnings():
        # of torchvision's suppression of boxes
        warnings.filterwarnings("ignore", "`create_unbacked_symint`", FutureWarning)
        program: Any = torch.onnx.export(
            model,
            (pixel_values,),
            dynamic_shapes={"pixel_values": free},
            input_names=["pixel_values"],
            output_names=list(model.outputs),
            opset_version=OPSET,
            custom_translation_table={
                torch.ops.hf_bcd.convolve_same.default: onnx_convolve_same,
                torch.ops.aten._is_all_true.default: onnx_is_all_true,
            },
            verbose=False,
        )
    ClearMetadataAndDocStringPass()(program.model)  # stack traces with this machine's paths
    return program
