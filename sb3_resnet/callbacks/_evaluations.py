"""The rewards of an ``EvalCallback`` that runs beside ours, so that nothing is evaluated twice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback, EventCallback


def walk(callback: Any) -> Iterator[BaseCallback]:
    """:return: a callback and all inside it"""
    if isinstance(callback, BaseCallback):
        yield callback
    if isinstance(callback, CallbackList):
        for child in callback.callbacks:
            yield from walk(child)
    elif isinstance(callback, EventCallback):
        yield from walk(callback.callback)


class Evaluations:
    """
    Watches the first ``EvalCallback`` of a ``learn()`` call.

    :param root: the callback that ``learn()`` was given, as found in ``self.locals["callback"]``
    """

    def __init__(self, root: Any) -> None:
        self._source = next((child for child in walk(root) if isinstance(child, EvalCallback)), None)
        self._seen = self._count()

    @property
    def folder(self) -> str | None:
        """Where the ``EvalCallback`` saves its best model."""
        return None if self._source is None else self._source.best_model_save_path

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
