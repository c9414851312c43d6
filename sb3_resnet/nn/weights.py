"""Read backbone weights from files and from torch's hub cache: the one place that opens weight files."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
from os import PathLike
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch as th
from torch import nn

from sb3_resnet.common import host
from sb3_resnet.common.arguments import path_of, shown
from sb3_resnet.nn import backbones
from sb3_resnet.nn.adapters import InflatedConv2d
from sb3_resnet.nn.cards import check_card, read_card
from sb3_resnet.nn.state_dicts import choose, shorten, unwrap, without_copies

#: Endings by which a value of ``weights=`` is known as a path, beside those of files that exist.
SUFFIXES = (".pth", ".pt", ".safetensors", ".zip", ".ckpt", ".bin", ".tar", ".th", ".pkl")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # a Path of a URL has one slash
_WHAT = (
    "Write the path of a .pth, .pt or .safetensors file, or pretrained=True for torchvision's ImageNet weights "
    "(in a probe: 'pretrained')."
)
_COUNTER = "num_batches_tracked"

_overwritten: ContextVar[bool] = ContextVar("overwritten", default=False)


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
    return _overwritten.get() or host.is_loading()


def check_weights(pretrained: bool, weights: Any, prefix: str | None) -> bool:
    """
    :param pretrained: as the extractor takes it
    :param weights: likewise
    :param prefix: its ``weights_prefix``
    :return: whether there are weights to read
    :raises ValueError: for a prefix without a file
    """
    if prefix is not None and weights is None:
        raise ValueError("weights_prefix says which ResNet of a file is meant: write weights=PATH beside it")
    return pretrained or weights is not None


def read_into(
    resnet: nn.Module,
    backbone: str,
    weights: str | PathLike[str] | Enum | None = None,
    prefix: str | None = None,
    seen: Mapping[str, Any] | None = None,
) -> None:
    """
    Copy the weights that an argument names into the trunk.

    :param resnet: a trunk without ``fc``
    :param backbone: torchvision's name of it
    :param weights: path of a file, or a member of torchvision's enum or its name; ``None``: the enum's ``DEFAULT``
    :param prefix: which ResNet of a file, where it holds several
    :param seen: what the trunk sees, :meth:`~sb3_resnet.nn.preprocessing.Preprocessing.seen`: compared with the card
        of a file that has one
    :raises ValueError: if they do not fit, or cannot be read
    :raises TypeError: for a value of another type
    :raises FileNotFoundError: if they are not there
    """
    if prefix is not None and not isinstance(prefix, str):
        raise TypeError(f"weights_prefix must be a string such as 'module.encoder_q.', got {shown(prefix)}")
    if isinstance(weights, Enum):
        weights = f"{type(weights).__name__}.{weights.name}"
    if weights is not None and _is_path(weights):
        state = read_file(weights)
        card = None if seen is None else read_card(str(weights))
        if card is not None and seen is not None:
            check_card(card, str(weights), backbone, seen)
        load_into(resnet, state, str(weights), prefix)
        return
    if prefix is not None:
        raise ValueError("weights_prefix says which ResNet of a file is meant: write weights=PATH, or leave it out")
    url = backbones.pretrained_source(backbone, None if weights is None else str(weights))
    state = backbones.legacy_pretrained_state(backbone) if url is None else read_url(url)
    load_into(resnet, state, f"{backbone} weights {url or ''}".strip())


def read_file(path: str | PathLike[str]) -> dict[str, th.Tensor]:
    """
    Read a checkpoint file as a flat state dict; pickles with ``weights_only=True``.

    :param path: a ``.safetensors`` file, a torch pickle (``.pth``, ``.pt``), or a model that SB3 saved (``.zip``)
    :return: tensors on the CPU, keys as in the file, wrappers such as ``state_dict`` removed; of an SB3 model those of
        its policy, without target networks
    :raises FileNotFoundError: if there is no such file
    :raises PermissionError: if it may not be read
    :raises ValueError: if it is a URL, empty, cut off, or not a checkpoint
    """
    if _URL.match(str(path)):
        raise ValueError(
            f"weights={shown(str(path))} is a URL, and weights are read from files: download it, for example with "
            "torch.hub.download_url_to_file(url, path), and write that path. pretrained=True downloads torchvision's."
        )
    path = path_of("weights", path)
    name = f"weights={shown(str(path))}"
    try:
        if path.is_dir():
            files = sorted(file.name for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
            there = f" Such files in it: {shorten(files)}." if files else ""
            raise FileNotFoundError(f"{name} is a folder, not a file. {_WHAT}{there}")
        if not path.is_file():
            raise FileNotFoundError(f"{name}: no such file. {_WHAT}")
        with path.open("rb") as file:
            if not file.read(1):
                raise ValueError(f"{name}: the file is empty. Download it again.")
        raw = _read_safetensors(path) if path.suffix.lower() == ".safetensors" else _read_pickle(path)
    except PermissionError as error:
        raise PermissionError(
            f"{name}: no permission to read it (chmod u+r lets its owner read a file). {_WHAT}"
        ) from error
    except FileNotFoundError:
        raise
    except OSError as error:  # such as a name that is too long, or a disk that fails
        raise FileNotFoundError(f"{name} cannot be read ({error.strerror or error}). {_WHAT}") from error
    state = unwrap(raw, str(path))
    return without_copies(state) if any(".features_extractor." in f".{key}" for key in state) else state


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
    return unwrap(raw, name)


def load_into(resnet: nn.Module, state: Mapping[str, th.Tensor], source: str, prefix: str | None = None) -> None:
    """
    Copy weights into the trunk; every key must match by name and shape. ``fc.*`` and stages above the last are ignored.

    :param resnet: a trunk, with ``Identity`` in the place of what it lacks; if its first convolution is inflated,
        weights for three channels are too
    :param state: keys plain, under one common prefix such as ``module.``, or numbered by ``nn.Sequential``; keys
        outside of the prefix are ignored
    :param source: name of the file, for the errors
    :param prefix: which ResNet, where there are several
    :raises ValueError: with all that is missing, unexpected, of another shape or kind, or not finite
    """
    wanted = resnet.state_dict()
    absent = tuple(f"{name}." for name, child in resnet.named_children() if isinstance(child, nn.Identity))
    chosen = choose(state, wanted, source, prefix)
    given = {key: value for key, value in chosen.items() if not key.startswith(absent)}
    first = resnet.get_submodule("conv1")
    if isinstance(first, InflatedConv2d) and "conv1.weight" in given:
        given["conv1.weight"] = first.inflated(given["conv1.weight"])
    # Checkpoints older than PyTorch 0.4.1 have no counter; nothing but momentum=None reads it.
    missing = [key for key in wanted if key not in given and not key.endswith(_COUNTER)]
    known = {key: (value, wanted[key]) for key, value in given.items() if key in wanted}
    other = [
        f"{key} {tuple(value.shape)} instead of {tuple(old.shape)}"
        for key, (value, old) in known.items()
        if value.shape != old.shape
    ]
    problems = {
        "missing": missing,
        "unexpected": [key for key in given if key not in wanted],
        "of another shape": other,
        **_broken(known),
    }
    if any(problems.values()):
        text = "; ".join(f"{kind}: {shorten(names)}" for kind, names in problems.items() if names)
        held = f" The file holds {shorten([*state])}." if 2 * len(missing) > len(wanted) else ""
        end = _end_of(given)
        if [kind for kind, names in problems.items() if names] == ["missing"] and _all_above(end, missing):
            hint = f"The file ends at {end}: write last_stage={end!r} or a lower one."
        else:
            hint = "Is backbone= the network that it was made for?"
        raise ValueError(f"{source} does not fit the backbone. {text}. {hint}{held}")
    resnet.load_state_dict({**wanted, **given})


def _end_of(state: Mapping[str, th.Tensor]) -> str:
    """The highest of the stages that a trunk has weights of."""
    return max(
        (stage for stage in backbones.STAGES if any(key.startswith(f"{stage}.") for key in state)), default="stem"
    )


def _all_above(stage: str, keys: Sequence[str]) -> bool:
    return all(key.startswith(backbones.STAGES[backbones.STAGES.index(stage) + 1 :]) for key in keys)


def _broken(known: Mapping[str, tuple[th.Tensor, th.Tensor]]) -> dict[str, list[str]]:
    """Names of tensors that would be copied in silence and compute nonsense, by kind; each with its dtype."""
    kinds: dict[str, list[str]] = {"no floating point numbers": [], "not dense": [], "not finite": [], "negative": []}
    for key, (value, old) in known.items():
        whole = not value.is_floating_point() and not key.endswith(_COUNTER)  # files of torchvision count in int64
        if value.is_complex() or (old.is_floating_point() and whole):
            kinds["no floating point numbers"].append(f"{key} ({str(value.dtype).removeprefix('torch.')})")
        elif value.layout != th.strided:
            kinds["not dense"].append(key)
        elif old.is_floating_point():
            read = value.to(old.dtype)  # what float64 can hold may be infinite in float32
            if not read.isfinite().all():
                kinds["not finite"].append(key)
            elif key.endswith("running_var") and (read < 0).any():
                kinds["negative"].append(key)
    return kinds


def _is_path(weights: str | PathLike[str]) -> bool:
    if not isinstance(weights, (str, PathLike)):
        raise TypeError(
            "weights must be a path, or a member of torchvision's enum or its name such as 'DEFAULT', got "
            f"{shown(weights)}"
        )
    if _URL.match(str(weights)):
        return True
    path = path_of("weights", weights)
    try:
        return path.suffix.lower() in SUFFIXES or len(path.parts) > 1 or path.exists()
    except OSError:  # such as a folder that may not be looked into
        return True


def _read_pickle(path: Path) -> Any:
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if "policy.pth" in archive.namelist():  # SB3's; torch's own files are archives too
                    policy = io.BytesIO(archive.read("policy.pth"))
                    return th.load(policy, map_location="cpu", weights_only=True)
        return th.load(path, map_location="cpu", weights_only=True)
    except (PermissionError, MemoryError):
        raise
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
    except PermissionError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is not a whole safetensors file ({error}). Download it again.") from error
