"""Frames of played episodes, each stored once, and pairs of observations of one episode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np
import torch as th
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Frames:
    """
    Observations as references to frames.

    :param pixels: each frame once, uint8 ``(frames, c, H, W)``
    :param parts: frames of each observation, oldest first, ``(rows, k)``
    :param episodes: number of the episode of each, ``(rows,)``; rows of one episode follow each other in time
    :param actions: the action taken there, ``(rows,)``; -1 where none was, or where it is no number of a choice
    """

    pixels: th.Tensor
    parts: th.Tensor
    episodes: th.Tensor
    actions: th.Tensor

    def tensors(self) -> dict[str, th.Tensor]:
        """:return: all of it by name, to be saved"""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def of(cls, tensors: Mapping[str, th.Tensor]) -> Frames:
        """:return: what :meth:`tensors` gave"""
        return cls(**{field.name: tensors[field.name] for field in fields(cls)})

    def starts(self, gap: int) -> th.Tensor:
        """
        :param gap: steps between the two observations of a pair
        :return: rows whose episode goes on for that long, so that no pair crosses an episode's end
        """
        count = max(len(self.episodes) - gap, 0)
        return (self.episodes[:count] == self.episodes[len(self.episodes) - count :]).nonzero()[:, 0]

    def images(self, rows: th.Tensor, newest_only: bool) -> th.Tensor:
        """
        :param rows: of observations
        :param newest_only: the last frame of each instead of all
        :return: uint8 ``(n, channels, H, W)``
        """
        if newest_only:
            return self.pixels[self.parts[rows, -1]]
        return self.pixels[self.parts[rows]].flatten(1, 2)


class FrameWriter:
    """
    Takes the observations of several environments as they come, and keeps each frame once.

    :param capacity: largest number of frames
    :param shape: of an observation, ``(C, H, W)``
    :param frame_channels: channels of one frame
    :param n_envs: number of environments
    """

    def __init__(self, capacity: int, shape: tuple[int, int, int], frame_channels: int, n_envs: int) -> None:
        self._shape = (shape[0] // frame_channels, frame_channels, *shape[1:])
        self._pixels = np.zeros((capacity, *self._shape[1:]), np.uint8)
        self._latest: list[list[int] | None] = [None] * n_envs
        self._episode = np.full(n_envs, -1)
        self._rows: list[tuple[int, list[int]]] = []
        self._actions: list[int] = []
        self._last_row = [0] * n_envs
        self._episodes = 0
        #: Frames stored so far.
        self.used = 0

    @property
    def is_full(self) -> bool:
        """Whether there may be no room for another observation."""
        return self.used + self._shape[0] > len(self._pixels)

    def add(self, env: int, observation: Array, starts: bool) -> None:
        """
        :param env: which environment
        :param observation: what it shows, ``(C, H, W)``
        :param starts: whether an episode begins with it
        """
        frames = observation.reshape(self._shape)
        latest = self._latest[env]
        if starts or latest is None:
            self._episode[env] = self._episodes
            self._episodes += 1
        if starts or latest is None or not np.array_equal(self._pixels[latest[1:]], frames[:-1]):
            parts = [self._store(frames[0])]
            for before, frame in pairwise(frames):
                # After a reset a stack is filled up with frames that are all alike.
                parts.append(parts[-1] if np.array_equal(before, frame) else self._store(frame))
        else:
            parts = [*latest[1:], self._store(frames[-1])]
        self._latest[env] = parts
        self._last_row[env] = len(self._rows)
        self._rows.append((int(self._episode[env]), parts))
        self._actions.append(-1)

    def act(self, env: int, action: int) -> None:
        """
        :param env: which environment
        :param action: taken where its latest observation was
        """
        self._actions[self._last_row[env]] = action

    def finished(self) -> Frames:
        """:return: all observations, episode after episode"""
        episodes = np.array([episode for episode, _ in self._rows], np.int64)
        order = np.argsort(episodes, kind="stable")
        parts = np.array([parts for _, parts in self._rows], np.int64).reshape(len(order), self._shape[0])
        return Frames(
            th.from_numpy(self._pixels[: self.used]),
            th.from_numpy(parts[order]),
            th.from_numpy(episodes[order]),
            th.from_numpy(np.array(self._actions, np.int64)[order]),
        )

    def _store(self, frame: Array) -> int:
        self._pixels[self.used] = frame
        self.used += 1
        return self.used - 1


def shifted(images: th.Tensor, padding: int, probability: float, generator: th.Generator) -> th.Tensor:
    """
    Shift images at random, their edges repeated, as the augmentation ``random_shift`` does.

    :param images: ``(n, c, H, W)``
    :param padding: largest shift in pixels, up and down, left and right
    :param probability: that an image is shifted; the others stay where they are
    :param generator: of the shifts
    :return: images of the same shape
    """
    count, _, height, width = images.shape
    shifts = th.randint(-padding, padding + 1, (2, count, 1), generator=generator)
    shifts *= th.rand(count, 1, generator=generator) < probability
    rows = (th.arange(height) + shifts[0]).clamp(0, height - 1)
    columns = (th.arange(width) + shifts[1]).clamp(0, width - 1)
    which = th.arange(count)[:, None, None]
    return images[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
