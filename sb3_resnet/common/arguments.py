"""Argument checks that say what to write instead."""

from __future__ import annotations

import difflib
import math
import os
import reprlib
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch as th

_LONGEST = 300  # characters of a value in an error


class _Short(reprlib.Repr):
    """As ``reprlib``'s, which shows subclasses of ``dict`` whole: a state dict is one, and takes seconds."""

    repr_OrderedDict = repr_defaultdict = reprlib.Repr.repr_dict  # noqa: N815  # reprlib looks them up by type


_SHORT = _Short()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = _LONGEST
_SHORT.maxdict = _SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = 6


def shown(value: Any) -> str:
    """
    A value as errors show it: ``repr``, in one line and not longer than an error can be.

    The ``repr`` of a state dict has hundreds of thousands of characters.

    :param value: what the user passed
    :return: its ``repr``, with dots in the middle where it is long
    """
    try:
        text = _SHORT.repr(value)
    except Exception:  # of the value's own __repr__
        text = f"<{type(value).__name__}>"
    text = " ".join(text.split()) if "\n" in text else text
    half = _LONGEST // 2 - 2
    return text if len(text) <= _LONGEST else f"{text[:half]}...{text[-half:]}"


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
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (Real, str)):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    try:
        result = float(value)
    except ValueError:
        raise TypeError(f"{name} must be a number, got {shown(value)}") from None
    except OverflowError:
        raise ValueError(f"{name} must be finite, got a whole number beyond 1e308") from None
    low = result > minimum if above else result >= minimum
    if not (math.isfinite(result) and low and result <= maximum):
        bounds = f"{'>' if above else '>='} {minimum:g}" + (f" and <= {maximum:g}" if math.isfinite(maximum) else "")
        raise ValueError(f"{name} must be finite and {bounds}, got {shown(value)}")
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
    if isinstance(value, Integral):
        return int(value)  # a float holds whole numbers up to 2**53 only
    if result != int(result):
        raise ValueError(f"{name} must be a whole number, got {shown(value)}")
    return int(result)


def flag(name: str, value: Any) -> bool:
    """
    Read a boolean, also NumPy's. Strings are refused, since ``bool("False")`` is true.

    :param name: argument name for the error
    :param value: what the user passed
    :return: the value
    :raises TypeError: if it is not a boolean
    """
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be true or false, got {shown(value)}")
    return bool(value)


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
        raise TypeError(f"{name} must be a string, got {shown(value)}")
    if not value:
        raise ValueError(f"{name} must not be empty")
    return str(value)


def path_of(name: str, value: Any) -> Path:
    """
    Read the path of a file or folder; ``~`` is the home folder.

    :param name: of the argument, for the error
    :param value: what was given
    :return: the path
    :raises TypeError: if it is neither a string nor a path
    :raises ValueError: if it is empty
    """
    read = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(read, str):
        raise TypeError(f"{name} must be a string or a path, got {shown(value)}")
    if not read:
        raise ValueError(f"{name} must not be empty: write the path of a file or folder")
    try:
        return Path(read).expanduser()
    except RuntimeError as error:  # ~name of a user that does not exist
        raise ValueError(f"{name}={shown(value)}: {error}") from error


def choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    """
    Read one of several names.

    :param name: argument name for the error
    :param value: what the user passed
    :param allowed: the accepted values
    :return: the value
    :raises ValueError: for any other value; the error names the accepted ones and the nearest of them
    """
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, allowed))}, got {shown(value)}{nearest(value, allowed)}"
        )
    return str(value)


def read_device(value: Any) -> str:
    """
    :param value: what the user passed as ``device``
    :return: the same as text
    :raises ValueError: if it is no device and not ``"auto"``, or a GPU that PyTorch does not find
    """
    try:
        device = None if isinstance(value, str) and value == "auto" else th.device(value)
    except (RuntimeError, TypeError):
        raise ValueError(f"device must be 'auto', 'cpu' or 'cuda', got {shown(value)}") from None
    if device is None:
        return "auto"
    count = th.cuda.device_count() if th.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        found = "no such GPU" if count else "no GPU"
        raise ValueError(f"device={shown(value)}, but PyTorch finds {found}: write device='auto' or 'cpu'")
    return str(device)


def listed(name: str, value: Any) -> list[Any]:
    """
    Read several names; a single one counts as a list of one.

    :param name: argument name for the error
    :param value: what the user passed
    :return: the names
    :raises TypeError: if it is no list
    """
    if isinstance(value, (str, os.PathLike)):
        return [value]
    if not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a list of names, got {shown(value)}")
    return [*value]


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
            raise TypeError(f"{owner} has no argument {shown(name)}: write it in {place}")
        raise TypeError(f"{owner} has no argument {shown(name)}{nearest(name, names)}. It takes: {', '.join(names)}")


def nearest(value: Any, allowed: Iterable[str]) -> str:
    """
    :param value: an unknown name
    :param allowed: the known names
    :return: ``"; did you mean 'x'?"``; empty if no name is near
    """
    match = difflib.get_close_matches(shown(value).strip("'\"")[:_LONGEST], list(allowed), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""
