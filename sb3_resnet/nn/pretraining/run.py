"""The loop of a pretraining: budget, probes, the best weights, and checkpoints from which it goes on exactly."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch as th
from numpy.typing import NDArray

from sb3_resnet.common.files import written_whole
from sb3_resnet.nn.pretraining.collapse import CollapseError, refuse_collapse, spread_and_rank
from sb3_resnet.nn.pretraining.settings import Settings
from sb3_resnet.nn.pretraining.trainer import Trainer


@dataclass(frozen=True)
class Probed:
    """
    What weights show of the observations held out.

    :param score: the one number by which weights are compared
    :param knows_state: whether it is of labels of the state. Else it is that of the actions, which does not tell good
        weights from bad ones
    :param scores: of each label
    :param features: of each observation
    """

    score: float
    knows_state: bool
    scores: dict[str, float | None]
    features: NDArray[Any]


#: From weights to what they show.
Probe = Callable[[Mapping[str, th.Tensor]], Probed]
#: Told what goes on, the share of it that is done, and figures as text.
Told = Callable[[str, float, str], None]
#: Told a name, a value and an update.
Log = Callable[[str, float, int], None]

#: Their names in the folder of a run.
CHECKPOINT, CLOCK = "checkpoint.pt", "seconds.json"
# What a run did whose arguments lack these names; files of version 0.1.0 do.
_WITHOUT = {"neighbours": 1, "shift_probability": 1.0}
# What such files do not tell, so that it is not compared.
_NOT_TOLD = {"wrappers", "labels_module", "labels_content", "env_kwargs"}
_SAVE_SECONDS = 60.0  # between checkpoints, beside those of the probes
_CLOCK_SECONDS = 10.0  # between notes of the time, before there is a checkpoint


class Run:
    """
    One pretraining, from its first update or from where an earlier attempt was stopped.

    :param folder: of the checkpoint, and of the time that is spent before there is one
    :param settings: what was chosen
    :param identity: what must be the same for a checkpoint to be gone on from
    :param began: second of ``time.monotonic()`` at which this attempt began
    :raises ValueError: for a checkpoint of a run with other arguments
    """

    def __init__(self, folder: Path, settings: Settings, identity: Mapping[str, Any], began: float) -> None:
        #: Of the checkpoint.
        self.folder = folder
        self._path, self._clock = folder / CHECKPOINT, folder / CLOCK
        #: What was chosen.
        self.settings = settings
        self._identity, self._began = dict(identity), began
        #: By probe: update, mean loss since the one before, score, spread, effective rank; the first of random weights.
        self.history: list[dict[str, Any]] = []
        #: Of the best probe of trained weights, or of the last if none knows the state: update, score, scores, weights.
        self.best: dict[str, Any] = {}
        #: Scores of the random weights.
        self.random_scores: dict[str, Any] = {}
        self._losses: list[float] = []
        self._saved = began
        self._trained: dict[str, Any] | None = None
        if self._path.exists():
            self._read()
        elif self._clock.exists():
            noted = json.loads(self._clock.read_text())
            if noted["identity"] == self._identity:
                self._began -= noted["seconds"]
        self._begun_with = self.seconds

    @property
    def next_update(self) -> int | None:
        """Before ``train()``: the first that it will make; ``None`` where there is no checkpoint."""
        return None if self._trained is None else int(self._trained["update"]) + 1

    def may_collect(self) -> bool:
        """:return: whether half of the minutes that this attempt began with is still to come"""
        minutes = self.settings.minutes
        return minutes is None or 2 * self.seconds < self._begun_with + 60.0 * minutes

    def note_time(self) -> None:
        """Write down the time spent, now and then, as checkpoints do later."""
        if time.monotonic() - self._saved > _CLOCK_SECONDS:
            with written_whole(self._clock) as (temporary,):
                temporary.write_text(json.dumps({"identity": self._identity, "seconds": self.seconds}))
            self._saved = time.monotonic()

    @property
    def seconds(self) -> float:
        """Time spent, earlier attempts included."""
        return time.monotonic() - self._began

    def train(self, trainer: Trainer, probe: Probe, told: Told, log: Log) -> None:
        """
        Train until updates, minutes or patience end.

        :param trainer: freshly made
        :param probe: scores weights
        :param told: told of each update
        :param log: told each figure
        :raises CollapseError: for features that collapse
        """
        if self._trained is not None:
            trainer.load(self._trained)
            self._trained = None
        if not self.history:
            self._probe(trainer, probe, log)
            self._save(trainer)
        try:
            while not self._is_over(trainer.update):
                rate = trainer.learning_rate
                self._losses.append(trainer.step())
                log("loss", self._losses[-1], trainer.update)
                log("learning_rate", rate, trainer.update)
                if trainer.update % self.settings.probe_every == 0:
                    self._probe(trainer, probe, log)
                    self._save(trainer)
                elif time.monotonic() - self._saved > _SAVE_SECONDS:
                    self._save(trainer)
                told("Pretraining", self._share(trainer.update), self._figures())
            if self.history[-1]["update"] != trainer.update:
                self._probe(trainer, probe, log)
                self._save(trainer)
        except CollapseError:
            for path in (self._path, self._clock):  # whoever tries other settings needs none of it
                path.unlink(missing_ok=True)
            raise

    def _is_over(self, update: int) -> bool:
        if update == 0:
            return False
        stale = sum(entry["update"] > self.best["update"] for entry in self.history) if self.best else 0
        return self._share(update) >= 1.0 or stale >= self.settings.patience

    def _share(self, update: int) -> float:
        chosen = self.settings
        shares = [0.0 if chosen.updates is None else update / chosen.updates]
        shares.append(0.0 if chosen.minutes is None else self.seconds / (60.0 * chosen.minutes))
        return max(shares)

    def _figures(self) -> str:
        score = "" if math.isnan(self._latest()) else f", score {self._latest():.3f}"
        return f"loss {self._losses[-1]:.3f}{score}" if self._losses else score.removeprefix(", ")

    def _latest(self) -> float:
        return _number(self.history[-1]["score"])

    def _probe(self, trainer: Trainer, probe: Probe, log: Log) -> None:
        weights = trainer.trunk.weights()
        probed = probe(weights)
        spread, rank = spread_and_rank(probed.features)
        loss = sum(self._losses) / len(self._losses) if self._losses else None
        known = probed.score if math.isfinite(probed.score) else None
        entry = {"update": trainer.update, "loss": loss, "score": known, "spread": spread, "effective_rank": rank}
        for name, value in (("score", known), ("spread", spread), ("effective_rank", rank)):
            if value is not None:
                log(name, value, trainer.update)
        refuse_collapse(spread, rank, trainer.update, self.history[0]["spread"] if self.history else 0.0)
        self.history.append(entry)
        self._losses = []
        if trainer.update == 0:
            self.random_scores = probed.scores
        elif not probed.knows_state or self._is_best(known):
            best = {"update": trainer.update, "score": known, "scores": probed.scores, "trunk": weights}
            self.best = {**best, "knows_state": probed.knows_state}

    def _is_best(self, score: float | None) -> bool:
        best = self.best.get("score")
        return best is None or (score is not None and score > best)  # without any score the newest weights are kept

    def _save(self, trainer: Trainer) -> None:
        state = {
            "identity": json.dumps(self._identity, sort_keys=True),
            "trainer": trainer.state(),
            "history": self.history,
            "best": self.best,
            "random_scores": self.random_scores,
            "losses": self._losses,
            "seconds": self.seconds,
        }
        with written_whole(self._path) as (temporary,):
            th.save(state, temporary)
        self._saved = time.monotonic()

    def _read(self) -> None:
        state = th.load(self._path, map_location="cpu", weights_only=True)
        refuse_other(self.folder, json.loads(state["identity"]), self._identity)
        self._trained = state["trainer"]
        self.history, self.best = state["history"], state["best"]
        self.random_scores, self._losses = state["random_scores"], state["losses"]
        self._began -= state["seconds"]


def refuse_other(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """
    :param path: file or folder of an earlier run
    :param before: its arguments
    :param now: those of this run
    :raises ValueError: if they differ, with what differs
    """
    before = {**{name: value for name, value in _WITHOUT.items() if name in now}, **before}
    names = differing(before, now)
    if names:
        texts = (f"{name}={before.get(name)!r} instead of {now.get(name)!r}" for name in names)
        raise ValueError(
            f"{str(path)!r} is of a run with other arguments ({', '.join(texts)}): write the same ones, or another "
            "output, or delete it"
        )


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """
    :param before: arguments of an earlier run
    :param now: those of this run
    :return: names of those that differ
    """
    compared = {*before} | ({*now} - _NOT_TOLD)
    return [name for name in {**before, **now} if name in compared and before.get(name) != now.get(name)]


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
