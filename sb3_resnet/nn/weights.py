"""Read backbone weights from files and from torch's hub cache: the one place that opens weight files."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BaseModel
from torch import nn

#: Keys under which checkpoints hide their state dict; ``r3m`` is R3M's (arXiv 2203.12601).
WRAPPERS = ("state_dict", "model", "r3m")
_SHOWN = 8  # names listed per kind of mismatch; a ResNet-50 for a ResNet-18 has hundreds

_overwritten: ContextVar[bool] = ContextVar("overwritten", default=False)
# Called by SB3 to rebuild a saved object; the state dict follows at once.
_LOADERS = {vars(owner)["load"].__func__.__code__ for owner in (BaseAlgorithm, BaseModel)}


@contextmanager
def about_to_be_overwritten() -> Iterator[None]:
    """Within it, new networks read no weights: another state dict is loaded into them next."""
    token = _overwritten.set(True)
    try:
        yield
    finally:
        _overwritten.reset(token)


def checkpoint_follows() -> bool:
    """
    Whether the network under construction gets its weights from elsewhere right away.

    True within :func:`about_to_be_overwritten` and below SB3's two ``load`` class methods, which tell neither policy
    nor extractor that they are loading. Reading the original weights there would need the network, or a file that
    the machine may no longer have, only to throw them away.
    """
    if _overwritten.get():
        return True
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code in _LOADERS:
            return True
    return False


def read_file(path: str | Path) -> dict[str, th.Tensor]:
    """
    Read a checkpoint file as a flat state dict; pickles with ``weights_only=True``.

    :param path: a ``.safetensors`` file, or a torch pickle (``.pth``, ``.pt``)
    :return: tensors on the CPU, keys as in the file, wrappers (:data:`WRAPPERS`) removed
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if it is empty, cut off, or not a checkpoint
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"weights={str(path)!r}: no such file. Write the path of a .pth, .pt or .safetensors file, "
            "or pretrained=True for torchvision's ImageNet weights."
        )
    if path.stat().st_size == 0:
        raise ValueError(f"weights={str(path)!r}: the file is empty. Download it again.")
    raw = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    return _unwrap(raw, str(path))


def read_url(url: str) -> dict[str, th.Tensor]:
    """
    Read weights from torch's hub cache, downloading them at the first use.

    :param url: a torchvision weights URL
    :return: tensors on the CPU
    :raises FileNotFoundError: if the file is not in the cache and cannot be downloaded
    :raises ValueError: if the file is broken
    """
    name = Path(urlparse(url).path).name
    folder = Path(th.hub.get_dir()) / "checkpoints"
    if (folder / name).exists():
        return read_file(folder / name)
    try:
        raw = th.hub.load_state_dict_from_url(
            url, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"Could not download {name} ({error}). Put the file into {folder} yourself, or name another file with "
            "weights=PATH, or write pretrained=False."
        ) from error
    return _unwrap(raw, name)


def load_into(resnet: nn.Module, state: Mapping[str, th.Tensor], source: str) -> None:
    """
    Copy weights into the trunk; every key must match by name and shape. ``fc.*`` and stages above the last are ignored.

    :param resnet: a trunk, with ``Identity`` in the place of what it lacks
    :param state: keys plain or under one common prefix such as ``module.``; keys outside of that prefix are ignored
    :param source: name of the file, for the errors
    :raises ValueError: with all that is missing, unexpected, of another shape, or not finite
    """
    wanted = resnet.state_dict()
    prefix = _prefix(state, wanted, source)
    given = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    absent = tuple(f"{name}." for name, child in resnet.named_children() if isinstance(child, nn.Identity))
    given = {key: value for key, value in given.items() if not key.startswith(absent)}
    # Checkpoints older than PyTorch 0.4.1 have no counter; nothing but momentum=None reads it.
    missing = [key for key in wanted if key not in given and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in given if key not in wanted]
    other = [
        f"{key} {tuple(value.shape)} instead of {tuple(wanted[key].shape)}"
        for key, value in given.items()
        if key in wanted and value.shape != wanted[key].shape
    ]
    broken = [key for key, value in given.items() if value.is_floating_point() and not value.isfinite().all()]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": other, "not finite": broken}
    if any(problems.values()):
        text = "; ".join(f"{kind}: {_shorten(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"{source} does not fit the backbone. {text}. Is backbone= the network that it was made for?")
    resnet.load_state_dict({**wanted, **given})


def _read_pickle(path: Path) -> Any:
    try:
        return th.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles raise almost anything: IndexError, struct.error, AssertionError
        reason = type(error).__name__
        raise ValueError(
            f"{str(path)!r} cannot be read as a checkpoint with weights_only=True ({reason}). It may be cut off, not a "
            "checkpoint, or hold more than tensors. Download it again, or save its state_dict() alone."
        ) from error


def _read_safetensors(path: Path) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"{str(path)!r} needs safetensors: pip install safetensors") from error
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is not a whole safetensors file ({error}). Download it again.") from error


def _unwrap(raw: Any, source: str) -> dict[str, th.Tensor]:
    for key in WRAPPERS:
        if isinstance(raw, Mapping) and isinstance(raw.get(key), Mapping):
            raw = raw[key]
    tensors = isinstance(raw, Mapping) and all(isinstance(k, str) and isinstance(v, th.Tensor) for k, v in raw.items())
    if not tensors or not raw:
        raise ValueError(
            f"{source!r} holds no state dict: expected tensors by name, plain or under {', '.join(WRAPPERS)}."
        )
    return dict(raw)


def _prefix(state: Mapping[str, th.Tensor], wanted: Iterable[str], source: str) -> str:
    """The prefix under which a whole ResNet lies; ``conv1.weight`` alone also ends every block's first conv."""
    found = [
        key.removesuffix("conv1.weight")
        for key in state
        if key.endswith("conv1.weight") and key.removesuffix("conv1.weight") + "layer1.0.conv1.weight" in state
    ]
    if len(found) > 1:
        raise ValueError(f"{source} holds several ResNets, under {', '.join(map(repr, found))}. Save the one you want.")
    if found:
        return found[0]
    # Something is missing, so this will be an error: under the prefix of most names it lists that alone.
    counts = Counter(key.removesuffix(name) for key in state for name in wanted if key.endswith(name))
    return counts.most_common(1)[0][0] if counts else ""


def _shorten(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
