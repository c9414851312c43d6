"""What is told of the state of environments, as one array per label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from sb3_resnet.common.arguments import shown

Array = NDArray[Any]


class ResetInfos:
    """
    The ``info`` of the resets that begin episodes.

    SB3's wrappers have a list of their own that stays empty, so it is read from what they wrap.

    :param env: environments
    """

    def __init__(self, env: VecEnv) -> None:
        self._base = env.unwrapped
        self._read: list[Any] = [None] * env.num_envs

    def of(self, index: int) -> Mapping[str, Any]:
        """
        :param index: of an environment whose episode begins now
        :return: its ``info``; empty where the environments keep that of their first reset only
        """
        info: Mapping[str, Any] = self._base.reset_infos[index]
        if info is self._read[index]:
            return {}
        self._read[index] = info
        return info


def labels_from_info(info: Mapping[str, Any], keys: Sequence[str], first: bool) -> dict[str, Any]:
    """
    :param info: of an environment
    :param keys: those that are labels
    :param first: whether it is that of a reset
    :return: the labels; ``None`` for those that a reset does not tell
    :raises ValueError: for a key that is not there after a step, and for other than numbers
    """
    missing = [key for key in keys if key not in info]
    if missing and not first:  # many environments tell nothing at a reset
        raise ValueError(f"info has no {', '.join(missing)}: it has {', '.join(sorted(map(str, info)))}")
    return {**dict.fromkeys(keys), **checked_labels({key: info[key] for key in keys if key in info})}


def checked_labels(labels: Mapping[str, Any]) -> dict[str, Any]:
    """
    :param labels: by name, of one environment
    :return: a copy of them, as NumPy's scalars
    :raises ValueError: for other than one finite number, since nothing could be read out
    """
    found = {}
    for name, value in labels.items():
        array = np.asarray(value)
        if array.ndim or array.dtype.kind not in "biuf":
            raise ValueError(
                f"label {name!r} must be one number, True or False, got {shown(value)}: leave it out, or make numbers "
                "of it in labels="
            )
        if not np.isfinite(array):
            raise ValueError(
                f"label {name!r} is {array}, and nothing can be scored with it: give a number where it is not seen, "
                "such as -1, or leave the label out"
            )
        found[name] = array[()]
    return found


def label_columns(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Array], Array]:
    """
    Put the labels of all rows together.

    Where a reset did not tell a label, the row has the value of the next one, so that whole numbers remain whole.

    :param rows: labels by name, of rows in the order of time; ``None`` where a reset did not tell one
    :return: by name: numbers as floats, classes as integers, and ``delta_<name>`` of each number, ``(rows,)``; and
        which rows follow one without a number, so that what has changed since is not known, ``(rows,)``
    """
    columns: dict[str, Array] = {}
    unknown = np.zeros(len(rows) + 1, bool)
    for name in rows[0]:
        told = [row[name] for row in rows]
        known = np.array([value is not None for value in told])
        if not known.any():
            continue
        places = np.flatnonzero(known)
        following = np.searchsorted(places, np.arange(len(rows))).clip(max=len(places) - 1)
        columns[name] = np.array([told[place] for place in places])[following]
        if np.issubdtype(columns[name].dtype, np.floating):
            columns[f"delta_{name}"] = np.diff(columns[name], prepend=columns[name][:1])
            unknown[1:] |= ~known
    return columns, unknown[:-1]
