"""Image stacks in which each frame is stored once, however many observations show it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]
_CHUNK_BYTES = 32 * 2**20  # memory grows in steps of this size, and only by what is written


class Pool:
    """
    Rows of equal shape, counted by how many refer to them; memory is taken when rows are written.

    :param shape: shape of a row
    :param dtype: type of its elements
    """

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self.shape = shape
        self.dtype = np.dtype(dtype)
        row_bytes = max(1, int(np.prod(shape)) * self.dtype.itemsize)
        self._rows = min(2**16, max(1, _CHUNK_BYTES // row_bytes))
        self._chunks: list[Array] = []
        self._free: list[int] = []
        self.references: Array = np.zeros(0, np.int32)
        #: How many rows each id has been given to.
        self.uses: Array = np.zeros(0, np.int64)

    def put(self, row: Array) -> int:
        """:return: the id of a new row with this content, to which nothing refers yet"""
        if not self._free:
            start = len(self._chunks) * self._rows
            self._chunks.append(np.empty((self._rows, *self.shape), self.dtype))
            self.references = np.concatenate([self.references, np.zeros(self._rows, np.int32)])
            self.uses = np.concatenate([self.uses, np.zeros(self._rows, np.int64)])
            self._free = [*range(start + self._rows - 1, start - 1, -1)]
        row_id = self._free.pop()
        self.uses[row_id] += 1
        self._chunks[row_id // self._rows][row_id % self._rows] = row
        return row_id

    def row(self, row_id: int) -> Array:
        """:return: one row, to read"""
        row: Array = self._chunks[row_id // self._rows][row_id % self._rows]
        return row

    def take(self, row_ids: Array) -> Array:
        """:return: copies of rows, ``(*row_ids.shape, *shape)``"""
        out = np.empty((row_ids.size, *self.shape), self.dtype)
        if len(self._chunks) == 1:
            np.take(self._chunks[0], row_ids.ravel(), axis=0, out=out, mode="clip")  # else it copies twice
        else:
            for index, row_id in enumerate(row_ids.ravel().tolist()):
                out[index] = self.row(row_id)
        return out.reshape(*row_ids.shape, *self.shape)

    def refer(self, row_id: int) -> None:
        """One more refers to the row."""
        self.references[row_id] += 1

    def release(self, row_id: int) -> bool:
        """
        One less refers to the row.

        :return: whether it was the last, so that the row is free now
        """
        self.references[row_id] -= 1
        if self.references[row_id] > 0:
            return False
        self._free.append(row_id)
        return True

    def ids(self) -> Array:
        """:return: the ids of all rows in use"""
        return self.references.nonzero()[0]

    def __len__(self) -> int:
        return self.references.size - len(self._free)

    def __getstate__(self) -> dict[str, Any]:
        """Without the memory above the last row in use, which nobody has written."""
        used = int(self.references.nonzero()[0].max(initial=-1)) + 1
        chunks = [chunk[: max(0, used - index * self._rows)] for index, chunk in enumerate(self._chunks)]
        return {**self.__dict__, "_chunks": chunks, "uses": np.trim_zeros(self.uses, "b")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.uses = np.zeros(len(self.references), np.int64)
        self.uses[: len(state["uses"])] = state["uses"]
        for index, chunk in enumerate(self._chunks):
            self._chunks[index] = np.empty((self._rows, *self.shape), self.dtype)
            self._chunks[index][: len(chunk)] = chunk


@dataclass
class Gone:
    """
    Ids that are free again, and will be those of others.

    :param obs_ids: of observations
    :param frame_ids: of frames
    """

    obs_ids: list[int] = field(default_factory=list)
    frame_ids: list[int] = field(default_factory=list)


class ObservationStore:
    """
    Observations of several environments, each stored once, and each of their frames once.

    A new observation is compared with the one before it in the same environment: a stack that moved on by some frames
    shares the others. Nothing is assumed about how frames are stacked or episodes end; what does not match is stored
    whole. So it is exact for any data, and saves memory where the data are stacks.

    :param shape: of an observation, channels first
    :param dtype: of its pixels
    :param n_envs: number of environments
    :param frame_channels: channels of one frame, which are stored together
    """

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike, n_envs: int, frame_channels: int = 1) -> None:
        self.shape = shape
        self.frame_channels = frame_channels
        self._n_frames = shape[0] // frame_channels
        self._frames = Pool((frame_channels, *shape[1:]), dtype)
        self._stacks = Pool((self._n_frames,), np.int64)
        self._last: list[tuple[int, Array] | None] = [None] * n_envs
        self._shift = 1  # frames by which stacks move on; 3 where RGB is stored by channel, found from the data

    def add(self, env: int, pixels: Array) -> tuple[int, bool, Gone]:
        """
        Store one observation, unless it is the last one of its environment again.

        :param env: its environment
        :param pixels: ``(C, H, W)``
        :return: its id, which the caller must refer to before the next call for this environment; whether it is new;
            and what is gone
        """
        known, last = self.last(env, pixels), self._last[env]
        if known is not None:
            return known, False, Gone()
        obs_id = self._stacks.put(self._frames_of(pixels, last))
        for frame_id in self._stacks.row(obs_id).tolist():
            self._frames.refer(frame_id)
        self.refer(obs_id)
        self._last[env] = (obs_id, pixels.copy())
        return obs_id, True, Gone() if last is None else self.release(last[0])

    def last(self, env: int, pixels: Array) -> int | None:
        """:return: the id of an observation, if it is the last one of its environment"""
        last = self._last[env] if env < len(self._last) else None
        return None if last is None or not same_pixels(last[1], pixels) else last[0]

    def obs_ids(self) -> Array:
        """:return: the ids of all observations"""
        return self._stacks.ids()

    def uses(self, obs_ids: Array) -> Array:
        """:return: how many observations have had the ids so far; an id and this number belong to one alone"""
        uses: Array = self._stacks.uses[obs_ids]
        return uses

    def frame_ids(self, obs_ids: Array | None = None) -> Array:
        """:return: the ids of the frames of observations, ``(*obs_ids.shape, frames)``; of all frames, ``(n,)``"""
        return self._frames.ids() if obs_ids is None else self._stacks.take(obs_ids)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the pixels."""
        return self._frames.dtype

    def refer(self, obs_id: int) -> None:
        """One more refers to the observation."""
        self._stacks.refer(obs_id)

    def release(self, obs_id: int) -> Gone:
        """:return: the observation, if nothing refers to it any more, and those of its frames that no other shows"""
        frame_ids = self._stacks.row(obs_id).tolist()
        if not self._stacks.release(obs_id):
            return Gone()
        return Gone([obs_id], [frame_id for frame_id in frame_ids if self._frames.release(frame_id)])

    def pixels(self, obs_ids: Array) -> Array:
        """:return: observations ``(*obs_ids.shape, C, H, W)``; zeros where an id is -1"""
        if not self.capacity:
            return np.zeros((*obs_ids.shape, *self.shape), self.dtype)
        out = self._frames.take(self._stacks.take(np.maximum(obs_ids, 0))).reshape(*obs_ids.shape, *self.shape)
        out[obs_ids < 0] = 0
        return out

    def frames(self, frame_ids: Array) -> Array:
        """:return: frames ``(*frame_ids.shape, frame_channels, H, W)``"""
        return self._frames.take(frame_ids)

    @property
    def capacity(self) -> int:
        """Ids of observations are below it; it grows."""
        return int(self._stacks.references.size)

    @property
    def n_planes(self) -> int:
        """Planes (channels of frames) in memory."""
        return len(self._frames) * self.frame_channels

    def __len__(self) -> int:
        return len(self._stacks)

    def _frames_of(self, pixels: Array, last: tuple[int, Array] | None) -> Array:
        count, channels = self._n_frames, self.frame_channels
        frame_ids: list[int] = []
        if last is not None:
            for shift in sorted(range(1, count), key=lambda shift: (shift != self._shift, shift)):
                if np.array_equal(last[1][shift * channels :], pixels[: -shift * channels]):
                    self._shift = shift
                    frame_ids = self._stacks.row(last[0])[shift:].tolist()
                    break
        frames = pixels.reshape(count, *self._frames.shape)
        for index in range(len(frame_ids), count):
            # Repeated frames: the zeros with which VecFrameStack begins an episode, the copies of other wrappers.
            repeated = index > 0 and np.array_equal(frames[index], frames[index - 1])
            frame_ids.append(frame_ids[-1] if repeated else self._frames.put(frames[index]))
        return np.array(frame_ids)


def same_pixels(one: Array, other: Array) -> bool:
    """:return: whether two observations of one shape are the same; the newest frame tells most of them apart"""
    return np.array_equal(one[-1], other[-1]) and np.array_equal(one, other)
