"""Where frames come from: an environment that is played, or the replay buffer of a finished run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from sb3_resnet.common.playing import begin, next_actions
from sb3_resnet.nn.pretraining.frames import Frames, FrameWriter

Report = Callable[[float], None]


def play(
    env: VecEnv,
    capacity: int,
    frame_channels: int,
    seed: int,
    model: Any,
    epsilon: float,
    told: Report,
    may_go_on: Callable[[int], bool] = lambda frames: True,
) -> Frames:
    """
    Play until so many frames are there, or time is up.

    :param env: environments of uint8 images, channels first
    :param capacity: frames to keep
    :param frame_channels: channels of one frame
    :param seed: of the environments and the actions
    :param model: an SB3 model whose greedy actions are played; ``None``: random actions
    :param epsilon: share of random actions beside those of the model
    :param told: called with the share that is done
    :param may_go_on: called with the frames that are there; whether to play on
    :return: the frames
    """
    shape: Any = env.observation_space.shape
    writer = FrameWriter(capacity, shape, frame_channels, env.num_envs)
    rng = np.random.default_rng(seed)
    observations: Any = begin(env, seed)
    starts = np.ones(env.num_envs, bool)
    is_choice = n_actions(env.action_space) is not None
    while True:
        for index in range(env.num_envs):
            if writer.is_full:
                return writer.finished()
            writer.add(index, observations[index], bool(starts[index]))
        actions = next_actions(env, observations, model, epsilon, rng)
        if is_choice:
            for index, action in enumerate(actions):
                writer.act(index, int(action) - _first(env.action_space))
        observations, _, starts, _ = env.step(actions)
        told(writer.used / capacity)
        if not may_go_on(writer.used):
            return writer.finished()


def from_buffer(buffer: Any, capacity: int, frame_channels: int, space: Any, told: Report) -> Frames:
    """
    Read a replay buffer, the newest transitions where not all fit.

    An episode ends where a transition says so, and where a run was stopped and went on: there an observation is not the
    one that the transition before promised. With ``optimize_memory_usage`` promises are not kept. Then a stack
    of frames that does not continue the one before begins an episode; single images tell nothing, and a pair may cross
    a stop.

    :param buffer: SB3's ``ReplayBuffer`` or one derived from it, as ``save_replay_buffer`` wrote it, of such
        observations
    :param capacity: frames to keep
    :param frame_channels: channels of one frame
    :param space: observation space that the trunk is for
    :param told: called with the share that is done
    :return: the frames
    :raises ValueError: for an empty buffer
    """
    rows = _in_time(buffer)
    if len(rows) < 2:
        raise ValueError("The replay buffer is empty: give one that was saved with save_replay_buffer after training")
    starts = _newest(buffer, rows, capacity, frame_channels)
    rows = rows[len(rows) - len(starts) :]
    writer = FrameWriter(capacity, space.shape, frame_channels, buffer.n_envs)
    is_choice = n_actions(buffer.action_space) is not None
    for done, row in enumerate(rows):
        for env, observation in enumerate(np.asarray(buffer.observations[int(row)])):
            writer.add(env, observation, bool(starts[done, env]))
            if is_choice:
                writer.act(env, int(buffer.actions[row, env].item()) - _first(buffer.action_space))
        told((done + 1) / len(rows))
    return writer.finished()


def _newest(buffer: Any, rows: Any, capacity: int, frame_channels: int) -> NDArray[np.bool_]:
    """:return: where episodes begin, ``(n, n_envs)``, in as many of the newest rows as have room"""
    starts: list[Any] = []
    breaks: list[Any] = []
    used, later, later_alone = 0, np.empty(0), np.empty(0)
    for row in reversed(rows):
        seen = np.asarray(buffer.observations[int(row)])
        frames = seen.reshape(len(seen), -1, frame_channels, *seen.shape[2:])
        alone = 1 + (frames[:, 1:] != frames[:, :-1]).any(axis=(2, 3, 4)).sum(axis=1)  # as the writer stores a stack
        if starts:
            broken = (frames[:, 1:] != later[:, :-1]).any(axis=(1, 2, 3, 4))
            begins = np.asarray(buffer.dones[row]) > 0
            if not buffer.optimize_memory_usage:
                promised = np.asarray(buffer.next_observations[int(row)]).reshape(later.shape)
                begins |= (promised != later).any(axis=(1, 2, 3, 4))
            used += int(np.where(begins | broken, later_alone, 1).sum())
            starts[-1], breaks[-1] = begins, broken & ~begins
        if used + alone.sum() > capacity:
            break
        starts.append(np.ones(buffer.n_envs, bool))
        breaks.append(np.zeros(buffer.n_envs, bool))
        later, later_alone = frames, alone
    found = np.array(starts[::-1], bool).reshape(-1, buffer.n_envs)
    found[:1] = True  # whatever was before, there was no room for it
    broken = np.array(breaks[::-1], bool).reshape(found.shape)
    # Where few continue, channels are no stack of frames, and tell nothing of episodes.
    if buffer.optimize_memory_usage and 2 * broken.sum() < (~found).sum():
        found |= broken
    return found


def n_actions(space: Any) -> int | None:
    """:return: number of actions, where the space is a choice of one among several"""
    return int(space.n) if isinstance(space, spaces.Discrete) else None


def _first(space: Any) -> int:
    return int(space.start)


def _in_time(buffer: Any) -> Any:
    if not buffer.full:
        return np.arange(buffer.pos)
    # Where both share one array, the row at `pos` holds what followed the newest transition.
    skipped = int(buffer.optimize_memory_usage)
    return (np.arange(skipped, buffer.buffer_size) + buffer.pos) % buffer.buffer_size
