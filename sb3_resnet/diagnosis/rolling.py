"""How sure a rise of a rolling mean is, whose rows share episodes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from sb3_resnet.diagnosis.columns import Columns

#: Episodes of the mean that SB3 logs, ``stats_window_size``.
WINDOW = 100
_LOG_INTERVAL = 4  # episodes between two lines of SB3's log, where it does not tell


def episodes_at(columns: Columns) -> np.ndarray:
    """
    :param columns: the log of a run
    :return: how many episodes had ended at each row that has a mean reward
    """
    rows = [row for row, reward in enumerate(columns.get("rollout/ep_rew_mean", ())) if reward is not None]
    counts = _filled(columns, "time/episodes", rows)
    if np.isnan(counts).all():  # PPO and A2C do not log it
        steps, lengths = (_filled(columns, key, rows) for key in ("time/total_timesteps", "rollout/ep_len_mean"))
        counts = np.cumsum(np.diff(steps, prepend=0.0) / lengths)
    if np.isnan(counts).all():
        counts = _LOG_INTERVAL * np.arange(1.0, len(rows) + 1)
    counts = np.nan_to_num(counts)
    more = np.diff(counts, prepend=0.0)
    more = np.where(more < 0, counts, more)  # a second learn() counts from 0 again
    ended: np.ndarray = np.maximum(more.cumsum().round(), 1).astype(int)
    return ended


def standard_error(means: np.ndarray, episodes: np.ndarray, window: int) -> float:
    """
    The standard error of the difference between the last and the first third of a rolling mean.

    Rows that share episodes are not independent, and say less than as many numbers of their own. So each third is taken
    as what it is, a weighted mean of episodes. The spread of single episodes shows in how much the mean moves when some
    come in and others leave.

    :param means: the rolling mean, by row
    :param episodes: episodes that had ended at each row, not falling
    :param window: episodes of the mean; fewer at the start
    :return: the standard error, if single episodes are independent; NaN where too few rows differ in their episodes
    """
    starts = np.maximum(episodes - window, 0)
    sizes = (episodes - starts).astype(np.float64)
    shared = np.maximum(episodes[:-1] - starts[1:], 0)
    moved = 1 / sizes[1:] + 1 / sizes[:-1] - 2 * shared / (sizes[1:] * sizes[:-1])
    new = moved > 1e-12
    if new.sum() < 2:
        return math.nan
    spread = float((np.diff(means)[new] / np.sqrt(moved[new])).std(ddof=1))
    first, _, last = np.array_split(np.arange(len(means)), 3)
    weights = [_weights(starts[rows], episodes[rows], sizes[rows], int(episodes[-1])) for rows in (first, last)]
    return spread * float(np.linalg.norm(weights[1] - weights[0]))


def _weights(starts: np.ndarray, ends: np.ndarray, sizes: np.ndarray, count: int) -> np.ndarray:
    """:return: how much each episode counts in the mean of some rows, ``(count,)``"""
    steps = np.zeros(count + 1)
    np.add.at(steps, starts, 1 / sizes)
    np.add.at(steps, ends, -1 / sizes)
    return np.cumsum(steps)[:-1] / len(starts)


def _filled(columns: Columns, key: str, rows: Sequence[int]) -> np.ndarray:
    """:return: a column at some rows, or its latest value before them; NaN before the first"""
    values: list[float] = []
    latest = math.nan
    for value in columns.get(key, ()):
        latest = latest if value is None else value
        values.append(latest)
    values += [latest] * (max(rows, default=-1) + 1 - len(values))
    return np.array(values, dtype=np.float64)[list(rows)]
