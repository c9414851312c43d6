"""VecNormalize around images: where it would change their scale, hand them over in two layouts, or learn from play."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

#: What to write instead; goes on after a colon or a comma.
INSTEAD = (
    "write norm_obs=False: VecNormalize(VecTransposeImage(env), norm_obs=False), or VecNormalize(env, norm_obs=False) "
    "where images come channels first"
)


def check_vec_normalize(model: BaseAlgorithm) -> None:
    """
    Refuse a ``VecNormalize`` with which images would not reach the network as their space says.

    Those in a Dict are left alone: ``norm_obs_keys`` may name other observations only.

    :param model: an SB3 model that has its environment, perhaps still without a policy
    :raises ValueError: if observations are normalised, or if the replay buffer would get them channels last
    """
    normalizer = model.get_vec_normalize_env()
    if normalizer is None or isinstance(model.observation_space, spaces.Dict):
        return
    if normalizer.norm_obs:
        raise ValueError(
            "VecNormalize changes the scale of images with statistics that move, also of old observations in replay "
            f"memory: {INSTEAD}"
        )
    check_stored_layout(model)


def check_stored_layout(model: BaseAlgorithm) -> None:
    """
    Refuse a ``VecNormalize`` below a wrapper that changes the shape of images. Only spaces are compared.

    :param model: an SB3 model that has its environment
    :raises ValueError: if the replay buffer would get images of another shape than the network
    """
    normalizer = model.get_vec_normalize_env()
    if normalizer is None or isinstance(model.observation_space, spaces.Dict):
        return
    # Off-policy algorithms store what comes out of the environment below VecNormalize, before SB3 transposes it.
    stored = normalizer.observation_space.shape
    if isinstance(model, OffPolicyAlgorithm) and stored != model.observation_space.shape:
        raise ValueError(
            "VecNormalize is below a wrapper that changes the shape of images, such as VecTransposeImage or "
            f"VecFrameStack. The replay buffer would get shape {stored}, and the network takes "
            f"{model.observation_space.shape}. Put VecNormalize on top and {INSTEAD}. In RL-Zoo leave normalize out"
        )


@contextmanager
def resting(env: VecEnv) -> Iterator[None]:
    """
    Play without a change to the statistics of a ``VecNormalize``.

    :param env: environments, with or without one
    """
    normalizer = unwrap_vec_normalize(env)
    if normalizer is None:
        yield
        return
    learned = normalizer.training
    normalizer.training = False
    try:
        yield
    finally:
        normalizer.training = learned


def raw_rewards(env: VecEnv, rewards: Any) -> Any:
    """
    :param env: environments that were stepped
    :param rewards: what they gave
    :return: the rewards before a ``VecNormalize`` scaled them
    """
    normalizer = unwrap_vec_normalize(env)
    return rewards if normalizer is None else normalizer.get_original_reward()
