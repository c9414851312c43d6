"""Stop before NaN or infinity in rewards or gradients is trained on."""

from __future__ import annotations

from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm
from torch.optim import Optimizer

from sb3_resnet.callbacks._evaluations import refusals_end_the_search
from sb3_resnet.callbacks._updates import LendingCallback
from sb3_resnet.common.nonfinite import (
    POLICYS_CHECK,
    RewardCheck,
    check_gradients,
    check_sampled_rewards,
    remove_gradient_check,
)
from sb3_resnet.common.sampling import unwatch_samples, watch_samples
from sb3_resnet.common.step_hooks import before_step


class NanGuardCallback(LendingCallback):
    """
    Check new rewards before each ``train()``, the rewards of each sampled batch, and the gradient before each step of
    an optimizer; a NaN or an infinity is an error that says where it is.

    ``ResNetCnnPolicy`` refuses such gradients by itself, and this package's replay buffers refuse such rewards when
    they are sampled, which may be long after. Other policies, as PPO's and A2C's with a
    :class:`~sb3_resnet.extractor.ResNetExtractor`, and other buffers refuse neither without this callback;
    ``AMPCallback`` and ``FeatureCacheCallback`` check new rewards. Works with every SB3 algorithm and with all
    optimizers of it: policy, actor, critic and SAC's entropy coefficient. After training nothing of it stays in the
    model. Example::

        NanGuardCallback()

    :param verbose: SB3's verbosity
    :raises ValueError: in training, for NaN or infinity in rewards or gradients
    """

    def __init__(self, verbose: int = 0) -> None:
        super().__init__(verbose)
        self._rewards = RewardCheck()
        self._watched: Any = None  # the buffer whose batches are checked

    @refusals_end_the_search
    def _on_training_start(self) -> None:
        for optimizer in optimizers_of(self.model):
            if before_step(optimizer).get(POLICYS_CHECK) is None:
                before_step(optimizer).add(NanGuardCallback, self._check_gradients)
        self._check_rewards()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self._check_rewards()

    def _on_training_end(self) -> None:
        for optimizer in optimizers_of(self.model):
            remove_gradient_check(optimizer, NanGuardCallback)
        unwatch_samples(self._watched, NanGuardCallback)
        self._watched = None

    def _check_rewards(self) -> None:
        self._rewards(self.model)
        buffer = getattr(self.model, "replay_buffer", None)
        if buffer is not self._watched:  # another one was loaded, or a callback has replaced it
            unwatch_samples(self._watched, NanGuardCallback)
            self._watched = buffer
        if hasattr(buffer, "sample"):
            watch_samples(buffer, NanGuardCallback, self._check_batch)

    def _check_gradients(self, optimizer: Optimizer) -> None:
        if self.lending is None or self.lending.updating:
            check_gradients(optimizer)

    def _check_batch(self, batch: Any) -> None:
        if self.lending is None or self.lending.updating:
            check_sampled_rewards(batch)


def optimizers_of(model: BaseAlgorithm) -> list[Optimizer]:
    """:return: all optimizers of an SB3 model: those of its networks, and its own, as SAC's ``ent_coef_optimizer``"""
    # SAC's networks have one each.
    found = [*vars(model).values(), *(getattr(module, "optimizer", None) for module in model.policy.modules())]
    return [*{id(one): one for one in found if isinstance(one, Optimizer)}.values()]
