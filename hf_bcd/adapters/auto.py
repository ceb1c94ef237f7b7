"""From a model of `transformers` to its adapter, its input statistics and its image processor."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import BaseImageProcessor, PreTrainedModel

from ..utils.files import read_json
from ..utils.messages import UserError
from ..utils.text import shortened
from . import generic
from .backbones import BackboneAdapter, is_encoder
from .base import DenseAdapter
from .detr import (
    ConditionalDetrAdapter,
    DeformableDetrAdapter,
    DetrAdapter,
    DetrMaskAdapter,
    DFineAdapter,
    RTDetrAdapter,
)
from .mask2former import Mask2FormerAdapter
from .mask_queries import EomtAdapter, Mask2FormerInstanceAdapter, MaskFormerAdapter
from .timm_detection import TimmDetectionAdapter, TimmMaskAdapter
from .upernet import UperNetAdapter
from .vit_detectors import RfDetrAdapter, RfDetrMaskAdapter, YolosAdapter


logger = logging.getLogger(__name__)

# of the values that 0..255 becomes: divided by a deviation of 10 or less, or not even scaled to 0..1
SMALLEST_RANGE, LARGEST_RANGE = 0.1, 500

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
DETECTORS: dict[str, type[DenseAdapter]] = {
    "conditional_detr": ConditionalDetrAdapter,
    "d_fine": DFineAdapter,
    "dab-detr": ConditionalDetrAdapter,
    "deformable_detr": DeformableDetrAdapter,
    "deimv2": DFineAdapter,
    "detr": DetrAdapter,
    "rf_detr": RfDetrAdapter,
    "rt_detr": RTDetrAdapter,
    "rt_detr_v2": RTDetrAdapter,
    "timm_detection": TimmDetectionAdapter,
    "yolos": YolosAdapter,
}
# of models with masks
INSTANCES: dict[str, type[DenseAdapter]] = {
    "detr": DetrMaskAdapter,
    "eomt": EomtAdapter,
    "eomt_dinov3": EomtAdapter,
    "mask2former": Mask2FormerInstanceAdapter,
    "maskformer": MaskFormerAdapter,
    "rf_detr": RfDetrMaskAdapter,
}


def adapter_class(model: PreTrainedModel, task: str | None = None) -> type[DenseAdapter]:
    """The class for a model's type and kind of predictions.

    Args:
        model: of transformers, or one of ours.
        task: name of the task, of which a model such as Mask2Former serves two; by default that of label maps.

    Raises:
        UserError: if there is none, or the model predicts neither label maps nor boxes nor masks.
    """
    if is_encoder(model):
        return BackboneAdapter
    model_type, kind = model.config.model_type, type(model).__name__
    supported = {*ADAPTERS, *DETECTORS, *INSTANCES}
    if model_type not in supported:
        names = ", ".join(sorted(supported))
        raise UserError(f"no adapter for models of type {model_type!r}; supported types: {names}")
    known = ADAPTERS if "Segmentation" in kind else DETECTORS
    if (
        known is ADAPTERS
        and model_type in INSTANCES
        and (task == RfDetrMaskAdapter.task or model_type not in ADAPTERS)
    ):
        known = INSTANCES
    if model_type not in known or not ("Segmentation" in kind or "Detection" in kind):
        wanted, loader = "segmentation", "AutoModelForSemanticSegmentation"
        if model_type in DETECTORS:
            wanted, loader = "boxes", "AutoModelForObjectDetection"
        elif model_type in INSTANCES:
            wanted, loader = (
                "masks",
                "AutoModelForUniversalSegmentation, for masks of objects with --task instance-segmentation",
            )
        raise UserError(f"{kind} predicts no {wanted}; load the weights with {loader}")
    adapter = known[model_type]
    return TimmMaskAdapter if adapter is TimmDetectionAdapter and model.config.has_masks else adapter


def build_adapter(
    model: PreTrainedModel,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    task: str | None = None,
) -> DenseAdapter:
    """Adapts a segmentation model or a detector.

    Args:
        model: semantic segmentation model, or a universal one such as Mask2Former.
        image_mean: mean of each channel in RGB order, for images scaled to 0..1; the family's own if `None`.
            `image_statistics(model)` reads both from the model's image processor.
        image_std: standard deviation of each channel, likewise.
        task: see `adapter_class`.

    Raises:
        UserError: if there is no adapter for the model; the message names the supported model types.
    """
    return adapter_class(model, task)(model, image_mean, image_std)


def adapt(model: PreTrainedModel | DenseAdapter, task: str | None = None) -> DenseAdapter:
    """Adapts a model with the statistics of its own image processor; an adapter stays as it is.

    Args:
        model: of transformers, or one of ours.
        task: see `adapter_class`.

    Raises:
        UserError: if it is no model of transformers, there is no adapter for it, or the adapter shows it other values than the
            image processor.
    """
    if isinstance(model, DenseAdapter):
        return model
    if not isinstance(model, PreTrainedModel):
        given = repr(model) if isinstance(model, str) else f"a {type(model).__name__}"
        raise UserError(
            f"the model is {given}, not a model of transformers: load it first, such as by "
            "AutoModelForSemanticSegmentation.from_pretrained."
        )
    processor = own_processor(model)
    try:
        mean, std = statistics_of(processor, model)
        adapter = build_adapter(model, mean, std, task)
        if processor is not None:
            compare_inputs(adapter, processor)
    except (TypeError, ValueError, LookupError, RuntimeError) as error:
        if processor is None or isinstance(error, UserError):
            raise
        said = shortened(f"{type(error).__name__}: {error}")
        raise UserError(f"{model.name_or_path}: its {type(processor).__name__} cannot be used ({said}).") from error
    return adapter


def own_processor(model: PreTrainedModel) -> BaseImageProcessor | None:
    """The image processor saved beside a model's weights, on disk or on the Hub (only in the cache when offline).

    It is read at the commit that the weights came from if `load_model` loaded them, else on the default
    branch. None, with a warning, where a named model has none; a model built from a configuration has none beside it.
    """
    if not model.name_or_path:
        return None
    options = {"revision": getattr(model.config, "_commit_hash", None), "trust_remote_code": False}
    file = Path(model.name_or_path) / "preprocessor_config.json"
    if file.is_file() and not isinstance(read_json(file), dict):
        raise UserError(f"{file}: no image processor's configuration, which is a JSON object.")
    try:
        return transformers.AutoImageProcessor.from_pretrained(model.name_or_path, **options)
    except Exception as error:  # of whatever kind a strange value in the file leads to
        if file.is_file():
            raise UserError(f"{file}: the model's image processor cannot be loaded ({shortened(error)}).") from error
        if not isinstance(error, OSError | ValueError):
            raise
        mean, std = adapter_class(model).family_statistics(model)
        logger.warning(
            f"No image processor beside {model.name_or_path!r}; images are normalised as is usual for "
            f"{model.config.model_type}, by {mean}, {std} ({error})."
        )
        return None


def image_statistics(model: PreTrainedModel) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Channel means and standard deviations that the model's weights expect, in RGB order, for images in 0..1.

    Those of its `own_processor`; without one, the family's own.
    """
    return statistics_of(own_processor(model), model)


def statistics_of(processor: Any, model: PreTrainedModel) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The statistics of an image processor, whatever it multiplies 0..255 by, for images in 0..1.

    Raises:
        UserError: if it has no three means or deviations, or no factor.
    """
    if processor is None:
        mean, std = adapter_class(model).family_statistics(model)
        return tuple(mean), tuple(std)
    mean, std = processor.image_mean, processor.image_std
    if not processor.do_normalize:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    for name, values in (("image_mean", mean), ("image_std", std)):
        whole = isinstance(values, list | tuple) and len(values) == 3 and all(map(is_finite, values))
        if not whole or (name == "image_std" and min(values) <= 0):
            positive = ", above 0 since images are divided by them" if name == "image_std" else ""
            raise UserError(
                f"{model.name_or_path}: {name} of its image processor is {shortened(values)}; it must be three numbers, for R, "
                f"G and B{positive}."
            )
    if processor.do_rescale and not (is_finite(processor.rescale_factor) and processor.rescale_factor > 0):
        raise UserError(
            f"{model.name_or_path}: rescale_factor of its image processor is {shortened(processor.rescale_factor)}; it must "
            "be a number above 0, such as 1/255."
        )
    factor = 255 * processor.rescale_factor if processor.do_rescale else 255.0
    if not math.isclose(factor, 1.0, rel_tol=1e-6):
        mean, std = [value / factor for value in mean], [value / factor for value in std]
    return tuple(mean), tuple(std)


def is_finite(value: Any) -> bool:
    """Whether a value is a number, neither infinite nor NaN."""
    return isinstance(value, int | float) and math.isfinite(value)


def compare_inputs(adapter: DenseAdapter, processor: Any) -> None:
    """Shows a picture to a model by its adapter and by its own image processor.

    Raises:
        UserError: if the values differ.
    """
    # a prime, so that no two channels are alike
    picture = torch.arange(3 * 64 * 64, dtype=torch.int32).remainder(251).to(torch.uint8).view(3, 64, 64)
    kept = {step: False for step in ("do_resize", "do_center_crop", "do_pad") if getattr(processor, step, None)}
    name = f"{adapter.model.name_or_path}: its {type(processor).__name__}"
    try:
        expected = processor(picture, return_tensors="pt", input_data_format="channels_first", **kept)["pixel_values"]
    except Exception as error:  # transformers trusts its file to be right
        raise UserError(
            f"{name} cannot prepare a picture ({shortened(f'{type(error).__name__}: {error}')})."
        ) from error
    shown = adapter.normalize(picture[None])
    if expected.shape != shown.shape or not torch.allclose(expected, shown, rtol=1e-3, atol=1e-3):
        ranges = [
            f"{values.min():.2f}..{values.max():.2f} of shape {list(values.shape)}" for values in (expected, shown)
        ]
        raise UserError(
            f"{name} shows the model values {ranges[0]}, but models "
            f"of type {adapter.model.config.model_type} are shown {ranges[1]} here (channels {adapter.channel_order}). Save "
            "an image processor of the family's usual form beside the weights."
        )
    span = (shown.amax((2, 3)) - shown.amin((2, 3))).min().item()  # of a channel
    if not SMALLEST_RANGE < span < LARGEST_RANGE:
        logger.warning(
            "%s shows the model values %.4g..%.4g, a channel's range of %.4g for 0..255; are image_mean and image_std for images in "
            "0..255, or is do_rescale wrong?",
            name,
            shown.min().item(),
            shown.max().item(),
            span,
        )
    if kept.get("do_center_crop") is False:
        logger.warning(
            "%s crops pictures to %s; here the model sees them whole.",
            name,
            {side: length for side, length in dict(processor.crop_size).items() if length},
        )


def image_processor(adapter: DenseAdapter, *, shortest_edge: int | None, **size: Any) -> BaseImageProcessor:
    """Builds the image processor to save beside a student.

    With it, `pipeline("image-segmentation")` shows the model the images that the adapter saw in evaluation: resized
    bilinearly so that the shorter side has `shortest_edge` pixels (the longer at most four times as many; `None` keeps
    the size), never cropped, with the adapter's normalisation. Families that take only squares get squares. `size` are
    further arguments of a detector's `processor_options`.
    """
    return getattr(transformers, adapter.processor_class)(**adapter.processor_options(shortest_edge, **size))


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
        f"labels: {len(names)} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
        if adapter.predicts
        else "labels: none; a teacher of features",
        f"input: {adapter.channel_order}, {size}, mean {mean}, std {std}",
        f"{'level':<10} {'channels':>8} {'stride':>6}",
    ]
    lines += [f"{name:<10} {spec.channels:>8} {spec.stride:>6}" for name, spec in adapter.feature_specs.items()]
    return "\n".join(lines)
