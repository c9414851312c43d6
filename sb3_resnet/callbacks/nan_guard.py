"""Stop before NaN or infinity in rewards or gradients is trained on."""

from __future__ import annotations

from typing import Any

import torch as th
from stable_baselines3.common.callbacks import BaseCallback

from sb3_resnet.callbacks._evaluations import refusals_end_the_search
from sb3_resnet.callbacks._rewards import RewardCheck
from sb3_resnet.common.arguments import no_unknown
from sb3_resnet.optim.groups import install_effective_lr


class NanGuardCallback(BaseCallback):
    """
    Check new rewards before each ``train()`` and the gradient before each step of an optimizer; a NaN or an infinity is
    an error that says where it is.

    ``ResNetCnnPolicy`` refuses such gradients by itself, and such rewards when they are sampled, which may be long
    after. Other policies, as PPO's and A2C's with a :class:`~sb3_resnet.extractor.ResNetExtractor`, refuse neither
    without this callback or ``AMPCallback``, which checks the same; ``FeatureCacheCallback`` checks rewards. Works with
    every SB3 algorithm. Example::

        NanGuardCallback()

    :param verbose: SB3's verbosity
    :raises ValueError: in training, for NaN or infinity in rewards or gradients
    :raises TypeError: for unknown arguments
    """

    def __init__(self, verbose: int = 0, **unknown: Any) -> None:
        super().__init__(verbose)
        no_unknown("NanGuardCallback", unknown, ("verbose",))
        self._rewards = RewardCheck()

    @refusals_end_the_search
    def _on_training_start(self) -> None:
        for module in self.model.policy.modules():
            optimizer = getattr(module, "optimizer", None)  # SAC's networks have one each
            if isinstance(optimizer, th.optim.Optimizer):
                install_effective_lr(optimizer)
        self._rewards(self.model)

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self._rewards(self.model)
