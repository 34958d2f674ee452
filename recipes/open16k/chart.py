"""Draw what Table 2 has measured so far: ../unasdiff/results/table2/methods.svg, of the numbers in its README.

Run: python recipes/open16k/chart.py
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from scores import HERE, TASKS, measured

from audiosep import recipe

FOLDER = HERE.parent / "unasdiff"
# Methods of the paper that have another name here.
NAMES = {"hybrid, 37 M": "hybrid, published", **{f"{name}, 37 M": name for name in ("DSG", "DPS", "analytical")}}
OURS, OTHERS, ORACLES, PUBLISHED = "#a3245f", "#2a78b5", "#888888", "#555555"
SCORE = "si_sdr_permuted"


def order(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Methods by their mean over all tasks, the best last; what was not run on all of them comes first."""
    means: dict[str, list[float]] = {}
    for found in tasks.values():
        for name, row in found.items():
            means.setdefault(name, []).append(row[SCORE]["mean"])
    return sorted(means, key=lambda name: (len(means[name]), np.mean(means[name])))


def panel(axis: Axes, names: list[str], found: Mapping[str, Any], published: Mapping[str, float]) -> None:
    """One task: means with their intervals, and the paper's figure of the same method as a diamond."""
    for y, name in enumerate(names):
        if name in found:
            mean, ends = found[name][SCORE]["mean"], found[name][SCORE]["interval"]
            colour = OURS if name == "default" else ORACLES if found[name]["oracle"] else OTHERS
            axis.plot(ends, [y, y], color=colour, alpha=0.45, linewidth=3)
            axis.plot(mean, y, "o", color=colour)
        if name in published:
            axis.plot(published[name], y, "D", markerfacecolor="none", markeredgecolor=PUBLISHED)
    axis.axvline(0, color="#cccccc", zorder=0)
    axis.spines[["top", "right"]].set_visible(False)


def paper(task: str) -> dict[str, float]:
    """The paper's figures of a task, by our names of the methods."""
    table = recipe.load(FOLDER / "table2.toml")["published"]
    return {NAMES.get(name, name): row[task][SCORE] for name, row in table.items() if task in row}


def main() -> None:
    """Write the picture."""
    tasks = {task: found for task in TASKS if (found := measured(task))}
    names = order(tasks)
    names = [name for name in paper(next(iter(tasks))) if name not in names] + names  # not run here
    oracles = {name for found in tasks.values() for name, row in found.items() if row["oracle"]}
    with mpl.rc_context({"svg.hashsalt": "audiosep", "svg.fonttype": "none", "font.size": 9}):
        figure, axes = plt.subplots(1, len(tasks), sharey=True, figsize=(12, 4.2), layout="constrained")
        for axis, (task, found) in zip(axes, tasks.items()):
            panel(axis, names, found, paper(task))
            axis.set_title(f"{TASKS[task]}, {next(iter(found.values()))['count']} mixtures", fontsize=9)
        axes[0].set_yticks(range(len(names)), [f"{name} (oracle)" if name in oracles else name for name in names])
        figure.supxlabel("SI-SDR in dB, best order, 95 % interval; diamonds: published, see the text", fontsize=9)
        figure.savefig(FOLDER / "results/table2/methods.svg", metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
