"""Play where nothing learns: which actions to take, and what is told of the state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def labels_from_info(info: Mapping[str, Any], keys: Sequence[str], first: bool) -> dict[str, Any]:
    """
    :param info: of an environment
    :param keys: those that are labels
    :param first: whether it is that of a reset
    :return: the labels; NaN for all of a reset that lacks one
    :raises ValueError: for a key that is not there after a step
    """
    if first and not {*keys} <= {*info}:
        return dict.fromkeys(keys, np.nan)  # many environments tell nothing at a reset; such rows are not scored
    missing = [key for key in keys if key not in info]
    if missing:
        raise ValueError(f"info has no {', '.join(missing)}: it has {', '.join(sorted(map(str, info)))}")
    return {key: info[key] for key in keys}
