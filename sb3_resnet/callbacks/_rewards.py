"""Rewards that are NaN or infinite, found before they are trained on."""

from __future__ import annotations

from typing import Any

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_resnet.common.nonfinite import FIND_THE_STEP


class RewardCheck:
    """
    Looks at the rewards that a model's buffer has got since the last call.

    The gradient does not show an infinite reward: DQN's Huber loss turns it into a slope of 1.
    """

    def __init__(self) -> None:
        self._seen: tuple[Any, int] = (None, 0)

    def __call__(self, model: BaseAlgorithm) -> None:
        """
        :param model: an SB3 model, right before ``train()``; one without a buffer has nothing to check
        :raises ValueError: if there is a NaN or an infinity among its rewards
        """
        buffer: Any = getattr(model, "replay_buffer", getattr(model, "rollout_buffer", None))
        if not hasattr(buffer, "rewards"):
            return
        seen, start = self._seen
        self._seen = (buffer, buffer.pos)
        rows = np.arange(len(buffer.rewards) if buffer.full else buffer.pos)
        new = (buffer.pos - start) % len(buffer.rewards)
        if seen is buffer and new > 0:  # 0: after one whole turn, as PPO's after each rollout
            rows = np.arange(start, start + new) % len(buffer.rewards)
        finite = np.isfinite(buffer.rewards[rows])
        bad = rows[~finite.all(axis=tuple(range(1, finite.ndim)))]
        if len(bad):
            raise ValueError(
                f"The rewards hold NaN or inf: {buffer.rewards[bad[0]].tolist()} in row {bad[0]} of the buffer. "
                f"{FIND_THE_STEP}."
            )
