"""A learning rate for each arm: the same number of tries for all, on games that are not reported."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sb3_resnet.common.files import written_whole

from .arms import LEARNING_RATE
from .games import SCORES_SOURCE, suite_of


def rates_file(results: Path, suite: str, budget: str) -> Path:
    """:return: where the chosen learning rates are"""
    return results / suite / budget / "learning_rates.json"


def choose(files: Sequence[Path], suite: str, budget: str, results: Path, command: str) -> dict[str, Any]:
    """
    Take the learning rate with the best mean of all evaluations, normalised, over all games and seeds.

    :param files: result files of the tries
    :param suite: name of the suite
    :param budget: name of the budget
    :param results: folder of all results
    :param command: that made the tries
    :return: what is written into :func:`rates_file`
    """
    domain = suite_of(suite)
    names = {domain.env_id(game): game for game in domain.tuning}
    tries: dict[str, dict[float, list[float]]] = {}
    games: set[str] = set()
    for file in files:
        found = json.loads(file.read_text())
        score = domain.normalised(names[found["game"]], found["mean of all evaluations"])
        games.add(names[found["game"]])
        tries.setdefault(found["arm"], {}).setdefault(found["learning_rate"], []).append(score)
    (steps,) = {json.loads(file.read_text())["steps"] for file in files}
    chosen = {
        "score": f"mean of all evaluations, {domain.unit}",
        **({"source": SCORES_SOURCE} if suite == "atari" else {}),
        "arms": {
            # The lower rate where two are equal.
            arm: {
                "learning_rate": max(sorted(scores), key=lambda rate, scores=scores: float(np.mean(scores[rate]))),
                "tries": {f"{rate:g}": round(float(np.mean(scores[rate])), 4) for rate in sorted(scores)},
                "games": sorted(games),
                "runs per try": len(next(iter(scores.values()))),
                "steps": steps,
                "command": command,
            }
            for arm, scores in sorted(tries.items())
        },
    }
    file = rates_file(results, suite, budget)
    if file.exists():  # arms that were tuned before stay
        chosen["arms"] = {**json.loads(file.read_text())["arms"], **chosen["arms"]}
    _refuse_other_tries(chosen["arms"], file)
    with written_whole(file) as (temporary,):
        temporary.write_text(json.dumps(chosen, indent=1) + "\n")
    return chosen


def check_tries(arms: Collection[str], tries: tuple[Sequence[float], Sequence[str], int, int], file: Path) -> None:
    """
    Refuse before anything is run what :func:`choose` would refuse.

    :param arms: that are to be tuned
    :param tries: rates, games, seeds and steps
    :param file: of :func:`rates_file`
    :raises ValueError: if arms that were tuned before had other tries
    """
    rates, games, seeds, steps = tries
    planned = {"tries": dict.fromkeys(f"{rate:g}" for rate in sorted(rates)), "games": sorted(games)}
    planned |= {"runs per try": len(games) * seeds, "steps": steps}
    before = json.loads(file.read_text())["arms"] if file.exists() else {}
    _refuse_other_tries({**before, **dict.fromkeys(arms, planned)}, file)


def _refuse_other_tries(arms: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    tried = {
        arm: ([*found["tries"]], found["games"], found["runs per try"], found["steps"]) for arm, found in arms.items()
    }
    if len({*map(str, tried.values())}) > 1:
        raise ValueError(
            f"Each arm must have the same tries, and here are (rates, games, runs of each, steps) {tried}: tune with "
            f"the same --rates, --games, --seeds and --steps, or delete {file}"
        )


def learning_rate_of(arm: str, results: Path, suite: str, budget: str) -> float:
    """:return: that which was chosen for an arm; the default of one that was not tuned"""
    file = rates_file(results, suite, budget)
    arms = json.loads(file.read_text())["arms"] if file.exists() else {}
    return float(arms[arm]["learning_rate"]) if arm in arms else LEARNING_RATE
