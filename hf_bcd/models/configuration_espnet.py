"""Configuration of `EspNetForSemanticSegmentation`."""

from dataclasses import field

from transformers import PreTrainedConfig


class EspNetConfig(PreTrainedConfig):
    """Depth, output and input statistics of an ESPNet; its widths are fixed.

    The defaults are the largest network of the publication (alpha_2 = 2, alpha_3 = 8): 363,462 parameters for the 19
    classes of Cityscapes (published: 0.364 M), 349,193 without the decoder (0.349 M).

    Args:
        p: efficient spatial pyramid modules at stride 4, beside the one that halves the resolution.
        q: such modules at stride 8, likewise.
        decoder: refine the class scores up to the input size (ESPNet). Without (ESPNet-C) they stay at stride 8. The
            decoder is as wide as there are classes: it adds 14,269 parameters for 19 of them, 569,850 for 150.
        image_mean: mean per RGB channel of images in [0, 1].
        image_std: standard deviation, likewise.
        semantic_loss_ignore_index: label of the pixels left out of the loss.
        kwargs: the common fields, `num_labels` or `id2label` and `label2id` among them.

    Raises:
        ValueError: a depth is no integer of at least 1.
    """

    model_type = "espnet"

    p: int = 2
    q: int = 8
    decoder: bool = True
    image_mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    image_std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    semantic_loss_ignore_index: int = 255

    def __post_init__(self, **kwargs):
        for name in ("p", "q"):
            depth = getattr(self, name)
            if type(depth) is not int or depth < 1:
                raise ValueError(f"{name} is {depth!r}; it must be an integer of at least 1")
        super().__post_init__(**kwargs)
