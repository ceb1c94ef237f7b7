"""From a model of `transformers` to its adapter, its input statistics and its image processor."""

import logging
from collections.abc import Sequence

import transformers
from transformers import BaseImageProcessor, PreTrainedModel

from ..utils.messages import UserError
from .base import DenseAdapter
from .espnet import EspNetAdapter
from .generic import (
    BeitAdapter,
    Data2VecVisionAdapter,
    DPTAdapter,
    MobileNetV2Adapter,
    MobileViTAdapter,
)
from .mask2former import Mask2FormerAdapter
from .segformer import SegformerAdapter
from .timm_segmentation import TimmSegmentationAdapter
from .upernet import UperNetAdapter


logger = logging.getLogger(__name__)

ADAPTERS: dict[str, type[DenseAdapter]] = {
    "beit": BeitAdapter,
    "data2vec-vision": Data2VecVisionAdapter,
    "dpt": DPTAdapter,
    "espnet": EspNetAdapter,
    "mask2former": Mask2FormerAdapter,
    "mobilenet_v2": MobileNetV2Adapter,
    "mobilevit": MobileViTAdapter,
    "mobilevitv2": MobileViTAdapter,
    "segformer": SegformerAdapter,
    "timm_segmentation": TimmSegmentationAdapter,
    "upernet": UperNetAdapter,
}


def adapter_class(model: PreTrainedModel) -> type[DenseAdapter]:
    """Class in `ADAPTERS` for the model's type.

    Raises:
        UserError: if the type has no adapter, or the model is no segmentation model.
    """
    model_type = model.config.model_type
    if model_type not in ADAPTERS:
        raise UserError(f"no adapter for models of type {model_type!r}; supported types: {', '.join(ADAPTERS)}")
    if "Segmentation" not in type(model).__name__:
        raise UserError(
            f"{type(model).__name__} predicts no segmentation; load the weights with AutoModelForSemanticSegmentation"
        )
    return ADAPTERS[model_type]


def build_adapter(
    model: PreTrainedModel,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
) -> DenseAdapter:
    """Adapts a segmentation model.

    Args:
        model: semantic segmentation model, or a universal one such as Mask2Former.
        image_mean: mean of each channel in RGB order, for images scaled to 0..1; the family's own if `None`.
            `image_statistics(model)` reads both from the model's image processor.
        image_std: standard deviation of each channel, likewise.

    Raises:
        UserError: if there is no adapter for the model; the message names the supported model types.
    """
    return adapter_class(model)(model, image_mean, image_std)


def adapt(model: PreTrainedModel | DenseAdapter) -> DenseAdapter:
    """Adapts a model with the statistics of its own image processor; an adapter stays as it is."""
    return model if isinstance(model, DenseAdapter) else build_adapter(model, *image_statistics(model))


def image_statistics(model: PreTrainedModel) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Channel means and standard deviations that the model's weights expect, in RGB order, for images in 0..1.

    Read from the image processor saved beside the weights, on disk or on the Hub (only in the cache when offline), at
    the commit that the weights came from if `load_segmentation_model` loaded them, else on the default branch. Without
    one, the family's own, with a warning. A model built from a configuration alone has nothing beside it.
    """
    mean, std = adapter_class(model).family_statistics(model)
    source = model.name_or_path
    if source:
        commit = getattr(model.config, "_commit_hash", None)
        try:
            processor = transformers.AutoImageProcessor.from_pretrained(
                source, revision=commit, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            logger.warning(
                f"No image processor beside {source!r}; images are normalised as is usual for {model.config.model_type}, "
                f"by {mean}, {std} ({error})."
            )
        else:
            mean, std = processor.image_mean, processor.image_std
            if not processor.do_normalize:
                mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return tuple(mean), tuple(std)


def image_processor(adapter: DenseAdapter, *, shortest_edge: int | None) -> BaseImageProcessor:
    """Builds the image processor to save beside a student.

    With it, `pipeline("image-segmentation")` shows the model the images that the adapter saw in evaluation: resized
    bilinearly with their aspect ratio, never cropped, with the adapter's normalisation. Families that take only
    squares get squares.

    Args:
        adapter: adapter of the student.
        shortest_edge: length of the shorter side in pixels (the longer is at most four times as long); `None` keeps
            the image's size.
    """
    return getattr(transformers, adapter.processor_class)(**adapter.processor_options(shortest_edge))


def describe(model: PreTrainedModel | DenseAdapter) -> str:
    """Says in a few lines what distillation would tap: levels, channels, strides, labels and normalisation."""
    adapter = adapt(model)
    names = list(adapter.id2label.values())
    size = f"{adapter.fixed_size[0]}x{adapter.fixed_size[1]}" if adapter.fixed_size else "any size"
    mean, std = (
        [f"{value:.3g}" for value in values.flatten().tolist()] for values in (adapter.image_mean, adapter.image_std)
    )
    lines = [
        f"{type(adapter.model).__name__} ({adapter.model.config.model_type}), adapted by {type(adapter).__name__}",
        f"labels: {len(names)} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})",
        f"input: {adapter.channel_order}, {size}, mean {' '.join(mean)}, std {' '.join(std)}",
        f"{'level':<10} {'channels':>8} {'stride':>6}",
    ]
    lines += [f"{name:<10} {spec.channels:>8} {spec.stride:>6}" for name, spec in adapter.feature_specs.items()]
    return "\n".join(lines)
