"""Stop before NaN or infinite rewards are trained on."""

from __future__ import annotations

from typing import Any

from stable_baselines3.common.callbacks import BaseCallback

from sb3_resnet.callbacks._rewards import RewardCheck
from sb3_resnet.checks import no_unknown


class NanGuardCallback(BaseCallback):
    """
    Check new rewards before each ``train()``; a NaN or an infinity among them is an error that says where it is.

    ``ResNetCnnPolicy`` refuses such rewards only when they are sampled, which may be long after; PPO and A2C with a
    :class:`~sb3_resnet.extractor.ResNetExtractor` refuse them only here. ``AMPCallback`` and ``FeatureCacheCallback``
    check the same. Works with every SB3 algorithm that has a buffer. Example::

        NanGuardCallback()

    :param verbose: SB3's verbosity
    :raises ValueError: in training, for NaN or infinity in rewards
    :raises TypeError: for unknown arguments
    """

    def __init__(self, verbose: int = 0, **unknown: Any) -> None:
        super().__init__(verbose)
        no_unknown("NanGuardCallback", unknown, ("verbose",))
        self._rewards = RewardCheck()

    def _on_training_start(self) -> None:
        self._rewards(self.model)

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self._rewards(self.model)
