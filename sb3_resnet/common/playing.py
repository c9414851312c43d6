"""Play where nothing learns: which actions to take."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.atari_wrappers import EpisodicLifeEnv
from stable_baselines3.common.env_util import unwrap_wrapper
from stable_baselines3.common.vec_env import VecEnv

from sb3_resnet.common.arguments import shown


def check_model(model: Any, env: VecEnv) -> None:
    """
    :param model: an SB3 model that shall play, or ``None``
    :param env: environments
    :raises TypeError: for other than a model
    :raises ValueError: for a recurrent model, and for one of other observations or actions
    """
    if model is None:
        return
    if not all(hasattr(model, name) for name in ("predict", "observation_space", "action_space")):
        raise TypeError(f"model must be an SB3 model, got {shown(model)}: load it first, such as with DQN.load(path)")
    refuse_memory(model)
    for kind in ("observation", "action"):
        own, given = (getattr(one, f"{kind}_space") for one in (model, env))
        if own != given:
            raise ValueError(
                f"The model has the {kind}s {own}, and the environment {given}: give the environment of its training, "
                "with the same wrappers"
            )


def refuse_memory(model: Any) -> None:
    """
    :param model: an SB3 model
    :raises ValueError: if it is recurrent: each step is played on its own here, and it would forget the ones before
    """
    if hasattr(getattr(model, "policy", model), "lstm_actor"):
        raise ValueError(
            f"{type(getattr(model, 'policy', model)).__name__} is recurrent, and each step is played on its own here: "
            "give a model without an LSTM"
        )


def begin(env: VecEnv, seed: int) -> Any:
    """
    Begin new episodes, the same for the same seed.

    :param env: environments in this process
    :param seed: of environments and random actions
    :return: the first observations
    """
    env.seed(seed)
    env.action_space.seed(seed)
    for one in getattr(env.unwrapped, "envs", ()):
        # SB3's wrapper goes on where a life was lost, and in the midst of a life too, unless the last game was over.
        lives: Any = unwrap_wrapper(one, EpisodicLifeEnv)
        if lives is not None:
            lives.was_real_done = True
    return env.reset()


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
