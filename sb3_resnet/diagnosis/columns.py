"""Logged values by key, and what rules read from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from sb3_resnet.diagnosis.findings import THRESHOLDS

#: Logged values by key, one per line of the log; ``None`` where a line has no such value. NaN is a logged NaN.
Columns = Mapping[str, Sequence[float | None]]


def enough() -> float:
    """:return: number of values below which a log says nothing"""
    return THRESHOLDS["values"].value


def recent(columns: Columns, key: str) -> np.ndarray:
    """:return: the latest values, :func:`enough` of them"""
    return logged(columns, key)[-int(enough()) :]


def median(columns: Columns, key: str) -> float:
    """:return: median of the latest values; NaN, which exceeds no limit, if there are too few of them"""
    values = recent(columns, key)
    return float(np.median(values)) if len(values) >= enough() else math.nan


def last_third(columns: Columns, key: str) -> np.ndarray:
    """:return: the last third of the values, and at least :func:`enough` of them"""
    values = logged(columns, key)
    return values[-max(int(enough()), len(values) // 3) :]


def logged(columns: Columns, key: str) -> np.ndarray:
    """:return: all values of a key, without the lines that have none"""
    return np.array([value for value in columns.get(key, ()) if value is not None], dtype=np.float64)


def keys_with(columns: Columns, prefix: str) -> list[str]:
    """:return: the keys that begin with ``prefix``"""
    return [key for key in columns if key.startswith(prefix)]


def is_actor_critic(columns: Columns) -> bool:
    """:return: whether it is a log of PPO or A2C, whose loss falls and rises with the advantages of each rollout"""
    return "train/policy_gradient_loss" in columns or "train/policy_loss" in columns
