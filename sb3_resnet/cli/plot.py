"""``sb3-resnet plot``: learning curves of runs, with confidence bands over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from sb3_resnet.cache.frames import Array
from sb3_resnet.cli.extras import import_extra
from sb3_resnet.cli.runs import Run, find_runs, rolling_mean
from sb3_resnet.common.arguments import integer, number

_POINTS = 200
_RESAMPLES = 2000
_MARKER_LIMIT = 30  # points up to which each is marked


@dataclass(frozen=True)
class Curve:
    """
    A mean and its band.

    :param label: name of the experiment
    :param steps: environment steps, ``(n,)``
    :param mean: mean over the runs, ``(n,)``
    :param low: lower edge of the band, ``(n,)``
    :param high: upper edge of the band, ``(n,)``
    :param runs: number of runs
    """

    label: str
    steps: Array
    mean: Array
    low: Array
    high: Array
    runs: int


def command(
    context: typer.Context,
    run_folders: Annotated[
        list[Path], typer.Argument(metavar="RUN_FOLDER", help="of runs, or of folders with runs in them")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="picture: .png, .svg or .pdf")] = Path(
        "curves.png"
    ),
    window: Annotated[int, typer.Option(metavar="N", help="training episodes in a mean")] = 100,
    confidence: Annotated[float, typer.Option(metavar="PERCENT", help="of the band")] = 95.0,
) -> None:
    """
    Learning curves from evaluations.npz and monitor.csv.

    Runs whose folders differ in the number at the end (Pong_1, Pong_2) are one curve: their mean, and as the band its
    percentile bootstrap interval over the runs, which is too narrow for fewer than about five. For a single run the
    band is over its episodes.
    """
    refuse_bad_picture(output)
    runs = {run.folder.resolve(): run for folder in run_folders for run in find_runs(folder)}
    drawn = draw(output, [*runs.values()], integer("--window", window, 1), number("--confidence", confidence, 1, 99.9))
    context.obj.print(f"{output}: {len(drawn)} curves of {len(runs)} runs", highlight=False, soft_wrap=True)


def curves(runs: Sequence[Run], source: str, window: int, confidence: float) -> list[Curve]:
    """
    Compute one curve per experiment: for all runs whose folders differ only in the number at the end.

    The band is the percentile bootstrap interval of the mean over runs. For a single run it is over the episodes of an
    evaluation, or of the window. That says how well the mean of this run is known, and nothing about other seeds.

    :param runs: the runs
    :param source: ``"evaluations"`` or ``"training"``
    :param window: number of training episodes per mean
    :param confidence: confidence level of the band, in percent
    :return: the curves of experiments that have such data
    """
    experiments: dict[Path, list[Run]] = {}
    for run in runs:
        if len(run.evaluations if source == "evaluations" else run.episodes):
            experiments.setdefault(run.experiment, []).append(run)
    labels = _labels([*experiments])
    found = []
    for label, members in zip(labels, experiments.values(), strict=True):
        make = _one_run if len(members) == 1 else _several_runs
        found.append(make(label, members, source, window, confidence))
    return found


def bootstrap(values: Array, confidence: float) -> tuple[Array, Array]:
    """
    :param values: values, ``(samples, points)``
    :param confidence: confidence level, in percent
    :return: lower and upper edge of the percentile interval of the mean, ``(points,)`` each
    """
    random = np.random.default_rng(0)
    means = np.stack([values[random.integers(len(values), size=len(values))].mean(axis=0) for _ in range(_RESAMPLES)])
    low, high = np.percentile(means, (50 - confidence / 2, 50 + confidence / 2), axis=0)
    return low, high


def refuse_bad_picture(path: Path, option: str = "--output") -> None:
    """
    :param path: picture to write
    :param option: that names it, for the error
    :raises FileNotFoundError: if its folder does not exist
    :raises ValueError: if it is a folder itself, or if its suffix is no picture format
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder: write the name of a picture, such as {path / 'curves.png'}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is no folder: make it first, or write another {option}")
    formats = import_extra("matplotlib.backend_bases").FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in formats:
        suffixes = ", ".join(f".{name}" for name in sorted(formats))
        raise ValueError(f"{path} names no format of pictures by its end: write one of {suffixes}")


def draw(path: str | Path, runs: Sequence[Run], window: int = 100, confidence: float = 95.0) -> list[Curve]:
    """
    Write a picture of the evaluations and of the training episodes.

    :param path: picture to write; its suffix names the format
    :param runs: runs of one or several experiments
    :param window: number of training episodes per mean
    :param confidence: confidence level of the bands, in percent
    :return: the curves that were drawn
    :raises ValueError: if there is nothing to draw
    """
    import_extra("matplotlib").use("Agg")
    pyplot = import_extra("matplotlib.pyplot")
    parts = [(source, curves(runs, source, window, confidence)) for source in ("evaluations", "training")]
    parts = [(source, found) for source, found in parts if found]
    if not parts:
        raise ValueError("The runs hold neither evaluations nor finished training episodes: nothing to draw")
    figure, axes = pyplot.subplots(1, len(parts), figsize=(6.4 * len(parts), 4.4), squeeze=False)
    for axis, (source, found) in zip(axes[0], parts, strict=True):
        _draw_part(axis, source, found, window)
    kinds = {curve.runs > 1 for _, found in parts for curve in found}
    over = " and ".join(
        text for several, text in ((True, "runs"), (False, "episodes of a single run")) if several in kinds
    )
    figure.suptitle(f"Mean and {confidence:g} % bootstrap interval of the mean, over {over}", fontsize=10)
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=110)
    finally:
        pyplot.close(figure)
    return [curve for _, found in parts for curve in found]


def _several_runs(label: str, runs: Sequence[Run], source: str, window: int, confidence: float) -> Curve:
    """Over the steps that all runs have reached; values between the points of a run are interpolated."""
    lines = [_line(run, source, window) for run in runs]
    start, end = max(steps[0] for steps, _ in lines), min(steps[-1] for steps, _ in lines)
    same = all(np.array_equal(steps, lines[0][0]) for steps, _ in lines)
    grid = lines[0][0] if same else np.linspace(min(start, end), end, _POINTS)
    table = np.stack([np.interp(grid, steps, values) for steps, values in lines])
    low, high = bootstrap(table, confidence)
    return Curve(label, grid, table.mean(axis=0), low, high, len(runs))


def _one_run(label: str, runs: Sequence[Run], source: str, window: int, confidence: float) -> Curve:
    (run,) = runs
    if source == "evaluations":
        low, high = bootstrap(run.results.T, confidence)
        return Curve(label, run.evaluations, run.results.mean(axis=1), low, high, 1)
    ends = np.unique(np.linspace(min(window, len(run.episodes)), len(run.episodes), _POINTS).astype(int))
    edges = [bootstrap(run.episodes[max(0, end - window) : end, 1:], confidence) for end in ends]
    low, high = (np.array([edge[side][0] for edge in edges]) for side in (0, 1))
    mean = rolling_mean(run.episodes[:, 1], window)[ends - 1]
    return Curve(label, run.episodes[ends - 1, 0], mean, low, high, 1)


def _line(run: Run, source: str, window: int) -> tuple[Array, Array]:
    if source == "evaluations":
        return run.evaluations, run.results.mean(axis=1)
    return run.episodes[:, 0], rolling_mean(run.episodes[:, 1], window)


def _labels(experiments: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ from each other."""
    parts = [path.resolve().parts for path in experiments]
    shortest = 1
    while len({path[-shortest:] for path in parts}) < len(parts):
        shortest += 1
    return ["/".join(path[-shortest:]) for path in parts]


def _draw_part(axis: Any, source: str, found: Sequence[Curve], window: int) -> None:
    for curve in found:
        marker = "o" if len(curve.steps) <= _MARKER_LIMIT else None
        count = f"{curve.runs} run{'' if curve.runs == 1 else 's'}"
        (line,) = axis.plot(curve.steps, curve.mean, marker=marker, markersize=3, label=f"{curve.label} ({count})")
        axis.fill_between(curve.steps, curve.low, curve.high, color=line.get_color(), alpha=0.2, linewidth=0)
    axis.set_title("evaluations" if source == "evaluations" else f"training, mean of {window} episodes", fontsize=10)
    axis.set_xlabel("environment steps")
    axis.set_ylabel("episode reward")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
