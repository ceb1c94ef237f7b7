"""What a trainer knows of its run, for the card of its student."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer

from ..adapters import DenseAdapter
from ..card.model_card import write_card
from ..card.provenance import Origin
from ..data import DenseDataset, DenseDatasets, DenseStream


if TYPE_CHECKING:
    from .trainer import BCDTrainer


def write_run_card(
    trainer: "BCDTrainer",
    models: Mapping[str, DenseAdapter],
    results: Mapping[str, Any],
    data: DenseDatasets,
    figures: list[str],
    origin: Origin | None = None,
) -> None:
    """Writes README.md beside a student with the scores and pictures of its run."""
    folder = Path(trainer.args.output_dir or ".")
    write_card(folder, trainer, {name: one.model for name, one in models.items()}, results, data, figures, origin)
    trainer.has_card = True


def write_training_card(trainer: "BCDTrainer") -> None:
    """Writes README.md beside a student that no run has reported: its training, without scores."""
    data: Any = getattr(trainer.train_dataset, "dataset", None)
    if not isinstance(data, DenseDataset | DenseStream):
        distiller, trainer.model = trainer.model, trainer.student  # type: ignore[assignment]
        try:  # of tensors from elsewhere nothing is known; the base class describes a model of transformers
            Trainer.create_model_card(trainer)
        finally:
            trainer.model = distiller
        return
    models = {"student": trainer.distiller.student}
    if trainer.teacher is not None:
        models["teacher"] = trainer.teacher.adapter
    write_run_card(trainer, models, {}, DenseDatasets({"train": data}), [])
    trainer.has_card = False  # a later report knows more
