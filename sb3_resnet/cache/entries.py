"""Encoded observations, each encoded once."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import numpy as np
import torch as th

from sb3_resnet.cache.frames import Array, ObservationStore
from sb3_resnet.common.memory import available_bytes
from sb3_resnet.nn.encoder import FrozenEncoder

_ENCODE_BATCH = 64  # observations encoded at once; more gains nothing on a CPU
_TOGETHER = 16  # one by one they take twice as long (benchmarks/results/choices.json)
_CHUNK_BYTES = 32 * 2**20  # memory grows in steps of this size
_RESERVE = 256 * 2**20  # left to others: Linux promises more memory than there is, and kills who uses it


class EntryCache:
    """
    Keeps what a :class:`~sb3_resnet.nn.encoder.FrozenEncoder` made of observations, by their id.

    :param encoder: encodes what is missing
    :param device: where entries live
    :param max_bytes: limit of their memory, beyond which the oldest go; ``None``: none
    """

    def __init__(self, encoder: FrozenEncoder, device: th.device | str, max_bytes: int | None = None) -> None:
        self.encoder = encoder
        self.device = th.device(device)
        self.max_bytes = max_bytes
        self.hits = 0
        self.misses = 0
        self._slots: dict[int, int] = {}  # by observation, in the order of encoding
        self._pending: dict[int, None] = {}  # stored and not encoded, in the order of storing
        self.clear()

    def suits(self, trunk: Any, dtype: str, device: th.device, max_bytes: int | None) -> bool:
        """:return: whether a new cache with these settings would be the same"""
        mine = (self.encoder.trunk, self.encoder.requested, self.device, self.max_bytes)
        return mine[0] is trunk and mine[1:] == (dtype, device, max_bytes) and self.encoder.holds()

    def clear(self) -> None:
        """Forget all entries."""
        self._pending |= dict.fromkeys(self._slots)
        self._slots.clear()
        self._chunks: list[th.Tensor] = []
        self._free: list[int] = []
        self._rows = 1
        self._version = self.encoder.version

    def get(self, obs_ids: Array, store: ObservationStore) -> th.Tensor:
        """
        :param obs_ids: of observations, ``(batch,)``
        :param store: has their pixels
        :return: their entries, encoded now where they are missing, ``(batch, ...)`` on :attr:`device`
        """
        self.encoder.refresh()
        self._drop_stale()
        wanted = obs_ids.tolist()
        missing = [obs_id for obs_id in dict.fromkeys(wanted) if obs_id not in self._slots]
        fresh: dict[int, th.Tensor] = {}
        together = self._with_others(missing, store) if missing else []
        for start in range(0, len(together), _ENCODE_BATCH):
            some = together[start : start + _ENCODE_BATCH]
            fresh.update(zip(some, self._encode(store.pixels(np.array(some))), strict=True))
        if self.encoder.version != self._version:
            return self.get(obs_ids, store)  # its precision fell back: the others are of the wrong one
        self.hits += len(wanted) - len(missing)
        self.misses += len(missing)
        entries = th.stack([fresh[n] if n in fresh else self._row(self._slots[n]) for n in wanted]) if fresh else None
        for obs_id, entry in fresh.items():
            self.put(obs_id, entry)
        return self._gather(wanted) if entries is None else entries

    def expect(self, obs_ids: Iterable[int]) -> None:
        """Observations were stored; those that are not encoded will be when they, or others, are needed."""
        self._pending |= {obs_id: None for obs_id in obs_ids if obs_id not in self._slots}

    def put(self, obs_id: int, entry: th.Tensor) -> None:
        """Keep the entry of an observation, made by the encoder as it is now."""
        self._drop_stale()
        self._pending.pop(obs_id, None)
        if not self._free and not self._grow(entry):
            oldest = next(iter(self._slots), None)
            if oldest is None:
                return  # not even one entry fits
            self._free.append(self._slots.pop(oldest))
        slot = self._free.pop()
        self._row(slot).copy_(entry)
        self._slots[obs_id] = slot

    def forget(self, obs_id: int) -> None:
        """The observation is gone, and its id will be another's."""
        self._pending.pop(obs_id, None)
        slot = self._slots.pop(obs_id, None)
        if slot is not None:
            self._free.append(slot)

    def find(self, obs_id: int) -> th.Tensor | None:
        """:return: the entry of an observation, if there is a valid one"""
        slot = self._slots.get(obs_id) if self._version == self.encoder.version else None
        return None if slot is None else self._row(slot)

    def __contains__(self, obs_id: int) -> bool:
        return self.find(obs_id) is not None

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def nbytes(self) -> int:
        """Memory reserved for entries."""
        return sum(chunk.element_size() * chunk.numel() for chunk in self._chunks)

    def _drop_stale(self) -> None:
        if self._version != self.encoder.version:
            self.clear()

    def _grow(self, entry: th.Tensor) -> bool:
        """:return: whether there was room for more entries"""
        size = entry.element_size() * entry.numel()
        if not self._chunks:
            self._rows = _rows_of(size, self.max_bytes)
        chunk = self._rows * size
        if self.max_bytes is not None and self.nbytes + chunk > self.max_bytes:
            return False
        left = available_bytes() if self.device.type == "cpu" else None  # a GPU says so itself
        if left is not None and left < chunk + _RESERVE:
            raise MemoryError(f"only {left / 1e6:.0f} MB are left")
        start = len(self._chunks) * self._rows
        self._chunks.append(th.empty((self._rows, *entry.shape), dtype=entry.dtype, device=self.device))
        self._free = [*range(start + self._rows - 1, start - 1, -1)]
        return True

    def _with_others(self, missing: list[int], store: ObservationStore) -> list[int]:
        """
        Some more that will be needed, as a batch takes less time than one after the other.

        If one of the environments' last observations is missing, all of them: they are acted upon next. Then what was
        acted upon without the encoder, by chance of exploration, the newest first, unless memory is limited.
        """
        together = dict.fromkeys(missing)
        latest = store.latest()
        if not latest.isdisjoint(missing):
            together |= {obs_id: None for obs_id in latest if obs_id not in self._slots}
        newest = reversed(self._pending) if self.max_bytes is None else ()
        for obs_id in islice(newest, _TOGETHER):
            if len(together) < _TOGETHER:
                together[obs_id] = None
        return [*together]

    def _gather(self, wanted: list[int]) -> th.Tensor:
        """:return: entries that are all there"""
        places = [divmod(self._slots[obs_id], self._rows) for obs_id in wanted]
        if self.device.type == "cpu":  # picking rows takes PyTorch half as long again (choices.json)
            arrays = [chunk.numpy() for chunk in self._chunks]
            return th.from_numpy(np.stack([arrays[chunk][row] for chunk, row in places]))
        chunks, rows = th.tensor(places, device=self.device).T
        out = th.empty((len(wanted), *self._chunks[0].shape[1:]), dtype=self._chunks[0].dtype, device=self.device)
        for chunk in {chunk for chunk, _ in places}:
            here = chunks == chunk
            out[here] = self._chunks[chunk][rows[here]]
        return out

    def _row(self, slot: int) -> th.Tensor:
        return self._chunks[slot // self._rows][slot % self._rows]

    def _encode(self, pixels: Array) -> th.Tensor:
        return self.encoder(th.as_tensor(pixels, device=self.encoder.device)).to(self.device)


def _rows_of(size: int, max_bytes: int | None) -> int:
    """:return: entries a chunk, so that whole chunks fill the limit"""
    if max_bytes is None:
        return max(1, _CHUNK_BYTES // size)
    chunks = -(-max_bytes // _CHUNK_BYTES)
    return max(1, max_bytes // size // chunks)
