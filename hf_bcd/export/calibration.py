"""Pictures that find the scales of int8."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Calibration:
    """Pictures as a model gets them, read anew whenever they are gone through, so that memory holds one of them.

    Attributes:
        read: gives normalised float32 pictures `[1, 3, H, W]` of any sizes.
        number: of them.
        source: where they are from, in words.
        size: height and width to resize them to; None leaves them as they are.
    """

    read: Callable[[], Iterable[Tensor]]
    number: int
    source: str
    size: tuple[int, int] | None = None

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[Tensor]:
        for picture in self.read():
            if self.size is not None and tuple(picture.shape[-2:]) != self.size:
                picture = F.interpolate(picture, self.size, mode="bilinear", align_corners=False, antialias=True)
            yield picture

    def at(self, size: tuple[int, int] | None) -> "Calibration":
        """The same pictures at another size."""
        return replace(self, size=size)
