"""A DQN on random 84x84x4 images whose buffer holds one batch: what a benchmark of updates alone needs."""

from __future__ import annotations

from typing import Any

import numpy as np
from stable_baselines3 import DQN
from stable_baselines3.common.envs import FakeImageEnv

import sb3_resnet  # noqa: F401  # registers "ResNetCnnPolicy"


def filled_dqn(batch: int, **extractor: Any) -> DQN:
    """
    :param batch: transitions in the buffer
    :param extractor: the ``features_extractor_kwargs``
    :return: a model that is ready for ``train()``
    """
    env = FakeImageEnv(action_dim=6, screen_height=84, screen_width=84, n_channels=4, discrete=True, channel_first=True)
    policy_kwargs = {"features_extractor_kwargs": extractor}
    model = DQN("ResNetCnnPolicy", env, buffer_size=batch, policy_kwargs=policy_kwargs, device="cpu", seed=0)
    rng = np.random.default_rng(0)
    for _ in range(batch):
        images = rng.integers(0, 256, (2, 1, 4, 84, 84), dtype=np.uint8)
        model.replay_buffer.add(*images, rng.integers(0, 6, (1, 1)), rng.normal(size=1), np.zeros(1), [{}])
    model._setup_learn(1, None)
    return model
