"""What every adapted model offers: named feature levels, logits, and its own input normalisation."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..losses.ops.functional import resize
from ..losses.ops.segmentation import segmentation_loss
from ..outputs import DenseOutput, FeatureSpec, LabelMaps
from ..utils.messages import UserError
from ..utils.text import shortened
from .label_matching import LabelMap, match_labels


REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# of what a loss may need, what both models must have
OF_BOTH = frozenset(
    {
        "logits", "pyramid", "dense", "distributions", "tower", "queries", "mask_queries", "corners", "classes", "boxes",
        "final_boxes",
    }
)  # fmt: skip
HALF_MEAN, HALF_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


class DenseAdapter(nn.Module, ABC):
    """Turns one family of segmentation models into `DenseOutput`.

    A subclass states the family's rules as class attributes and implements `find_feature_specs` and `run`.

    Args:
        model: segmentation model of the family; it stays the module `model` of the adapter, unchanged.
        image_mean: mean of each channel in RGB order, for images scaled to 0..1; the family's own if `None`.
        image_std: standard deviation of each channel, likewise.

    Attributes:
        feature_specs: level name -> channels and true stride, from fine to coarse, known before the first forward.
        label_map: set on a model that is not trained, to get its logits in the classes of another label set.
    """

    task: ClassVar[str] = "semantic-segmentation"
    """Name of the task that the family's predictions are for."""
    default_statistics: tuple[Sequence[float], Sequence[float]] = (IMAGENET_MEAN, IMAGENET_STD)
    channel_order = "RGB"
    size_multiple = 32
    """A teacher's images are resized to the next multiple of this along each axis."""
    processor_class = "SegformerImageProcessor"
    """Image processor of `transformers` that prepares and post-processes images as this adapter does."""
    unused_parameters: tuple[str, ...] = ()
    """Beginnings of the names of parameters that no output of the adapter depends on."""
    min_labels: ClassVar[int] = 2
    """Number of classes below which a model gives one answer only."""
    exported: ClassVar[tuple[str, ...]] = ("logits",)
    """Outputs of the model that an export has."""
    finds_masks: ClassVar[bool] = False
    """Whether predictions have the mask of each object."""
    predicts: ClassVar[bool] = True
    """Whether it has classes; a backbone without a head teaches features only."""
    weighs_classes: ClassVar[bool] = True
    """Whether its task loss heeds weights of classes."""
    upsamples = False
    """Whether the model itself, unlike `run`, brings its logits to the size of the image."""

    image_mean: Tensor
    image_std: Tensor
    label_map: LabelMap | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ):
        super().__init__()
        check_config(model, self.min_labels)
        self.model: Any = model  # each family reaches for parts that PreTrainedModel does not declare
        default_mean, default_std = self.family_statistics(model)
        for name, values in (("image_mean", image_mean or default_mean), ("image_std", image_std or default_std)):
            if len(values) != 3:
                raise UserError(f"{name} has {len(values)} values {list(values)}; give one for each of R, G and B")
            if name == "image_std" and min(values) <= 0:
                raise UserError(
                    f"image_std is {list(values)}; images cannot be divided by that, so it must be positive"
                )
            # not persistent: the state dict of an adapter holds only the model's weights
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(3, 1, 1), persistent=False)
        self.feature_specs: dict[str, FeatureSpec] = self.find_feature_specs()

    @classmethod
    def family_statistics(cls, model: PreTrainedModel) -> tuple[Sequence[float], Sequence[float]]:
        """Channel means and standard deviations that the family's weights expect, for images scaled to 0..1."""
        config: Any = model.config  # our own models state theirs
        own = getattr(config, "image_mean", None), getattr(config, "image_std", None)
        return own[0] or cls.default_statistics[0], own[1] or cls.default_statistics[1]

    @property
    def num_labels(self) -> int:
        return self.model.config.num_labels if self.label_map is None else len(self.label_map.student)

    @property
    def id2label(self) -> dict[int, str]:
        return self.model.config.id2label if self.label_map is None else self.label_map.student

    @property
    def repo_id(self) -> str | None:
        """The repository on the Hub that the model was loaded from; `None` for folders and for models built here."""
        source = self.model.config.name_or_path or ""
        return source if REPO_ID.fullmatch(source) and not Path(source).exists() else None

    @property
    def revision(self) -> str | None:
        """The commit of that repository."""
        return getattr(self.model.config, "_commit_hash", None)

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        """Height and width of the only input size the model was made for, or `None` where any size will do."""
        return None

    def size_as_teacher(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width to which a teacher's images `size` are resized: its own, or the next multiples."""
        multiple = self.size_multiple
        return self.fixed_size or (-(-size[0] // multiple) * multiple, -(-size[1] // multiple) * multiple)

    def match(self, id2label: Mapping[int, str], synonyms: Mapping[str, Sequence[str]] | None = None) -> LabelMap:
        """Finds the model's classes for another label set, see `match_labels`; logits are in that one if it is complete."""
        label_map = match_labels(self.model.config.id2label, id2label, synonyms)
        self.label_map = label_map if label_map.is_complete else None
        return label_map

    @abstractmethod
    def find_feature_specs(self) -> dict[str, FeatureSpec]:
        """Reads channels and strides of the levels off the configuration and the layers, without a forward pass."""

    def run(self, pixel_values: Tensor, targets: LabelMaps | None) -> DenseOutput:
        """Runs the model on normalised images `[B, 3, H, W]`.

        With targets, the output has the task losses that its `logits` do not determine.
        """
        outputs = self.model(pixel_values, output_hidden_states=True)
        return DenseOutput(stage_features(self.feature_specs, self.stages(outputs.hidden_states)), outputs.logits)

    def stages(self, hidden_states: Sequence[Tensor]) -> Sequence[Tensor]:
        """The maps that end a stage, of all that the model hands out."""
        return hidden_states

    @property
    def head_levels(self) -> tuple[str, ...]:
        """Levels of which the logits are a function, see `run_head`; none where the head reads something else too."""
        return ()

    @property
    def offers(self) -> frozenset[str]:
        """What losses may need of this model as a teacher, see `DistillationLoss.needs`."""
        return frozenset({"features", "logits", *(["head"] if self.head_levels else [])})

    def offers_with(self, teacher: "DenseAdapter") -> frozenset[str]:
        """What losses may need of the two models, if this one is the student."""
        return teacher.offers - (OF_BOTH - self.offers)

    @property
    def pyramid_specs(self) -> dict[str, FeatureSpec]:
        """Levels of `DenseOutput.pyramid`, as `feature_specs`."""
        return {}

    def run_head(self, features: dict[str, Tensor]) -> Tensor:
        """Runs the model's head on maps in the place of its levels `head_levels`: logits in the model's own classes."""
        raise NotImplementedError

    def freeze_unused(self) -> None:
        """Freezes what gets no gradient: data-parallel training waits for one from every trainable parameter."""
        for name, parameter in self.model.named_parameters():
            if name.startswith(self.unused_parameters):
                parameter.requires_grad_(False)

    def stage_modules(self) -> Sequence[nn.Module]:
        """The modules whose outputs end the stages of the backbone, a stem left out.

        Raises:
            UserError: if the family's stages are no modules of their own.
        """
        raise UserError(f"layer_decay: the stages of a {type(self.model).__name__} are not known; set layer_decay: 1.")

    def depths(self) -> dict[nn.Parameter, int]:
        """The stage of each parameter of the backbone, from 1 on; 0 for what comes before the first one.

        Raises:
            UserError: as `stage_modules`.
        """
        stages = [list(module.parameters()) for module in self.stage_modules()]
        inside = {parameter: stage for stage, parameters in enumerate(stages, 1) for parameter in parameters}
        found, depth, ended = {}, 0, 0
        for parameter in self.model.parameters():  # in the order of the layers
            ended = max(ended, inside.get(parameter, 0))
            # layers between two stages belong to the later one, unless nothing follows
            found[parameter] = inside.get(parameter, min(ended + 1, len(stages)) if ended else 0)
            depth += parameter in inside
            if depth == len(inside):
                break
        return found

    def normalize(self, pixel_values: Tensor) -> Tensor:
        """Normalises RGB images with values 0..255 as the family's image processor does, in float32."""
        # the order of operations of transformers' torchvision image processors, so that results agree bit for bit
        normalized = (pixel_values.float() - self.image_mean * 255) / (self.image_std * 255)
        return normalized.flip(1) if self.channel_order == "BGR" else normalized

    def forward(self, pixel_values: Tensor, targets: Any = None, pixel_mask: Tensor | None = None) -> DenseOutput:
        """Runs the model on RGB images `[B, 3, H, W]`, uint8 or float, values 0..255, not normalised.

        Without targets (`LabelMaps` here), the output has no task losses. `pixel_mask` tells which pixels belong to a picture
        where the targets do not; no model for label maps heeds it.

        Raises:
            UserError: if `pixel_values` is not a batch of RGB images, or has a size that the model cannot take.
        """
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise UserError(f"pixel_values has shape {list(pixel_values.shape)}; expected RGB images [B, 3, H, W]")
        output = self.run(self.normalize(pixel_values).to(self.model.dtype), targets)
        output.logits = self._map_labels(output.logits)
        if targets is not None and "loss_task" not in output.task_losses:
            output.task_losses = {"loss_task": cross_entropy(output.logits, targets), **output.task_losses}
        return output

    def begin_step(self, seed: int, step: int) -> None:
        """Tells a model that draws at random which optimizer step comes, so that a resumed run draws what this one does."""

    def check_shape(self, size: tuple[int, int] | None) -> None:
        """Refuses training images `size` (height, width; None for padded ones) that the family must not be shown."""

    @torch.no_grad()
    def check_size(self, size: tuple[int, int]) -> None:
        """Runs the model on a black image `size` (height, width), as training and evaluation would.

        Raises:
            UserError: if it cannot take images of this size.
        """
        self.check_shape(size)
        mode = self.training
        pixel_values = torch.zeros(1, 3, *size, dtype=torch.uint8, device=self.image_mean.device)
        try:
            self.eval()(pixel_values)
        except UserError:
            raise
        except (RuntimeError, AssertionError, ValueError) as error:
            made_for = getattr(getattr(self.model, "backbone", None), "pretrained_cfg", {}).get("input_size", ())
            raise UserError(
                f"{type(self.model).__name__} cannot take images of {size[0]}x{size[1]} pixels ({shortened(error)})."
                + (
                    f" Its backbone {self.model.config.backbone} was made for {made_for[-2]}x{made_for[-1]}. Train at that "
                    "size (`--crop_size`, `--image_size`, for detectors `--square_size`), or build it for another: options {backbone_kwargs: {img_size: "
                    "...}}, for Swin also {strict_img_size: false}."
                    if made_for
                    else " Choose another crop_size, image_size or square_size, such as a multiple of 32."
                )
            ) from error
        finally:
            self.train(mode)

    @torch.no_grad()
    def predict(self, pixel_values: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Class maps as `pipeline("image-segmentation")` computes them: logits brought to the size, then arg-max.

        Args:
            pixel_values: `[B, 3, H, W]`, values 0..255.
            sizes: height and width of each map, int64 `[h, w]`, such as the picture's own.
        """
        with torch.autocast(pixel_values.device.type, enabled=False):
            logits = self(pixel_values).logits.float()
        if self.upsamples:
            logits = resize(logits, (pixel_values.shape[-2], pixel_values.shape[-1]))
        if len(set(sizes)) == 1:
            return list(resize(logits, sizes[0]).argmax(dim=1))
        return [resize(one[None], size).argmax(dim=1)[0] for one, size in zip(logits, sizes, strict=True)]

    def head(self, features: dict[str, Tensor]) -> Tensor:
        """Logits of the model's head on other maps `{level: [B, C, h, w]}`, in the classes of `forward`'s logits.

        Raises:
            UserError: if the head reads more than the levels.
        """
        if not self.head_levels:
            raise UserError(f"the head of this {self.model.config.model_type} reads more than the feature levels")
        levels = {name: features[name].to(self.model.dtype) for name in self.head_levels}
        return self._map_labels(self.run_head(levels))

    def _map_labels(self, logits: Tensor) -> Tensor:
        return logits if self.label_map is None else self.label_map.apply(logits)

    def processor_options(self, shortest_edge: int | None) -> dict[str, Any]:
        """Arguments of `processor_class` with which a saved model sees images as this adapter shows them."""
        bilinear, mean, std = 2, self.image_mean.flatten().tolist(), self.image_std.flatten().tolist()
        options: dict[str, Any] = {"do_resize": shortest_edge is not None, "resample": bilinear}
        options |= {"do_reduce_labels": False, "image_mean": mean, "image_std": std}
        if shortest_edge is not None:
            options["size"] = {"shortest_edge": shortest_edge, "longest_edge": 4 * shortest_edge}
        return options


def check_config(model: PreTrainedModel, min_labels: int) -> None:
    """Refuses models of pictures that are not RGB, models of one answer, and names that are none of 0 to K - 1."""
    settings: Any = model.config
    names: dict[int, Any] = settings.id2label or {}
    wrong = [key for key, name in names.items() if not isinstance(name, str) or not name.strip()]
    if wrong:
        raise UserError(
            f"{model.name_or_path}: id2label of config.json names class {wrong[0]} {shortened(names[wrong[0]])!r}; it must be "
            "text."
        )
    if holes := sorted({*range(len(names))} - {*names}):
        raise UserError(
            f"{model.name_or_path}: id2label of config.json has {len(names)} classes, but none of the id {holes[0]}: it has "
            f"{shortened(sorted(names))}. Number them from 0 to {len(names) - 1}."
        )
    if settings.num_labels < min_labels:
        raise UserError(
            f"{type(model).__name__} {model.name_or_path} has {settings.num_labels} class, which every pixel would get; "
            "choose a model with a class for the background too, or one of boxes or masks where the data are objects."
        )
    for config in (settings, getattr(settings, "backbone_config", None)):
        channels = getattr(config, "num_channels", 3)
        if channels not in (3, None):
            raise UserError(
                f"{type(model).__name__} {model.name_or_path} takes {channels} channels, but pictures are RGB here; choose a "
                "model with num_channels=3."
            )


def cross_entropy(logits: Tensor, targets: LabelMaps) -> Tensor:
    """`segmentation_loss` of logits `[B, num_labels, h, w]` against label maps: scalar."""
    options = {name: getattr(targets, name) for name in ("ignore_index", "num_valid", "class_weights")}
    return segmentation_loss(logits, targets.ids.long(), **options)


def stage_specs(channels: Sequence[int], strides: Sequence[int]) -> dict[str, FeatureSpec]:
    """Names the consecutive stages of a backbone, given from fine to coarse with their true strides.

    A stage is named after its nominal stride, which doubles from stage to stage, so that a dilated stage keeps its
    name. A first stage of stride 2 becomes `stem`, at stride 4: it is tapped after max-pooling.
    """
    specs = {}
    for index, (stage_channels, stride) in enumerate(zip(channels, strides, strict=True)):
        nominal = strides[0] * 2**index
        if nominal == 2:
            specs["stem"] = FeatureSpec(stage_channels, 4)
        else:
            specs[f"stride_{nominal}"] = FeatureSpec(stage_channels, stride)
    return specs


def timm_stages(backbone: Any, infos: Sequence[Mapping[str, Any]] | None = None) -> list[nn.Module]:
    """The modules that end the stages of a feature extractor of timm, by default those it gives; without a stem of stride 2."""
    modules = dict(backbone.named_modules())
    names = [info["module"] for info in infos or backbone.feature_info.get_dicts() if info["reduction"] > 2]
    return [modules[name] if name in modules else modules[name.replace(".", "_")] for name in names]


def stage_features(specs: dict[str, FeatureSpec], maps: Sequence[Tensor]) -> dict[str, Tensor]:
    """Gives the maps `[B, C, h, w]` of consecutive stages their level names."""
    features = dict(zip(specs, maps, strict=True))
    if "stem" in features:  # to stride 4, as ResNet does after its first convolution
        features["stem"] = F.max_pool2d(features["stem"], kernel_size=3, stride=2, padding=1)
    return features
