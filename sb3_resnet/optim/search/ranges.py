"""The values that a search may give to one hyperparameter, and how they are written in YAML."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from sb3_resnet.common.arguments import flag, integer, no_unknown, number, shown

#: Reads one value: takes its name, for errors, and what was written.
Reader = Callable[[str, Any], Any]


@dataclass(frozen=True, repr=False)
class Range:
    """
    All numbers between two; whole numbers where both are whole numbers.

    :param low: the smallest
    :param high: the largest
    :param log: draw the logarithm evenly, for values that span orders of magnitude
    :param step: distance of the values from each other; ``None``: any value
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None

    def __repr__(self) -> str:
        log = ", log: true" if self.log else ""
        return f"{{low: {self.low:g}, high: {self.high:g}{log}{'' if self.step is None else f', step: {self.step:g}'}}}"

    def suggest(self, trial: Any, name: str) -> Any:
        """
        :param trial: an Optuna trial
        :param name: of the hyperparameter
        :return: the trial's value
        """
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(name, self.low, self.high, step=self.step or 1, log=self.log)
        return trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log)


@dataclass(frozen=True, repr=False)
class Choices:
    """
    Any of these values, which have no order.

    :param values: numbers, strings or booleans
    """

    values: tuple[Any, ...]

    def __repr__(self) -> str:
        return f"[{', '.join(map(str, self.values))}]"

    def suggest(self, trial: Any, name: str) -> Any:
        """
        :param trial: an Optuna trial
        :param name: of the hyperparameter
        :return: the trial's value
        """
        return trial.suggest_categorical(name, [*self.values])


@dataclass(frozen=True)
class Fixed:
    """
    One value, which is written into each trial and not searched.

    :param value: the value
    """

    value: Any

    def suggest(self, trial: Any, name: str) -> Any:
        """
        :param trial: an Optuna trial, which does not hear of it
        :param name: of the hyperparameter
        :return: the value
        """
        return self.value


Values = Range | Choices | Fixed


def read_values(name: str, written: Any, read: Reader) -> Values:
    """
    :param name: of the hyperparameter
    :param written: a mapping of ``low``, ``high``, ``log`` and ``step``, a list of choices, or one value
    :param read: reads and checks one value
    :return: the values
    :raises ValueError: for values that cannot work
    :raises TypeError: for wrong types and unknown keys
    """
    name = f"search: {name}"
    if isinstance(written, (Range, Choices, Fixed)):
        return written
    if isinstance(written, Mapping):
        return _read_range(name, written, read)
    if isinstance(written, (list, tuple)):
        if not written:
            raise ValueError(f"{name} has no choices: write a list of values, a range, or leave it out")
        choices = tuple(read(name, value) for value in written)
        if len({*choices}) < len(choices):
            raise ValueError(f"{name} has a choice twice, got {shown(written)}")
        return Choices(choices) if len(choices) > 1 else Fixed(choices[0])
    return Fixed(read(name, written))


def _read_range(name: str, written: Mapping[str, Any], read: Reader) -> Values:
    no_unknown(name, written, ("low", "high", "log", "step"))
    if not {"low", "high"} <= {*written}:
        raise ValueError(
            f"{name} must be a range with low and high, a list of choices, or a value; got {shown(written)}"
        )
    low, high = (read(f"{name}: {key}", written[key]) for key in ("low", "high"))
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (low, high)):
        raise TypeError(f"{name} takes names, which have no range: write a list such as [{low}, {high}]")
    log = flag(f"{name}: log", written.get("log", False))
    if low > high:
        raise ValueError(f"{name}: low must not be above high, got {low} and {high}")
    if log and low <= 0:
        raise ValueError(f"{name}: low must be above 0 where log is true, got {low}")
    step = written.get("step")
    if step is not None:
        if log:
            raise ValueError(f"{name}: write either log or step, since no steps are even in both")
        whole = isinstance(low, int) and isinstance(high, int)
        step = integer(f"{name}: step", step, 1) if whole else number(f"{name}: step", step, above=True)
    return Fixed(low) if low == high else Range(low, high, log, step)


def as_whole(written: Any) -> Any:
    """
    :param written: what :func:`read_values` reads, for a hyperparameter that takes whole numbers
    :return: the same, with whole numbers in place of floats and strings such as ``1e4`` that are whole
    """
    if isinstance(written, Mapping):
        return {key: as_whole(value) for key, value in written.items()}
    if isinstance(written, (list, tuple)):
        return [as_whole(value) for value in written]
    try:
        value = float(written) if isinstance(written, (float, str)) else math.nan
    except ValueError:  # a name
        return written
    return int(value) if value.is_integer() else written


def any_value(name: str, value: Any) -> Any:
    """
    :param name: of the hyperparameter, for errors
    :param value: a number, a string or a boolean
    :return: the same; a string that is a number, such as YAML's ``1e-5``, as a number
    :raises TypeError: for other types
    """
    if isinstance(value, (bool, Integral)):
        return value
    if not isinstance(value, (float, str)):
        raise TypeError(f"{name} must be a number, a string or a boolean, got {shown(value)}")
    try:
        return number(name, value, float("-inf"))
    except TypeError:
        return value
