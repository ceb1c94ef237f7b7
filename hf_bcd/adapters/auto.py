"""From a model of `transformers` to its adapter, its input statistics and its image processor."""

import logging
from collections.abc import Sequence

import transformers
from transformers import BaseImageProcessor, PreTrainedModel

from ..utils.messages import UserError
from . import generic
from .base import DenseAdapter
from .mask2former import Mask2FormerAdapter
from .upernet import UperNetAdapter


logger = logging.getLogger(__name__)

ADAPTERS: dict[str, type[DenseAdapter]] = {
    "beit": generic.BeitAdapter,
    "data2vec-vision": generic.Data2VecVisionAdapter,
    "dpt": generic.DPTAdapter,
    "espnet": generic.EspNetAdapter,
    "mask2former": Mask2FormerAdapter,
    "mobilenet_v2": generic.MobileNetV2Adapter,
    "mobilevit": generic.MobileViTAdapter,
    "mobilevitv2": generic.MobileViTAdapter,
    "segformer": generic.SegformerAdapter,
    "timm_segmentation": generic.TimmSegmentationAdapter,
    "upernet": UperNetAdapter,
}


def adapter_class(model: PreTrainedModel) -> type[DenseAdapter]:
    """Class in `ADAPTERS` for the model's type; a `UserError` says that there is none, or that it does not segment."""
    model_type = model.config.model_type
    if model_type not in ADAPTERS:
        raise UserError(f"no adapter for models of type {model_type!r}; supported types: {', '.join(ADAPTERS)}")
    if "Segmentation" not in type(model).__name__:
        raise UserError(
            f"{type(model).__name__} predicts no segmentation; load the weights with AutoModelForSemanticSegmentation"
        )
    return ADAPTERS[model_type]


def build_adapter(
    model: PreTrainedModel, image_mean: Sequence[float] | None = None, image_std: Sequence[float] | None = None
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
        options = {"revision": getattr(model.config, "_commit_hash", None), "trust_remote_code": False}
        try:
            processor = transformers.AutoImageProcessor.from_pretrained(source, **options)
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
    bilinearly so that the shorter side has `shortest_edge` pixels (the longer at most four times as many; `None` keeps
    the size), never cropped, with the adapter's normalisation. Families that take only squares get squares.
    """
    return getattr(transformers, adapter.processor_class)(**adapter.processor_options(shortest_edge))


def describe(model: PreTrainedModel | DenseAdapter) -> str:
    """Says in a few lines what distillation would tap: levels, channels, strides, labels and normalisation."""
    adapter = adapt(model)
    names = list(adapter.id2label.values())
    size = "x".join(map(str, adapter.fixed_size)) if adapter.fixed_size else "any size"
    mean, std = (
        " ".join(f"{value:.3g}" for value in values.flatten().tolist())
        for values in (adapter.image_mean, adapter.image_std)
    )
    lines = [
        f"{type(adapter.model).__name__} ({adapter.model.config.model_type}), adapted by {type(adapter).__name__}",
        f"labels: {len(names)} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})",
        f"input: {adapter.channel_order}, {size}, mean {mean}, std {std}",
        f"{'level':<10} {'channels':>8} {'stride':>6}",
    ]
    lines += [f"{name:<10} {spec.channels:>8} {spec.stride:>6}" for name, spec in adapter.feature_specs.items()]
    return "\n".join(lines)
