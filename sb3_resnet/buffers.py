"""SB3's buffers, with frames stored once and observations encoded once."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import BaseBuffer, NStepReplayBuffer, ReplayBuffer, RolloutBuffer
from stable_baselines3.common.vec_env import VecNormalize

from sb3_resnet.cache.batch import EncodedBatch
from sb3_resnet.cache.frames import Array
from sb3_resnet.cache.observations import Observations
from sb3_resnet.common import host
from sb3_resnet.common.nonfinite import check_sampled_rewards
from sb3_resnet.common.vec_normalize import INSTEAD

__all__ = ["FrameNStepReplayBuffer", "FrameReplayBuffer"]


class Column:
    """
    Takes the place of an observation array in SB3's buffers: assign rows, gather batches.

    :param observations: shared by all columns of a buffer
    :param obs_ids: of the observation in each place, ``(rows, n_envs)``; -1: none
    """

    def __init__(self, observations: Observations, obs_ids: Array) -> None:
        self.obs_ids = obs_ids
        self._observations = observations

    @classmethod
    def empty(cls, observations: Observations, rows: int, n_envs: int) -> Column:
        """:return: a column without observations"""
        return cls(observations, np.full((rows, n_envs), -1, np.int64))

    @property
    def shape(self) -> tuple[int, ...]:
        """As that of the array in its place."""
        return (*self.obs_ids.shape, *self._observations.store.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Likewise."""
        return self._observations.store.dtype

    def __setitem__(self, row: int, values: Array) -> None:
        if np.shape(values) != self.shape[1:]:
            raise ValueError(
                f"Observations of shape {np.shape(values)} came to a replay buffer for {self.shape[1:]} (environments, "
                f"then the observation space). If VecNormalize is around the environment, {INSTEAD}."
            )
        for env, pixels in enumerate(values):
            obs_id = self._observations.add(env, pixels)
            self._observations.store.refer(obs_id)
            old, self.obs_ids[row, env] = int(self.obs_ids[row, env]), obs_id
            if old >= 0:
                self._observations.release(old)

    def __getitem__(self, key: Any) -> Any:
        keys, places = key if isinstance(key, tuple) else (key,), self.obs_ids.ndim
        if len(keys) >= places and all(isinstance(index, np.ndarray) for index in keys[:places]):
            return self._observations.batch(self.obs_ids[keys[:places]])
        rows, inner = keys[:places], keys[places:]
        if any(index is None or index is Ellipsis for index in rows):
            return np.asarray(self)[key]
        obs_ids = np.asarray(self.obs_ids[rows])
        selected = (slice(None),) * obs_ids.ndim + tuple(inner)
        return self._observations.store.pixels(obs_ids)[selected]

    def swapaxes(self, axis: int, other: int) -> Column:
        """As NumPy's, of rows and environments: SB3 lays a rollout out environment by environment."""
        return Column(self._observations, self.obs_ids.swapaxes(axis, other))

    def reshape(self, *shape: int) -> Column:
        """As NumPy's; the shape ends with that of an observation."""
        places = len(shape) - len(self._observations.store.shape)
        return Column(self._observations, self.obs_ids.reshape(shape[:places]))

    def release(self) -> None:
        """Forget the observations, since the column is not used any more."""
        for obs_id in self.obs_ids[self.obs_ids >= 0].tolist():
            self._observations.release(obs_id)

    def __len__(self) -> int:
        return len(self.obs_ids)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.asarray(self._observations.store.pixels(self.obs_ids), dtype=dtype)


def resize_replay_arrays(buffer: Any, rows: int, columns: Sequence[str]) -> None:
    """
    Give the arrays of an empty replay buffer another number of rows; they are found by their shape, not by name.

    :param buffer: an empty SB3 replay buffer; its ``buffer_size`` is changed too
    :param rows: the new number of rows
    :param columns: arrays that are left alone, since other objects take their places
    :raises HostPartMissingError: if there is no array of such a name
    """
    missing = [name for name in columns if not isinstance(getattr(buffer, name, None), np.ndarray)]
    if missing:
        raise host.HostPartMissingError(
            "stable-baselines3", f"array {missing[0]!r} in its replay buffers", "train with SB3's own replay buffer"
        )
    shape = (buffer.buffer_size, buffer.n_envs)
    for name, array in [*vars(buffer).items()]:
        if name not in columns and isinstance(array, np.ndarray) and array.shape[:2] == shape:
            setattr(buffer, name, np.zeros((rows, *array.shape[1:]), array.dtype))
    buffer.buffer_size = rows


class _Encoded(BaseBuffer):
    """Lets batches that are encoded already pass."""

    def to_torch(self, array: Any, copy: bool = True) -> Any:
        if isinstance(array, EncodedBatch):
            return array.to(self.device)
        return super().to_torch(array, copy)


class _ColumnBuffer(_Encoded, ReplayBuffer):
    """Puts columns in the place of SB3's observation arrays; SB3's own code adds and samples."""

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: th.device | str = "auto",
        n_envs: int = 1,
        **kwargs: Any,
    ) -> None:
        if isinstance(observation_space, spaces.Dict):
            raise ValueError(
                f"{type(self).__name__} stores one image, and the observation space is a Dict: leave "
                "replay_buffer_class out, so that SB3 takes its DictReplayBuffer, or write HerReplayBuffer"
            )
        # With its full size SB3 would reserve the memory that the columns save.
        super().__init__(n_envs, observation_space, action_space, device, n_envs, **kwargs)
        resize_replay_arrays(self, max(buffer_size // n_envs, 1), self.column_names())
        self.make_columns()

    def make_columns(self, frame_channels: int = 1) -> None:
        shared = Observations(self.obs_shape, self.observation_space.dtype, self.n_envs, frame_channels)
        for name in self.column_names():
            setattr(self, name, Column.empty(shared, self.buffer_size, self.n_envs))
        self.shared = shared

    def column_names(self) -> tuple[str, ...]:
        return ("observations",) if self.optimize_memory_usage else ("observations", "next_observations")

    def reset(self) -> None:
        super().reset()
        self.make_columns(self.shared.store.frame_channels)

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> Any:
        """As SB3's; refuses rewards that are NaN or infinite, which no gradient need show."""
        batch = super().sample(batch_size, env)
        check_sampled_rewards(batch)
        return batch


class FrameReplayBuffer(_ColumnBuffer):
    """
    SB3's ``ReplayBuffer``, each frame stored once: a seventh of its memory for stacks of four; same arguments.

    :param buffer_size: transitions of all environments together
    :param observation_space: space of the observations, as in SB3's class
    :param action_space: space of the actions, likewise
    :param device: where sampled batches go
    :param n_envs: number of environments
    :param kwargs: the other arguments of SB3's class
    """


class FrameNStepReplayBuffer(_ColumnBuffer, NStepReplayBuffer):
    """
    SB3's ``NStepReplayBuffer``, likewise.

    :param buffer_size: transitions of all environments together
    :param observation_space: space of the observations, as in SB3's class
    :param action_space: space of the actions, likewise
    :param device: where sampled batches go
    :param n_envs: number of environments
    :param kwargs: ``n_steps`` and ``gamma``, and the other arguments of SB3's class
    """


_CLASSES: dict[type, type[_ColumnBuffer]] = {ReplayBuffer: FrameReplayBuffer, NStepReplayBuffer: FrameNStepReplayBuffer}


def with_columns(buffer: Any, frame_channels: int = 1) -> _ColumnBuffer:
    """
    :param buffer: a buffer of SB3 or of this module, possibly filled
    :param frame_channels: channels of one frame, which are stored together; 3 for stacks of RGB frames that pass the
        trunk one by one
    :return: the same content with columns; itself if it has them
    :raises ValueError: for other classes, which may read the arrays in ways of their own
    """
    cls = type(buffer) if isinstance(buffer, _ColumnBuffer) else _CLASSES.get(type(buffer))
    if isinstance(buffer, _ColumnBuffer) and buffer.shared.store.frame_channels == frame_channels:
        return buffer
    if cls is None:
        known = ", ".join(cls.__name__ for cls in _CLASSES)
        raise ValueError(f"{type(buffer).__name__} cannot be cached, only {known} can: leave replay_buffer_class out")
    new = object.__new__(cls)
    new.__dict__.update(buffer.__dict__)
    vars(new).pop("sample", None)  # somebody watches the batches of the other buffer
    new.make_columns(frame_channels)
    filled = buffer.buffer_size if buffer.full else buffer.pos + int(buffer.optimize_memory_usage)
    start = buffer.pos + 1 if buffer.full and buffer.optimize_memory_usage else buffer.pos if buffer.full else 0
    for row in ((start + index) % buffer.buffer_size for index in range(filled)):
        for name in new.column_names():
            getattr(new, name)[row] = getattr(buffer, name)[row]
    return new


class LentRolloutBuffer(_Encoded, RolloutBuffer):
    """
    What a rollout buffer is while a :class:`~sb3_resnet.callbacks.FeatureCacheCallback` is at work: one with a column
    in the place of its observations. SB3's own code adds to it and draws minibatches.
    """

    #: What it is at other times.
    own_class: ClassVar[type]

    shared: Observations

    def reset(self) -> None:
        """As SB3's, before each rollout; the last observations stay, since the next rollout begins with them."""
        used = self.observations
        super().reset()
        self.observations: Any = Column.empty(self.shared, self.buffer_size, self.n_envs)
        if isinstance(used, Column):
            used.release()


def lend_rollout_buffer(buffer: Any, frame_channels: int = 1) -> LentRolloutBuffer:
    """
    Let the observations of a rollout buffer be a column, from the next rollout until :func:`give_rollout_buffer_back`.

    :param buffer: SB3's or sb3-contrib's rollout buffer; it is changed. One that is lent already stays as it is
    :param frame_channels: channels of one frame, which are stored together
    :return: the same object
    :raises ValueError: for other classes, which may read the arrays in ways of their own
    """
    if isinstance(buffer, LentRolloutBuffer):
        if buffer.shared.store.frame_channels == frame_channels:
            return buffer
        give_rollout_buffer_back(buffer)
    known = _rollout_buffers()
    if type(buffer) not in known:
        names = ", ".join(cls.__name__ for cls in known)
        raise ValueError(f"{type(buffer).__name__} cannot be cached, only {names} can: leave rollout_buffer_class out")
    buffer.shared = Observations(buffer.obs_shape, buffer.observation_space.dtype, buffer.n_envs, frame_channels)
    own_class = type(buffer)
    buffer.__class__ = type(f"Lent{own_class.__name__}", (LentRolloutBuffer, own_class), {"own_class": own_class})
    lent: LentRolloutBuffer = buffer
    return lent


def give_rollout_buffer_back(buffer: Any) -> None:
    """
    Make a buffer what it was before :func:`lend_rollout_buffer`, with the rollout that it holds.

    :param buffer: any rollout buffer; one that is not lent stays as it is
    """
    if isinstance(buffer, LentRolloutBuffer):
        other: Any = buffer
        other.observations = np.asarray(buffer.observations)
        del other.shared
        other.__class__ = buffer.own_class


def _rollout_buffers() -> list[type]:
    """:return: the classes whose observations a column may replace"""
    known: list[type] = [RolloutBuffer]
    with contextlib.suppress(ImportError):
        known.append(importlib.import_module("sb3_contrib.common.maskable.buffers").MaskableRolloutBuffer)
    return known
