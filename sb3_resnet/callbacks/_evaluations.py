"""The rewards of an ``EvalCallback`` that runs beside ours, so that nothing is evaluated twice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback, EventCallback


class Evaluations:
    """
    Watches the first ``EvalCallback`` of a ``learn()`` call.

    :param root: the callback that ``learn()`` was given, as found in ``self.locals["callback"]``
    """

    def __init__(self, root: Any) -> None:
        self._source = next(_eval_callbacks(root), None)
        self._seen = self._count()

    @property
    def found(self) -> bool:
        """Whether there is an ``EvalCallback`` that evaluates at all."""
        return self._source is not None and self._source.eval_freq > 0

    def poll(self) -> float | None:
        """:return: the mean reward of the latest evaluation, if there has been one since the last call"""
        count = self._count()
        if self._source is None or count == self._seen:
            return None
        self._seen = count
        return float(self._source.last_mean_reward)

    def _count(self) -> int:
        if self._source is None or self._source.eval_freq <= 0:
            return 0
        return int(self._source.n_calls // self._source.eval_freq)


def _eval_callbacks(callback: Any) -> Iterator[EvalCallback]:
    if isinstance(callback, EvalCallback):
        yield callback
    if isinstance(callback, CallbackList):
        for child in callback.callbacks:
            yield from _eval_callbacks(child)
    elif isinstance(callback, EventCallback) and isinstance(callback.callback, BaseCallback):
        yield from _eval_callbacks(callback.callback)
