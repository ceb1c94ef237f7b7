"""The samples of a training split with what a store keeps of the teachers for each, and their batches."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..data.dataset import TransformedDataset
from ..utils.messages import UserError
from .codecs import Parts
from .store import Store, fingerprint


class StoredViews(TransformedDataset):
    """Transformed samples of the views that a store knows: epoch e shows view e modulo their number.

    Args:
        dataset: samples in canonical form.
        transform: as `TransformedDataset` has it; its seed is the stores'.
        stores: of this split, by the names of their teachers ("" for a single one).

    Raises:
        UserError: two stores have different seeds or numbers of views.
    """

    def __init__(self, dataset: Any, transform: Callable[..., Any], stores: Mapping[str, Store]) -> None:
        first, *others = stores.values()
        for other in others:
            for what, ours, theirs in (("seed", first.seed, other.seed), ("views", first.views, other.views)):
                if ours != theirs:
                    raise UserError(
                        f"the stored teachers {first.source} and {other.source} are of different views: {what} is {ours} there and "
                        f"{theirs} here. Make one of them again with the other's --seed and --views."
                    )
        super().__init__(dataset, transform, first.seed, getattr(dataset, "cache", None))
        self.stores, self.views = dict(stores), first.views

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch % self.views)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The sample, with the parts of each teacher's output for it under `stored`."""
        return self.stored_view(index, int(self._epoch))

    def stored_view(self, index: int, number: int) -> dict[str, Any]:
        """As `[index]`, of the view with a number."""
        sample = self.view(index, number)
        view = sample["index"], number, fingerprint(sample["pixel_values"])
        return {**sample, "stored": {name: store.read(*view) for name, store in self.stores.items()}}


def with_stored(collate: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """A task's collate that stacks what is stored of the teachers, too."""
    return _Collate(collate)


class _Collate:  # a class, because loader workers may be spawned
    def __init__(self, collate: Callable[..., dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = self.collate([{key: sample[key] for key in sample if key != "stored"} for sample in samples])
        stored = [sample["stored"] for sample in samples if "stored" in sample]
        if stored:
            batch["stored"] = {teacher: _stacked([one[teacher] for one in stored]) for teacher in stored[0]}
        return batch


def _stacked(rows: Sequence[Mapping[str, Parts]]) -> dict[str, Parts]:
    return {
        name: {part: torch.stack([row[name][part] for row in rows]) for part in parts}
        for name, parts in rows[0].items()
    }
