"""What is told of the state of environments, as one array per label."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from sb3_resnet.common.arguments import shown

Array = NDArray[Any]

#: Begins the name of the change of a number from step to step.
CHANGE = "delta_"
_EVERYWHERE = ("reward", "action")  # labels of every environment
_MANY = 20  # different whole numbers up to which they are classes


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


class LabelReader:
    """
    What each step tells of the state of environments, by the names that the first one told.

    :param env: environments
    :param labels: function of an innermost environment
    :param keys: of ``info``, which are labels too
    :raises TypeError: for labels that cannot be called
    """

    def __init__(self, env: VecEnv, labels: Callable[[Any], Mapping[str, Any]], keys: Sequence[str]) -> None:
        check_labels(labels)
        self._labels, self._keys = labels, keys
        self._resets = ResetInfos(env)
        self._names: list[str] | None = None

    def read(self, index: int, inner: Any, info: Mapping[str, Any], first: bool) -> dict[str, Any]:
        """
        :param index: of an environment
        :param inner: the innermost environment
        :param info: that came with its last step
        :param first: whether an episode begins now, so that ``info`` is that of the episode before
        :return: its labels; ``None`` for those that a reset does not tell
        :raises TypeError: for other than a dict, and for names that are no strings
        :raises ValueError: for other than numbers, and for names that are taken or differ from those of the first step
        """
        told = self._labels(inner)
        if not isinstance(told, Mapping):
            raise TypeError(f"labels must return a dict of numbers by name, got {shown(told)}: write {{}} for none")
        found = checked_labels(told)
        if self._names is None:
            self._names = [*found]
            _refuse_taken(self._names, self._keys)
        other = sorted({*self._names} ^ {*found}, key=str)
        if other:
            kind = "there now, and was not" if other[0] in found else "not there now, and was"
            raise ValueError(
                f"label {other[0]!r} is {kind} at the first step: let each step tell the same labels, with a number "
                "such as -1 where one is not seen"
            )
        return {**found, **_from_info(self._resets.of(index) if first else info, self._keys, first)}


def check_labels(labels: Any) -> None:
    """
    :param labels: what the user passed
    :raises TypeError: if it cannot be called
    """
    if not callable(labels):
        raise TypeError(
            f"labels must be a function of the innermost environment that returns a dict, got {shown(labels)}"
        )


def _refuse_taken(names: Sequence[str], keys: Sequence[str]) -> None:
    for name in (*names, *keys):
        place = "labels" if name in names else "info_keys"
        why = ""
        if name in _EVERYWHERE:
            why = "is a label of every environment"
        elif isinstance(name, str) and name.removeprefix(CHANGE) in ({*names, *keys} - {name}):
            why = f"is how the change of {name.removeprefix(CHANGE)!r} is called"
        elif name in names and name in keys:
            why = "is also one of info_keys"
        if why:
            instead = "write another name" if place == "labels" else "tell it by another name in labels="
            raise ValueError(f"{place} has {name!r}, which {why}: {instead}")


def _from_info(info: Mapping[str, Any], keys: Sequence[str], first: bool) -> dict[str, Any]:
    missing = [key for key in keys if key not in info]
    if missing and not first:  # many environments tell nothing at a reset
        raise ValueError(f"info has no {', '.join(missing)}: it has {', '.join(sorted(map(str, info)))}")
    return {**dict.fromkeys(keys), **checked_labels({key: info[key] for key in keys if key in info})}


def checked_labels(labels: Mapping[str, Any]) -> dict[str, Any]:
    """
    :param labels: by name, of one environment
    :return: a copy of them, as NumPy's scalars
    :raises TypeError: for names that are no strings
    :raises ValueError: for other than one finite number, since nothing could be read out
    """
    found = {}
    for name, value in labels.items():
        if not isinstance(name, str):
            raise TypeError(f"names of labels must be strings, got {shown(name)}: write {str(name)!r}")
        array = np.asarray(value)
        if array.dtype == np.longdouble:  # files have no wider numbers
            array = array.astype(np.float64)
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

    Whole numbers of more than 20 different values become floats, since no class but a position has so many. Where a
    reset did not tell a label, the row has the value of the next one, so that whole numbers remain whole.

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
        if np.issubdtype(columns[name].dtype, np.integer) and len(np.unique(columns[name])) > _MANY:
            columns[name] = columns[name].astype(np.float64)
        if np.issubdtype(columns[name].dtype, np.floating):
            columns[f"{CHANGE}{name}"] = np.diff(columns[name], prepend=columns[name][:1])
            unknown[1:] |= ~known
    return columns, unknown[:-1]
