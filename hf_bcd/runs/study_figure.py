"""What the students of a study say of the same pictures: those that distillation helps most, and those that it harms most."""

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np

from ..adapters.loading import load_adapter
from ..tasks import task_of
from ..training.evaluation import moved, on_cpu, predict_batch
from ..utils.text import shortened
from .arguments import build_arguments
from .experiment import final_split, load_data
from .report import shown_to
from .study import RESULT_FILE, Run, Study


logger = logging.getLogger(__name__)

FIGURE = "methods.png"
LOOKED_AT = 48  # pictures, spread over the split
SHOWN = 2  # of the most helped ones, and of the most harmed ones


def write_methods_figure(study: Study) -> Path | None:
    """Draws the finished students of the first seed side by side, with the errors of each, if there are two or more.

    Of pictures spread over the split, it shows those where the students' first score, as a mean, is most above that of the
    runs that they are compared with, and those where it is most below; of equal ones the first. A figure that cannot be
    drawn is a warning: the study stands.

    Returns:
        The PNG file, which stays as it is while no run is newer.
    """
    runs = [run for run in study.runs if run.seed == study.runs[0].seed and (run.folder / RESULT_FILE).is_file()]
    path = study.folder / FIGURE
    if len(runs) < 2:
        return None
    if path.is_file() and path.stat().st_mtime > max((run.folder / RESULT_FILE).stat().st_mtime for run in runs):
        return path
    try:
        return draw_methods(study, runs, path)
    except Exception as error:  # whatever a model or a picture does to a figure, the study stands
        logger.warning("no %s, because it failed: %s", FIGURE, shortened(f"{type(error).__name__}: {error}"))
        return None


def draw_methods(study: Study, runs: list[Run], path: Path) -> Path:
    """As `write_methods_figure`, of these runs, which have one data set."""
    _, data_args, config = build_arguments(runs[0].arguments)
    data = load_data(data_args)
    split = data[study.split or final_split(data) or ""]
    task, best = task_of(split), task_of(split).scores[0]
    indices = sorted({index * len(split) // LOOKED_AT for index in range(LOOKED_AT)})
    predictions: dict[str, list[Any]] = {}
    scores: dict[str, list[float]] = {}
    for run in runs:
        model = load_adapter(str(run.folder), task=task.name).to(config.device).eval()
        shown = shown_to(model, split, config)
        predictions[run.name], scores[run.name] = [], []
        for index in indices:
            batch = {name: moved(value, config) for name, value in task.collate([shown[index]]).items()}
            (prediction,), metric = predict_batch(model, task, batch), task.metric(split.num_labels)
            task.score(metric, [prediction], batch)
            predictions[run.name].append(on_cpu(prediction))
            scores[run.name].append(metric.compute()[best.key])
    gains = [
        np.subtract(scores[run.name], scores[run.reference])
        for run in runs
        if run.name != run.reference and run.reference in scores
    ] or [np.subtract(scores[runs[-1].name], scores[runs[0].name])]
    gain = (1 if best.higher_is_better else -1) * np.mean(gains, axis=0)
    order = [int(place) for place in np.argsort(-gain, kind="stable") if math.isfinite(gain[place])]
    chosen = list(dict.fromkeys([*order[:SHOWN], *order[-SHOWN:]]))
    samples = [
        {**split[indices[place]], "predictions": {name: found[place] for name, found in predictions.items()}}
        for place in chosen
    ]
    task.comparison(samples, split.id2label, path, errors=list(predictions))
    return path
