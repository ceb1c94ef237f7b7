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
from .dataset import DenseDataset


logger = logging.getLogger(__name__)

PROBED_IMAGES = 16
RESERVE = 2  # sizes vary; memory that is never touched costs nothing


class SampleCache:
    """Decodes every sample of a data set once and keeps its pixels and its truth.

    The memory is shared with worker processes that are forked; spawned ones keep their own. Samples that no longer fit
    into it are decoded every time.

    Args:
        samples: canonical samples, of a data set that packs their truth (`DenseDataset`).
        name: data set and split, for messages.
        capacity: bytes to reserve; by default enough for all samples, judging by some of them.

    Raises:
        UserError: if all samples would take more memory than the machine has.
    """

    def __init__(self, samples: Any, name: str, capacity: int | None = None):
        self.samples, self.name, self._packed, self._unpacked = samples, name, samples.packed, samples.unpacked
        if capacity is None:
            probed = np.linspace(0, len(samples) - 1, min(len(samples), PROBED_IMAGES)).round().astype(int).tolist()
            sizes = [sum(part.size for part in self._parts(samples[index])) for index in probed]
            expected = round(len(samples) * sum(sizes) / len(probed))
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
        # bytes in use, then for every sample: height, width, bytes of truth, place + 1 (0: not there), written last
        self._index = mmap.mmap(-1, 8 + 32 * len(samples))
        self._lock = multiprocessing.Lock()

    def __reduce__(self):
        return SampleCache, (self.samples, self.name, self.capacity)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """The sample, its image as uint8 `[H, W, 3]`. The arrays are shared: change copies of them only."""
        entry = 8 + 32 * index
        height, width, extra, place = struct.unpack_from("4q", self._index, entry)
        if place:
            return self._unpacked(*self._arrays(place - 1, height, width, extra))
        image, truth = self._parts(self.samples[index])
        height, width, _ = image.shape
        place = self._reserve(image.size + truth.size)
        if place is None:
            return self._unpacked(image, truth)
        pixels, kept = self._arrays(place, height, width, truth.size)
        pixels[:], kept[:] = image, truth
        struct.pack_into("3q", self._index, entry, height, width, truth.size)
        struct.pack_into("q", self._index, entry + 24, place + 1)
        return self._unpacked(pixels, kept)

    def _parts(self, sample: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray(sample["image"]), self._packed(sample)

    def _reserve(self, size: int) -> int | None:
        with self._lock:
            (used,) = struct.unpack_from("q", self._index)
            if used + size <= self.capacity:
                struct.pack_into("q", self._index, 0, used + size)
                return used
        return None

    def _arrays(self, place: int, height: int, width: int, extra: int) -> tuple[np.ndarray, np.ndarray]:
        area = 3 * height * width
        kept = np.frombuffer(self._pixels, np.uint8, area + extra, place)
        return kept[:area].reshape(height, width, 3), kept[area:]


def keep_in_memory(dataset: DenseDataset) -> DenseDataset:
    """The same data set, whose transformed samples are decoded once."""
    return replace(dataset, cache=SampleCache(dataset, f"{dataset.name}/{dataset.split}"))
