"""Clip head and backbone apart, so that unfreezing does not shrink the head's step."""

from __future__ import annotations

from typing import Any

import torch as th
from stable_baselines3.common.callbacks import BaseCallback

from sb3_resnet.callbacks._updates import UpdateHook, optimizer_of
from sb3_resnet.checks import no_unknown, number
from sb3_resnet.optim import is_part


class GradientClipCallback(BaseCallback):
    """
    Clip the gradient norm of head and backbone each by itself.

    SB3 clips one joint norm (``max_grad_norm``, 10 for DQN), in which a freshly unfrozen trunk outweighs the head. This
    clips after it, so set ``max_grad_norm`` high to make this the only one. Example::

        GradientClipCallback(max_norm=2.0)

    :param max_norm: largest norm of each part; 1 to 5 is usual
    :param verbose: SB3's verbosity
    :raises ValueError: if it is not above 0
    :raises TypeError: for unknown arguments
    """

    def __init__(self, max_norm: float = 2.0, verbose: int = 0, **unknown: Any) -> None:
        super().__init__(verbose)
        no_unknown("GradientClipCallback", unknown, ("max_norm", "verbose"))
        self.max_norm = number("max_norm", max_norm, above=True)
        self._updates = UpdateHook(self._clip)

    def _on_training_start(self) -> None:
        self._updates.attach(self.model)

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self._updates.detach()

    def _clip(self, n: int) -> None:
        groups = optimizer_of(self.model).param_groups
        for part in ("head", "backbone"):
            parameters = [parameter for group in groups if is_part(group, part) for parameter in group["params"]]
            th.nn.utils.clip_grad_norm_(parameters, self.max_norm)
