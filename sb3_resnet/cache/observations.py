"""What the columns of one replay buffer share: pixels, and their entries."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch as th

from sb3_resnet.cache.encoder import EncodedBatch
from sb3_resnet.cache.entries import EntryCache
from sb3_resnet.cache.frames import Array, ObservationStore, same_pixels
from sb3_resnet.common import host


@dataclass(frozen=True)
class Acted:
    """
    The observations that were acted upon last.

    :param pixels: one an environment
    :param entries: what the encoder made of them
    :param version: of the encoder
    """

    pixels: Array
    entries: th.Tensor
    version: int


class Observations:
    """
    What the columns of one buffer share: the pixels, and the entries while there is an encoder.

    :param shape: of an observation
    :param dtype: of its pixels
    :param n_envs: number of environments
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, n_envs: int) -> None:
        self.store = ObservationStore(shape, dtype, n_envs)
        self.cache: EntryCache | None = None
        self.encodes = False  # whether batches come encoded; entries are kept meanwhile
        self.acted: Acted | None = None

    def encode_with(self, cache: EntryCache) -> None:
        """Give out encoded batches from now on."""
        self.cache = cache
        self.encodes = True
        self.acted = None
        cache.expect(self.store.numbers())

    def add(self, env: int, pixels: Array) -> int:
        """:return: the number of an observation, stored and, if it was just acted upon, already encoded"""
        number, gone = self.store.add(env, pixels)
        self._forget(gone)
        if self.entry(number) is None:
            entry = self._recall(env, pixels)
            self.keep(number, entry)
            if entry is None and self._active is not None:
                self._active.expect((number,))
        return number

    def entry(self, number: int | None) -> th.Tensor | None:
        """:return: the entry of an observation, if it was encoded before"""
        return None if number is None or self._active is None else self._active.find(number)

    def keep(self, number: int | None, entry: th.Tensor | None) -> None:
        """Keep the entry of an observation that was acted upon, once it has a number."""
        cache = self._active
        if number is not None and entry is not None and cache is not None:
            self._guard(cache.put, number, entry.to(cache.device))

    def release(self, number: int) -> None:
        """One row less has the observation."""
        self._forget(self.store.release(number))

    def batch(self, numbers: Array) -> EncodedBatch | Array:
        """:return: entries of sampled observations, or their pixels where nothing encodes"""
        cache = self._active
        if cache is not None:
            entries = self._guard(cache.get, numbers, self.store)
            if entries is not None:
                return EncodedBatch(entries, cache.encoder.centre)
        elif self.cache is not None and self.encodes:
            self.cache.clear()  # of entries from before the whole trunk was unfrozen
        return self.store.pixels(numbers)

    @property
    def _active(self) -> EntryCache | None:
        cache = self.cache if self.encodes else None
        return cache if cache is not None and cache.encoder.is_useful else None

    def _recall(self, env: int, pixels: Array) -> th.Tensor | None:
        acted, cache = self.acted, self.cache
        if acted is None or cache is None or acted.version != cache.encoder.version or env >= len(acted.pixels):
            return None
        return acted.entries[env] if same_pixels(acted.pixels[env], pixels) else None

    def _forget(self, gone: int | None) -> None:
        if gone is not None and self.cache is not None:
            self.cache.forget(gone)

    def _guard(self, act: Any, *args: Any) -> Any:
        """Out of memory ends the cache, not the training: the pixels are all there."""
        try:
            return act(*args)
        except (MemoryError, RuntimeError) as error:
            if not host.is_out_of_memory(error):
                raise
            warnings.warn(
                f"No memory for encoded observations ({error}): going on without the cache, more slowly. "
                "Give it a limit with FeatureCacheCallback(max_bytes=...), or device='cpu'.",
                stacklevel=3,
            )
            self.cache = None
            return None

    def __getstate__(self) -> dict[str, Any]:
        # Entries are cheap to make anew, and stale in another model.
        return {**self.__dict__, "cache": None, "encodes": False, "acted": None}
