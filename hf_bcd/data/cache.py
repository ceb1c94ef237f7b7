"""Decoded samples kept in memory, once for all loader workers."""

import logging
import mmap
import multiprocessing
import os
import struct
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..utils.messages import UserError
from .dataset import DenseDataset, Samples


logger = logging.getLogger(__name__)

PROBED_IMAGES = 16
RESERVE = 2  # sizes vary; memory that is never touched costs nothing


class SampleCache:
    """Decodes every sample of a data set once and keeps its pixels, four bytes each with the label.

    The memory is shared with worker processes that are forked; spawned ones keep their own. Samples that no longer fit
    into it are decoded every time.

    Args:
        samples: canonical samples.
        name: data set and split, for messages.
        capacity: bytes to reserve; by default enough for all samples, judging by some of them.

    Raises:
        UserError: if all samples would take more memory than the machine has.
    """

    def __init__(self, samples: Samples, name: str, capacity: int | None = None):
        self.samples, self.name = samples, name
        if capacity is None:
            probed = np.linspace(0, len(samples) - 1, min(len(samples), PROBED_IMAGES)).round().astype(int).tolist()
            expected = round(len(samples) * sum(4 * samples[index]["label"].size for index in probed) / len(probed))
            physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            if expected > physical:
                raise UserError(
                    f"{name}: {len(samples)} decoded images would take about {expected / 2**30:.1f} GiB, more than this "
                    f"machine's {physical / 2**30:.1f} GiB. Leave --cache_images out."
                )
            gib = expected / 2**30
            logger.warning("%s: %d decoded images will take about %.2f GiB of memory.", name, len(samples), gib)
            capacity = RESERVE * expected
        self.capacity, self._pixels = capacity, mmap.mmap(-1, max(capacity, 1))
        # bytes in use, then for every sample: height, width, place + 1 (0: not there), which is written last
        self._index = mmap.mmap(-1, 8 + 24 * len(samples))
        self._lock = multiprocessing.Lock()

    def __reduce__(self):
        return SampleCache, (self.samples, self.name, self.capacity)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """The sample, its image as uint8 `[H, W, 3]`. The arrays are shared: change copies of them only."""
        entry = 8 + 24 * index
        height, width, place = struct.unpack_from("3q", self._index, entry)
        if place:
            return self._arrays(place - 1, height, width)
        sample = self.samples[index]
        image, label = np.asarray(sample["image"]), sample["label"]
        place = self._reserve(image.size + label.size)
        if place is None:
            return {"image": image, "label": label}
        kept = self._arrays(place, *label.shape)
        kept["image"][:], kept["label"][:] = image, label
        struct.pack_into("2q", self._index, entry, *label.shape)
        struct.pack_into("q", self._index, entry + 16, place + 1)
        return kept

    def _reserve(self, size: int) -> int | None:
        with self._lock:
            (used,) = struct.unpack_from("q", self._index)
            if used + size <= self.capacity:
                struct.pack_into("q", self._index, 0, used + size)
                return used
        return None

    def _arrays(self, place: int, height: int, width: int) -> dict[str, np.ndarray]:
        area = height * width
        pixels = np.frombuffer(self._pixels, np.uint8, 4 * area, place)
        image, label = pixels[: 3 * area], pixels[3 * area :]
        return {"image": image.reshape(height, width, 3), "label": label.reshape(height, width)}


def keep_in_memory(dataset: DenseDataset) -> DenseDataset:
    """The same data set, whose transformed samples are decoded once."""
    return replace(dataset, cache=SampleCache(dataset, f"{dataset.name}/{dataset.split}"))
