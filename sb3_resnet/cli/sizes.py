"""How much memory replay and cache will take, computed before anything is allocated."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.preprocessing import get_action_dim

from sb3_resnet.cache.frames import Array, ObservationStore

_NUMBER = 8  # bytes of the number by which a column, a stack or a plane is found
_COUNT = 4  # bytes of a reference count


def stock_buffer_bytes(model: Any, buffer_size: int) -> int:
    """
    :param model: an off-policy model
    :param buffer_size: transitions
    :return: what SB3's ``ReplayBuffer`` allocates at once for so many
    """
    space = model.observation_space
    pixels = int(np.prod(space.shape)) * space.dtype.itemsize * (1 if model.optimize_memory_usage else 2)
    return _rows(model, buffer_size) * int(pixels + _rest(model))


def frame_buffer_bytes(model: Any, buffer_size: int, played: Array) -> int:
    """
    What :class:`~sb3_resnet.buffers.FrameReplayBuffer` grows to, estimated from observations of this environment.

    :param model: an off-policy model
    :param buffer_size: transitions
    :param played: successive observations ``(steps, envs, C, H, W)``, which show how much of a stack is new
    """
    store = ObservationStore(played.shape[2:], played.dtype, played.shape[1])
    for step in played:
        for env, pixels in enumerate(step):
            store.refer(store.add(env, pixels)[0])
    share = played.shape[0] * played.shape[1]
    planes, stacks = store.n_planes / share, len(store) / share
    plane = int(np.prod(played.shape[3:])) * played.dtype.itemsize + _COUNT
    stack = played.shape[2] * _NUMBER + _COUNT
    columns = _NUMBER * (1 if model.optimize_memory_usage else 2)
    return int(_rows(model, buffer_size) * (planes * plane + stacks * stack + columns + _rest(model)))


def cache_bytes(model: Any, extractor: Any, observations: Array, count: int) -> int | None:
    """
    :param model: the model of the extractor
    :param extractor: a ``ResNetExtractor``
    :param observations: some, ``(batch, C, H, W)``; the first is encoded
    :param count: observations to keep entries of; with ``adapter="per_frame"`` each brings one frame that is new
    :return: what the entries of so many observations take; ``None`` where no stage of the trunk is frozen
    """
    if not extractor.encoder.can_gain:
        return None
    images = extractor.preprocessing.as_images(th.as_tensor(observations[:1], device=model.device))
    entry = extractor.encoder(images[:1])
    return int(count * entry.numel() * entry.element_size())


def _rows(model: Any, buffer_size: int) -> int:
    n_envs = int(model.n_envs)
    return max(buffer_size // n_envs, 1) * n_envs


def _rest(model: Any) -> int:
    """Bytes of a transition without its observations: action, and reward, done and timeout as float32."""
    action = np.dtype(ReplayBuffer._maybe_cast_dtype(model.action_space.dtype))
    return int(get_action_dim(model.action_space) * action.itemsize + 3 * 4)
