"""Equal rows of an array that is too large to be copied."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def unique_rows(rows: Array) -> tuple[Array, Array]:
    """
    As ``np.unique`` gives index and inverse of whole rows, without its copy of all of them.

    :param rows: contiguous, ``(rows, n)``
    :return: a row of each kind, ``(kinds,)``, and the kind of each row, ``(rows,)``
    """
    order = rows.view(np.dtype((np.void, rows[0].nbytes))).ravel().argsort(kind="stable")
    is_new = np.array([True, *(rows[before].tobytes() != rows[now].tobytes() for before, now in pairwise(order))])
    which = np.empty(len(rows), int)
    which[order] = is_new.cumsum() - 1
    return order[is_new], which
