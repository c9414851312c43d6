"""
Learning-rate factors as pure functions of a counter.

``n`` is the number of gradient updates done before the one that the factor is for. Nothing here keeps state, so a
resumed run needs the counter alone to go on where it stopped. The exception is the plateau, which depends on rewards
and not on a counter: its state is an explicit argument that the caller saves.
"""

from __future__ import annotations

import math
from typing import TypedDict


def warmup(n: int, steps: int) -> float:
    """
    Linear warmup: ``1/steps`` at the first update, 1 from update ``steps - 1`` on.

    :param n: updates done so far
    :param steps: length in gradient updates; 0 means none
    :return: factor in (0, 1]
    """
    return min(1.0, (n + 1) / steps) if steps > 0 else 1.0


def linear(n: int, total: int, final: float = 0.0) -> float:
    """
    From 1 down to ``final`` over ``total`` updates, and then constant.

    :param n: updates done so far
    :param total: length in gradient updates
    :param final: factor at the end
    """
    return final + (1.0 - final) * (1.0 - _progress(n, total))


def cosine(n: int, total: int, final: float = 0.0) -> float:
    """
    Half a cosine from 1 down to ``final`` over ``total`` updates, and then constant (SGDR, arXiv 1608.03983).

    :param n: updates done so far
    :param total: length in gradient updates
    :param final: factor at the end
    """
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * _progress(n, total)))


def step(n: int, step_size: int, gamma: float = 0.1) -> float:
    """
    Multiply by ``gamma`` each ``step_size`` updates.

    :param n: updates done so far
    :param step_size: length of one step in gradient updates
    :param gamma: factor of each step
    """
    return float(gamma ** (n // step_size))


def ramp(n: int, start: int, steps: int) -> float:
    """
    From 0 at update ``start`` to 1 at ``start + steps``, and then it stays.

    :param n: updates done so far
    :param start: update at which the ramp begins
    :param steps: length in gradient updates; 0 means at once
    """
    return _progress(n - start, steps) if steps > 0 else 1.0


class PlateauState(TypedDict):
    """What a plateau has to remember: plain numbers, saved with the optimizer."""

    best: float
    bad: int
    factor: float


def plateau_start() -> PlateauState:
    """:return: the state before the first evaluation"""
    return PlateauState(best=-math.inf, bad=0, factor=1.0)


def plateau(
    state: PlateauState, reward: float, patience: int, min_delta: float = 0.0, gamma: float = 0.1, final: float = 0.0
) -> PlateauState:
    """
    The state after one more evaluation. A NaN reward counts as one that did not improve.

    :param state: the state so far
    :param reward: mean reward of the evaluation
    :param patience: evaluations without improvement that are tolerated, as in ``ReduceLROnPlateau``
    :param min_delta: smallest gain in reward that counts as an improvement
    :param gamma: factor of each reduction
    :param final: the factor never falls below it
    """
    if reward > state["best"] + min_delta:
        return PlateauState(best=reward, bad=0, factor=state["factor"])
    if state["bad"] < patience:
        return PlateauState(best=state["best"], bad=state["bad"] + 1, factor=state["factor"])
    return PlateauState(best=state["best"], bad=0, factor=max(final, state["factor"] * gamma))


def _progress(n: int, total: int) -> float:
    return min(1.0, max(0.0, n / total)) if total > 0 else 1.0
