"""What the results of a suite say: interquartile means, intervals, and which arm is better than which."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .arms import ARMS
from .games import Suite
from .results import SECONDS

REPS = 2_000  # bootstrap samples, as many as rliable's own examples take at least
CONTROLS = ("nature", "nature_head")  # what all others are compared with
KINDS = {"last": "last evaluation", "mean": "mean of all evaluations"}


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


@dataclass(frozen=True)
class Table:
    """
    Results that can be compared: all arms on the same games, with the same number of seeds and steps.

    :param results: all result files, with their times
    :param steps: environment steps of each run
    :param arms: in the order of :data:`~evidence.arms.ARMS`
    :param games: ids of the games that all these arms have
    :param seeds: the number that all have
    :param left_out: results that cannot be compared, in words
    """

    results: dict[tuple[str, str, int], dict[str, Any]]
    steps: int
    arms: tuple[str, ...]
    games: tuple[str, ...]
    seeds: tuple[int, ...]
    left_out: tuple[str, ...]

    def of(self, arm: str, value: Any) -> np.ndarray:
        """:return: a value of each run of an arm, ``(seeds, games, ...)``; ``value`` takes game and result"""
        rows = [[value(game, self.results[arm, game, seed]) for game in self.games] for seed in self.seeds]
        return np.array(rows, float)


def read(folder: Path, suite: Suite, steps: int | None = None) -> Table:
    """
    :param folder: of result files
    :param suite: what they are of
    :param steps: of the runs; ``None``: the most that there are
    :return: what can be compared
    :raises FileNotFoundError: if there is no result
    """
    found = {file: json.loads(file.read_text()) for file in sorted(folder.glob("*-s[0-9]*.json"))}
    found = {file: result for file, result in found.items() if "evaluations" in result}
    if not found:
        raise FileNotFoundError(f"{folder} holds no results: run `python benchmarks/atari.py` first")
    steps = steps or max(result["steps"] for result in found.values())
    results = {}
    for file, result in found.items():
        if result["steps"] == steps:
            times = json.loads(file.with_suffix(".times.json").read_text())
            results[result["arm"], result["game"], result["seed"]] = {**result, "times": times, "file": file.name}
    if not results:
        raise FileNotFoundError(f"{folder} holds no results of {steps} steps")
    arms = tuple(arm for arm in ARMS if any(key[0] == arm for key in results))
    ids = [suite.env_id(game) for game in suite.games]
    played = dict.fromkeys(
        [*(game for game in ids if any(key[1] == game for key in results)), *(k[1] for k in results)]
    )
    games = tuple(game for game in played if all(any(key[:2] == (arm, game) for key in results) for arm in arms))
    seeds = sorted({key[2] for key in results})
    common = tuple(s for s in seeds if games and all((arm, game, s) in results for arm in arms for game in games))
    if not common:
        raise ValueError(f"{folder}: no game has the same seed of all arms ({', '.join(arms)}): finish the suite")
    used = {(arm, game, seed) for arm in arms for game in games for seed in common}
    left_out = tuple(results[key]["file"] for key in sorted({*results} - used))
    return Table(results, steps, arms, games, common, left_out)


def scores(table: Table, suite: Suite, kind: str) -> dict[str, np.ndarray]:
    """
    :param kind: one of :data:`KINDS`
    :return: normalised scores by arm, ``(seeds, games)``
    """
    names = {suite.env_id(game): game for game in [*suite.games, *suite.tuning]}

    def normalised(game: str, result: dict[str, Any]) -> float:
        return suite.normalised(names.get(game, _game(suite, game)), result[KINDS[kind]])

    return {arm: table.of(arm, normalised) for arm in table.arms}


def curves(table: Table, suite: Suite) -> tuple[list[int], dict[str, np.ndarray]]:
    """:return: environment steps of the evaluations, and normalised scores by arm, ``(seeds, games, evaluations)``"""
    names = {suite.env_id(game): game for game in [*suite.games, *suite.tuning]}
    first = table.results[table.arms[0], table.games[0], table.seeds[0]]
    steps = [entry["step"] for entry in first["evaluations"]]

    def all_of(game: str, result: dict[str, Any]) -> list[float]:
        name = names.get(game, _game(suite, game))
        return [suite.normalised(name, float(np.mean(entry["returns"]))) for entry in result["evaluations"]]

    return steps, {arm: table.of(arm, all_of) for arm in table.arms}


def seconds(table: Table) -> tuple[str, dict[str, np.ndarray]]:
    """:return: whose seconds, and those of training up to each evaluation by arm: the mean over all runs"""
    on_gpu = any(result["times"]["gpu"] for result in table.results.values())
    column = 2 if on_gpu else 1

    def spent(game: str, result: dict[str, Any]) -> list[float]:
        return [row[column] for row in result["times"][SECONDS]]

    return "of a clock" if on_gpu else "of one core", {arm: table.of(arm, spent).mean((0, 1)) for arm in table.arms}


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

    pairs = {
        f"{arm},{control}": (by_arm[arm], by_arm[control])
        for control in CONTROLS
        for arm in by_arm
        if control in by_arm and arm != control
    }
    found = _intervals(pairs, metrics.probability_of_improvement, library) if pairs else {}
    return {(arm, control): found[f"{arm},{control}"] for arm, control in (key.split(",") for key in found)}


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


def verdict(iqm: dict[str, Interval]) -> dict[str, Any]:
    """
    Say which arms are better than which: where 95 % intervals do not overlap.

    :return: ``"best"``; ``"beaten"``: arms whose interval lies below the best one's; ``"open"``: all others; and
        ``"pairs"`` of a better and a worse arm
    """
    best = max(iqm, key=lambda arm: iqm[arm].value)
    beaten = [arm for arm in iqm if iqm[best].is_above(iqm[arm])]
    pairs = [(one, other) for one in iqm for other in iqm if iqm[one].is_above(iqm[other])]
    return {"best": best, "beaten": beaten, "open": [arm for arm in iqm if arm not in (best, *beaten)], "pairs": pairs}


def _game(suite: Suite, env_id: str) -> str:
    """The name of a game that belongs to no list of the suite."""
    before, after = suite.env_id("\0").split("\0")
    return env_id.removeprefix(before).removesuffix(after)


def mean_and_range(values: Sequence[float]) -> str:
    """:return: mean, and lowest and highest of the seeds"""
    rounded = [f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" for value in (np.mean(values), *_ends(values))]
    return rounded[0] if len(values) == 1 else f"{rounded[0]} ({rounded[1]} to {rounded[2]})"


def _ends(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)
