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
        number = self._free.pop()
        self._chunks[number // self._rows][number % self._rows] = row
        return number

    def row(self, number: int) -> Array:
        """:return: one row, to read"""
        row: Array = self._chunks[number // self._rows][number % self._rows]
        return row

    def take(self, numbers: Array) -> Array:
        """:return: copies of rows, ``(*numbers.shape, *shape)``"""
        out = np.empty((numbers.size, *self.shape), self.dtype)
        for index, number in enumerate(numbers.ravel().tolist()):
            out[index] = self.row(number)
        return out.reshape(*numbers.shape, *self.shape)

    def refer(self, number: int) -> None:
        """One more refers to the row."""
        self.references[number] += 1

    def release(self, number: int) -> bool:
        """
        One less refers to the row.

        :return: whether it was the last, so that the row is free now
        """
        self.references[number] -= 1
        if self.references[number] > 0:
            return False
        self._free.append(number)
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
        :return: its number, for the caller to refer to before the next call, and that of an observation which is gone
        """
        known, last = self.last(env, pixels), self._last[env]
        if known is not None:
            return known, None
        number = self._stacks.put(self._planes_of(pixels, last))
        for plane in self._stacks.row(number).tolist():
            self._planes.refer(plane)
        self.refer(number)
        self._last[env] = (number, pixels.copy())
        return number, None if last is None else self.release(last[0])

    def last(self, env: int, pixels: Array) -> int | None:
        """:return: the number of an observation, if it is the last one of its environment"""
        last = self._last[env] if env < len(self._last) else None
        return None if last is None or not same_pixels(last[1], pixels) else last[0]

    def latest(self) -> set[int]:
        """:return: the numbers of the last observations of all environments"""
        return {last[0] for last in self._last if last is not None}

    def numbers(self) -> list[int]:
        """:return: the numbers of all observations"""
        numbers: list[int] = self._stacks.references.nonzero()[0].tolist()
        return numbers

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the pixels."""
        return self._planes.dtype

    def refer(self, number: int) -> None:
        """One more refers to the observation."""
        self._stacks.refer(number)

    def release(self, number: int) -> int | None:
        """:return: the number, if nothing refers to the observation any more and it is gone"""
        planes = self._stacks.row(number).tolist()
        if not self._stacks.release(number):
            return None
        for plane in planes:
            self._planes.release(plane)
        return number

    def pixels(self, numbers: Array) -> Array:
        """:return: observations ``(*numbers.shape, C, H, W)``; zeros where a number is -1"""
        if not self.capacity:
            return np.zeros((*numbers.shape, *self.shape), self._planes.dtype)
        out = self._planes.take(self._stacks.take(np.maximum(numbers, 0)))
        out[numbers < 0] = 0
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
