"""Masked generative distillation (Yang et al., ECCV 2022, https://arxiv.org/abs/2205.01529)."""

from collections.abc import Callable

from torch import Tensor, nn

from ..outputs import DenseOutput, Targets
from ..utils.messages import UserError
from .base import DistillationLoss, Pair
from .modules.connectors import FeaturePair
from .modules.noise import SharedNoise
from .ops.functional import full_precision, mean_squared_error, on_teacher_grid, spatial_size


@full_precision
def mgd_loss(
    student: Tensor, teacher: Tensor, generate: Callable[[Tensor], Tensor], *, keep: Tensor, mask: Tensor | None = None
) -> Tensor:
    """The teacher's full features are generated from some positions of the student's.

    `mean over images and valid positions of ‖G(M · s) - t‖²`, the norm over channels.

    Args:
        student: features `[B, C, h, w]`, projected to the teacher's channels.
        teacher: features `[B, C, h', w']`, to whose grid the student's are resized; they receive no gradient.
        generate: G, from `[B, C, h', w']` to the same shape.
        keep: M, boolean `[h', w']` or `[B, h', w']`, True where G sees the student.
        mask: `[B, h', w']`, True where valid; G sees zeros elsewhere.

    Returns:
        Scalar >= 0; float32 or float64.
    """
    student, teacher, mask = on_teacher_grid(student, teacher, mask)
    generated = generate(student.masked_fill(~(keep & mask)[:, None], 0))
    return teacher.shape[1] * mean_squared_error(generated, teacher, mask)


class MGDLoss(DistillationLoss):
    """`mgd_loss` on one feature level, behind a trained 1x1 convolution on the student's; 3x3-ReLU-3x3 generates.

    The official weight for segmentation is 2e-5 on the sum over positions and channels of an image: 0.082 on the mean
    over positions at the official 64 x 64 of them (512 x 512 pixels at stride 8). That suits features of about unit
    size; on larger ones, such as MobileNetV2's linear bottlenecks, the generator diverges at a learning rate of 0.01,
    so the default is 0.005. The official configuration adds `{cwd: {weight: 3, temperature: 4}}` on the logits. The mask
    is the same for all images of a step.

    The generator has 18 C² parameters, C being the teacher's channels: 75 million for 2,048.

    Args:
        masked: expected fraction of positions that the generator does not see, in [0, 1); 0.75 as in the official code.
        level: level name; the coarsest that both models have by default.
    """

    weights = {"mgd": 0.005}
    needs = frozenset({"features"})
    transfers = "features of each position, generated from other positions"
    checked = (
        "official code for segmentation: same mask ratio, generator and reduction, weight 0.005 for the official 0.082; one "
        "mask for all images, a trained 1x1 also where channels agree; void pixels left out"
    )
    reference = "yang2022masked"

    def __init__(self, pair: Pair, *, masked: float = 0.75, level: str | None = None) -> None:
        super().__init__(pair)
        if not 0 <= masked < 1:
            raise UserError(f"masked is {masked!r}; it must be in [0, 1).")
        self.masked = masked
        self.pair = FeaturePair(pair, level)
        channels = self.pair.channels
        self.generator = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
        )
        self.noise = SharedNoise(pair.seed)

    def forward(self, student: DenseOutput, teacher: DenseOutput, targets: Targets) -> dict[str, Tensor]:
        ours, theirs = self.pair(student.features, teacher.features)
        size = spatial_size(theirs)
        keep = self.noise.draw(*size) >= self.masked
        return {"mgd": mgd_loss(ours, theirs, self.generator, keep=keep, mask=targets.valid(size))}

    def after_step(self) -> None:
        self.noise.advance()
