"""How much of everything: for a test, for CPU cores, for a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch as th

from .games import N_ENVS


@dataclass(frozen=True)
class Budget:
    """
    :param steps: environment steps of a run
    :param seeds: runs of each arm and game
    :param eval_every: environment steps between two evaluations
    :param episodes: whole games of an evaluation
    :param save_every: environment steps between two checkpoints
    :param buffer_size: transitions
    :param learning_starts: environment steps before the first update
    :param updates_per_rollout: gradient updates after each step of all environments
    :param target_update_interval: environment steps between two copies of the target network
    :param exploration_fraction: share of the steps in which epsilon falls to its end
    :param device: of the network
    :param threads: of a process: torch's, and emulators at work
    """

    steps: int
    seeds: int
    eval_every: int
    episodes: int
    save_every: int
    buffer_size: int
    learning_starts: int
    updates_per_rollout: int
    target_update_interval: int = 1_000
    exploration_fraction: float = 0.1
    device: str = "cpu"
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "eval_every", "save_every"):
            value = getattr(self, name)
            if value < N_ENVS or value % N_ENVS:
                raise ValueError(f"{name} must be a multiple of {N_ENVS}, the number of environments, got {value}")


_CPU = Budget(100_000, 3, 10_000, 20, 20_000, 100_000, 2_000, N_ENVS)
#: An update per environment step, as in zoo_configs; the smoke test makes one per eight.
BUDGETS = {
    "smoke": Budget(5_000, 1, 4_000, 1, 2_000, 5_000, 400, 1),
    "cpu": _CPU,
    # An update per four steps, SB3's default and RL-Zoo's for Atari: NatureCNN then needs no night for a game.
    "quarter": replace(_CPU, updates_per_rollout=N_ENVS // 4),
    "gpu": Budget(400_000, 5, 10_000, 20, 100_000, 100_000, 2_000, N_ENVS, device="cuda"),
    # Of `atari.py pong`, which ends a run before that. Pong needs less exploration than a suite of games.
    "pong": Budget(1_000_000, 5, 25_000, 20, 100_000, 100_000, 2_000, N_ENVS, exploration_fraction=0.02, threads=2),
}


def budget_of(name: str, steps: int | None = None) -> Budget:
    """
    :param name: ``"smoke"``, ``"cpu"``, ``"quarter"``, ``"gpu"`` or ``"pong"``
    :param steps: other than the budget's
    :return: the budget
    :raises ValueError: for an unknown name, or steps that are no multiple of the number of environments
    """
    if name not in BUDGETS:
        raise ValueError(f"--budget must be one of {', '.join(BUDGETS)}, got {name!r}")
    return BUDGETS[name] if steps is None else replace(BUDGETS[name], steps=steps)


def check_device(name: str) -> None:
    """
    :param name: of a budget that is to be run here
    :raises ValueError: if it needs a GPU that is not there
    """
    if BUDGETS[name].device == "cuda" and not th.cuda.is_available():  # SB3 would take the CPU in silence
        raise ValueError(f"--budget {name}, but PyTorch finds no GPU: write --budget cpu")
