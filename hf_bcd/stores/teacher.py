"""A store in the place of the teacher that made it."""

import copy
import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..adapters.base import DenseAdapter
from ..adapters.label_matching import LabelMap
from ..adapters.loading import empty_adapter
from ..losses import DistillationCriterion
from ..losses.criterion import teacher_of
from ..outputs import DenseOutput, Targets
from ..utils.messages import UserError
from .needs import check_storable, queries_from
from .store import STATE_FILE, Store, prefix_of


class StoredTeacher:
    """A store in the place of the teacher that made it.

    Args:
        store: with the teacher's outputs.
        name: of the teacher, where there are several.

    Raises:
        UserError: the store is of several teachers.

    Attributes:
        adapter: the teacher without weights, which says of it what the teacher would.
        label_map: from the teacher's classes to the student's; None for a teacher of features only.
    """

    def __init__(self, store: Store, name: str = "") -> None:
        self.store, self.name = store, name
        if "" not in store.parts:
            raise UserError(f"{store.source} has the teachers {', '.join(store.teachers)}; choose one of its `parts`.")
        made = store.content["teacher"]
        self.adapter: DenseAdapter = empty_adapter(
            made["config"], made["class"], made["repo_id"], made["revision"], store.content["task"]
        )
        classes = dict(enumerate(store.content["classes"]))
        self.label_map: LabelMap | None = (
            self.adapter.match(classes, made["synonyms"]) if made["has_classes"] else None
        )

    @property
    def fingerprint(self) -> int:
        """Tells this teacher from others."""
        return self.store.content["teacher"]["fingerprint"]

    def check(self, criterion: DistillationCriterion) -> None:
        """Gives this teacher's own criterion what the store keeps for it, and refuses losses that it does not serve.

        Raises:
            UserError: a loss needs the teacher itself, or has other options than the store was made for.
        """
        check_storable(criterion.by_name().items())
        path = self.store.folder / STATE_FILE
        state = load_file(path) if path.is_file() else {}
        for name, loss in criterion.by_name().items():
            if not loss.digested:
                continue
            made, wanted = self.store.content["losses"].get(name), json.loads(json.dumps(loss.digested))
            if made is None or made != {key: wanted.get(key) for key in made}:  # an older store names fewer
                there = "was made without it" if made is None else f"has it with {made}"
                raise UserError(
                    f"loss {name!r} has the options {wanted}, but the stored teacher {self.store.source} {there}. Use these "
                    "options, or make another store."
                )
            prefix = f"{prefix_of(self.store.teacher)}{name}."
            own = {key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)}
            loss.load_state_dict(own, strict=False)

    @torch.no_grad()
    def tensors(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The columns of the store for a training batch, on its device."""
        return {name: self.store.columns[name].restore(parts) for name, parts in batch["stored"][self.name].items()}

    def for_batch(self, batch: Mapping[str, Any], pixel_mask: Tensor | None = None) -> DenseOutput:
        """The teacher's output for a training batch, on its device."""
        tensors = self.tensors(batch)
        digest = {
            name: x
            for name, x in tensors.items()
            if name.partition("/")[0] not in ("logits", "features", "pyramid", "queries")
        }
        levels = {
            kind: _Levels(
                {name.partition("/")[2]: x for name, x in tensors.items() if name.startswith(f"{kind}/")},
                self.store.source,
            )
            for kind in ("features", "pyramid")
        }
        return DenseOutput(logits=tensors.get("logits"), queries=queries_from(tensors), digest=digest, **levels)  # type: ignore[arg-type]

    def check_levels(
        self, criterion: DistillationCriterion, student: DenseOutput, batch: Mapping[str, Any], targets: Targets
    ) -> None:
        """Computes the losses of a batch once and forgets them; a `UserError` names a level that one reads and the store lacks."""
        teacher = self.for_batch(batch, targets.pixel_mask)
        for name, loss in copy.deepcopy(criterion).by_name().items():
            if teacher_of(name) == self.name and "features" in loss.needs and not loss.digested:
                loss(criterion.seen_by(name, student), criterion.seen_by(name, teacher), targets)

    def answers(self, pixel_values: Tensor) -> None:
        """None: what it found was used when the store was made."""


class _Levels(dict[str, Tensor]):
    def __init__(self, levels: Mapping[str, Tensor], source: str) -> None:
        super().__init__(levels)
        self.source = source

    def __missing__(self, name: str) -> Tensor:
        raise UserError(
            f"the stored teacher {self.source} has no level {name!r}, only {', '.join(self) or 'none'}. Make it again with these "
            "losses, or with --columns."
        )
