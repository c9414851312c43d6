"""Whole games with raw returns, played greedily but for one action in a hundred."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch as th
from stable_baselines3 import DQN
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_resnet.cache.batch import EncodedBatch

from .arms import ARMS, EPSILON
from .games import make_env

_ENVS = 10  # games that are played at once


class EpsilonGreedy:
    """
    Acts as a model does, but at random with probability epsilon, in each environment by itself.

    It leaves SB3's random generators alone, so that training goes on as if nothing had been evaluated.

    :param model: the agent
    :param seed: of the random actions
    """

    def __init__(self, model: DQN, seed: int) -> None:
        self.model = model
        self.random = np.random.default_rng(seed)

    def predict(self, observation: np.ndarray, *args: Any, **kwargs: Any) -> tuple[np.ndarray, None]:
        """:return: an action per environment, as SB3's ``evaluate_policy`` asks for"""
        actions, _ = self.model.predict(observation, deterministic=True)
        at_random = self.random.random(len(actions)) < EPSILON
        others = self.random.integers(int(self.model.action_space.n), size=len(actions))
        return np.where(at_random, others, actions), None


class NewestFrames:
    """
    Encodes one frame per observation where the others were in the observation before it.

    The features cache does so in training, with its replay buffer; an evaluation has none.

    :param extractor: of a model with ``adapter="per_frame"`` whose stages are frozen, at least the lowest
    """

    def __init__(self, extractor: Any) -> None:
        self.extractor = extractor
        self.pixels: np.ndarray | None = None
        self.entries = th.zeros(0)

    def encode(self, observations: th.Tensor) -> EncodedBatch:
        """:return: what the frozen stages make of observations, one per environment"""
        trunk = self.extractor.trunk
        frames, channels = trunk.preprocessing.n_frames, trunk.preprocessing.frame_channels
        pixels = observations.cpu().numpy().reshape(len(observations), frames, channels, *observations.shape[2:])
        known = np.zeros((len(pixels), frames), bool)
        if self.pixels is not None and self.pixels.shape == pixels.shape and frames > 1:
            shifted = (self.pixels[:, 1:] == pixels[:, :-1]).all(axis=(1, 2, 3, 4))
            known[:, :-1] = shifted[:, None]
        fresh = self.extractor.encoder(th.as_tensor(pixels[~known], device=self.extractor.encoder.device))
        entries = th.empty((*known.shape, *fresh.shape[1:]), dtype=fresh.dtype, device=fresh.device)
        entries[th.as_tensor(~known)] = fresh
        if known.any():
            rows = th.as_tensor(known[:, 0])
            entries[rows, :-1] = self.entries[rows, 1:]
        self.pixels, self.entries = pixels.copy(), entries
        return EncodedBatch(trunk.per_observation(entries.flatten(0, 1)))


def evaluate(model: DQN, suite: str, game: str, arm: str, episodes: int, seed: int, threads: int = 1) -> list[float]:
    """
    :param model: the agent, as training left it; it goes on as if this had not happened
    :param suite: name of the suite
    :param game: name of the game
    :param arm: name of the arm
    :param episodes: number of whole games
    :param seed: of games and random actions
    :param threads: emulators at work at the same time
    :return: the raw return of each game
    """
    env = make_env(suite, game, min(_ENVS, episodes), seed, evaluates=True, threads=threads)
    policy: Any = model.policy
    before = getattr(policy, "encoding", None)
    try:
        if ARMS[arm].is_resnet:
            extractor = policy.online.features_extractor
            reuses = extractor.trunk.preprocessing.per_frame and extractor.encoder.can_gain
            policy.encoding = NewestFrames(extractor) if reuses else None
        returns, _ = evaluate_policy(EpsilonGreedy(model, seed), env, episodes, return_episode_rewards=True, warn=False)
    finally:
        if ARMS[arm].is_resnet:
            policy.encoding = before
        env.close()
    return [float(value) for value in returns]
