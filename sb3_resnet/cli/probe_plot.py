"""The picture of ``sb3-resnet probe``: a cell for each combination and label."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from sb3_resnet.cli.extras import import_extra
from sb3_resnet.probing import Row


def means_of(rows: Sequence[Row]) -> dict[str, list[float]]:
    """
    :param rows: of :func:`~sb3_resnet.probing.probe`
    :return: mean R² and mean F1 of all rows, by name; those that no row has are left out
    """
    means = {"mean R²": [row.mean for row in rows], "mean F1": [row.mean_f1 for row in rows]}
    return {name: values for name, values in means.items() if not all(map(math.isnan, values))}


def draw(path: Path, rows: Sequence[Row]) -> None:
    """
    Write a picture of all scores: a line per combination, the best first, and a column per label.

    :param path: picture to write; its suffix names the format
    :param rows: of :func:`~sb3_resnet.probing.probe`
    """
    import_extra("matplotlib").use("Agg")
    pyplot = import_extra("matplotlib.pyplot")
    labels = [name for name, score in rows[0].scores.items() if not score.is_constant]
    means = means_of(rows)
    columns = [*means, *(f"{name} {rows[0].scores[name].kind}" for name in labels)]
    cells = [
        [*(one[line] for one in means.values()), *(row.scores[name].value for name in labels)]
        for line, row in enumerate(rows)
    ]
    values = [[math.nan if value is None else value for value in line] for line in cells]
    figure, axis = pyplot.subplots(figsize=(3.5 + 0.45 * len(columns), 1.8 + 0.26 * len(rows)))
    image = axis.imshow(values, vmin=0.0, vmax=1.0, aspect="auto", cmap="viridis")
    for line, scores in enumerate(values):
        for column, value in enumerate(scores):
            if not math.isnan(value):
                colour = "white" if value < 0.5 else "black"
                axis.text(column, line, f"{value:.2f}", ha="center", va="center", fontsize=6, color=colour)
    axis.set_xticks(range(len(columns)), columns, rotation=40, ha="left", fontsize=7)
    axis.xaxis.tick_top()
    names = [f"{Path(row.weights).stem}, {row.last_stage}, {row.pooling}, {row.adapter}" for row in rows]
    axis.set_yticks(range(len(rows)), names, fontsize=7)
    figure.colorbar(image, label="score (darkest: 0 and below)", shrink=0.8)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
