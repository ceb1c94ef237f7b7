"""The report of a study: every number as CSV, means with paired differences as Markdown, and plots."""

import csv
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..tasks import TASKS, Score, Task
from ..tasks.semantic_segmentation import SemanticSegmentation
from ..utils.files import write_text
from ..utils.messages import UserError
from .study import Study
from .study_figure import FIGURE


logger = logging.getLogger(__name__)

# two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom
T_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
)  # fmt: skip
Results = Mapping[str, Mapping[int, Mapping[str, Any]]]


def collect(study: Study) -> dict[str, dict[int, dict[str, Any]]]:
    """Results of the finished runs: name -> seed -> what `study.json` holds; runs of another recipe are left out."""
    results: dict[str, dict[int, dict[str, Any]]] = {}
    for run in study.runs:
        try:
            result = run.result()
        except ValueError as error:  # of another recipe
            logger.warning("left out of the report: %s", error)
            continue
        if result is not None:
            results.setdefault(run.name, {})[run.seed] = result
    return results


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation of a sample, NaN left out; NaN for none, no deviation for a single value."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return math.nan, None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def paired_difference(
    values: Mapping[int, float], reference: Mapping[int, float]
) -> tuple[float, float | None] | None:
    """Mean difference to the reference over common seeds, if any, and half of its 95 % interval (Student's t), if several."""
    pairs = [(value, reference[seed]) for seed, value in values.items() if seed in reference]
    differences = [own - other for own, other in pairs if math.isfinite(own - other)]
    if not differences:
        return None
    mean, deviation = mean_and_deviation(differences)
    if deviation is None:
        return mean, None
    degrees = len(differences) - 1
    quantile = T_QUANTILES[degrees - 1] if degrees <= len(T_QUANTILES) else 1.96 + 2.5 / degrees
    return mean, quantile * deviation / math.sqrt(len(differences))


def write_csv(results: Results, path: Path) -> None:
    """One row a run and seed, with every scalar score."""
    metrics = list(dict.fromkeys(key for seeds in results.values() for one in seeds.values() for key in _scalars(one)))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "seed", "split", "steps", "train_seconds", *metrics])
        for name, seeds in results.items():
            for seed, one in sorted(seeds.items()):
                values = [_scalars(one).get(metric, "") for metric in metrics]
                writer.writerow([name, seed, one["split"], one["steps"], one["train_seconds"], *values])


def score_table(results: Results, task: Task) -> str:
    """Means and deviations over seeds as Markdown; the teachers' scores come first."""
    header = ["run", "seeds", *(score.title for score in task.headline), "minutes"]
    rows = []
    for number, scores in _teachers(results):
        cells = [score.text(scores[score.key]) for score in task.headline]
        rows.append([f"teacher {number}" if number else "teacher", "", *cells, ""])
    for name, seeds in results.items():
        cells = []
        for score in task.headline:
            mean, deviation = mean_and_deviation([one["scores"][score.key] for one in seeds.values()])
            cells.append(score.text(mean) + ("" if deviation is None else f" ± {score.text(deviation)}"))
        minutes = statistics.fmean([one["train_seconds"] for one in seeds.values()]) / 60
        rows.append([name, str(len(seeds)), *cells, f"{minutes:.1f}"])
    return _markdown(header, rows)


def difference_table(results: Results, references: Mapping[str, str], task: Task) -> str:
    """Each run's difference to its reference, paired by seed, with 95 % intervals, as Markdown.

    `references` has the name of a run -> name of the run that it is compared with.
    """
    rows, paired = [], [score for score in task.scores if score.paired]
    for name, seeds in results.items():
        reference = results.get(references[name], {})
        if name == references[name] or not set(seeds) & set(reference):
            continue
        cells = []
        for score in paired:
            own, other = ({seed: one["scores"][score.key] for seed, one in x.items()} for x in (seeds, reference))
            cells.append(_interval(paired_difference(own, other), score))
        rows.append([f"{name} − {references[name]}", str(len(set(seeds) & set(reference))), *cells])
    return _markdown(["difference", "seeds", *(score.title for score in paired)], rows) if rows else ""


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    filled = [any(cells) for cells in zip(*rows, strict=True)]  # sizes or kinds that the data lack are left out
    header, *rows = ([cell for cell, kept in zip(line, filled, strict=True) if kept] for line in (header, *rows))
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _teachers(results: Results) -> list[tuple[int, Mapping[str, Any]]]:
    """The distinct teachers' scores, numbered from 1 where there are several."""
    distinct: list[Mapping[str, Any]] = []
    for seeds in results.values():
        for one in seeds.values():
            for scores in (one["teacher"], *one.get("more_teachers", [])):
                if scores and scores not in distinct:
                    distinct.append(scores)
    return [(number if len(distinct) > 1 else 0, scores) for number, scores in enumerate(distinct, 1)]


def _interval(difference: tuple[float, float | None] | None, score: Score) -> str:
    if difference is None:
        return ""
    (mean, half), scale = difference, score.scale
    text = f"{scale * mean:+.2f}"
    return text if half is None else f"{text} [{scale * (mean - half):+.2f}, {scale * (mean + half):+.2f}]"


def _scalars(result: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in result["scores"].items() if isinstance(value, int | float)}


def write_study_report(study: Study) -> str:
    """Writes results.csv, results.md, results.png and, where runs were evaluated meanwhile, curves.png.

    Returns:
        The Markdown tables.

    Raises:
        UserError: if no run is finished.
    """
    results = collect(study)
    if not results:
        raise UserError(f"no run of the study in {study.folder} is finished.")
    write_csv(results, study.folder / "results.csv")
    first = next(iter(next(iter(results.values())).values()))
    task = TASKS[first.get("task", SemanticSegmentation.name)]  # results of earlier versions name none
    references = {run.name: run.reference for run in study.runs}
    tables = [score_table(results, task), difference_table(results, references, task)]
    text = "\n\n".join(filter(None, tables))
    finished = sum(map(len, results.values()))
    figure = (
        f"\n![Students side by side]({FIGURE})\n\n*The pictures of the first seed on which {task.scores[0].title} gains most over "
        "the reference as a mean over the runs, and then those on which it loses most, with the errors of each student.*\n"
        if (study.folder / FIGURE).is_file()
        else ""
    )
    write_text(
        study.folder / "results.md",
        f"# {study.name}\n\n{text}\n\n"
        f"{finished} of {len(study.runs)} runs. Scores on the {first['images']} images of the split `{first['split']}`, in "
        "percent where they are fractions; mean ± standard deviation over seeds. Differences are paired by seed, with their 95 % "
        "intervals (Student's t). Minutes are of training only.\n" + figure,
    )
    plot_scores(results, study.folder / "results.png", task)
    if any(one["curve"] for seeds in results.values() for one in seeds.values()):
        plot_curves(results, study.folder / "curves.png", task)
    return text


def plot_scores(results: Results, path: Path, task: Task) -> None:
    """A row of dots (one a seed) and a bar at their mean for every run, in one panel a metric."""
    from matplotlib.figure import Figure

    names = list(results)
    figure = Figure(figsize=(9, 1.2 + 0.3 * len(names)), layout="constrained")
    plotted = [score for score in task.scores if score.plotted]
    panels = figure.subplots(1, len(plotted), sharey=True)
    for axes, score in zip(panels, plotted, strict=True):
        for row, name in enumerate(names):
            values = [score.scale * one["scores"][score.key] for one in results[name].values()]
            axes.plot(values, [row] * len(values), "o", color=f"C{row % 10}", alpha=0.6, markersize=5)
            axes.plot(mean_and_deviation(values)[0], row, "|", color="black", markersize=14)
        for _, scores in _teachers(results):
            axes.axvline(score.scale * scores[score.key], color="grey", linestyle=":")
        axes.set(xlabel=score.label)
        axes.grid(alpha=0.3, axis="x")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=150)


def plot_curves(results: Results, path: Path, task: Task) -> None:
    """The first score on the validation split of every run, mean over seeds, over optimizer steps and over seconds of training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels, best = figure.subplots(1, 2, sharey=True), task.scores[0]
    for axes, key, label in zip(panels, ("step", "seconds"), ("optimizer step", "seconds of training"), strict=True):
        for number, (name, seeds) in enumerate(results.items()):
            curves = [one["curve"] for one in seeds.values() if one["curve"]]
            points = list(zip(*curves, strict=False))  # seeds share their steps
            x = [statistics.fmean(entry[key] for entry in point) for point in points]
            y = [best.scale * statistics.fmean(entry[best.key] for entry in point) for point in points]
            style = ("-", "--", ":", "-.")[number // 10 % 4]  # there are ten colours
            axes.plot(x, y, linestyle=style, label=name)
        axes.set(xlabel=label)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"validation {best.label}")
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=7)
    figure.savefig(path, dpi=150)
