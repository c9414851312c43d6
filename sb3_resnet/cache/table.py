"""Rows of equal shape in memory that is taken when they are written."""

from __future__ import annotations

import numpy as np
import torch as th

from sb3_resnet.cache.frames import Array
from sb3_resnet.common.memory import available_bytes

_STEP_BYTES = 32 * 2**20  # first memory on a GPU, and how much is written between two looks at what is left
_RESERVE = 256 * 2**20  # left to others: Linux promises more memory than there is, and kills who uses it


class EntryTable:
    """
    A growing table of entries; a batch is one gather.

    On a CPU all expected rows are reserved at once, since the system gives memory only where it is written. On a GPU,
    and where more rows come than were expected, each new part is half as large as all before it.

    :param device: where the rows live
    :param expected: rows that will be needed, most likely
    :param max_bytes: limit of the memory; ``None``: none
    """

    def __init__(self, device: th.device, expected: int, max_bytes: int | None = None) -> None:
        self.device = device
        self._expected = expected
        self._max_bytes = max_bytes
        self._parts: list[th.Tensor] = []
        self._starts: list[int] = []
        self._row_bytes = 0
        self._checked = 0  # rows that there was memory for at the last look
        #: Rows that were given out.
        self.used = 0

    def new_slots(self, count: int, like: th.Tensor) -> Array:
        """
        :param count: wanted rows
        :param like: an entry, ``(n,)`` or ``(c, h, w)``
        :return: slots of so many rows, or of as many as the limit allows
        :raises MemoryError: if the machine has no more memory
        """
        self._row_bytes = like.element_size() * like.numel()
        limit = None if self._max_bytes is None else self._max_bytes // max(1, self._row_bytes)
        count = count if limit is None else max(0, min(count, limit - self.used))
        while self.used + count > self._capacity:
            self._grow(like, limit)
        self._look_at_memory(self.used + count)
        slots = np.arange(self.used, self.used + count)
        self.used += count
        return slots

    def write(self, slots: Array, entries: th.Tensor) -> None:
        """Write entries ``(n, ...)`` into their slots."""
        rows = _channels_last(entries).to(self.device)
        for part, here, rows_there in self._by_part(slots):
            part.index_copy_(0, rows_there, rows if here is None else rows[here])

    def read(self, slots: Array) -> th.Tensor:
        """:return: the entries of slots, ``(n, ...)``, maps in channels-last order"""
        pieces = [*self._by_part(slots)]
        if len(pieces) == 1:
            part, _, rows = pieces[0]
            return _channels_first(part.index_select(0, rows))
        out = th.empty((len(slots), *self._parts[0].shape[1:]), dtype=self._parts[0].dtype, device=self.device)
        for part, here, rows in pieces:
            out[here] = part.index_select(0, rows)
        return _channels_first(out)

    @property
    def has_rows(self) -> bool:
        """Whether there is memory for rows yet; before that nothing tells their shape."""
        return bool(self._parts)

    @property
    def nbytes(self) -> int:
        """Memory of the rows that were given out."""
        return self.used * self._row_bytes

    @property
    def _capacity(self) -> int:
        return self._starts[-1] + len(self._parts[-1]) if self._parts else 0

    def _by_part(self, slots: Array) -> list[tuple[th.Tensor, th.Tensor | None, th.Tensor]]:
        """:return: parts of the table, which of the slots are there, and their rows in it"""
        if len(self._parts) == 1:
            return [(self._parts[0], None, th.as_tensor(slots, device=self.device))]
        which = np.searchsorted(self._starts, slots, side="right") - 1
        found: list[tuple[th.Tensor, th.Tensor | None, th.Tensor]] = []
        for index in np.unique(which).tolist():
            here = np.flatnonzero(which == index)
            rows = th.as_tensor(slots[here] - self._starts[index], device=self.device)
            found.append((self._parts[index], th.as_tensor(here, device=self.device), rows))
        return found

    def _grow(self, like: th.Tensor, limit: int | None) -> None:
        first = self._expected if self.device.type == "cpu" else _STEP_BYTES // max(1, self._row_bytes)
        rows = max(1, self._capacity // 2 if self._parts else first)
        if limit is not None:
            rows = max(1, min(rows, limit - self._capacity))
        shape = _channels_last(like[None]).shape[1:]
        while True:
            try:
                part = th.empty((rows, *shape), dtype=like.dtype, device=self.device)
                break
            except RuntimeError:  # more than the system would ever give: less will do for now
                if rows * self._row_bytes <= _STEP_BYTES:
                    raise
                rows //= 2
        self._starts.append(self._capacity)
        self._parts.append(part)

    def _look_at_memory(self, needed: int) -> None:
        """A GPU says itself when it has no more."""
        if self.device.type != "cpu" or needed <= self._checked:
            return
        left, step = available_bytes(), max(_STEP_BYTES // max(1, self._row_bytes), needed - self.used)
        if left is not None and left < step * self._row_bytes + _RESERVE:
            raise MemoryError(f"only {left / 1e6:.0f} MB are left")
        self._checked = self.used + step


def _channels_last(entries: th.Tensor) -> th.Tensor:
    return entries.permute(0, 2, 3, 1) if entries.ndim == 4 else entries


def _channels_first(rows: th.Tensor) -> th.Tensor:
    return rows.permute(0, 3, 1, 2) if rows.ndim == 4 else rows
