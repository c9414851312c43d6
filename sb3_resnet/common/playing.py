"""Play where nothing learns: which actions to take."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv


def next_actions(env: VecEnv, observations: Any, model: Any, epsilon: float, rng: np.random.Generator) -> NDArray[Any]:
    """
    :param env: environments
    :param observations: what they show
    :param model: an SB3 model whose greedy actions are taken; ``None``: random actions
    :param epsilon: share of random actions beside those of the model
    :param rng: decides between the two
    :return: an action per environment
    """
    actions = np.array([env.action_space.sample() for _ in range(env.num_envs)])
    if model is None:
        return actions
    greedy, _ = model.predict(observations, deterministic=True)
    explores = (rng.random(env.num_envs) < epsilon).reshape(-1, *(1,) * (actions.ndim - 1))
    chosen: NDArray[Any] = np.where(explores, actions, greedy)
    return chosen
