"""The pictures of a report; each says how many seeds it shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .statistics import Interval


def intervals(path: Path, iqm: dict[str, dict[str, Interval]], unit: str, shown: str) -> None:
    """
    :param path: PNG
    :param iqm: by kind of score, by arm
    :param unit: of the scores
    :param shown: how many seeds, games and steps
    """
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(iqm), figsize=(11, 1.4 + 0.4 * len(next(iter(iqm.values())))), sharey=True)
    for axis, (kind, by_arm) in zip(np.atleast_1d(axes), iqm.items(), strict=True):
        for row, (_, found) in enumerate(reversed(by_arm.items())):
            if not np.isnan(found.low):
                axis.barh(row, found.high - found.low, left=found.low, height=0.6, alpha=0.5)
            axis.plot([found.value] * 2, [row - 0.3, row + 0.3], color="black")
        axis.set_yticks(range(len(by_arm)), [*reversed(by_arm)])
        axis.set(title=kind, xlabel=f"IQM of the {unit}")
        axis.xaxis.label.set_size(8)
        axis.use_sticky_edges = False  # a bar would end at the edge of the picture, as if it went on
        axis.autoscale_view()
        axis.grid(axis="x", alpha=0.3)
    _save(plt, figure, path, f"{shown}; bars: 95 % stratified bootstrap")


def curves(
    path: Path, x: dict[str, Sequence[float]], by_arm: dict[str, list[Interval]], labels: Any, shown: str
) -> None:
    """
    :param path: PNG
    :param x: where each arm was evaluated
    :param by_arm: its IQM there
    :param labels: of both axes
    :param shown: how many seeds, games and steps
    """
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(8, 4.5))
    for arm, found in by_arm.items():
        (line,) = axis.plot(x[arm], [point.value for point in found], marker=".", label=arm)
        axis.fill_between(
            x[arm], [point.low for point in found], [point.high for point in found], alpha=0.2, color=line.get_color()
        )
    axis.set(xlabel=labels[0], ylabel=labels[1])
    axis.yaxis.label.set_size(8)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    _save(plt, figure, path, shown)


def _save(plt: Any, figure: Any, path: Path, title: str) -> None:
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
