"""Pong on two cores: how many of five seeds win within an hour each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sb3_resnet.common.files import written_whole

from . import figures
from .arms import LEARNING_RATE
from .budgets import budget_of
from .recording import Log
from .results import SECONDS
from .runs import execute
from .spec import Run
from .statistics import Interval

SEEDS = 5
WON = 18.0  # of 21 points, the mean of 20 games
SHARE = "share of seeds at or above 18"


def pong(
    results: Path,
    checkpoints: Path,
    seeds: Sequence[int],
    minutes: float,
    weights: str | None,
    learning_rate: float = LEARNING_RATE,
) -> dict[str, Any]:
    """
    Train one seed after the other with both cores, each until an evaluation is won or its time is over.

    :param results: folder of all results; the runs' own, ``<arm>.json`` and ``<arm>.png`` lie below it
    :param checkpoints: folder of all checkpoints
    :param seeds: the seeds
    :param minutes: of a run, its evaluations included
    :param weights: file of the trunk's weights, for the pretrained arm; ``None``: the random one
    :param learning_rate: of the head
    :return: what is written into ``<arm>.json``
    """
    arm = "random_frozen" if weights is None else "pretrained_frozen"
    steps, files = budget_of("pong").steps, []
    for seed in seeds:
        run = Run("atari", "pong", "Pong", arm, seed, steps, learning_rate, weights, minutes=minutes)
        with tqdm(total=steps, desc=f"seed {seed}", unit="step", unit_scale=True, dynamic_ncols=True) as bar:
            files += [execute(run, results, checkpoints, lambda done, bar=bar: bar.update(done - bar.n), ends(minutes))]
    found = summary(files, minutes)
    told = results / run.folder / f"{arm}.json"
    with written_whole(told) as (file,):
        file.write_text(json.dumps(found, indent=1) + "\n")
    _draw(told.with_suffix(".png"), files, found)
    print(f"{SHARE}: {found[SHARE]} ({told})")
    return found


def ends(minutes: float) -> Any:
    """:return: whether a run ends after its last evaluation: it was won, or the time is over"""

    def over(log: Log) -> bool:
        won = bool(log.evaluations) and float(np.mean(log.evaluations[-1]["returns"])) >= WON
        return won or log.spent[2] >= 60 * minutes

    return over


def summary(files: Sequence[Path], minutes: float) -> dict[str, Any]:
    """:return: how far each seed got, and the share of those that won before the time was over"""
    rows = []
    for file in files:
        result, times = (json.loads(path.read_text()) for path in (file, file.with_suffix(".times.json")))
        spent = times[SECONDS][-1]
        pairs = zip(result["evaluations"], times[SECONDS], strict=True)
        in_time = [float(np.mean(entry["returns"])) for entry, row in pairs if row[3] <= 60 * minutes]
        best = max(in_time, default=None)
        row = {"seed": result["seed"], "file": file.name, "steps": spent[0], "minutes": round(spent[3] / 60, 1)}
        rows.append({**row, "best evaluation": best, "last evaluation": result["last evaluation"], "cpu": times["cpu"]})
    won = sum(row["best evaluation"] is not None and row["best evaluation"] >= WON for row in rows)
    command = json.loads(files[0].read_text())["command"]
    return {
        "command": command if len(files) == SEEDS else f"{command} --seeds {len(files)}",
        "minutes of a run at most": minutes,
        "threads": budget_of("pong").threads,
        SHARE: f"{won} of {len(rows)}",
        "runs": rows,
    }


def _draw(path: Path, files: Sequence[Path], found: dict[str, Any]) -> None:
    x, y = {}, {}
    for file in files:
        result, times = (json.loads(path.read_text()) for path in (file, file.with_suffix(".times.json")))
        name = f"seed {result['seed']}"
        rows = times[SECONDS]
        x[name] = [row[3] / 60 for row in rows]
        values = [float(np.mean(entry["returns"])) for entry in result["evaluations"]]
        y[name] = [Interval(value, np.nan, np.nan) for value in values]
    labels = ("minutes of two cores, evaluations included", "return, mean of 20 games")
    figures.curves(path, x, y, labels, f"Pong, {len(files)} seeds; {SHARE}: {found[SHARE]}")
