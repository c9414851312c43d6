"""What the columns of one replay buffer share: pixels, and their entries."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch as th

from sb3_resnet.cache.batch import EncodedBatch
from sb3_resnet.cache.entries import EntryCache
from sb3_resnet.cache.frames import Array, Gone, ObservationStore, same_pixels
from sb3_resnet.common import host
from sb3_resnet.common.lending import Lending

T = TypeVar("T")


@dataclass(frozen=True)
class Acted:
    """
    The observations that were acted upon last.

    :param pixels: one per environment
    :param entries: of their images, ``(n_envs, images, ...)``
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
    :param frame_channels: channels of one frame, which are stored together
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, n_envs: int, frame_channels: int = 1) -> None:
        self.store = ObservationStore(shape, dtype, n_envs, frame_channels)
        self.cache: EntryCache | None = None
        self.encodes = False  # whether batches come encoded; entries are kept meanwhile
        self.acted: Acted | None = None
        self.lending: Lending | None = None  # says when batches may come encoded; None: always

    def encode_with(self, cache: EntryCache, lending: Lending | None = None) -> None:
        """
        Give out encoded batches from now on.

        :param cache: keeps their entries
        :param lending: says when; ``None``: always
        :raises ValueError: if single frames are to be encoded, and the store keeps others
        """
        images = cache.encoder.trunk.preprocessing
        if images.per_frame and images.frame_channels != self.store.frame_channels:
            raise ValueError(
                f"The buffer stores frames of {self.store.frame_channels} channels, the extractor sees frames of "
                f"{images.frame_channels}: convert it with sb3_resnet.buffers.with_columns(buffer, frame_channels)"
            )
        if cache is not self.cache:
            cache.clear(self.store)
        self.cache = cache
        self.encodes = True
        self.lending = lending
        self.acted = None

    def add(self, env: int, pixels: Array) -> int:
        """:return: the id of an observation, stored and, if it was just acted upon, already encoded"""
        obs_id, is_new, gone = self.store.add(env, pixels)
        self._forget(gone)
        cache = self.active
        if is_new and cache is not None and cache.copies is None:
            image_ids = np.unique(self.image_ids(np.array([obs_id])))
            lacking = image_ids[~cache.has(image_ids)]
            if not self._recall(cache, env, pixels, obs_id, lacking):
                cache.expect(lacking)
        return obs_id

    def latest(self, pixels: Array) -> Array:
        """:return: ids of observations ``(n_envs,)`` that are the last ones of their environments; -1 of others"""
        found = [self.store.last(env, image) for env, image in enumerate(pixels)]
        return np.array([-1 if obs_id is None else obs_id for obs_id in found], np.int64)

    def image_ids(self, obs_ids: Array) -> Array:
        """:return: ids of what is encoded at once, ``(*obs_ids.shape, images)``; -1 where an observation's id is"""
        cache = self.cache
        if cache is None or not cache.per_frame:
            return obs_ids[..., None]
        if not self.store.capacity:
            return np.full((*obs_ids.shape, cache.encoder.trunk.preprocessing.n_frames), -1)
        frame_ids = self.store.frame_ids(np.maximum(obs_ids, 0))
        frame_ids[obs_ids < 0] = -1
        return frame_ids

    def release(self, obs_id: int) -> None:
        """One row less has the observation."""
        self._forget(self.store.release(obs_id))

    def batch(self, obs_ids: Array) -> EncodedBatch | Array:
        """:return: entries of sampled observations, or of a copy of each; their pixels where nothing encodes"""
        if self.lending is not None and not self.lending.updating:
            return self.store.pixels(obs_ids)
        cache = self.active
        if cache is not None and obs_ids.min(initial=0) >= 0:
            image_ids = self.image_ids(obs_ids) if cache.copies is None else cache.copies.sample(obs_ids)
            entries = self.guard(cache.get, image_ids, self.store)
            if entries is not None:
                return EncodedBatch(entries)
        elif self.cache is not None and self.encodes and len(self.cache):
            self.cache.clear(self.store)  # of entries from before the whole trunk was unfrozen
        return self.store.pixels(obs_ids)

    @property
    def active(self) -> EntryCache | None:
        """The cache, while there is something to encode."""
        cache = self.cache if self.encodes else None
        return cache if cache is not None and cache.encoder.can_gain else None

    def guard(self, act: Callable[..., T], *args: Any) -> T | None:
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

    def _recall(self, cache: EntryCache, env: int, pixels: Array, obs_id: int, lacking: Array) -> bool:
        """:return: whether what was acted upon had the entries of this observation"""
        acted = self.acted
        if acted is None or acted.version != cache.encoder.version or env >= len(acted.pixels):
            return False
        if not same_pixels(acted.pixels[env], pixels):
            return False
        _, firsts = np.unique(self.image_ids(np.array([obs_id])), return_index=True)
        image_ids = self.image_ids(np.array([obs_id])).ravel()[firsts]
        wanted = np.isin(image_ids, lacking)
        self.guard(cache.put, image_ids[wanted], acted.entries[env][th.as_tensor(firsts[wanted])])
        return True

    def _forget(self, gone: Gone) -> None:
        cache = self.cache
        if cache is None:
            return
        if cache.copies is not None:
            cache.forget(cache.copies.image_ids(np.array(gone.obs_ids, np.int64)).tolist())
        else:
            cache.forget(gone.frame_ids if cache.per_frame else gone.obs_ids)

    def __getstate__(self) -> dict[str, Any]:
        # Entries are cheap to make anew, and stale in another model.
        return {**self.__dict__, "cache": None, "encodes": False, "acted": None, "lending": None}
