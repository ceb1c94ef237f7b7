"""Models whose object queries answer with a class and a mask: Mask2Former, MaskFormer and EoMT as instance models."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..outputs import DenseOutput, FeatureSpec, Objects, Queries
from ..utils.masks import encode, mask_boxes
from ..utils.messages import UserError
from .base import stage_features, timm_stages
from .detection import DetectionAdapter, replaced, tapped, unpacked_masks
from .mask2former import Layer, layers_of, matched_loss
from .upernet import backbone_feature_specs


class MaskQueryAdapter(DetectionAdapter):
    """What the three families have in common: Mask2Former's matched loss, and its scores of masks.

    In training, `queries` has the answers of all decoder layers that the family's loss sees, else those of the last one.
    A prediction's score is the probability of its class times the mean probability of its mask's pixels, its box that
    around its mask; empty masks are left out. Masks are brought from the model's logits to the picture's size, while the
    processors bring those of Mask2Former to 384 x 384 first, or binary ones of MaskFormer to the picture; there `pipeline`
    has other pixels along borders, and scores that differ in the second digit. The processor of EoMT gives one class a query.
    """

    task = "instance-segmentation"
    finds_masks = True
    exported = ("class_queries_logits", "masks_queries_logits")
    softmax = True
    within_queries = True
    blank_layers: ClassVar[int] = 0
    """First layers whose queries all say the same: the loss has them, `queries` has not."""

    @abstractmethod
    def answers(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> tuple[DenseOutput, list[Layer]]:
        """Levels of normalised images, and what each layer answers, the last one last."""

    @property
    def mask_stride(self) -> int:
        """Pixels of the images per position of a mask, along each axis."""
        return next(iter(self.pyramid_specs.values())).stride

    @property
    def offers(self) -> frozenset[str]:
        return frozenset(
            {"features", "boxes", "classes", "mask_queries", *(["pyramid"] if self.pyramid_specs else [])}
        )

    def run(self, pixel_values: Tensor, targets: Objects | None, pixel_mask: Tensor | None = None) -> DenseOutput:  # type: ignore[override]
        labels = None if targets is None else unpacked_masks(targets, self.model)
        output, layers = self.answers(pixel_values, pixel_mask)
        if targets is not None and labels is not None:
            output.task_losses["loss_task"] = self.task_loss(layers, labels, targets.classes)
        size = [-(-side // self.mask_stride) for side in pixel_values.shape[-2:]]
        earlier = layers[self.blank_layers : -1] if self.training else []
        classes, masks = zip(*earlier, layers[-1], strict=True)
        masks = torch.stack([one[..., : size[0], : size[1]] for one in masks])
        output.queries = Queries(self.map_classes(torch.stack(classes)), None, True, masks=masks)
        return output

    def task_loss(self, layers: Sequence[Layer], masks: Sequence[Tensor], classes: Sequence[Tensor]) -> Tensor:
        """The model's loss: what each layer answers, against true masks of each picture, boolean `[N, H, W]`, and their classes."""
        truth = [one.float() for one in masks], list(classes)
        return matched_loss(self.model, self.in_order_of_loss(layers), *truth)

    def in_order_of_loss(self, layers: Sequence[Layer]) -> Sequence[Layer]:
        """Layers as the family's loss visits them, which decides about its random points."""
        return [layers[-1], *layers[:-1]]

    @torch.no_grad()
    def predict(self, pixel_values: Tensor, sizes: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:  # type: ignore[override]
        shown = pixel_values.shape[-2], pixel_values.shape[-1]
        self.check_shape(shown)
        with torch.autocast(pixel_values.device.type, enabled=False):
            _, layers = self.answers(self.shown(pixel_values), None)
        classes, masks = layers[-1]
        answers = zip(self.map_classes(classes.float()), masks, sizes, strict=True)
        return [self.instances(logits, mask, shown, size) for logits, mask, size in answers]

    def instances(
        self, class_logits: Tensor, masks: Tensor, shown: tuple[int, int], size: tuple[int, int]
    ) -> dict[str, Any]:
        """Instances of one picture, see `predict`.

        Args:
            class_logits: `[Q, C + 1]`.
            masks: logits `[Q, h, w]`.
            shown: height and width of the image that the model saw.
            size: those of the picture.
        """
        scores = class_logits.softmax(-1)[:, :-1]
        best, index = scores.flatten().topk(min(self.limit, scores.numel()))
        rows, found = (index // scores.shape[1]).tolist(), {}
        for row in set(rows):  # one by one: all of them at full size may not fit
            logits = self.at_size(masks[row], shown, size)
            mask = logits > 0
            found[row] = encode(mask.cpu()), (logits.sigmoid() * mask).sum() / mask.sum().clamp_min(1)
        best = best * torch.stack([found[row][1] for row in rows])
        order = best.argsort(descending=True, stable=True)
        order = order[best[order] > 0]
        kept = [found[rows[place]][0] for place in order.tolist()]
        return {
            "boxes": best.new_tensor(mask_boxes(kept)),
            "scores": best[order],
            "labels": (index % scores.shape[1])[order],
            "masks": kept,
        }

    def at_size(self, logits: Tensor, shown: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """Logits of a mask `[h, w]` at the size of the picture; the grid may reach beyond the image shown."""
        whole = [self.mask_stride * side for side in logits.shape]
        image = F.interpolate(logits[None, None].float(), size=whole, mode="bilinear", align_corners=False)
        return F.interpolate(image[..., : shown[0], : shown[1]], size=size, mode="bilinear", align_corners=False)[0, 0]

    def processor_options(
        self, shortest_edge: int | None, longest_edge: int = 1333, square_size: int | None = None
    ) -> dict[str, Any]:
        options = super().processor_options(shortest_edge, longest_edge, square_size)
        del options["do_convert_annotations"]  # there are no boxes
        return options


class Mask2FormerInstanceAdapter(MaskQueryAdapter):
    """Mask2Former: levels of the backbone, and of the pixel decoder `p3` to `p5` and the maps of mask embeddings as `p2`.

    Neither family looks at the mask of padded pixels: padding is background to their losses.
    """

    processor_class = "Mask2FormerImageProcessor"
    unused_parameters = ("model.pixel_level_module.encoder.swin.layernorm.",)

    @property
    def encoder(self) -> Any:
        return self.model.model.pixel_level_module.encoder

    def find_feature_specs(self) -> dict[str, FeatureSpec]:
        return backbone_feature_specs(self.encoder)

    def stage_modules(self) -> Sequence[nn.Module]:
        if (timm := getattr(self.encoder, "_backbone", None)) is not None:
            return timm_stages(timm, timm.feature_info.info)
        inner = next((getattr(self.encoder, name) for name in ("swin", "model") if hasattr(self.encoder, name)), None)
        encoder = (inner or self.encoder).encoder
        return list(encoder.layers if hasattr(encoder, "layers") else encoder.stages)

    @property
    def pyramid_specs(self) -> dict[str, FeatureSpec]:
        config, strides = self.model.config, [spec.stride for spec in self.feature_specs.values()][-3:]
        specs = {f"p{stride.bit_length() - 1}": FeatureSpec(config.feature_size, stride) for stride in strides}
        return {"p2": FeatureSpec(config.mask_feature_size, config.common_stride), **specs}

    def answers(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> tuple[DenseOutput, list[Layer]]:
        outputs = self.model(pixel_values, output_hidden_states=True, output_auxiliary_logits=True)
        maps = outputs.pixel_decoder_last_hidden_state, *reversed(outputs.pixel_decoder_hidden_states)
        return self.levels(outputs, dict(zip(self.pyramid_specs, maps, strict=True))), layers_of(outputs)

    def levels(self, outputs: Any, pyramid: dict[str, Tensor]) -> DenseOutput:
        return DenseOutput(stage_features(self.feature_specs, outputs.encoder_hidden_states), None, pyramid=pyramid)

    def processor_options(
        self, shortest_edge: int | None, longest_edge: int = 1333, square_size: int | None = None
    ) -> dict[str, Any]:
        # size_divisor would stretch the image to a multiple of 32, which the model does not need
        return super().processor_options(shortest_edge, longest_edge, square_size) | {"size_divisor": 1}


class MaskFormerAdapter(Mask2FormerInstanceAdapter):
    """MaskFormer: levels of the backbone, and of the feature pyramid `p2` to `p5`.

    The layers before the last one answer only if `use_auxiliary_loss` is set in its configuration.
    """

    processor_class = "MaskFormerImageProcessor"
    unused_parameters = ("model.pixel_level_module.encoder.model.layernorm.",)
    blank_layers = 1

    @property
    def pyramid_specs(self) -> dict[str, FeatureSpec]:
        width, strides = self.model.config.fpn_feature_size, [spec.stride for spec in self.feature_specs.values()]
        return {f"p{stride.bit_length() - 1}": FeatureSpec(width, stride) for stride in strides}

    def answers(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> tuple[DenseOutput, list[Layer]]:
        fpn = self.model.model.pixel_level_module.decoder.fpn
        names = list(self.pyramid_specs)
        with tapped(dict(zip(reversed(names), [fpn.stem, *fpn.layers], strict=True))) as maps:
            outputs = self.model(pixel_values, output_hidden_states=True, output_auxiliary_logits=True)
        return self.levels(outputs, {name: maps[name] for name in names}), layers_of(outputs)


class EomtAdapter(MaskQueryAdapter):
    """EoMT: levels are four token grids at equal distances, named by depth as those of `TokenAdapter`; no neck.

    The model takes squares of one size. Images up to that are set in the top left corner of a black one, as its processor
    does, and levels and masks are cut to them again. `attn_mask_probs`, the share of queries whose attention is masked, stays what
    the model has: 1 in a new one, 0 in finished ones.
    """

    processor_class = "EomtImageProcessor"

    @property
    def side(self) -> int:
        """Height and width of the model's images."""
        return self.model.config.image_size

    @property
    def size_multiple(self) -> int:  # type: ignore[override]
        return self.model.config.patch_size

    @property
    def mask_stride(self) -> int:
        return self.model.config.patch_size // 2**self.model.config.num_upscale_blocks

    def size_as_teacher(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width whose longer one is the model's, the aspect ratio kept but for whole patches."""
        patch, shrink = self.size_multiple, self.side / max(size)
        height, width = (max(1, round(side * shrink / patch)) * patch for side in size)
        return height, width

    def check_shape(self, size: tuple[int, int] | None) -> None:
        if size is not None and max(size) > self.side:
            raise UserError(
                f"{type(self.model).__name__} takes images of at most {self.side} x {self.side} pixels, not {size[0]} x "
                f"{size[1]}. {self._remedy()}"
            )

    def _remedy(self) -> str:
        return (
            f"Resize them as the model's own processor does: image_size: {self.side} and image_longest: {self.side} "
            f"(`--image_size {self.side} --image_longest {self.side}`)."
        )

    def find_feature_specs(self) -> dict[str, FeatureSpec]:
        spec = FeatureSpec(self.model.config.hidden_size, self.model.config.patch_size)
        return {f"stride_{4 * 2**index}": spec for index in range(4)}

    def stage_modules(self) -> Sequence[nn.Module]:
        return list(self.model.layers)

    def depths(self) -> dict[nn.Parameter, int]:
        inside = {
            *self.model.embeddings.parameters(),
            *self.model.layers.parameters(),
        }  # queries come before the layers
        return {parameter: depth for parameter, depth in super().depths().items() if parameter in inside}

    def on_canvas(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> Tensor:
        """Normalised images on a black square of the model's size, black also where they were padded."""
        height, width = pixel_values.shape[-2:]
        self.check_shape((height, width))
        black = self.normalize(torch.zeros_like(self.image_mean)[None]).to(pixel_values.dtype)
        if pixel_mask is not None:
            pixel_values = torch.where(pixel_mask[:, None], pixel_values, black)
        canvas = black.expand(len(pixel_values), 3, self.side, self.side).clone()
        canvas[..., :height, :width] = pixel_values
        return canvas

    def answers(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> tuple[DenseOutput, list[Layer]]:
        height, width = (-(-side // self.size_multiple) for side in pixel_values.shape[-2:])
        blocks, grid = self.stage_modules(), self.side // self.size_multiple
        ends = [blocks[len(blocks) * part // 4 - 1] for part in (1, 2, 3, 4)]
        predict, layers = self.model.predict, []

        def kept(tokens: Tensor) -> tuple[Tensor, Tensor]:
            masks, classes = predict(tokens)
            layers.append((classes, masks))
            return masks, classes

        # the model returns the last layer's answers only
        with replaced(self.model, "predict", kept), tapped(dict(zip(self.feature_specs, ends, strict=True))) as tokens:
            self.model(self.on_canvas(pixel_values, pixel_mask))
        levels = {  # patches come last, behind queries, class token and registers
            name: tokens[name][:, -(grid**2) :].transpose(1, 2).unflatten(2, (grid, grid))[..., :height, :width]
            for name in self.feature_specs
        }
        return DenseOutput(levels, None), layers

    def task_loss(self, layers: Sequence[Layer], masks: Sequence[Tensor], classes: Sequence[Tensor]) -> Tensor:
        whole = [F.pad(one, (0, self.side - one.shape[-1], 0, self.side - one.shape[-2])) for one in masks]
        return super().task_loss(layers, whole, classes)

    def in_order_of_loss(self, layers: Sequence[Layer]) -> Sequence[Layer]:
        return layers

    def processor_options(
        self, shortest_edge: int | None, longest_edge: int = 1333, square_size: int | None = None
    ) -> dict[str, Any]:
        if (
            square_size is not None
            or shortest_edge not in (None, self.side)
            or shortest_edge
            and longest_edge != self.side
        ):
            raise UserError(
                f"{type(self.model).__name__} is shown pictures whose longer side is {self.side} pixels. {self._remedy()}"
            )
        size = {"size": {"shortest_edge": self.side, "longest_edge": self.side}}
        return super().processor_options(self.side, self.side) | size | {"do_pad": True, "do_split_image": False}
