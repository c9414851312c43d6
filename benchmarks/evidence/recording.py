"""What a run writes down while it trains, and where its pieces end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback

from .evaluation import evaluate
from .spec import Run

Tell = Callable[[int], None]  # takes the environment steps done
Ends = Callable[["Log"], bool]


@dataclass
class Log:
    """
    What a run has found out so far.

    :param steps: environment steps done
    :param evaluations: each with its step and its returns
    :param episodes: step and raw return of each game of training
    :param seconds: step, and :attr:`spent` then, at each evaluation
    :param spent: seconds so far: of the processor and of a clock without evaluations, and of a clock with them
    """

    steps: int = 0
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    episodes: list[list[float]] = field(default_factory=list)
    seconds: list[list[float]] = field(default_factory=list)
    spent: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])


class PieceOver(Exception):  # noqa: N818  # nothing is wrong
    """Ends ``learn()`` between two rollouts, which a callback's ``False`` does not: it drops the step."""


class Recorder(BaseCallback):
    """
    Writes down actions and games, evaluates, and ends the piece where a checkpoint is due.

    :param run: what is running
    :param log: of the run; goes on
    :param tell: is told the steps that are done
    :param ends: whether the run ends before its steps are done, asked after each evaluation
    """

    def __init__(self, run: Run, log: Log, tell: Tell, ends: Ends) -> None:
        super().__init__()
        self.run, self.log, self.tell, self.ends = run, log, tell, ends
        self.actions: list[np.ndarray] = []
        self._clocks = (0.0, 0.0, 0.0)

    def _on_training_start(self) -> None:
        self._is_first_rollout = True

    def _on_step(self) -> bool:
        self.actions.append(np.array(self.locals["actions"], np.uint8))
        for info in self.locals["infos"]:
            if "episode" in info:
                self.log.episodes.append([self.num_timesteps, float(info["episode"]["r"])])
        if self.n_calls % 25 == 0:
            self.tell(self.num_timesteps)
        return True

    def _on_rollout_start(self) -> None:
        """All updates up to here are made."""
        if self._is_first_rollout:
            # A run without checkpoints has these entries already, so they are not in its time.
            encode_stored(self.model)
            self._clocks, self._is_first_rollout = _clocks(), False
        if self.num_timesteps > self.log.steps and self.is_whole():
            raise PieceOver

    def is_whole(self) -> bool:
        """
        Evaluate where that is due.

        :return: whether a checkpoint is due
        """
        steps, plan = self.num_timesteps, self.run.plan
        last = steps >= plan.steps
        if (last or steps % plan.eval_every == 0) and steps not in [entry["step"] for entry in self.log.evaluations]:
            self.stop_clocks()
            self.log.evaluations.append({"step": steps, "returns": self._evaluate(steps)})
            before, self._clocks = self._clocks, _clocks()
            self.log.spent[2] += self._clocks[2] - before[2]
            self.log.seconds.append([steps, *(round(value, 1) for value in self.log.spent)])
        return last or steps % plan.save_every == 0 or self.ends(self.log)

    def stop_clocks(self) -> None:
        """What was spent since they began is training."""
        pairs = zip(self.log.spent, _clocks(), self._clocks, strict=True)
        self.log.spent = [spent + now - then for spent, now, then in pairs]
        self._clocks = _clocks()

    def _evaluate(self, steps: int) -> list[float]:
        run, model = self.run, self.model
        assert isinstance(model, DQN)
        seed = int(np.random.SeedSequence([run.seed, steps]).generate_state(1)[0]) & 0x7FFFFFFF
        return evaluate(model, run.suite, run.game, run.arm, run.plan.episodes, seed, run.plan.threads)


def encode_stored(model: Any) -> None:
    """
    Give the features cache all observations of the replay buffer: its entries are in no checkpoint.

    :param model: in training; nothing happens to one without a features cache
    """
    shared = model.replay_buffer.shared
    if shared.active is None:
        return
    rows = model.replay_buffer.size()
    columns = (model.replay_buffer.observations, model.replay_buffer.next_observations)
    stored = np.unique(np.concatenate([column.obs_ids[:rows].ravel() for column in columns]))
    for start in range(0, len(stored), 64):
        some = stored[start : start + 64]
        if shared.cache is None:  # there was no memory
            return
        shared.guard(shared.cache.get, shared.image_ids(some[some >= 0]), shared.store)


def _clocks() -> tuple[float, float, float]:
    return time.process_time(), time.perf_counter(), time.perf_counter()
