"""What the frames and labels of a pretraining come from, so that a run is not gone on from with those of another."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from functools import partial
from inspect import ismethod
from types import CodeType
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper

_STEPS = "max_episode_steps"  # of gymnasium's TimeLimit, which notes it here


def name_of(env: VecEnv) -> str:
    """:return: id of an environment in gymnasium's registry; empty where it has none"""
    try:
        spec = env.get_attr("spec")[0]
    except AttributeError:  # not gymnasium's, such as environments in C++
        return ""
    return "" if spec is None else str(spec.id)


def source_of(
    env: VecEnv, model: Any, replay_buffer: Any, labels: Any, info_keys: Sequence[str]
) -> dict[str, str | int | list[str] | dict[str, str]]:
    """
    :param env: environments
    :param model: an SB3 model that plays them, or ``None``
    :param replay_buffer: whose frames are trained on, or ``None``
    :param labels: function of an environment
    :param info_keys: keys of ``info`` that are labels
    :return: what tells them from others; models and buffers by a checksum, environments by their classes and the
        arguments that gymnasium knows of
    """
    player = "random actions" if model is None else _model(model)
    if replay_buffer is not None:
        player = f"{_buffer(replay_buffer)}, probe: {player}"
    named = labels if hasattr(labels, "__qualname__") else type(labels)
    content = " ".join(part for part in (_content(named), _held(labels)) if part)
    return {
        "env": name_of(env),
        "n_envs": env.num_envs,
        "space": str(env.observation_space),
        "wrappers": _classes(env),
        "source": player,
        "labels": [named.__qualname__, *info_keys],
        "labels_content": content,
        "labels_module": named.__module__,
        "env_kwargs": _arguments(env),
    }


def _arguments(env: VecEnv) -> dict[str, str]:
    """:return: arguments of an environment that its registration does not have, and those of gymnasium's wrappers"""
    if not name_of(env):
        return {}
    spec = env.get_attr("spec")[0]
    try:
        registered = gym.spec(spec.id)
        usual = {**registered.kwargs, _STEPS: registered.max_episode_steps}
    except gym.error.Error:  # its registration is gone
        usual = {}
    given = {name: _text(value) for name, value in {**spec.kwargs, _STEPS: spec.max_episode_steps}.items()}
    given.pop("render_mode", None)  # a picture for people changes nothing of what is observed
    found = {name: text for name, text in given.items() if name not in usual or _text(usual[name]) != text}
    for place, wrapper in enumerate(spec.additional_wrappers):
        if wrapper.kwargs:
            found[f"{wrapper.name} {place}"] = _text(wrapper.kwargs)
    return found


def _text(value: Any) -> str:
    """:return: the same text in each process, so of other than plain values the name of their class"""
    if isinstance(value, dict):
        return f"{{{', '.join(sorted(f'{_text(key)}: {_text(one)}' for key, one in value.items()))}}}"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_text, value))})"
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return f"{value.dtype}{value.shape} {_checksum([value])}"
    plain = value is None or isinstance(value, (str, bytes, bool, int, float, np.generic))
    return repr(value) if plain else type(value).__qualname__


def _content(function: Any) -> str:
    """:return: what tells a function without a name from others: the names and constants in it"""
    code = getattr(function, "__code__", None)
    return "" if code is None or function.__name__ != "<lambda>" else _in_code(code)


def _held(function: Any) -> str:
    """:return: what a function holds of its own: arguments of a ``partial``, variables around it, an object's values"""
    if isinstance(function, partial):
        own = getattr(function.func, "__qualname__", type(function.func).__qualname__)
        return " ".join([own, _held(function.func), _text(function.args), _text(function.keywords)])
    held: list[Any] = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    owner = function.__self__ if ismethod(function) else None if hasattr(function, "__qualname__") else function
    values = [] if owner is None else [getattr(owner, "__dict__", {})]
    return " ".join(map(_text, [*held, *values]))


def _in_code(code: CodeType) -> str:
    parts = [_in_code(one) if isinstance(one, CodeType) else _text(one) for one in code.co_consts]
    return " ".join([*code.co_names, *parts])


def _model(model: Any) -> str:
    # What else a state dict holds, such as the boundary of what is frozen, does not act.
    policy = getattr(model, "policy", model)
    tensors = [value for value in policy.state_dict().values() if isinstance(value, th.Tensor)]
    # As bytes, since NumPy has no bfloat16.
    values = [value.detach().cpu().contiguous().reshape(-1).view(th.uint8).numpy() for value in tensors]
    steps = f" of {model.num_timesteps:,} steps" if policy is not model else ""
    return f"{type(model).__name__}{steps}, checksum {_checksum(values)}"


def _buffer(buffer: Any) -> str:
    rows = buffer.size()
    values = [np.asarray(getattr(buffer, name)[:rows]) for name in ("actions", "rewards", "dones")]
    return f"{type(buffer).__name__} of {rows:,} rows, checksum {_checksum(values)}"


def _checksum(arrays: Iterable[np.ndarray]) -> str:
    found = 0
    for array in arrays:
        found = zlib.crc32(np.ascontiguousarray(array).data, found)
    return f"{found:08x}"


def _classes(env: Any) -> list[str]:
    """:return: classes of vectorised and single environments, from the outermost to the innermost"""
    found = [env]
    while isinstance(found[-1], VecEnvWrapper):
        found.append(found[-1].venv)
    inner = getattr(found[-1], "envs", None)
    found += inner[:1] if inner else []
    while isinstance(found[-1], gym.Wrapper):
        found.append(found[-1].env)
    return [f"{type(one).__module__}.{type(one).__qualname__}" for one in found]
