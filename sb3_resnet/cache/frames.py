"""Image stacks in which each plane of pixels is stored once, however many observations show it."""

from __future__ import annotations

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

    def put(self, row: Array) -> int:
        """:return: the number of a new row with this content, to which nothing refers yet"""
        if not self._free:
            start = len(self._chunks) * self._rows
            self._chunks.append(np.empty((self._rows, *self.shape), self.dtype))
            self.references = np.concatenate([self.references, np.zeros(self._rows, np.int32)])
            self._free = [*range(start + self._rows - 1, start - 1, -1)]
        row_id = self._free.pop()
        self._chunks[row_id // self._rows][row_id % self._rows] = row
        return row_id

    def row(self, row_id: int) -> Array:
        """:return: one row, to read"""
        row: Array = self._chunks[row_id // self._rows][row_id % self._rows]
        return row

    def take(self, row_ids: Array) -> Array:
        """:return: copies of rows, ``(*row_ids.shape, *shape)``"""
        out = np.empty((row_ids.size, *self.shape), self.dtype)
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

    def __len__(self) -> int:
        return self.references.size - len(self._free)

    def __getstate__(self) -> dict[str, Any]:
        """Without the memory above the last row in use, which nobody has written."""
        used = int(self.references.nonzero()[0].max(initial=-1)) + 1
        chunks = [chunk[: max(0, used - index * self._rows)] for index, chunk in enumerate(self._chunks)]
        return {**self.__dict__, "_chunks": chunks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for index, chunk in enumerate(self._chunks):
            self._chunks[index] = np.empty((self._rows, *self.shape), self.dtype)
            self._chunks[index][: len(chunk)] = chunk


class ObservationStore:
    """
    Observations of several environments, each stored once, and each of their planes (channels) once.

    A new observation is compared with the one before it in the same environment: a stack that moved on by some planes
    shares the others. Nothing is assumed about how frames are stacked or episodes end; what does not match is stored
    whole. So it is exact for any data, and saves memory where the data are stacks.

    :param shape: of an observation, channels first
    :param dtype: of its pixels
    :param n_envs: number of environments
    """

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike, n_envs: int) -> None:
        self.shape = shape
        self._planes = Pool(shape[1:], dtype)
        self._stacks = Pool(shape[:1], np.int64)
        self._last: list[tuple[int, Array] | None] = [None] * n_envs
        self._shift = 1  # planes by which stacks move on: 1 for grey frames, 3 for RGB, found from the data

    def add(self, env: int, pixels: Array) -> tuple[int, int | None]:
        """
        Store one observation, unless it is the last one of its environment again.

        :param env: its environment
        :param pixels: ``(C, H, W)``
        :return: its id, for the caller to refer to before the next call, and that of an observation which is gone
        """
        known, last = self.last(env, pixels), self._last[env]
        if known is not None:
            return known, None
        obs_id = self._stacks.put(self._planes_of(pixels, last))
        for plane in self._stacks.row(obs_id).tolist():
            self._planes.refer(plane)
        self.refer(obs_id)
        self._last[env] = (obs_id, pixels.copy())
        return obs_id, None if last is None else self.release(last[0])

    def last(self, env: int, pixels: Array) -> int | None:
        """:return: the id of an observation, if it is the last one of its environment"""
        last = self._last[env] if env < len(self._last) else None
        return None if last is None or not same_pixels(last[1], pixels) else last[0]

    def latest(self) -> set[int]:
        """:return: the ids of the last observations of all environments"""
        return {last[0] for last in self._last if last is not None}

    def obs_ids(self) -> list[int]:
        """:return: the ids of all observations"""
        obs_ids: list[int] = self._stacks.references.nonzero()[0].tolist()
        return obs_ids

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the pixels."""
        return self._planes.dtype

    def refer(self, obs_id: int) -> None:
        """One more refers to the observation."""
        self._stacks.refer(obs_id)

    def release(self, obs_id: int) -> int | None:
        """:return: the id, if nothing refers to the observation any more and it is gone"""
        planes = self._stacks.row(obs_id).tolist()
        if not self._stacks.release(obs_id):
            return None
        for plane in planes:
            self._planes.release(plane)
        return obs_id

    def pixels(self, obs_ids: Array) -> Array:
        """:return: observations ``(*obs_ids.shape, C, H, W)``; zeros where an id is -1"""
        if not self.capacity:
            return np.zeros((*obs_ids.shape, *self.shape), self._planes.dtype)
        out = self._planes.take(self._stacks.take(np.maximum(obs_ids, 0)))
        out[obs_ids < 0] = 0
        return out

    @property
    def capacity(self) -> int:
        """Numbers of observations are below it; it grows."""
        return int(self._stacks.references.size)

    @property
    def n_planes(self) -> int:
        """Planes in memory."""
        return len(self._planes)

    def __len__(self) -> int:
        return len(self._stacks)

    def _planes_of(self, pixels: Array, last: tuple[int, Array] | None) -> Array:
        channels = len(pixels)
        planes: list[int] = []
        if last is not None:
            for shift in sorted(range(1, channels), key=lambda shift: (shift != self._shift, shift)):
                if np.array_equal(last[1][shift:], pixels[:-shift]):
                    self._shift = shift
                    planes = self._stacks.row(last[0])[shift:].tolist()
                    break
        for index in range(len(planes), channels):
            # Repeated planes: the zeros with which VecFrameStack begins an episode, the copies of other wrappers.
            repeated = index > 0 and np.array_equal(pixels[index], pixels[index - 1])
            planes.append(planes[-1] if repeated else self._planes.put(pixels[index]))
        return np.array(planes)


def same_pixels(one: Array, other: Array) -> bool:
    """:return: whether two observations of one shape are the same; the newest frame tells most of them apart"""
    return np.array_equal(one[-1], other[-1]) and np.array_equal(one, other)
