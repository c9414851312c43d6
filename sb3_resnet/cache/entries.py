"""Encoded frames and observations, each encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import numpy as np
import torch as th

from sb3_resnet.cache.copies import AugmentedCopies
from sb3_resnet.cache.frames import Array, ObservationStore
from sb3_resnet.cache.table import EntryTable
from sb3_resnet.nn.encoder import FrozenEncoder, frozen_tensors
from sb3_resnet.nn.trunk import Trunk

# Images encoded at once: in bfloat16 64 of one frame up to layer2 take longer than twice 32, and elsewhere as long
# (benchmarks/results/packing.json).
_ENCODE_BATCH = 32
_TOGETHER = 16  # one by one they take twice as long (benchmarks/results/choices.json)


class EntryCache:
    """
    Keeps what an extractor's encoder made of images: of frames where each passes the trunk alone, else of observations.
    Where images are augmented, these are those of the copies.

    :param encoder: encodes what is missing
    :param device: where entries live
    :param max_bytes: limit of their memory, beyond which the oldest go; ``None``: none
    :param expected: images that will be kept at once, most likely
    :param twins: trunks for which the entries are meant too, such as the target network's
    :param copies: makes the images that are encoded where they are augmented; ``None``: they are not
    :param differ: the error where a twin has other weights below the boundary
    """

    def __init__(
        self,
        encoder: FrozenEncoder,
        device: th.device | str,
        max_bytes: int | None = None,
        expected: int = 2**16,
        twins: Sequence[Trunk] = (),
        copies: AugmentedCopies | None = None,
        differ: str = "",
    ) -> None:
        self.encoder = encoder
        self.device = th.device(device)
        self.max_bytes = max_bytes
        self.expected = expected
        self.copies = copies
        self.hits = 0
        self.misses = 0
        self._twins = twins
        self._differ = differ
        self._slot_of: Array = np.full(1024, -1, np.int64)  # by image id; -1: no entry
        self._waiting: dict[int, None] = {}  # ids of images that are stored and not encoded, in the order of storing
        self._clear()

    @property
    def per_frame(self) -> bool:
        """Whether an entry belongs to a frame, whatever observations show it, or to an observation."""
        return self.encoder.trunk.preprocessing.per_frame and self.copies is None

    def get(self, image_ids: Array, store: ObservationStore) -> th.Tensor:
        """
        :param image_ids: of frames or observations, ``(batch, images)``
        :param store: has their pixels
        :return: their entries, encoded now where they are missing, for each observation side by side; on :attr:`device`
        :raises ValueError: if a twin differs below the freeze boundary
        """
        self.refresh(store)
        wanted = image_ids.ravel()
        slots = self._slots(wanted)
        absent = slots < 0
        entries = self._fill(wanted, absent, store) if absent.any() else self._read(slots)
        self.hits += int(wanted.size - np.count_nonzero(absent))
        return self.encoder.trunk.per_observation(entries)

    def refresh(self, store: ObservationStore) -> None:
        """
        Forget all entries if weights, boundary or precision have changed since.

        :raises ValueError: if a twin differs below the freeze boundary
        """
        self.encoder.refresh()
        if self._version != self.encoder.version:
            refuse_different_twins(self.encoder.trunk, self._twins, self._differ)
            self.clear(store)

    def clear(self, store: ObservationStore) -> None:
        """Forget all entries; everything stored waits for one again, but for copies, which may never be sampled."""
        self._clear()
        if self.copies is None:
            self._waiting = dict.fromkeys((store.frame_ids() if self.per_frame else store.obs_ids()).tolist())

    def suits(
        self, encoder: FrozenEncoder, device: th.device, max_bytes: int | None, copies: AugmentedCopies | None
    ) -> bool:
        """:return: whether a new cache with these settings would be the same"""
        mine = (self.device, self.max_bytes, self.copies)
        return self.encoder is encoder and mine == (device, max_bytes, copies)

    def has(self, image_ids: Array) -> Array:
        """:return: which images have a valid entry; those with id -1 have none"""
        if self._version != self.encoder.version:
            return np.zeros(image_ids.shape, bool)
        return (self._slots(image_ids) >= 0) & (image_ids >= 0)

    def find(self, image_ids: Array) -> th.Tensor:
        """:return: entries of images that have one, ``(n, ...)`` on :attr:`device`"""
        return self._read(self._slots(image_ids))

    def merge(self, image_ids: Array, absent: Array, fresh: th.Tensor) -> th.Tensor:
        """
        :param image_ids: of the wanted images, ``(n,)``
        :param absent: which of them have no entry, ``(n,)``
        :param fresh: the entries of those, in order
        :return: entries of all, ``(n, ...)``. Maps are in channels-last order, as those that :meth:`find` reads: the
            order decides how the stages above add up, and so the last bits of what a resumed run computes
        """
        order = th.channels_last if fresh.ndim == 4 else th.contiguous_format
        shape = (len(image_ids), *fresh.shape[1:])
        entries = th.empty(shape, dtype=fresh.dtype, device=fresh.device, memory_format=order)
        entries[th.as_tensor(absent)] = fresh
        if not absent.all():
            entries[th.as_tensor(~absent)] = self.find(image_ids[~absent])
        return entries

    def put(self, image_ids: Array, entries: th.Tensor) -> None:
        """Keep the entries of different images that have none; call :meth:`refresh` before they are made."""
        if not len(image_ids):
            return
        for image_id in image_ids.tolist():
            self._waiting.pop(image_id, None)
        if not self._waiting:
            self._waiting.clear()  # an emptied dict keeps the memory of all that it ever held
        self._reach(int(image_ids.max(initial=-1)))
        slots = self._free_slots(len(image_ids), entries)
        # Where memory is limited to less than these, the first of them find none.
        image_ids, entries = image_ids[len(image_ids) - len(slots) :], entries[len(entries) - len(slots) :]
        if len(slots):
            self._table.write(slots, entries)
            self._slot_of[image_ids], self._id_at[slots] = slots, image_ids

    def expect(self, image_ids: Array) -> None:
        """Images were stored; they will be encoded when they, or others, are needed."""
        self._waiting |= dict.fromkeys(image_ids.tolist())

    def forget(self, image_ids: Sequence[int]) -> None:
        """The images are gone, and their ids will be those of others."""
        for image_id in image_ids:
            self._waiting.pop(image_id, None)
            if image_id < len(self._slot_of) and self._slot_of[image_id] >= 0:
                slot = int(self._slot_of[image_id])
                self._slot_of[image_id], self._id_at[slot] = -1, -1
                self._free.append(slot)

    def __len__(self) -> int:
        return self._table.used - len(self._free)

    @property
    def nbytes(self) -> int:
        """Memory taken by entries."""
        return self._table.nbytes

    def encode(self, images: Array | th.Tensor) -> th.Tensor:
        """:return: entries of raw images ``(n, c, H, W)``, on :attr:`device`"""
        parts = [
            self.encoder(th.as_tensor(images[start : start + _ENCODE_BATCH], device=self.encoder.device))
            for start in range(0, len(images), _ENCODE_BATCH)
        ]
        return (parts[0] if len(parts) == 1 else th.cat(parts)).to(self.device)

    def _clear(self) -> None:
        self._table = EntryTable(self.device, self.expected, self.max_bytes)
        self._slot_of.fill(-1)
        self._id_at: Array = np.zeros(0, np.int64)  # by slot; -1: free
        self._free: list[int] = []
        self._oldest = 0  # slot whose turn it is where memory is limited
        self._version = self.encoder.version

    def _slots(self, image_ids: Array) -> Array:
        self._reach(int(image_ids.max(initial=-1)))
        return self._slot_of[image_ids]

    def _read(self, slots: Array) -> th.Tensor:
        if self._table.has_rows:
            return self._table.read(slots)
        # None are wanted, and none were made: a blank image tells what shape they would have.
        images = self.encoder.trunk.preprocessing
        channels = images.frame_channels if images.per_frame else images.channels
        return self.encode(np.zeros((1, channels, *images.observed_size), np.uint8))[:0]

    def _reach(self, image_id: int) -> None:
        if image_id >= len(self._slot_of):
            more = np.full(max(image_id, len(self._slot_of)), -1, np.int64)
            self._slot_of = np.concatenate([self._slot_of, more])

    def _fill(self, wanted: Array, absent: Array, store: ObservationStore) -> th.Tensor:
        """:return: all wanted entries, after the absent ones were encoded"""
        missing, places = np.unique(wanted[absent], return_inverse=True)
        self.misses += len(missing)
        together = np.concatenate([missing, self._others(missing)])
        fresh = self.encode(self._images(together, store))
        # Read before any is kept, which may take the place of another where memory is limited.
        entries = self.merge(wanted, absent, fresh[th.as_tensor(places)])
        self.put(together, fresh)
        return entries

    def _images(self, image_ids: Array, store: ObservationStore) -> Array | th.Tensor:
        if self.copies is not None:
            return self.copies.pixels(image_ids, store, self.encoder.device)
        return store.frames(image_ids) if self.per_frame else store.pixels(image_ids)

    def _others(self, missing: Array) -> Array:
        """
        Some more that will be needed, as a batch takes less time than one after the other.

        Those that are acted upon next, or were acted upon by chance of exploration: the newest first, unless memory is
        limited.
        """
        count = max(0, _TOGETHER - len(missing)) if self.max_bytes is None else 0
        known = {*missing.tolist()}
        newest = (image_id for image_id in reversed(self._waiting) if image_id not in known)
        return np.fromiter(islice(newest, count), np.int64)

    def _free_slots(self, count: int, entries: th.Tensor) -> Array:
        """:return: slots for so many entries; fewer where the limit allows no more at once"""
        slots = [self._free.pop() for _ in range(min(count, len(self._free)))]
        slots += self._table.new_slots(count - len(slots), entries[0]).tolist()
        if self._table.used > len(self._id_at):
            self._id_at = np.concatenate([self._id_at, np.full(max(1024, self._table.used), -1, np.int64)])
        in_use = self._table.used - len(slots)
        slots += [self._evict() for _ in range(min(count - len(slots), in_use))]
        return np.array(slots, np.int64)

    def _evict(self) -> int:
        """:return: the slot of the oldest entry, which is gone; slots are given out in turn"""
        while self._id_at[self._oldest] < 0:
            self._oldest = (self._oldest + 1) % self._table.used
        slot = self._oldest
        self._oldest = (slot + 1) % self._table.used
        self._slot_of[self._id_at[slot]], self._id_at[slot] = -1, -1
        return slot


def refuse_different_twins(trunk: Trunk, twins: Sequence[Trunk], message: str) -> None:
    """
    :param trunk: what encodes
    :param twins: trunks for which the entries are meant too
    :param message: of the error
    :raises ValueError: if a twin has other weights below the freeze boundary
    """
    mine = frozen_tensors(trunk)
    for twin in twins:
        # Not equal bit for bit: with tau < 1 SB3 rounds the target anew at each update, frozen or not.
        same = (th.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(mine, frozen_tensors(twin), strict=True))
        if not all(same):
            raise ValueError(message)
