"""The plot of the context loss: time and memory over the number of positions."""

from pathlib import Path
from typing import Any


def plot_relation(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws time and memory of one image for every implementation that was measured.

    Args:
        rows: those of `relation_rows`; others are passed over.
        path: PNG file to write.
    """
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.get("batch") == 1 and "positions" in row]
    names = list(dict.fromkeys(key for row in rows for key, value in row.items() if isinstance(value, dict)))
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    for name in names:
        measured = [(row["positions"], row[name]) for row in rows if name in row]
        sizes = [size for size, _ in measured]
        time_axes.plot(sizes, [values["median"] for _, values in measured], marker="o", label=name)
        if all(values["peak_bytes"] is not None for _, values in measured):
            memory = [max(values["peak_bytes"], 2**20) / 2**20 for _, values in measured]
            memory_axes.plot(sizes, memory, marker="o", label=name)
    time_axes.plot(
        [row["positions"] for row in rows], [row["floor_seconds"] for row in rows], "k:", label="matrix products alone"
    )
    for axes, label in ((time_axes, "seconds, forward + backward"), (memory_axes, "MiB beyond the inputs")):
        axes.set(xscale="log", yscale="log", xlabel="positions n of one image", ylabel=label)
        axes.set_xticks([row["positions"] for row in rows], [f"{row['positions']:,}" for row in rows], fontsize=7)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    time_axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
