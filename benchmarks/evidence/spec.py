"""What a run is: all that its result file is a function of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from .arms import ARMS, LEARNING_RATE
from .budgets import Budget, budget_of


@dataclass(frozen=True)
class Run:
    """
    What a result file is a function of.

    :param suite: name of the suite
    :param budget: name of the budget
    :param game: name of the game
    :param arm: name of the arm
    :param seed: of everything
    :param steps: environment steps
    :param learning_rate: of the head
    :param weights: file of the trunk's weights, or ``None``
    :param is_try: whether it serves to choose a learning rate
    :param minutes: after which a run of Pong ends
    """

    suite: str
    budget: str
    game: str
    arm: str
    seed: int
    steps: int
    learning_rate: float
    weights: str | None = None
    is_try: bool = False
    minutes: float | None = None

    @property
    def folder(self) -> Path:
        """Of its files, within those of all runs."""
        return Path(self.suite, self.budget, *(["tuning"] if self.is_try else []))

    @property
    def name(self) -> str:
        """Of its files, without their endings."""
        rate = f"-lr{self.learning_rate}" if self.is_try else ""
        return f"{self.game}-{self.arm}-{self.steps}{rate}-s{self.seed}"

    @property
    def plan(self) -> Budget:
        """Its budget."""
        return budget_of(self.budget, self.steps)

    def options(self) -> list[str]:
        """:return: the command line of this run alone, after ``atari.py run``"""
        options = [f"--{name}" for name in ("suite", "budget", "game", "arm", "seed", "steps")]
        values = [self.suite, self.budget, self.game, self.arm, self.seed, self.steps]
        pairs = [*zip(options, map(str, values), strict=True), ("--learning-rate", str(self.learning_rate))]
        if self.weights is not None:
            pairs += [self._weights_option()]
        return [word for pair in pairs for word in pair] + (["--try"] if self.is_try else [])

    def _weights_option(self) -> tuple[str, str]:
        if ARMS[self.arm].weights == "imagenet":
            return "--imagenet", str(self.weights)
        return "--weights", f"{self.game}={self.weights}"

    @property
    def command(self) -> str:
        """What a result file names."""
        if self.budget == "pong":
            given = "" if self.weights is None else f" --weights Pong={Path(self.weights).name}"
            given += "" if self.learning_rate == LEARNING_RATE else f" --learning-rate {self.learning_rate}"
            return f"python benchmarks/atari.py pong --minutes {self.minutes:g}{given}"
        return f"python benchmarks/atari.py run {' '.join(self.named_options())}"

    def named_options(self) -> list[str]:
        """:return: :meth:`options` with a weights file by its name alone, since its hash says which it was"""
        named = self if self.weights is None else replace(self, weights=Path(self.weights).name)
        return named.options()
