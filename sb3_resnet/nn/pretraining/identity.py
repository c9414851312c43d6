"""What the frames and labels of a pretraining come from, so that a run is not gone on from with those of another."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper


def name_of(env: VecEnv) -> str:
    """:return: id of an environment in gymnasium's registry; empty where it has none"""
    try:
        spec = env.get_attr("spec")[0]
    except AttributeError:  # not gymnasium's, such as environments in C++
        return ""
    return "" if spec is None else str(spec.id)


def source_of(
    env: VecEnv, model: Any, replay_buffer: Any, labels: Any, info_keys: Sequence[str]
) -> dict[str, str | int | list[str]]:
    """
    :param env: environments
    :param model: an SB3 model that plays them, or ``None``
    :param replay_buffer: whose frames are trained on, or ``None``
    :param labels: function of an environment
    :param info_keys: keys of ``info`` that are labels
    :return: what tells them from others; models and buffers by a checksum, environments by their classes
    """
    player = "random actions" if model is None else _model(model)
    if replay_buffer is not None:
        player = f"{_buffer(replay_buffer)}, probe: {player}"
    named = labels if hasattr(labels, "__qualname__") else type(labels)
    return {
        "env": name_of(env),
        "n_envs": env.num_envs,
        "space": str(env.observation_space),
        "wrappers": _classes(env),
        "source": player,
        "labels": [named.__qualname__, *info_keys],
        "labels_module": named.__module__,
    }


def _model(model: Any) -> str:
    # What else a state dict holds, such as the boundary of what is frozen, does not act.
    tensors = [value for value in model.policy.state_dict().values() if isinstance(value, th.Tensor)]
    # As bytes, since NumPy has no bfloat16.
    values = [value.detach().cpu().contiguous().reshape(-1).view(th.uint8).numpy() for value in tensors]
    return f"{type(model).__name__} of {model.num_timesteps:,} steps, checksum {_checksum(values)}"


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
