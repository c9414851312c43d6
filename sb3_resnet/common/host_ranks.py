"""What training on several ranks needs of PyTorch and Stable-Baselines3 beyond their documentation; see ``host.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_resnet.common.host import HostPartMissingError


def after_backward(act: Callable[[], None]) -> None:
    """
    Let the backward pass that is under way end with a call: every gradient is accumulated then, and no one has used it.

    :param act: what to do; its errors come out of ``backward()``
    :raises HostPartMissingError: if PyTorch's engine takes no such calls
    """
    try:
        queue: Any = th.autograd.Variable._execution_engine.queue_callback
    except AttributeError:
        raise HostPartMissingError("torch", "queue_callback in its autograd engine") from None
    queue(act)


def steps_of_environments(model: BaseAlgorithm) -> int:
    """
    :param model: an SB3 model
    :return: the calls of ``env.step()`` by which DQN times its target network; 0 where nothing counts them
    """
    return int(getattr(model, "_n_calls", 0))


def restart_environments(model: BaseAlgorithm) -> None:
    """
    Reset the environments within ``learn()``, so that they take up the seeds which they were given.

    :param model: an SB3 model in ``learn()``
    """
    algorithm: Any = model
    env = algorithm.env
    if env is None or getattr(algorithm, "_last_obs", None) is None:  # the first reset is still to come
        return
    algorithm._last_obs = env.reset()
    algorithm._last_episode_starts = np.ones((env.num_envs,), dtype=bool)
    normalizer = algorithm.get_vec_normalize_env()
    if normalizer is not None:
        algorithm._last_original_obs = normalizer.get_original_obs()
