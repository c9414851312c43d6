"""What the results of a suite say: interquartile means, intervals, and which arm is better than which."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

REPS = 2_000  # bootstrap samples, as many as rliable's own examples take at least
#: What all others are compared with: one that differs from a ResNet in the trunk alone, and SB3's own.
CONTROLS = ("nature_head", "nature")
CHANCE = 0.05  # with which a difference may be said to be shown where all arms are alike
PERMUTATIONS = 20_000
ALL_DEALS = 200_000  # up to which each way to deal out the runs is tried


@dataclass(frozen=True)
class Interval:
    """
    :param value: an aggregate
    :param low: lower end of its 95 % interval; NaN where one seed cannot give one
    :param high: upper end
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if np.isnan(self.low):
            return f"{self.value:.3f} (one seed: no interval)"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def is_above(self, other: Interval) -> bool:
        """:return: whether the intervals do not overlap, and this one is the higher; never where there is none"""
        return bool(self.low > other.high)

    def as_dict(self) -> dict[str, float | None]:
        """:return: for JSON, which knows no NaN"""
        return {name: None if np.isnan(value) else round(value, 4) for name, value in vars(self).items()}


def interquartile_means(by_arm: dict[str, np.ndarray]) -> dict[str, Interval]:
    """:return: rliable's IQM over all runs of an arm, with a stratified bootstrap interval"""
    from rliable import library, metrics

    return _intervals(by_arm, lambda runs: np.array([metrics.aggregate_iqm(runs)]), library)


def iqm_curves(by_arm: dict[str, np.ndarray]) -> dict[str, list[Interval]]:
    """:return: the same at each evaluation"""
    points = next(iter(by_arm.values())).shape[2]
    each = [interquartile_means({arm: runs[..., point] for arm, runs in by_arm.items()}) for point in range(points)]
    return {arm: [point[arm] for point in each] for arm in by_arm}


def improvements(by_arm: dict[str, np.ndarray]) -> dict[tuple[str, str], Interval]:
    """:return: probability that a run of the first arm is better than one of the second, a control, in the same game"""
    from rliable import library, metrics

    pairs = {f"{arm},{control}": (by_arm[arm], by_arm[control]) for arm, control in pairs_of([*by_arm])}
    found = _intervals(pairs, metrics.probability_of_improvement, library) if pairs else {}
    return {pair: found[",".join(pair)] for pair in pairs_of([*by_arm])}


def pairs_of(arms: Sequence[str]) -> list[tuple[str, str]]:
    """:return: each arm with each control, the first arm where none of them was run; the controls themselves once"""
    controls = [control for control in CONTROLS if control in arms] or [arms[0]]
    return [
        (arm, control)
        for index, control in enumerate(controls)
        for arm in arms
        if arm != control and arm not in controls[index + 1 :]
    ]


def differences(by_arm: dict[str, np.ndarray]) -> dict[tuple[str, str], Interval]:
    """:return: IQM of each arm less that of a control, with a stratified bootstrap interval"""
    from rliable import library

    pairs = {f"{arm},{control}": (by_arm[arm], by_arm[control]) for arm, control in pairs_of([*by_arm])}

    def gain(runs: np.ndarray, others: np.ndarray) -> np.ndarray:
        return np.array([_iqm(runs.reshape(-1)) - _iqm(others.reshape(-1))])

    found = _intervals(pairs, gain, library) if pairs else {}
    return {pair: found[",".join(pair)] for pair in pairs_of([*by_arm])}


def chances(by_arm: dict[str, np.ndarray]) -> dict[tuple[str, str], float]:
    """
    A permutation test of each arm against each control. Bootstrap intervals of a few seeds are too narrow to decide.

    :return: how often the IQMs differ at least as much when the runs of each game are dealt out to both arms at random,
        times the number of tests: among many arms one is the best by chance
    """
    pairs = pairs_of([*by_arm])
    found = {}
    for arm, control in pairs:
        seeds, games = by_arm[arm].shape
        runs = np.concatenate([by_arm[arm], by_arm[control]])
        order, sampled = _deals(seeds, games)
        dealt = np.take_along_axis(runs[None], order, axis=1)
        first, second = (_iqm(part.reshape(len(order), -1)) for part in (dealt[:, :seeds], dealt[:, seeds:]))
        seen = abs(float(_iqm(by_arm[arm].reshape(-1)) - _iqm(by_arm[control].reshape(-1))))
        as_large = np.count_nonzero(np.abs(first - second) >= seen - 1e-9)
        # Of a sample, the deal that was seen counts too.
        found[arm, control] = min(1.0, len(pairs) * (sampled + as_large) / (sampled + len(order)))
    return found


def _deals(seeds: int, games: int) -> tuple[np.ndarray, int]:
    """:return: ways to deal out the runs of each game, ``(ways, 2 seeds, games)``; 0 if these are all, 1 if a sample"""
    if math.comb(2 * seeds, seeds) ** games > ALL_DEALS:
        return np.random.default_rng(0).random((PERMUTATIONS, 2 * seeds, games)).argsort(axis=1), 1
    runs = range(2 * seeds)
    ways = [[*some, *(run for run in runs if run not in some)] for some in itertools.combinations(runs, seeds)]
    chosen = np.array([*itertools.product(range(len(ways)), repeat=games)])  # a way for each game
    return np.array(ways)[chosen].transpose(0, 2, 1), 0


def can_decide(seeds: int, games: int, tests: int) -> bool:
    """:return: whether so many runs can show a difference: that of two arms all of whose runs are apart"""
    low = np.arange(seeds * games, dtype=float).reshape(seeds, games)
    (chance,) = chances({"low": low, "high": low + low.size}).values()
    return tests * chance < CHANCE


def _iqm(runs: np.ndarray) -> Any:
    """:return: mean of the middle half of the last axis: SciPy's ``trim_mean``, which rliable calls, for many rows"""
    cut = runs.shape[-1] // 4
    return np.sort(runs, axis=-1)[..., cut : runs.shape[-1] - cut].mean(axis=-1)


def _intervals(data: dict[str, Any], function: Any, library: Any) -> dict[str, Interval]:
    """Of a single seed the bootstrap would give an interval without width, which would look certain."""
    first = next(iter(data.values()))
    single = len(first[0] if isinstance(first, tuple) else first) == 1
    if single:
        value = {name: function(*runs) if isinstance(runs, tuple) else function(runs) for name, runs in data.items()}
        return {name: Interval(float(np.ravel(found)[0]), np.nan, np.nan) for name, found in value.items()}
    np.random.seed(0)  # noqa: NPY002  # rliable draws from the global generator; the same results give the same report
    points, ends = library.get_interval_estimates(data, function, reps=REPS)
    ordered = {name: np.ravel(ends[name]) for name in data}
    return {name: Interval(float(np.ravel(points[name])[0]), *map(float, ordered[name])) for name in data}


def verdict(iqm: dict[str, Interval], by_chance: dict[tuple[str, str], float]) -> dict[str, dict[str, list[str]]]:
    """
    Say which arms are better or worse than a control.

    That is shown where the intervals of the two do not overlap, and chance alone seldom makes such a difference.

    :param iqm: of each arm
    :param by_chance: of :func:`chances`
    :return: by control ``"won"``, ``"lost"`` and ``"open"``: the other arms, the highest first
    """
    found: dict[str, dict[str, list[str]]] = {}
    for arm, control in sorted(by_chance, key=lambda pair: -iqm[pair[0]].value):
        arms = found.setdefault(control, {"won": [], "lost": [], "open": []})
        shown = by_chance[arm, control] < CHANCE
        won, lost = shown and iqm[arm].is_above(iqm[control]), shown and iqm[control].is_above(iqm[arm])
        arms["won" if won else "lost" if lost else "open"].append(arm)
    return {control: found[control] for _, control in by_chance}


def mean_and_range(values: Sequence[float]) -> str:
    """:return: mean, and lowest and highest of the seeds"""
    rounded = [f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" for value in (np.mean(values), *_ends(values))]
    return rounded[0] if len(values) == 1 else f"{rounded[0]} ({rounded[1]} to {rounded[2]})"


def _ends(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)
