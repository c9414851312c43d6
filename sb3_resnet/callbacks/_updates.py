"""Act before each gradient update, with the number of updates done so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_resnet.callbacks._evaluations import walk
from sb3_resnet.optim.groups import install_effective_lr, optimizer_of


class UpdateHook:
    """
    Calls ``act(n)`` before each optimizer step; ``n`` counts gradient updates.

    SB3 updates its own counter only after the ``gradient_steps`` updates of one ``train()``, and PPO's counts epochs.

    :param act: what to do
    """

    def __init__(self, act: Callable[[int], None]) -> None:
        self.n = 0
        self._act = act
        self._handle: th.utils.hooks.RemovableHandle | None = None

    def attach(self, model: BaseAlgorithm, n: int = 0, first: bool = False) -> None:
        """
        Start at the optimizer of the model.

        :param model: an SB3 model
        :param n: where to start if the model has no such counter
        :param first: act before all that act on the optimizer's step so far
        :raises ValueError: if the policy has not exactly one optimizer, or ``learn()`` was given two such callbacks
        """
        owner = getattr(self._act, "__self__", None)
        optimizer = optimizer_of(model)
        _refuse_twins(owner)
        install_effective_lr(optimizer)
        self.n = n
        self.follow(model)
        # A learn() that was interrupted never reached on_training_end: its hook is still there.
        hooks = optimizer._optimizer_step_pre_hooks
        for key, hook in [*hooks.items()]:
            other = getattr(hook, "__self__", None)
            if isinstance(other, UpdateHook) and type(getattr(other._act, "__self__", None)) is type(owner):
                del hooks[key]
        self._handle = optimizer.register_step_pre_hook(self._before_step)
        if first:
            hooks.move_to_end(self._handle.id, last=False)  # type: ignore[attr-defined]  # an OrderedDict

    def follow(self, model: BaseAlgorithm) -> None:
        """Take over the model's counter where it counts gradient updates; it is saved and never reset."""
        if isinstance(model, OffPolicyAlgorithm):
            self.n = model._n_updates

    def detach(self) -> None:
        """Stop; may be called again (RL-Zoo calls ``on_training_end`` twice)."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _before_step(self, optimizer: th.optim.Optimizer, args: Any, kwargs: Any) -> None:
        n, self.n = self.n, self.n + 1
        self._act(n)


def _refuse_twins(owner: Any) -> None:
    """Two of a kind would undo each other: both own the same learning rates, or the same keys of the log."""
    if not isinstance(owner, BaseCallback):
        return
    kind = type(owner)
    twins = sum(type(callback) is kind for callback in walk(owner.locals.get("callback")))
    if twins > 1:
        raise ValueError(f"learn() was given {twins} callbacks {kind.__name__}, which would undo each other: write one")


def record(model: BaseAlgorithm, values: Mapping[str, float]) -> None:
    """Log values with SB3's logger, which a model has only from its first ``learn()`` on."""
    if hasattr(model, "_logger"):
        for key, value in values.items():
            model.logger.record(key, value)
