"""Compare the value of the start of an episode with the return that follows."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm

_KEPT = 20  # episodes per mean


class EpisodeValues:
    """
    Compare the value of first observations, the greedy Q-value or the critic's, with the discounted return of their
    episodes.

    :param min_gap: smallest number of environment steps between two measured starts, since each costs a forward pass
    """

    def __init__(self, min_gap: int) -> None:
        self.min_gap = min_gap
        self.finished: deque[tuple[float, float]] = deque(maxlen=_KEPT)
        self.largest_reward = 0.0
        # By environment: value, return so far, discount of the next reward.
        self._episodes: dict[int, list[float]] = {}
        self._fresh: dict[int, Any] = {}  # by environment: the first observation of its episode
        self._last = -math.inf

    def start(self) -> None:
        """Forget episodes that did not end in an earlier ``learn()``."""
        self._episodes.clear()
        self._fresh.clear()  # after a resume, the first observation may be in the middle of an episode
        self._last = -math.inf  # timesteps may begin at 0 again

    def step(self, model: BaseAlgorithm, local: Mapping[str, Any]) -> None:
        """
        Call in ``on_step``.

        :param model: an SB3 model with a ResNet policy
        :param local: the callback's ``self.locals``
        """
        if not {"rewards", "dones", "infos", "new_obs"} <= {*local}:
            return  # called without an environment
        rewards, dones = local["rewards"], local["dones"]
        self.largest_reward = max(self.largest_reward, float(np.abs(rewards).max()))
        if self._fresh and model.num_timesteps - self._last >= self.min_gap:
            self._last = model.num_timesteps
            self._episodes.update({env: [value, 0.0, 1.0] for env, value in self._values(model).items()})
        # Of environments that are done, what comes back is the first observation of the next episode.
        self._fresh = {env: _of_env(local["new_obs"], env) for env, done in enumerate(dones) if done}
        for env in [*self._episodes]:
            episode = self._episodes[env]
            episode[1] += episode[2] * float(rewards[env])
            episode[2] *= _gamma(model)
            if dones[env]:
                del self._episodes[env]
                if not local["infos"][env].get(
                    "TimeLimit.truncated", False
                ):  # the return after a time limit is not known
                    self.finished.append((episode[0], episode[1]))

    def measured(self, model: BaseAlgorithm) -> dict[str, float]:
        """
        :param model: an SB3 model with a ResNet policy
        :return: by log key: mean value and return of the latest episodes, largest reward, largest possible return
        """
        values: dict[str, float] = {}
        if self.finished:
            expected, got = np.mean(self.finished, axis=0)
            values = {"monitor/q_start": float(expected), "monitor/return_start": float(got)}
        gamma = _gamma(model)
        if self.largest_reward > 0:
            values["monitor/reward_max"] = self.largest_reward
        if self.largest_reward > 0 and gamma < 1:
            values["monitor/q_bound"] = self.largest_reward / (1.0 - gamma)
        return values

    def _values(self, model: BaseAlgorithm) -> dict[int, float]:
        policy: Any = model.policy
        envs = sorted(self._fresh)
        observations, _ = policy.obs_to_tensor(_batch([self._fresh[env] for env in envs]))
        # Not predict(), whose feature cache remembers what it is asked: asking more would change which observations
        # are encoded in which batch.
        with th.no_grad():
            values = policy.online(observations) if hasattr(policy, "online") else policy.predict_values(observations)
        values = values.mean(dim=1) if values.ndim == 3 else values
        return dict(zip(envs, values.max(dim=1).values.tolist(), strict=True))


def _gamma(model: Any) -> float:
    """Of n-step returns it is the replay buffer's, which SB3's ``train()`` takes."""
    return float(getattr(getattr(model, "replay_buffer", None), "gamma", model.gamma))


def _of_env(observations: Any, env: int) -> Any:
    """:return: the observation of one environment; a dict where there are several kinds of observations"""
    if isinstance(observations, Mapping):
        return {key: values[env] for key, values in observations.items()}
    return observations[env]


def _batch(observations: Sequence[Any]) -> Any:
    if isinstance(observations[0], Mapping):
        return {key: np.stack([one[key] for one in observations]) for key in observations[0]}
    return np.stack(observations)
