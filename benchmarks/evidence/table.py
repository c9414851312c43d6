"""The results of a suite that can be compared, and their scores."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .arms import ARMS
from .games import Suite
from .results import SECONDS

Key = tuple[str, str, int]  # arm, game, seed
KINDS = {"last": "last evaluation", "mean": "mean of all evaluations"}


@dataclass(frozen=True)
class Table:
    """
    Results that can be compared: all arms on the same games, with the same number of seeds and steps.

    :param results: what is compared, with its times, by arm, game and seed
    :param steps: environment steps of each run
    :param arms: in the order of :data:`~evidence.arms.ARMS`
    :param games: ids of the games that all these arms have
    :param seeds: the number that all have
    :param left_out: files of results that are not compared
    """

    results: dict[Key, dict[str, Any]]
    steps: int
    arms: tuple[str, ...]
    games: tuple[str, ...]
    seeds: tuple[int, ...]
    left_out: tuple[str, ...]

    def of(self, arm: str, value: Any) -> np.ndarray:
        """:return: a value of each run of an arm, ``(seeds, games, ...)``; ``value`` takes game and result"""
        rows = [[value(game, self.results[arm, game, seed]) for game in self.games] for seed in self.seeds]
        return np.array(rows, float)


def read(
    folder: Path,
    suite: Suite,
    steps: int | None = None,
    arms: Sequence[str] | None = None,
    games: Sequence[str] | None = None,
) -> Table:
    """
    :param folder: of result files
    :param suite: what they are of
    :param steps: of the runs; ``None``: those of most results
    :param arms: to compare; ``None``: those with which most results are compared
    :param games: to compare, by name; ``None``: those of the suite, or those for tuning where only these were played
    :return: what can be compared: games and seeds that all arms have, as many runs as possible
    :raises FileNotFoundError: if there is no result
    :raises ValueError: if nothing can be compared, and for results of arms with other settings
    """
    # A hidden file is one that is being written, or was when its process was killed.
    files = [file for file in sorted(folder.glob("*-s[0-9]*.json")) if not file.name.startswith(".")]
    found = {file: json.loads(file.read_text()) for file in files}
    found = {file: result for file, result in found.items() if "evaluations" in result}
    if not found:
        raise FileNotFoundError(f"{folder} holds no results: {_elsewhere(folder)}")
    numbers = Counter(result["steps"] for result in found.values())
    steps = steps or max(numbers, key=lambda number: (numbers[number], number))
    results = {}
    for file, result in found.items():
        if result["steps"] == steps:
            times = json.loads(file.with_suffix(".times.json").read_text())
            results[result["arm"], result["game"], result["seed"]] = {**result, "times": times, "file": file.name}
    if not results:
        raise FileNotFoundError(f"{folder} holds no results of {steps} steps")
    _refuse_unknown("--arms", arms, [key[0] for key in results], steps)
    _refuse_unknown("--games", games, [_game(suite, key[1]) for key in results], steps)
    in_suite = [game for game in suite.games if suite.env_id(game) in {key[1] for key in results}]
    wanted = games or in_suite or suite.tuning
    ids = [suite.env_id(game) for game in wanted]
    compared = tuple(arm for arm in ARMS if arm in arms) if arms else _compared(results, ids)
    played, common = _common({*results}, compared, ids)
    if not (compared and played):
        raise ValueError(
            f"{folder}: no game of {', '.join(wanted)} has the same seed of all arms ({', '.join(arms or ARMS)}): "
            "finish the suite, or write --arms and --games"
        )
    used = {(arm, game, seed) for arm in compared for game in played for seed in common}
    _refuse_other_settings([results[key] for key in sorted(used)])
    _refuse_mixed_arms([results[key] for key in sorted(used)])
    left_out = tuple(result["file"] for key, result in sorted(results.items()) if key not in used)
    return Table({key: results[key] for key in sorted(used)}, steps, compared, played, common, left_out)


def _elsewhere(folder: Path) -> str:
    """:return: which other budgets have results, or how to make some"""
    others = sorted({file.parent.name for file in folder.parent.glob("*/*-s[0-9]*.json")})
    if others:
        return f"there are some of --budget {' and '.join(others)}"
    return "run `python benchmarks/atari.py` first"


def _compared(results: Iterable[Key], ids: Sequence[str]) -> tuple[str, ...]:
    """:return: the arms with which most results are compared: one that was run in part costs the others nothing"""
    keys = {key for key in results if key[1] in ids}
    counts = Counter(key[0] for key in keys)
    fullest = sorted(counts, key=lambda arm: (-counts[arm], [*ARMS].index(arm)))
    ways = [tuple(arm for arm in ARMS if arm in fullest[:number]) for number in range(1, len(fullest) + 1)]

    def size(arms: tuple[str, ...]) -> tuple[int, int]:
        played, common = _common(keys, arms, ids)
        runs = len(arms) * len(played) * len(common)
        return runs * (len(arms) > 1), runs  # one arm alone is no comparison

    return max(reversed(ways), key=size, default=())


def _common(keys: set[Key], arms: Sequence[str], ids: Sequence[str]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """:return: games and seeds of which there is a result of each arm: as many runs as possible, and then seeds"""
    of_game = {game: [{key[2] for key in keys if key[:2] == (arm, game)} for arm in arms] for game in ids}
    shared = {game: set.intersection(*by_arm) if by_arm else set() for game, by_arm in of_game.items()}
    often = Counter(seed for seeds in shared.values() for seed in seeds)
    ordered = sorted(often, key=lambda seed: (-often[seed], seed))
    ways = []
    for number in range(1, len(ordered) + 1):
        seeds = {*ordered[:number]}
        games = tuple(game for game in ids if seeds <= shared[game])
        ways.append((len(games) * number, number, games, tuple(sorted(seeds))))
    best = max(ways, default=(0, 0, (), ()))
    return (best[2], best[3]) if best[0] else ((), ())


def _refuse_other_settings(results: Sequence[dict[str, Any]]) -> None:
    """Only what the arms have in common: their rates are chosen for each."""
    first = results[0]
    for result in results:
        for what, (ours, its) in {
            "settings": (first["settings"]["shared"], result["settings"]["shared"]),
            "versions": (first["versions"], result["versions"]),
        }.items():
            names = [name for name in {**ours, **its} if ours.get(name) != its.get(name)]
            if names:
                raise ValueError(
                    f"{first['file']} and {result['file']} have other {what} ({', '.join(names)}), so their arms "
                    "differ by more than what sees: run one of them again, or choose with --arms and --games"
                )


def _refuse_mixed_arms(results: Sequence[dict[str, Any]]) -> None:
    """The runs of an arm differ in game and seed alone; weights that are pretrained on a game are one file."""
    firsts: dict[tuple[str, ...], tuple[Any, str]] = {}
    for result in results:
        trunk = dict(result["settings"].get("trunk") or {})
        weights = (trunk.pop("weights", None) or {}).get("sha256")
        arm = {"learning_rate": result["learning_rate"], "trunk": trunk}
        in_game = {"weights": weights, "head": result["settings"].get("head")}  # which has an output per action
        for key, value in (((result["arm"],), arm), ((result["arm"], result["game"]), in_game)):
            first, file = firsts.setdefault(key, (value, result["file"]))
            names = [name for name in value if first[name] != value[name]]
            if names:
                raise ValueError(
                    f"{file} and {result['file']} are of one arm, and have other {', '.join(names)}: run one of them "
                    "again"
                )


def _refuse_unknown(option: str, given: Sequence[str] | None, known: Sequence[str], steps: int) -> None:
    for name in given or ():
        if name not in known:
            there = ", ".join(sorted({*known}))
            raise ValueError(f"{option}: there is no result of {name} with {steps:,} steps, but of {there}")


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


def _game(suite: Suite, env_id: str) -> str:
    """The name of a game that belongs to no list of the suite."""
    before, after = suite.env_id("\0").split("\0")
    return env_id.removeprefix(before).removesuffix(after)
