"""How far a model of Stable-Baselines3 has come: a second part of the one seam, beside ``host.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv

#: What training changes in a model, beside its tensors; each algorithm has some of these.
_PROGRESS = (
    "num_timesteps",
    "_n_updates",
    "_n_calls",
    "_episode_num",
    "_current_progress_remaining",
    "exploration_rate",
    "ep_info_buffer",
    "ep_success_buffer",
    "action_noise",
)
#: What ``learn()`` acts on next.
_OBSERVATIONS = ("_last_obs", "_last_original_obs", "_last_episode_starts")


def last_observation(model: BaseAlgorithm) -> Any:
    """
    :param model: an SB3 model
    :return: the observations on which ``learn()`` acts next; ``None`` if there are none, or nothing tells
    """
    return getattr(model, "_last_obs", None)


def set_seeds(env: VecEnv, seeds: Sequence[int | None]) -> None:
    """
    :param env: an SB3 environment
    :param seeds: those that its next reset takes, one per environment; ``None``: its generator goes on
    """
    if hasattr(env, "_seeds"):
        env._seeds = list(seeds)


def take_over_progress(model: BaseAlgorithm, saved: Mapping[str, Any], has_environments: bool) -> None:
    """
    Put a model where another one was when it was saved, within its ``learn()``.

    :param model: an SB3 model with the tensors of the other one
    :param saved: attributes of the other one
    :param has_environments: whether the environments are where those of the other one were
    """
    for name in (*_PROGRESS, *(_OBSERVATIONS if has_environments else ())):
        if name in saved and hasattr(model, name):
            setattr(model, name, saved[name])
    if hasattr(model, "_num_timesteps_at_start"):  # of this learn(), from which SB3 computes the speed
        model._num_timesteps_at_start = model.num_timesteps
