"""How a tensor of a teacher's output lies in a store: small parts of fixed shapes, filtered and compressed.

A loader's worker unpacks bytes to parts (`unpack`), which are small and stack to batches; the device makes tensors of them
(`restore`). Nothing here depends on a batch: a row is the same whatever was packed beside it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import torch
from torch import Tensor

from ..utils.messages import UserError


Shape = tuple[int, ...]
Parts = dict[str, Tensor]
SCORE_STEP = 0.25  # of logits, at least: a finer one costs bytes, and moves no distribution by 0.01 nat
LOG_STEP = 0.125  # of log-probabilities
RELATION_STEP = 0.0625  # of relation features, in stores that have these
COMPRESSION = 9  # of zstd: a third smaller than the default's, and as fast to read
LEVELS = 127


class Codec(NamedTuple):
    """A way to keep a tensor `[C, h, w]` (or `[h, w]`).

    Attributes:
        layout: shape of the tensor -> name -> type and shape of each part.
        pack: the tensor in float32 -> its parts.
        restore: parts of a batch and the tensor's shape -> `[B, *shape]`, float32.
    """

    layout: Callable[[Shape], dict[str, tuple[Any, Shape]]]
    pack: Callable[[Tensor], Parts]
    restore: Callable[[Parts, Shape], Tensor]


def quantised(x: Tensor, least: float = 0.0) -> Parts:
    """Each channel of `[C, h, w]` in 255 even steps of at least `least` over its own range."""
    flat = x.flatten(1)
    low, high = flat.amin(1), flat.amax(1)
    step = ((high - low) / (2 * LEVELS)).clamp_min(max(least, 1e-12))
    middle = (high + low) / 2
    levels = ((x - middle[:, None, None]) / step[:, None, None]).round().clamp(-LEVELS, LEVELS)
    return {"x": levels.to(torch.int8), "step": step, "middle": middle}


def _dequantised(parts: Parts, shape: Shape) -> Tensor:
    return torch.addcmul(parts["middle"][..., None, None], parts["x"].float(), parts["step"][..., None, None])


def even(x: Tensor, step: float) -> Parts:
    """`[C, h, w]` in even steps, the same of all channels, so that weak ones cost few bits; wider ones where 127 do not reach."""
    step_ = (x.abs().amax() / LEVELS).clamp_min(step)
    return {"x": (x / step_).round().to(torch.int8), "step": step_.view(1)}


def _no_longer(x: Tensor) -> Parts:
    raise UserError("the codec principal is only read; make the store again in another folder.")


def top_classes(logits: Tensor, count: int) -> Parts:
    """The `count` largest log-probabilities of each position of `[K, h, w]`, their logsumexp, and the mean rest."""
    total = logits.logsumexp(0)
    values, ids = logits.topk(count, 0)
    found = values - total
    rest = (1 - found.exp().sum(0)).clamp_min(1e-12).log() - float(np.log(max(1, len(logits) - count)))
    return {
        "ids": ids.to(torch.int16 if len(logits) > 255 else torch.uint8),
        "x": (found / LOG_STEP).round().clamp_min(-LEVELS).to(torch.int8),
        "rest": (rest / LOG_STEP).round().clamp(-LEVELS, 0).to(torch.int8),
        "total": total.half(),
    }


def _all_classes(parts: Parts, shape: Shape) -> Tensor:
    total = parts["total"].float()[:, None]
    rest = (parts["rest"].float()[:, None] * LOG_STEP).expand(-1, *shape)
    return rest.scatter(1, parts["ids"].long(), parts["x"].float() * LOG_STEP) + total


def _bits(x: Tensor) -> Parts:
    return {"x": torch.from_numpy(np.packbits(x.bool().cpu().numpy(), axis=-1))}


def _from_bits(parts: Parts, shape: Shape) -> Tensor:
    shifts = torch.arange(7, -1, -1, device=parts["x"].device, dtype=torch.uint8)
    return ((parts["x"][..., None] >> shifts) & 1).flatten(-2)[..., : shape[-1]].float()


def _plain(dtype: Any, kind: torch.dtype) -> Codec:
    return Codec(
        lambda shape: {"x": (dtype, shape)}, lambda x: {"x": x.to(kind)}, lambda parts, shape: parts["x"].float()
    )  # fmt: skip


def _scaled(shape: Shape) -> dict[str, tuple[Any, Shape]]:
    return {"x": (np.int8, shape), "step": (np.float32, shape[:1]), "middle": (np.float32, shape[:1])}


def codec_of(name: str) -> Codec:
    """The codec of a name: `exact`, `half`, `int8`, `scores`, `bits`, `even:STEP` or `top:COUNT`; in older stores `principal:RANK`.

    Raises:
        UserError: for any other name.
    """
    kind, _, number = name.partition(":")
    if kind == "even" and is_positive(number):
        return Codec(
            lambda shape: {"x": (np.int8, shape), "step": (np.float32, (1,))},
            partial(even, step=float(number)),
            lambda parts, shape: parts["x"].float() * parts["step"][..., None, None],
        )
    if kind in ("principal", "top") and number.isdigit() and int(number):
        count = int(number)
        if kind == "principal":
            return Codec(
                lambda shape: {"x": (np.int8, (count, *shape[1:]))},
                _no_longer,
                lambda parts, shape: parts["x"].float() * RELATION_STEP,
            )

        def layout(shape: Shape) -> dict[str, tuple[Any, Shape]]:
            some, one = (count, *shape[1:]), shape[1:]
            ids = np.int16 if shape[0] > 255 else np.uint8
            return {"ids": (ids, some), "x": (np.int8, some), "rest": (np.int8, one), "total": (np.float16, one)}

        return Codec(layout, partial(top_classes, count=count), _all_classes)
    if name not in CODECS:
        raise UserError(f"{name!r} is no codec; choose one of {', '.join(CODECS)}, even:STEP, top:COUNT.")
    return CODECS[name]


def is_positive(number: str) -> bool:
    try:
        return 0 < float(number) < float("inf")
    except ValueError:
        return False


CODECS = {
    "exact": _plain(np.float32, torch.float32),
    "half": _plain(np.float16, torch.float16),
    "int8": Codec(_scaled, quantised, _dequantised),
    "scores": Codec(_scaled, partial(quantised, least=SCORE_STEP), _dequantised),
    "bits": Codec(lambda shape: {"x": (np.uint8, (*shape[:-1], -(-shape[-1] // 8)))}, _bits, _from_bits),
}


@dataclass(frozen=True)
class Column:
    """A column of a store: one tensor of the teacher's output for each view.

    Attributes:
        codec: name of its codec.
        shape: of the tensor, for one view.
    """

    codec: str
    shape: Shape

    def pack(self, x: Tensor) -> bytes:
        """Bytes of a tensor `[*shape]`.

        Raises:
            UserError: it has another shape, so views differ in size.
        """
        if tuple(x.shape) != self.shape:
            raise UserError(
                f"a view's tensor is {list(x.shape)}, that of the first view {list(self.shape)}: the views differ in size. Stores "
                "need pictures of one size: for detectors, set square_size."
            )
        codec = codec_of(self.codec)
        parts = codec.pack(x.float())
        arrays = [
            filtered(parts[name].cpu().numpy().astype(kind, copy=False)) for name, (kind, _) in self._layout.items()
        ]
        content = b"".join(array.tobytes() for array in arrays)
        return pyarrow.Codec("zstd", compression_level=COMPRESSION).compress(content, asbytes=True)

    def unpack(self, stored: bytes) -> Parts:
        """The parts that `pack` has made."""
        sizes = [int(np.dtype(kind).itemsize * np.prod(shape)) for kind, shape in self._layout.values()]
        content = pyarrow.decompress(stored, sum(sizes), codec="zstd", asbytes=True)
        parts, place = {}, 0
        for (name, (kind, shape)), size in zip(self._layout.items(), sizes, strict=True):
            array = np.frombuffer(content, kind, count=size // np.dtype(kind).itemsize, offset=place).reshape(shape)
            parts[name], place = torch.from_numpy(unfiltered(array)), place + size
        return parts

    def restore(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The tensors `[B, *shape]` of a batch's parts, float32, on the parts' device."""
        return codec_of(self.codec).restore(dict(parts), self.shape)

    def kept(self, x: Tensor) -> Tensor:
        """What comes back of a tensor `[*shape]`."""
        parts = self.unpack(self.pack(x))
        return self.restore({name: part[None] for name, part in parts.items()})[0]

    @property
    def _layout(self) -> dict[str, tuple[Any, Shape]]:
        return codec_of(self.codec).layout(self.shape)


def filtered(array: np.ndarray) -> np.ndarray:
    """Bytes of maps as differences to their left neighbours, modulo 256, which compress better; all else as it is."""
    if array.itemsize > 1 or array.ndim < 2:
        return array
    bytes_ = array.view(np.uint8)
    return np.concatenate([bytes_[..., :1], bytes_[..., 1:] - bytes_[..., :-1]], axis=-1).view(array.dtype)


def unfiltered(array: np.ndarray) -> np.ndarray:
    """What `filtered` was given, in memory of its own."""
    if array.itemsize > 1 or array.ndim < 2:
        return array.copy()
    return np.add.accumulate(array.view(np.uint8), axis=-1, dtype=np.uint8).view(array.dtype)
