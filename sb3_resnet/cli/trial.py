"""Try a model out: random steps, real updates, and how long each takes."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import TrainFrequencyUnit
from stable_baselines3.common.utils import obs_as_tensor

from sb3_resnet.cache.batch import EncodedBatch
from sb3_resnet.cache.frames import Array
from sb3_resnet.callbacks import FeatureCacheCallback
from sb3_resnet.cli.observed import by_key, each, flat, stacked
from sb3_resnet.cli.texts import one_line
from sb3_resnet.extractor import ResNetExtractor

_REPEATS = 3
_LONG = 3.0  # seconds; what takes longer is timed once
_ENCODED = 64  # images per pass, as in the cache


@dataclass(frozen=True)
class Speed:
    """
    How long the parts of training take.

    :param env_step: seconds per step of all environments
    :param act: seconds for choosing their actions
    :param update: seconds per gradient update
    :param cached_update: the same with :class:`FeatureCacheCallback`; ``None`` if the callback refuses the model
    :param cache_refusal: why it refuses; ``None`` if it does not
    :param encode: seconds per image (with ``adapter="per_frame"`` per frame) in the frozen stages, by the key of the
        image; without those of which no stage is frozen
    :param updates: gradient updates per step of all environments; ``None`` if it depends on the episodes
    :param n_envs: number of environments
    """

    env_step: float
    act: float
    update: float
    cached_update: float | None
    cache_refusal: str | None
    encode: Mapping[str, float]
    updates: float | None
    n_envs: int

    def steps_per_second(self, update: float | None) -> float | None:
        """
        :param update: seconds per gradient update
        :return: environment steps per second; ``None`` if it is not known
        """
        if update is None or self.updates is None:
            return None
        return self.n_envs / (self.env_step + self.act + self.updates * update)


def play(model: Any, steps: int) -> tuple[Any, float]:
    """
    Act at random, and add the transitions to the model's replay buffer, if it has one.

    :param model: a model with environments
    :param steps: number of steps of all environments
    :return: observations ``(steps + 1, envs, C, H, W)``, of a Dict such by key, and seconds per step
    """
    env, buffer = model.get_env(), getattr(model, "replay_buffer", None)
    observation, seconds = env.reset(), 0.0
    seen = [observation]
    for _ in range(steps):
        actions = np.array([env.action_space.sample() for _ in range(env.num_envs)])
        start = time.perf_counter()
        following, rewards, dones, infos = env.step(actions)
        seconds += time.perf_counter() - start
        if buffer is not None:
            buffer.add(observation, following, actions, rewards, dones, infos)
        seen.append(following)
        observation = following
    if isinstance(buffer, HerReplayBuffer):  # it samples from whole episodes
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            buffer.truncate_last_trajectory()
    return stacked(seen), seconds / steps


def random_play(env: Any, count: int) -> Array:
    """
    :param env: one environment
    :param count: number of observations
    :return: successive observations under random actions, ``(count, C, H, W)``
    """
    seen = [env.reset()[0]]
    while len(seen) < count:
        seen.append(env.step([env.action_space.sample()])[0][0])
    return np.stack(seen)


def measure(
    model: Any,
    extractors: Mapping[str, ResNetExtractor],
    played: Any,
    env_step: float,
    callback: FeatureCacheCallback | None = None,
) -> Speed:
    """
    Make real updates, which change the model, and measure them.

    :param model: a model whose replay buffer is not empty
    :param extractors: the ResNet of each image, by its key; ``""`` for a single image
    :param played: observations of :func:`play`
    :param env_step: seconds per step, of :func:`play`
    :param callback: the feature cache of the run, if it has one
    :return: how long each part takes
    """
    update = _update_of(model, played)
    cached = refusal = None
    first = each(lambda part: part[0], played)
    act = _timed(model, lambda: model.predict(first, deterministic=True))
    plain = _timed(model, update)
    images = by_key(flat(played))
    encode = {
        key: _encode(model, extractor, images[key])
        for key, extractor in extractors.items()
        if extractor.encoder.can_gain
    }
    callback = callback or FeatureCacheCallback()
    try:
        callback.init_callback(model)
        callback.on_training_start({}, {})
        cached = _timed(model, _update_of(model, played, extractors[""]))
        callback.on_training_end()
    except ValueError as error:  # entries would not be exact, there is no buffer, or it is a Dict
        refusal = one_line(error)
    return Speed(env_step, act, plain, cached, refusal, encode, _updates_of(model), model.n_envs)


def _encode(model: Any, extractor: ResNetExtractor, observations: Array) -> float:
    """:return: seconds per image"""
    seen = th.as_tensor(observations[:_ENCODED], device=model.device)
    images = extractor.preprocessing.as_images(seen)[:_ENCODED]
    return _timed(model, lambda: extractor.encoder(images)) / len(images)


def batch_size_of(model: Any) -> int:
    """
    :param model: an SB3 model
    :return: number of observations per update; for A2C those of a whole rollout
    """
    return int(getattr(model, "batch_size", 0) or model.n_steps * model.n_envs)


def _update_of(model: Any, played: Any, encodes: Any = None) -> Callable[[], Any]:
    """
    A function that makes one gradient update: the algorithm's own if it is off-policy, else one of similar cost.

    :param encodes: the extractor that has encoded the batch of an on-policy algorithm before; ``None``: none has
    """
    model.set_logger(Logger(None, []))
    if isinstance(model, OffPolicyAlgorithm):
        return lambda: model.train(gradient_steps=1, batch_size=model.batch_size)
    size = batch_size_of(model)
    chosen = each(lambda part: part[np.arange(size) % len(part)], flat(played))
    batch: Any = obs_as_tensor(chosen, model.device)
    if encodes is not None and encodes.encoder.can_gain:
        batch = EncodedBatch(encodes.encode(encodes.scale_raw(batch)))
    actions = th.as_tensor(np.array([model.action_space.sample() for _ in range(size)]), device=model.device)

    def update() -> None:
        model.policy.set_training_mode(True)
        values, log_prob, _ = model.policy.evaluate_actions(batch, actions)
        model.policy.optimizer.zero_grad()
        (values.square().mean() - log_prob.mean()).backward()
        model.policy.optimizer.step()

    return update


def _updates_of(model: Any) -> float | None:
    if not isinstance(model, OffPolicyAlgorithm):
        on_policy: Any = model
        return float(getattr(model, "n_epochs", 1) * on_policy.n_envs / batch_size_of(model))
    frequency: Any = model.train_freq
    if model.gradient_steps < 0:
        return float(model.n_envs)
    return float(model.gradient_steps / frequency.frequency) if frequency.unit is TrainFrequencyUnit.STEP else None


def _timed(model: Any, act: Callable[[], Any]) -> float:
    """:return: median of the seconds; the first time is left out, since much is set up in it"""
    taken: list[float] = []
    for _ in range(_REPEATS + 1):
        _wait(model)
        start = time.perf_counter()
        act()
        _wait(model)
        taken.append(time.perf_counter() - start)
        if taken[0] > _LONG:
            break
    return float(np.median(taken[1:] or taken))


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        th.cuda.synchronize(model.device)
