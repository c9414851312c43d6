"""Warmup and learning-rate schedules that survive a resume."""

from __future__ import annotations

import math
from typing import Any

from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import TrainFrequencyUnit

from sb3_resnet.callbacks._evaluations import Evaluations, refusals_end_the_search
from sb3_resnet.callbacks._updates import LendingCallback, UpdateHook, record
from sb3_resnet.common import host
from sb3_resnet.common.arguments import choice, integer, number
from sb3_resnet.common.ranks import ranks_of
from sb3_resnet.optim import schedules
from sb3_resnet.optim.groups import (
    optimizer_of,
    recall,
    remember,
    set_lr_factor,
    warn_that_nothing_is_learnt,
)

#: The arguments of each schedule.
SCHEDULES: dict[str, tuple[str, ...]] = {
    "constant": (),
    "linear": ("decay_steps", "min_factor"),
    "cosine": ("decay_steps", "min_factor"),
    "step": ("step_size", "gamma"),
    "plateau": ("patience", "min_delta", "gamma", "min_factor"),
}
_STATE = "lr_schedule"  # key of our state in the optimizer's groups, where it is saved


class LRScheduleCallback(LendingCallback):
    """
    Linear warmup, then a schedule. Both multiply the learning rate of every parameter group.

    The schedule counts gradient updates with a counter that is saved with the model and never reset. So a second
    ``learn()``, ``reset_num_timesteps=True`` and a resumed model continue where training stopped, and a warning says so
    where that is at rate 0. For PPO each minibatch is an update, not each epoch; for A2C each rollout. Example::

        LRScheduleCallback(warmup_steps=1000, schedule="cosine", decay_steps=200_000)

    :param warmup_steps: length of the warmup in gradient updates (500 to 2000 is usual); 0 for none
    :param schedule: ``"constant"``, ``"linear"``, ``"cosine"``, ``"step"`` or ``"plateau"``
    :param decay_steps: linear and cosine: length after the warmup, in gradient updates. ``None``: the rest of the first
        ``learn()`` that goes beyond the warmup. Write it if training consists of several calls of ``learn()``
    :param min_factor: linear, cosine and plateau: the smallest factor (default 0)
    :param step_size: step: gradient updates between two reductions
    :param gamma: step and plateau: factor of each reduction (default 0.1, as in PyTorch)
    :param patience: plateau: number of evaluations without improvement that are tolerated (default 10, as in PyTorch);
        one of the same parameters as the one before does not count. A plateau needs an ``EvalCallback``
    :param min_delta: plateau: smallest gain in mean reward that counts as an improvement (default 0)
    :param verbose: 1 to print the schedule and each reduction on a plateau
    :raises ValueError: for values that cannot work, and for arguments of another schedule
    :raises TypeError: for wrong types
    """

    def __init__(
        self,
        warmup_steps: int = 0,
        schedule: str = "constant",
        *,
        decay_steps: int | None = None,
        min_factor: float | None = None,
        step_size: int | None = None,
        gamma: float | None = None,
        patience: int | None = None,
        min_delta: float | None = None,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        names = {name for names in SCHEDULES.values() for name in names}
        given = {name: value for name, value in locals().items() if name in names and value is not None}
        self.schedule = choice("schedule", schedule, [*SCHEDULES])
        for name in given.keys() - {*SCHEDULES[schedule]}:
            owners = [owner for owner, own in SCHEDULES.items() if name in own]
            raise ValueError(f"{name} means nothing to schedule={schedule!r}: leave it out, or write one of {owners}")
        if schedule == "step" and step_size is None:
            raise ValueError("schedule='step' needs step_size, the gradient updates between two reductions")
        self.warmup_steps = integer("warmup_steps", warmup_steps)
        self.decay_steps = None if decay_steps is None else integer("decay_steps", decay_steps, 1)
        self.min_factor = number("min_factor", 0.0 if min_factor is None else min_factor, 0.0, 1.0)
        self.step_size = integer("step_size", 1 if step_size is None else step_size, 1)
        self.gamma = number("gamma", 0.1 if gamma is None else gamma, 0.0, 1.0, above=True)
        self.patience = integer("patience", 10 if patience is None else patience)
        self.min_delta = number("min_delta", 0.0 if min_delta is None else min_delta)
        self._updates = UpdateHook(self._apply)
        self._horizon: int | None = None
        self._plateau = schedules.plateau_start()
        self._evaluations = Evaluations(None)

    def factor(self, n: int) -> float:
        """
        :param n: gradient updates done so far
        :return: the factor of the next update, with the reductions on plateaus up to this moment
        """
        after = max(0, n - self.warmup_steps)
        if self.schedule in ("linear", "cosine"):
            curve = schedules.linear if self.schedule == "linear" else schedules.cosine
            value = 1.0 if self._horizon is None else curve(after, self._horizon, self.min_factor)
        elif self.schedule == "step":
            value = schedules.step(after, self.step_size, self.gamma)
        else:
            value = self._plateau["factor"]
        return schedules.warmup(n, self.warmup_steps) * value

    @refusals_end_the_search
    def _on_training_start(self) -> None:
        self._evaluations = Evaluations(host.root_callback(self))
        if self.schedule == "plateau" and not self._evaluations.found:
            raise ValueError("schedule='plateau' follows the evaluation reward: add an EvalCallback to learn()")
        saved = recall(optimizer_of(self.model), _STATE)
        self._updates.attach(self.model, saved.get("updates", 0))
        self._plateau = saved.get("plateau", schedules.plateau_start())
        self._horizon = self.decay_steps or saved.get("horizon")
        if self.schedule in ("linear", "cosine") and self._horizon is None:
            left = self._updates.n + _planned_updates(self.model) - self.warmup_steps
            self._horizon = left if left > 0 else None  # within the warmup: a later learn() says how long it is
        self._apply(self._updates.n)
        if self.factor(self._updates.n) == 0.0:  # and so it stays: after the warmup no schedule rises
            warn_that_nothing_is_learnt(optimizer_of(self.model))
        if self.verbose:
            print(f"LRSchedule: warmup {self.warmup_steps} updates, then {self.schedule}, at update {self._updates.n}")

    def _on_step(self) -> bool:
        reward = self._evaluations.poll_after_updates(self.model) if self.schedule == "plateau" else None
        if reward is not None:
            before = self._plateau["factor"]
            self._plateau = schedules.plateau(
                self._plateau, reward, self.patience, self.min_delta, self.gamma, self.min_factor
            )
            if self.verbose and self._plateau["factor"] != before:
                print(f"LRSchedule: no gain on plateau, learning rates x {self._plateau['factor']:g}")
            self._apply(self._updates.n)  # at once, so that a checkpoint of this step contains it
        return True

    def _on_rollout_end(self) -> None:
        self._on_step()
        self._updates.follow(self.model)
        self._apply(self._updates.n)
        groups = optimizer_of(self.model).param_groups
        record(self.model, {f"train/lr_{group.get('name', 'all')}": group["effective_lr"] for group in groups})

    def _on_training_end(self) -> None:
        self._on_step()  # an evaluation may have stopped training, and then SB3 skips on_rollout_end
        self._updates.detach()

    def _apply(self, n: int) -> None:
        optimizer = optimizer_of(self.model)
        set_lr_factor(optimizer, "schedule", self.factor(n))
        state = {"updates": self._updates.n, "horizon": self._horizon, "plateau": dict(self._plateau)}
        remember(optimizer, _STATE, state)


def _planned_updates(model: Any) -> int:
    """Number of gradient updates that are left in this ``learn()``."""
    planned = host.planned_timesteps(model) or 0
    steps: int = planned - model.num_timesteps
    ranks = ranks_of(model).size  # timesteps are those of all ranks, and each has a rollout of its own
    if isinstance(model, OffPolicyAlgorithm):
        frequency: Any = model.train_freq
        if frequency.unit == TrainFrequencyUnit.EPISODE:
            raise ValueError("train_freq counts episodes, so the number of updates is unknown: write decay_steps=...")
        steps = planned - max(model.num_timesteps, model.learning_starts)
        rollout: int = frequency.frequency * model.n_envs
        updates = int(rollout if model.gradient_steps < 0 else model.gradient_steps)
        return max(0, steps) // (rollout * ranks) * updates
    rollout = model.n_steps * model.n_envs
    batches = math.ceil(rollout / getattr(model, "batch_size", rollout))
    return math.ceil(steps / (rollout * ranks)) * int(getattr(model, "n_epochs", 1)) * batches
