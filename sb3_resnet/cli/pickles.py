"""Unpickle what other people saved, without running what they may have put there."""

from __future__ import annotations

import base64
import binascii
import importlib
import io
import json
import pickle
import zipfile
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import BaseBuffer
from stable_baselines3.common.policies import BaseModel
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_resnet.cli.texts import one_line

#: Key under which SB3 keeps a pickled value in the JSON of a model.
SERIALIZED = ":serialized:"

# A pickle calls what it names, with arguments of its choice. These do nothing with any arguments but build themselves.
_NAMES = {
    "builtins": {"bytearray", "complex", "frozenset", "object", "range", "set", "slice"},
    "collections": {"Counter", "OrderedDict", "defaultdict", "deque"},
    "copyreg": {"_reconstructor"},
    "functools": {"partial"},
    "numpy": {"dtype", "ndarray"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "numpy.core.numeric": {"_frombuffer"},
    "numpy.random._mt19937": {"MT19937"},
    "numpy.random._pcg64": {"PCG64", "PCG64DXSM"},
    "numpy.random._pickle": {"__bit_generator_ctor", "__generator_ctor", "__randomstate_ctor"},
    "numpy.random.bit_generator": {"SeedSequence", "__pyx_unpickle_SeedSequence"},
    "pathlib": {"Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
    "rl_zoo3.utils": {"SimpleLinearSchedule"},
    "stable_baselines3.common.type_aliases": {"TrainFreq", "TrainFrequencyUnit"},
    "stable_baselines3.common.utils": {"ConstantSchedule", "FloatSchedule", "LinearSchedule"},
    "torch": {"Size", "device"},
    "torch._utils": {"_rebuild_parameter", "_rebuild_tensor_v2"},
    "torchvision.models._api": {"Weights"},
    "torchvision.transforms._presets": {"ImageClassification"},
}
_MOVED = {"numpy._core": "numpy.core", "pathlib._local": "pathlib"}
# Classes of these packages, where they derive from one of these.
_PACKAGES: dict[str, tuple[type, ...]] = {
    "gymnasium.spaces": (spaces.Space,),
    "sb3_contrib": (BaseModel, BaseFeaturesExtractor, BaseBuffer),
    "sb3_resnet": (BaseModel, BaseFeaturesExtractor, BaseBuffer),
    "sb3_resnet.buffers": (object,),
    "sb3_resnet.cache": (object,),
    "stable_baselines3": (BaseModel, BaseFeaturesExtractor, BaseBuffer),
    "torch.nn.modules.activation": (nn.Module,),
    "torch.optim": (th.optim.Optimizer,),
    "torchvision.models": (Enum,),
}


class UntrustedError(ValueError):
    """A file names something whose call may run any code."""


class _Unpickler(pickle.Unpickler):
    """Finds what :data:`_NAMES` and :data:`_PACKAGES` allow, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _load_storage
        if name in _NAMES.get(_canonical(module), ()):
            return getattr(importlib.import_module(module), name)
        found = class_in(_PACKAGES, module, name)
        if found is not None:
            return found
        if module == "torch" and isinstance(getattr(th, name, None), th.dtype):
            return getattr(th, name)
        if module.split(".")[0] == "numpy" and _is_scalar_type(name):
            return getattr(np, name)
        raise UntrustedError(f"{module}.{name}")


def loads(content: bytes, what: str) -> Any:
    """
    Unpickle data, and refuse everything that may be code.

    :param content: of a pickle
    :param what: whose it is, for the error
    :return: the object
    :raises UntrustedError: with the name of what it wants to call
    :raises ValueError: if it cannot be read
    """
    try:
        return _Unpickler(io.BytesIO(content)).load()
    except UntrustedError as error:
        raise UntrustedError(
            f"{what} wants to call {one_line(error)} when it is loaded, which may run any code. Load it with --trust "
            "if you know who made it."
        ) from None
    except Exception as error:  # damaged pickles raise almost anything
        raise ValueError(f"{what} cannot be unpickled ({one_line(error)})") from error


def read_pickle(path: str | Path, trust: bool = False) -> Any:
    """
    Read a file that SB3 pickled, such as a replay buffer.

    :param path: the file
    :param trust: also run the code that it may hold
    :return: the object
    :raises UntrustedError: with the name of what it wants to call
    :raises ValueError: if it cannot be read
    """
    content = Path(path).expanduser().read_bytes()
    if not trust:
        return loads(content, str(path))
    return pickle.loads(content)


def unpickled_data(content: bytes, path: Path) -> dict[str, Any]:
    """
    The pickled parts of a saved model, for ``custom_objects`` of SB3's ``load``, which then unpickles none itself.

    :param content: of the model's zip
    :param path: its name, for the errors
    :return: every pickled part by its name; and the environment, which SB3 would make from its name, as ``None``
    :raises UntrustedError: with the name of what a part wants to call
    :raises ValueError: if a part cannot be read
    """
    parts = {name: loads(pickled, f"{path}: its {name}") for name, pickled in _pickled_parts(content, path)}
    return {**parts, "env": None}


def trusted_part(content: bytes, path: Path, name: str) -> Any:
    """
    One pickled part of a saved model, for those who trust the file: code that the part holds is run.

    :param content: of the model's zip
    :param path: its name, for the errors
    :param name: of the part
    :return: the part; ``None`` if there is none of this name, or none that is pickled
    :raises ValueError: if a part cannot be read
    """
    pickled = dict(_pickled_parts(content, path)).get(name)
    return None if pickled is None else pickle.loads(pickled)


def _pickled_parts(content: bytes, path: Path) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        data = json.loads(archive.read("data"))
    for name, value in data.items():
        if not (isinstance(value, dict) and SERIALIZED in value):
            continue
        try:
            yield name, base64.b64decode(value[SERIALIZED])
        except (binascii.Error, TypeError, ValueError) as error:
            raise ValueError(f"{path}: its {name} cannot be read ({one_line(error)})") from error


def class_in(packages: dict[str, tuple[type, ...]], module: str, name: str) -> type | None:
    """
    :param packages: base classes by package
    :param module: where a class is said to be
    :param name: its name
    :return: the class, if its module is of such a package and it derives from one of the bases; no other module is
        imported
    """
    bases: tuple[type, ...] = ()
    for package, allowed in packages.items():
        if module == package or module.startswith(f"{package}."):
            bases += allowed
    if not bases or module.endswith("__main__"):
        return None
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
    ours = isinstance(found, type) and issubclass(found, bases)
    # What a module merely imports, such as pickle or os, is not its own.
    return found if ours and found.__module__.split(".")[0] == module.split(".")[0] else None


def _canonical(module: str) -> str:
    for new, old in _MOVED.items():
        if module == new or module.startswith(f"{new}."):
            return old + module.removeprefix(new)
    return module


def _is_scalar_type(name: str) -> bool:
    found = getattr(np, name, None)
    return isinstance(found, type) and issubclass(found, np.generic)


def _load_storage(content: bytes) -> Any:
    """In the place of torch's own, which unpickles without looking."""
    return th.load(io.BytesIO(content), map_location="cpu", weights_only=True)
