"""How much memory a replay buffer and a feature cache take, computed before it is allocated."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_action_dim

from sb3_resnet.cache.frames import Array, ObservationStore

_INDEX = 8  # bytes of the number under which an observation or a frame is found
_COUNT = 4  # bytes of a reference count
_MEASURED = 2000  # transitions after which a buffer's own use is a better guess than the shapes


def stock_buffer_bytes(model: Any, buffer_size: int) -> int:
    """
    Memory of SB3's ``ReplayBuffer``, which is allocated at once.

    :param model: an off-policy model
    :param buffer_size: number of transitions
    :return: size in bytes
    """
    space = model.observation_space
    parts: Any = space.spaces.values() if isinstance(space, spaces.Dict) else [space]
    pixels = sum(prod(part.shape) * part.dtype.itemsize for part in parts)
    return _rows(model, buffer_size) * int(pixels * observation_arrays(model) + _rest(model))


def observation_arrays(model: Any) -> int:
    """
    :param model: an off-policy model
    :return: arrays of observations that SB3 keeps: with ``optimize_memory_usage`` one, else also that of the next ones
    """
    return 1 if model.optimize_memory_usage else 2


def frame_buffer_bytes(model: Any, buffer_size: int, store: ObservationStore | None = None, count: int = 0) -> int:
    """
    Memory that a :class:`~sb3_resnet.buffers.FrameReplayBuffer` grows to.

    :param model: an off-policy model
    :param buffer_size: number of transitions
    :param store: holds observations of the same environment, which show how many of their frames are repeated;
        ``None``: assume that grey frames are stacked and that each step adds one
    :param count: number of observations that were added to ``store``
    :return: size in bytes, estimated
    """
    channels, *frame = model.observation_space.shape
    frames, observations = float(channels if channels <= 3 else 1), 1.0
    if store is not None:
        frames, observations = store.n_planes / count, len(store) / count
    frame_bytes = prod(frame) * model.observation_space.dtype.itemsize + _COUNT
    transition = frames * frame_bytes + observations * (channels * _INDEX + _COUNT)
    return int(_rows(model, buffer_size) * (transition + _INDEX * observation_arrays(model) + _rest(model)))


def store_of(played: Array) -> ObservationStore:
    """
    Store observations as a :class:`~sb3_resnet.buffers.FrameReplayBuffer` does.

    :param played: successive observations, ``(steps, envs, C, H, W)``
    :return: a store that holds them
    """
    store = ObservationStore(played.shape[2:], played.dtype, played.shape[1])
    for step in played:
        for env, pixels in enumerate(step):
            store.refer(store.add(env, pixels)[0])
    return store


def entry_bytes(extractor: Any, augment_copies: int | None = None) -> int:
    """
    Memory that a transition takes in the feature cache.

    :param extractor: a :class:`~sb3_resnet.extractor.ResNetExtractor`
    :param augment_copies: that of the :class:`~sb3_resnet.callbacks.FeatureCacheCallback`
    :return: size in bytes: of one entry, since with ``adapter="per_frame"`` a transition brings one frame that is new;
        of all copies, with all their frames, where there are copies; 0 if no stage of the trunk is frozen, so that
        nothing is cached
    """
    if not extractor.encoder.can_gain:
        return 0
    images = extractor.preprocessing
    blank = th.zeros((1, images.channels, *images.observed_size), device=extractor.encoder.device)
    entry = extractor.encoder(images.as_images(blank)[:1])
    images_kept = 1 if augment_copies is None else augment_copies * images.n_frames
    return int(entry.numel() * entry.element_size()) * images_kept


def largest_entry_bytes(extractor: Any, stages: Iterable[str], augment_copies: int | None = None) -> int:
    """
    Memory that a transition takes in the feature cache when it takes most: an entry is short while all stages are
    frozen, and a whole map once one trains.

    :param extractor: a :class:`~sb3_resnet.extractor.ResNetExtractor`; left as it is
    :param stages: the lowest stages that will train, phase by phase
    :param augment_copies: as for :func:`entry_bytes`
    :return: size in bytes
    """
    before, moved = extractor.boundary.stage, extractor.boundary.moved_at_update
    found = [entry_bytes(extractor, augment_copies)]
    try:
        for stage in stages:
            extractor.set_freeze_boundary(stage)
            found.append(entry_bytes(extractor, augment_copies))
    finally:
        extractor.set_freeze_boundary(before, moved)
    return max(found)


def growth_bytes(model: Any) -> int:
    """
    Memory that the replay buffer of a model, and its feature cache if there is one, will take beyond today's.

    :param model: an off-policy model
    :return: size in bytes; entries on a GPU are not counted
    """
    buffer = model.replay_buffer
    total = buffer.buffer_size * buffer.n_envs
    filled = total if buffer.full else buffer.pos * buffer.n_envs
    shared = getattr(buffer, "shared", None)
    if shared is None:
        needed = stock_buffer_bytes(model, total)
    else:
        needed = frame_buffer_bytes(model, total, shared.store if filled >= _MEASURED else None, filled)
        if shared.cache is not None and shared.cache.device.type == "cpu":
            limit = shared.cache.max_bytes
            copies = None if shared.cache.copies is None else shared.cache.copies.count
            entries = total * entry_bytes(model.policy.online.features_extractor, copies)
            needed += entries if limit is None else min(entries, limit)
    return int(needed * (1 - filled / total))


def stored_action_dtype(dtype: Any) -> np.dtype[Any]:
    """
    :param dtype: type of the actions
    :return: the type in which replay buffers keep them: float64 takes twice what it needs
    """
    kept = np.dtype(dtype)
    return np.dtype(np.float32) if kept == np.float64 else kept


def _rows(model: Any, buffer_size: int) -> int:
    n_envs = int(model.n_envs)
    return max(buffer_size // n_envs, 1) * n_envs


def _rest(model: Any) -> int:
    """Bytes of a transition without its observations: action, and reward, done and timeout as float32."""
    action = stored_action_dtype(model.action_space.dtype)
    return int(get_action_dim(model.action_space) * action.itemsize + 3 * 4)
