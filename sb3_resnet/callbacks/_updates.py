"""What callbacks do in updates: their hooks, given back however ``learn()`` ends, and the count of updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from torch.optim import Optimizer

from sb3_resnet.callbacks._evaluations import walk
from sb3_resnet.common import host, host_progress
from sb3_resnet.common.lending import Lending, begin_lending
from sb3_resnet.common.step_hooks import StepHooks, before_step
from sb3_resnet.extractor import ResNetExtractor, extractors_in
from sb3_resnet.optim.groups import install_effective_lr, optimizer_of
from sb3_resnet.optim.updates import gradient_updates, install_update_counter


class LendingCallback(BaseCallback):
    """
    Follows the parts of ``learn()``, so that what this callback lends to the model acts in them alone.

    What is lent asks :attr:`lending` each time whether it may act. Subclasses override SB3's methods with an
    underscore, as every callback does.
    """

    #: From the start of training on.
    lending: Lending | None = None

    def on_training_start(self, locals_: dict[str, Any], globals_: dict[str, Any]) -> None:
        """As SB3's. Where somebody else than ``learn()`` calls it, or an ``EventCallback``, hooks tell no parts."""
        driven = locals_.get("self") is not self.model or self.parent is not None
        self.lending = begin_lending(self.model, locals_, always=driven)
        extractors = extractors_of(self.model)
        if extractors:
            self.lending.hear_modes_of(extractors[0])  # the online network's; all are switched together
        super().on_training_start(locals_, globals_)

    def on_rollout_start(self) -> None:
        """As SB3's."""
        if self.lending is not None:
            self.lending.act(host_progress.last_observation(self.model))
        super().on_rollout_start()

    def on_step(self) -> bool:
        """As SB3's."""
        if self.lending is not None:
            self.lending.act(self.locals.get("new_obs"))
        return super().on_step()

    def on_rollout_end(self) -> None:
        """As SB3's."""
        if self.lending is not None:
            self.lending.update()
        super().on_rollout_end()

    def on_training_end(self) -> None:
        """As SB3's."""
        if self.lending is not None:
            self.lending.end()
        super().on_training_end()


class UpdateHook:
    """
    Calls ``act(n)`` before each optimizer step; ``n`` counts gradient updates.

    SB3 updates its own counter only after the ``gradient_steps`` updates of one ``train()``, and PPO's counts epochs.
    For PPO an update is one minibatch: ``train()`` makes ``n_epochs * n_steps * n_envs / batch_size`` of them, or fewer
    with ``target_kl``. For A2C it is one ``train()``.

    :param act: what to do
    """

    def __init__(self, act: Callable[[int], None]) -> None:
        self.n = 0
        self._act = act
        self._hooks: StepHooks | None = None

    def attach(self, model: BaseAlgorithm, n: int = 0, first: bool = False) -> None:
        """
        Start at the optimizer of the model.

        :param model: an SB3 model
        :param n: where to start if the model has no counter of gradient updates yet
        :param first: act before all that act on the optimizer's step so far
        :raises ValueError: if the policy has not exactly one optimizer, or ``learn()`` was given two such callbacks
        """
        owner = getattr(self._act, "__self__", None)
        optimizer = optimizer_of(model)
        _refuse_twins(owner)
        install_effective_lr(optimizer)
        if not isinstance(model, OffPolicyAlgorithm):
            install_update_counter(optimizer, n)
        self.follow(model)
        self.detach()
        self._hooks = before_step(optimizer)
        # A learn() that was interrupted never reached on_training_end: this takes the place of its hook.
        self._hooks.add(self._key, self._before_step, first)

    def follow(self, model: BaseAlgorithm) -> None:
        """Take over the count of gradient updates, which is saved with the model and never reset."""
        self.n = gradient_updates(model)

    def detach(self) -> None:
        """Stop; may be called again (RL-Zoo calls ``on_training_end`` twice)."""
        if self._hooks is not None:
            self._hooks.remove(self._key, self._before_step)
            self._hooks = None

    @property
    def _key(self) -> Any:
        """One hook for each class of callbacks, since :meth:`attach` refuses two of a class."""
        owner = getattr(self._act, "__self__", None)
        return self if owner is None else type(owner)

    def _before_step(self, optimizer: Optimizer) -> None:
        lending = getattr(getattr(self._act, "__self__", None), "lending", None)
        if lending is not None and not lending.updating:
            lending.was_passed_over = True
            return  # an update of somebody else, most likely after a learn() that was interrupted
        n, self.n = self.n, self.n + 1
        self._act(n)


def _refuse_twins(owner: Any) -> None:
    """Two of a kind would undo each other: both own the same learning rates, or the same keys of the log."""
    if not isinstance(owner, BaseCallback):
        return
    kind = type(owner)
    twins = sum(type(callback) is kind for callback in walk(host.root_callback(owner)))
    if twins > 1:
        raise ValueError(f"learn() was given {twins} callbacks {kind.__name__}, which would undo each other: write one")


def record(model: BaseAlgorithm, values: Mapping[str, float]) -> None:
    """Log values with SB3's logger, which a model has only from its first ``learn()`` on."""
    logger = host.logger_of(model)
    if logger is not None:
        for key, value in values.items():
            logger.record(key, value)


def extractors_of(model: BaseAlgorithm) -> list[ResNetExtractor]:
    """:return: the online and the target network's; PPO's may be shared or two"""
    return extractors_in(model.policy)
