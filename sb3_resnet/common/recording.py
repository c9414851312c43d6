"""What was played: a row per observation, and what is known about each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sb3_resnet.common.labels import CHANGE, label_columns
from sb3_resnet.common.unique_rows import unique_rows

Array = NDArray[Any]

# Of the largest value, for numbers of up to four bytes and of eight: the change of one has two or more.
_FEW_ROUNDINGS, _MANY_ROUNDINGS = 4, 64
_FEW_REWARDS = 5  # different values up to which rewards are classes


@dataclass(frozen=True)
class Recording:
    """
    Played observations and what is known about each.

    :param observations: as the environment gives them, ``(rows, C, H, W)``
    :param episodes: number of the episode of each, ``(rows,)``; rows of one episode follow each other
    :param actions: the action that led to the observation, counted from 0 whatever the ``start`` of the action space,
        ``(rows,)``; -1 in rows that are not scored; 0 where an action is not one choice
    :param labels: by name, ``(rows,)``: numbers as floats, classes as integers
    :param space: of the observations
    :param parts: actions that are not one choice: numbers, or several choices counted from 0, ``(rows, n)``
    """

    observations: Array
    episodes: Array
    actions: Array
    labels: Mapping[str, Array]
    space: Any
    parts: Array | None = None

    @cached_property
    def kinds(self) -> Array:
        """A number for each observation, the same where they are equal, ``(rows,)``."""
        return unique_rows(np.ascontiguousarray(self.observations).reshape(len(self.observations), -1))[1]


def joined(
    observations: Array, tracks: Sequence[Sequence[Mapping[str, Any]]], space: Any, is_choice: bool
) -> Recording:
    """
    :param observations: of all environments, one after the other
    :param tracks: by environment, what is known about each observation
    :param space: of the observations
    :param is_choice: whether an action is one choice among several
    :return: one row per observation, with the labels that need a step before
    """
    rows = [row for track in tracks for row in track]
    firsts = np.array([row["first"] or index == 0 for track in tracks for index, row in enumerate(track)])
    names = [(env, row["episode"]) for env, track in enumerate(tracks) for row in track]
    begins = [before != now for before, now in pairwise([None, *names])]
    parts = np.stack([row["action"] for row in rows])
    actions = parts[:, 0].astype(int) if is_choice else np.zeros(len(rows), int)
    labels, unknown = label_columns([row["labels"] for row in rows])
    actions[firsts | unknown] = -1
    kinds, which = np.unique(rewards := np.array([row["reward"] for row in rows]), return_inverse=True)
    labels["reward"] = which if len(kinds) <= _FEW_REWARDS else rewards
    labels = {name: _steady(name, labels, actions >= 0) for name in labels}
    return Recording(observations, np.cumsum(begins), actions, labels, space, None if is_choice else parts)


def _steady(name: str, labels: Mapping[str, Array], led: Array) -> Array:
    """:return: the label; one value where it varies by what rounding leaves, which a score would be made of"""
    values = labels[name]
    source = labels.get(str(name).removeprefix(CHANGE), values)
    if not (np.issubdtype(values.dtype, np.floating) and np.issubdtype(source.dtype, np.floating) and led.any()):
        return values
    largest = float(np.abs(source).max())
    roundings = _MANY_ROUNDINGS if source.dtype.itemsize > 4 else _FEW_ROUNDINGS
    rounding = roundings * float(np.finfo(source.dtype).eps) * largest
    scored = values[led]
    return np.full_like(values, scored[0]) if float(scored.max()) - float(scored.min()) <= rounding else values
