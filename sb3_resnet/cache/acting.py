"""Acting with the entries of a buffer, so that what is acted upon is encoded once."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch as th

from sb3_resnet.cache.batch import EncodedBatch
from sb3_resnet.cache.entries import EntryCache
from sb3_resnet.cache.frames import Array
from sb3_resnet.cache.observations import Acted, Observations


class CachedEncoding:
    """
    Encodes the observations that are acted upon, and shares the entries with the replay buffer.

    :param shared: the observations of the buffer, which stored them as the last ones, or is about to
    """

    def __init__(self, shared: Observations) -> None:
        self._shared = shared

    def encode(self, observations: th.Tensor) -> EncodedBatch | None:
        """
        :param observations: raw, one per environment, ``(n_envs, C, H, W)``
        :return: what the frozen stages make of them, from the buffer's entries where it has them; ``None`` where no
            entries of true images are kept (no stage of the trunk is frozen, they are augmented, or there was no
            memory), and where somebody else than ``learn()`` asks for actions, as an evaluation
        """
        lending = self._shared.lending
        if lending is not None and not lending.acting:
            return None
        return self._shared.guard(self._encode, observations)

    def _encode(self, observations: th.Tensor) -> EncodedBatch | None:
        shared, cache = self._shared, self._shared.active
        if cache is None or cache.copies is not None:
            return None
        cache.refresh(shared.store)
        pixels = observations.cpu().numpy().copy()
        image_ids = shared.image_ids(shared.latest(pixels))
        has_entry = cache.has(image_ids)
        if has_entry.all():
            entries = cache.find(image_ids.ravel())
        else:
            entries = self._with_absent(cache, pixels, image_ids, has_entry)
        shared.acted = Acted(pixels, entries.reshape(*image_ids.shape, *entries.shape[1:]), cache.encoder.version)
        return EncodedBatch(cache.encoder.trunk.per_observation(entries.to(observations.device)))

    def _with_absent(self, cache: EntryCache, pixels: Array, image_ids: Array, has_entry: Array) -> th.Tensor:
        """Encode what has no entry, in one batch and each image once."""
        images = pixels.reshape(image_ids.size, -1, *pixels.shape[2:])
        flat, absent = image_ids.ravel(), np.flatnonzero(~has_entry)
        firsts, places = _different(flat, absent, images)
        fresh = cache.encode(images[firsts])
        # Read before any is kept, which may take the place of another where memory is limited.
        entries = cache.merge(flat, ~has_entry.ravel(), fresh[th.as_tensor(places)])
        stored = flat[firsts] >= 0
        cache.put(flat[firsts][stored], fresh[th.as_tensor(stored)])
        return entries


class RolloutEncoding(CachedEncoding):
    """
    Encodes what is acted upon in a rollout, and stores it right away, since SB3 does so only after the step.

    :param buffer: the rollout buffer, with a column for its observations
    """

    def __init__(self, buffer: Any) -> None:
        super().__init__(buffer.shared)
        self._buffer = buffer
        self._acted_at: int | None = None  # row of the buffer for what was acted upon last

    def encode(self, observations: th.Tensor) -> EncodedBatch | None:
        """As for a replay buffer; ``None`` also for another number of observations than there are environments."""
        if len(observations) != self._buffer.n_envs:
            return None
        self._acted_at = self._buffer.pos
        for env, pixels in enumerate(observations.cpu().numpy()):
            self._shared.add(env, pixels)
        return self._shared.guard(self._encode, observations)

    def encode_valued(self, observations: th.Tensor) -> EncodedBatch | None:
        """
        Encode what a value is asked of: the observations after a rollout, with which the next one begins.

        :param observations: raw, ``(batch, C, H, W)``
        :return: as :meth:`encode`; ``None`` between acting and storing, when it is the last observation of an episode
            that was cut off, which is in no rollout
        """
        return None if self._buffer.pos == self._acted_at else self.encode(observations)


def _different(image_ids: Array, absent: Array, images: Array) -> tuple[Array, Array]:
    """:return: positions of the different images among the absent ones, and for each of these its place among them"""
    seen: dict[int, int] = {}
    firsts: list[int] = []
    places: list[int] = []
    for position in absent.tolist():
        image_id = int(image_ids[position])
        if image_id >= 0:
            place = seen.setdefault(image_id, len(firsts))
        else:  # not stored: the same frame, or empty ones, may follow each other in a stack
            same = bool(firsts) and np.array_equal(images[firsts[-1]], images[position])
            place = len(firsts) - 1 if same else len(firsts)
        if place == len(firsts):
            firsts.append(position)
        places.append(place)
    return np.array(firsts), np.array(places)
