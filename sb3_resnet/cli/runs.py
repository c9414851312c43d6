"""Read the folder of a finished run, as SB3 and RL-Zoo leave it."""

from __future__ import annotations

import csv
import json
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sb3_resnet.cache.frames import Array
from sb3_resnet.cli.texts import one_line
from sb3_resnet.diagnosis.log import read_log

#: Files that mark a folder as that of a run.
MONITOR, EVALUATIONS, PROGRESS = "*monitor.csv", "evaluations.npz", "progress.csv"
#: Number of episodes of the mean that SB3 logs.
WINDOW = 100
_LOG_INTERVAL = 4  # episodes between two lines of SB3's log
_ATARI_SKIP = 4  # AtariWrapper's default
# A number at the end of a name: Pong_3, Pong-seed2, run_1.
_COUNTER = re.compile(r"(^|[_-])(seed|run|s)?[_-]?\d+$")


@dataclass(frozen=True)
class Run:
    """
    The logs of a run.

    :param folder: folder of the run
    :param episodes: environment steps at the end of each training episode, and its reward, ``(n, 2)``
    :param evaluations: environment steps at each evaluation, ``(k,)``
    :param results: rewards of the episodes of each evaluation, ``(k, episodes)``
    :param progress: SB3's log by column; empty if there is no ``progress.csv``
    """

    folder: Path
    episodes: Array
    evaluations: Array
    results: Array
    progress: dict[str, list[float | None]]

    @property
    def experiment(self) -> Path:
        """The folder without the number at its end: runs of one experiment differ only in the seed."""
        folder = self.folder.resolve()  # two ways to write it are one experiment, and "." has no name
        name = _COUNTER.sub("", folder.name)
        return folder.parent / name if name else folder.parent

    @property
    def model(self) -> Path | None:
        """The last model, else the best one, else the newest file; ``None`` if there is none."""
        zips = sorted(self.folder.glob("*.zip"), key=lambda file: file.stat().st_mtime)
        final = [file for file in zips if self.folder.resolve().name.startswith(file.stem)]
        best = [file for file in zips if file.stem == "best_model"]
        return next(iter([*final, *best, *zips[::-1]]), None)

    @property
    def shown_evaluation(self) -> int:
        """Number of the evaluation that belongs to :attr:`model`: a best model is that of the best evaluation."""
        is_best = self.model is not None and self.model.stem in ("best_model", "best")
        return int(self.results.mean(axis=1).argmax()) if is_best else len(self.results) - 1

    def columns(self) -> dict[str, list[float | None]]:
        """
        :return: SB3's log by column, with the episodes of ``monitor.csv``; without a log, its columns about rewards,
            made from the other files
        """
        if self.progress:
            steps = self.progress.get("time/total_timesteps", [])
            last = max((step for step in steps if step is not None), default=0.0)
            # Steps of a monitor file may be those of a game that repeats actions.
            return {**self.progress, **self._episodes_at(steps, last / max(self._trained, 1.0))}
        means = rolling_mean(self.episodes[:, 1], WINDOW)
        rows: list[tuple[float, str, float]] = [
            (float(self.episodes[index, 0]), "rollout/ep_rew_mean", float(means[index]))
            for index in range(_LOG_INTERVAL - 1, len(means), _LOG_INTERVAL)
        ]
        scores = self.results.mean(axis=1)
        rows += [
            (float(step), "eval/mean_reward", float(score))
            for step, score in zip(self.evaluations, scores, strict=True)
        ]
        rows.sort(key=lambda row: row[0])
        table: dict[str, list[float | None]] = {"time/total_timesteps": [step for step, _, _ in rows]}
        for key in ("rollout/ep_rew_mean", "eval/mean_reward"):
            table[key] = [value if name == key else None for _, name, value in rows]
        return {**table, **self._episodes_at(table["time/total_timesteps"])}

    @property
    def _trained(self) -> float:
        return float(self.episodes[-1, 0]) if len(self.episodes) else 0.0

    def _episodes_at(self, steps: Sequence[float | None], scale: float = 1.0) -> dict[str, list[float | None]]:
        """Episodes at each line. SB3's own count in the log takes each lost life for an episode."""
        if not len(self.episodes):
            return {}
        ends = self.episodes[:, 0] * scale * (1.0 - 1e-9)  # an end and its line are at the same step
        counts = [None if step is None else float(np.searchsorted(ends, step, side="right")) for step in steps]
        return {"time/episodes": counts}


def find_runs(folder: str | Path) -> list[Run]:
    """
    :param folder: folder of one or several runs
    :return: the runs in it
    :raises FileNotFoundError: if there is no such folder
    :raises ValueError: if it holds no logs, or broken ones
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: give that of a run, such as logs/dqn/PongNoFrameskip-v4_1")
    if any(_logs_in(folder)):
        return [read_run(folder)]
    found = sorted({file.parent for file in _logs_in(folder, "**/")})
    # RL-Zoo and EvalCallback may write into a folder below that of the run.
    runs = [path for path in found if not any(other in path.parents for other in found)]
    if not runs:
        raise ValueError(f"{folder} holds no logs of a run: none of {MONITOR}, {EVALUATIONS}, {PROGRESS}")
    return [read_run(path) for path in runs]


def read_run(folder: Path) -> Run:
    """
    :param folder: folder of one run; logs may also be one folder deeper
    :return: its logs
    :raises ValueError: for logs that cannot be read
    """
    monitors = _either(folder, MONITOR)
    evaluations, results = _evaluations(_either(folder, EVALUATIONS))
    progress = _either(folder, PROGRESS)
    return Run(folder, _episodes(monitors), evaluations, results, read_log(progress[0]) if progress else {})


def rolling_mean(values: Array, window: int) -> Array:
    """
    :param values: values in order, ``(n,)``
    :param window: number of values per mean
    :return: at each position the mean of the last ``window`` values, of fewer at the start, ``(n,)``
    """
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    mean: Array = (sums[ends] - sums[starts]) / np.maximum(ends - starts, 1)
    return mean


def _logs_in(folder: Path, depth: str = "") -> Iterator[Path]:
    for pattern in (MONITOR, EVALUATIONS, PROGRESS):
        yield from folder.glob(depth + pattern)


def _either(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern)) or sorted(folder.glob(f"*/{pattern}"))


def _episodes(files: Sequence[Path]) -> Array:
    """Episodes of all environments in the order in which they ended; their lengths add up to the steps."""
    rows = [row for file in files for row in _monitor_rows(file)]
    if not rows:
        return np.zeros((0, 2))
    table = np.array(sorted(rows))
    return np.stack([np.cumsum(table[:, 2]), table[:, 1]], axis=1)


def _monitor_rows(file: Path) -> list[tuple[float, float, float]]:
    """:return: time of the end, reward and length of each episode"""
    if file.stat().st_size == 0:  # of a run that has just begun
        return []
    with open(file, newline="") as stream:
        try:
            header = json.loads(stream.readline().removeprefix("#"))
            start = float(header["t_start"])
            lines = list(csv.DictReader(stream))
        except (ValueError, KeyError, TypeError, RecursionError, csv.Error) as error:
            raise ValueError(f"{file} is no monitor file of SB3 ({one_line(error)})") from error
    # Monitor is below AtariWrapper, where one step of the agent is four steps of the game.
    name = str(header.get("env_id"))
    skip = _ATARI_SKIP if "NoFrameskip" in name or name.startswith("ALE/") else 1
    rows = []
    for number, line in enumerate(lines, 3):
        try:
            rows.append((start + float(line["t"]), float(line["r"]), float(line["l"]) / skip))
        except (TypeError, ValueError, KeyError) as error:
            if number < len(lines) + 2:  # a run that was killed leaves half a line at the end
                raise ValueError(f"{file}, line {number}: no episode ({one_line(error)})") from error
    return rows


def _evaluations(files: Sequence[Path]) -> tuple[Array, Array]:
    if not files:
        return np.zeros(0), np.zeros((0, 1))
    try:
        with np.load(files[0]) as data:
            steps, results = np.asarray(data["timesteps"], np.float64), np.asarray(data["results"], np.float64)
        if steps.ndim != 1 or results.size == 0:
            raise ValueError("it holds no evaluations")
        return steps, results.reshape(len(steps), -1)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{files[0]} is no file of EvalCallback ({one_line(error)})") from error


def summary(run: Run) -> list[tuple[str, str]]:
    """
    :param run: the logs of a run
    :return: names and values of what they hold, as text
    """
    rows: list[tuple[str, Any]] = [("folder", run.folder)]
    if len(run.episodes):
        last = run.episodes[-WINDOW:, 1]
        rows.append(("training", f"{len(run.episodes)} episodes, {run.episodes[-1, 0]:,.0f} steps"))
        rows.append((f"mean reward of the last {len(last)}", f"{last.mean():.4g}"))
    if len(run.evaluations):
        means = run.results.mean(axis=1)
        best = int(means.argmax())
        rows.append(("evaluations", f"{len(means)} of {run.results.shape[1]} episodes"))
        rows.append(("best evaluation", f"{means[best]:.4g} at step {run.evaluations[best]:,.0f}"))
        rows.append(("last evaluation", f"{means[-1]:.4g} at step {run.evaluations[-1]:,.0f}"))
    if run.progress:
        rows.append(("log", f"{len(next(iter(run.progress.values())))} lines, {len(run.progress)} columns"))
    return [(name, str(value)) for name, value in rows]
