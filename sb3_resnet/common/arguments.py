"""Argument checks that say what to write instead."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any


def number(
    name: str,
    value: Any,
    minimum: float = 0.0,
    maximum: float = math.inf,
    *,
    above: bool = False,
) -> float:
    """
    Read a finite number. Strings are accepted, since PyYAML reads ``1e-5`` (without a dot) as one.

    :param name: argument name for the error
    :param value: what the user passed
    :param minimum: smallest accepted value
    :param maximum: largest accepted value
    :param above: whether to refuse ``minimum`` itself
    :return: the value as float
    :raises TypeError: if it is not a number
    :raises ValueError: if it is not finite or out of range
    """
    if isinstance(value, bool) or not isinstance(value, (Real, str)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        result = float(value)
    except ValueError:
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    except OverflowError:
        raise ValueError(f"{name} must be finite, got a whole number beyond 1e308") from None
    low = result > minimum if above else result >= minimum
    if not (math.isfinite(result) and low and result <= maximum):
        bounds = f"{'>' if above else '>='} {minimum:g}" + (f" and <= {maximum:g}" if math.isfinite(maximum) else "")
        raise ValueError(f"{name} must be finite and {bounds}, got {value!r}")
    return result


def integer(name: str, value: Any, minimum: int = 0) -> int:
    """
    Read a whole number. ``1e6`` counts as one.

    :param name: argument name for the error
    :param value: what the user passed
    :param minimum: smallest accepted value
    :return: the value as int
    :raises TypeError: if it is not a number
    :raises ValueError: if it is not whole or too small
    """
    result = number(name, value, minimum)
    if result != int(result):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    return int(result)


def flag(name: str, value: Any) -> bool:
    """
    Read a boolean. Strings are refused, since ``bool("False")`` is true.

    :param name: argument name for the error
    :param value: what the user passed
    :return: the value
    :raises TypeError: if it is not a boolean
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be true or false, got {value!r}")
    return value


def text(name: str, value: Any) -> str:
    """
    Read a string that is not empty.

    :param name: argument name for the error
    :param value: what the user passed
    :return: the value
    :raises TypeError: if it is no string
    :raises ValueError: if it is empty
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {value!r}")
    if not value:
        raise ValueError(f"{name} must not be empty")
    return value


def choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    """
    Read one of several names.

    :param name: argument name for the error
    :param value: what the user passed
    :param allowed: the accepted values
    :return: the value
    :raises ValueError: for any other value; the error names the accepted ones and the nearest of them
    """
    if value not in allowed:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}{nearest(value, allowed)}"
        )
    return str(value)


def no_unknown(
    owner: str, given: Iterable[str], allowed: Iterable[str], elsewhere: Iterable[str] = (), place: str = ""
) -> None:
    """
    Refuse unknown keys of a dict that comes from YAML.

    :param owner: name of the class or dict that takes the keys, for the error
    :param given: the keys
    :param allowed: keys that the owner takes
    :param elsewhere: keys that belong to another dict
    :param place: name of that dict
    :raises TypeError: for an unknown key; the error names the right dict, or the accepted keys and the nearest of them
    """
    names = sorted(allowed)
    misplaced = {*elsewhere}
    for name in (name for name in given if name not in names):
        if name in misplaced:
            raise TypeError(f"{owner} has no argument {name!r}: write it in {place}")
        raise TypeError(f"{owner} has no argument {name!r}{nearest(name, names)}. It takes: {', '.join(names)}")


def nearest(value: Any, allowed: Iterable[str]) -> str:
    """
    :param value: an unknown name
    :param allowed: the known names
    :return: ``"; did you mean 'x'?"``; empty if no name is near
    """
    match = difflib.get_close_matches(str(value), list(allowed), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""
