"""Find the ResNet in what a checkpoint file holds: under wrappers, prefixes, and the numbers of ``nn.Sequential``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch as th

from sb3_resnet.common.arguments import shown

State = Mapping[str, th.Tensor]

_SHOWN = 8  # names listed per kind of mismatch; a ResNet-50 for a ResNet-18 has hundreds
_DEEPEST = 4  # dicts inside of dicts
# What torch.compile, FSDP and activation checkpointing put into the names of what they wrap, at any depth.
_PUT_IN = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# The first convolution of a stage of nn.Sequential(*resnet.children()): 4.0.conv1.weight.
_NUMBERED_STAGE = re.compile(r"((?:.*\.)?)(\d+)\.0\.conv1\.weight")
_NUMBERED_LAYER = re.compile(r"(\d+(?:\.\d+)*)\.weight")


def unwrap(raw: Any, source: str) -> dict[str, th.Tensor]:
    """
    :param raw: what a file holds
    :param source: name of the file, for the error
    :return: its state dict; where there are several, those that hold a ResNet, their names in front of the keys
    :raises ValueError: if it holds none, with what it holds
    """
    found = {path: _plain_names(state) for path, state in _state_dicts(raw)}
    found = {path: state for path, state in found.items() if resnets(state)} or found
    if not found:
        held = f"a dict of {shorten([shown(key) for key in raw])}" if isinstance(raw, Mapping) and raw else shown(raw)
        raise ValueError(
            f"{source!r} holds no state dict: expected tensors by name, plain or in a dict under a name such as "
            f"'state_dict' or 'model'. Found {held}."
        )
    if len(found) == 1:
        (state,) = found.values()
        return state
    return {path + key: value for path, state in found.items() for key, value in state.items()}


def resnets(state: State) -> dict[str, dict[str, th.Tensor]]:
    """
    :param state: a state dict
    :return: by prefix, the tensors of each ResNet under torchvision's names; others under the prefix are among them
    """
    # conv1.weight alone also ends every block's first convolution.
    plain = [
        key.removesuffix("conv1.weight")
        for key in state
        if key.endswith("conv1.weight") and key.removesuffix("conv1.weight") + "layer1.0.conv1.weight" in state
    ]
    found = {}
    for prefix in plain:
        inner = tuple(other for other in plain if other != prefix and other.startswith(prefix))
        found[prefix] = {
            key.removeprefix(prefix): value
            for key, value in state.items()
            if key.startswith(prefix) and not key.startswith(inner)
        }
    stages: dict[str, set[int]] = {}
    for key in state:
        match = _NUMBERED_STAGE.fullmatch(key)
        if match is not None:
            stages.setdefault(match[1], set()).add(int(match[2]))
    for prefix, numbers in stages.items():
        renamed = _from_numbers(state, prefix, sorted(numbers))
        if renamed is not None and prefix not in found:
            found[prefix] = renamed
    return found


def choose(state: State, wanted: Iterable[str], source: str, prefix: str | None = None) -> dict[str, th.Tensor]:
    """
    :param state: a state dict
    :param wanted: torchvision's names of a trunk
    :param source: name of the file, for the error
    :param prefix: of the ResNet, with or without the dot at its end; ``None``: there is one
    :return: the tensors of one ResNet under torchvision's names
    :raises ValueError: if there are several, or none under the prefix
    """
    found = resnets(state)
    if prefix is not None:
        name = _PUT_IN.sub("", f"{prefix.rstrip('.')}.") if prefix else ""
        if name in found:
            return found[name]
        if found or not any(key.startswith(name) for key in state):
            held = f"ResNets are under {_listed(found)}" if found else f"The file holds {shorten([*state])}"
            raise ValueError(f"{source} holds no ResNet under weights_prefix={shown(prefix)}. {held}.")
        return {key.removeprefix(name): value for key, value in state.items() if key.startswith(name)}
    if len(found) > 1:
        raise ValueError(
            f"{source} holds several ResNets, under {_listed(found)}. Save the one you want alone, or say which it is: "
            f"weights_prefix={next(iter(found))!r}."
        )
    if found:
        return next(iter(found.values()))
    # Something is missing, so this will be an error: under the prefix of most names it lists that alone.
    counts = Counter(key.removesuffix(name) for key in state for name in wanted if key.endswith(name))
    common = counts.most_common(1)[0][0] if counts else ""
    return {key.removeprefix(common): value for key, value in state.items() if key.startswith(common)}


def without_copies(state: State) -> dict[str, th.Tensor]:
    """
    :param state: of an SB3 policy
    :return: without target networks, and without the names under which a shared extractor stands again
    """
    kept = {key: value for key, value in state.items() if key.replace("_target.", ".", 1) not in {*state} - {key}}
    for name in ("pi_features_extractor.", "vf_features_extractor."):
        copies = {key: "features_extractor." + key.removeprefix(name) for key in kept if key.startswith(name)}
        if copies and all(key in kept and th.equal(kept[copy], kept[key]) for copy, key in copies.items()):
            kept = {key: value for key, value in kept.items() if key not in copies}
    return kept


def shorten(names: list[str]) -> str:
    """:return: the first of some names, and how many more there are"""
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _state_dicts(raw: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, State]]:
    """Dicts that hold tensors by name and nothing else, and the names under which they lie."""
    if not isinstance(raw, Mapping) or not raw or depth > _DEEPEST:
        return
    if all(isinstance(key, str) and isinstance(value, th.Tensor) for key, value in raw.items()):
        yield path, raw
        return
    for key, value in raw.items():
        if isinstance(key, str):
            yield from _state_dicts(value, f"{path}{key}.", depth + 1)


def _plain_names(state: State) -> dict[str, th.Tensor]:
    plain = {_PUT_IN.sub("", key): value for key, value in state.items()}
    return plain if len(plain) == len(state) else dict(state)


def _from_numbers(state: State, prefix: str, stages: list[int]) -> dict[str, th.Tensor] | None:
    """
    Rename what ``nn.Sequential(*resnet.children())`` numbers: the stages are those with blocks, the stem is before.

    :return: under torchvision's names; what follows the stages as ``fc``; ``None`` where the stem is not one
        convolution and one norm layer
    """
    inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    names = {f"{number}": f"layer{index}" for index, number in enumerate(stages, 1)}
    for key, value in inside.items():
        match = _NUMBERED_LAYER.fullmatch(key)
        if match is None:
            continue
        place = int(match[1].split(".")[0])
        if place > stages[-1]:
            names.setdefault(match[1], "fc")
        elif place < stages[0]:
            names.setdefault(match[1], "conv1" if value.ndim == 4 else "bn1")
    if sorted(name for name in names.values() if name in ("conv1", "bn1")) != ["bn1", "conv1"]:
        return None
    renamed = {}
    for key, value in inside.items():
        number = next((number for number in names if key.startswith(f"{number}.")), None)
        renamed[key if number is None else names[number] + key.removeprefix(number)] = value
    return renamed


def _listed(prefixes: Iterable[str]) -> str:
    return ", ".join(map(repr, prefixes))
