"""What ``sb3-resnet check`` tells of a run, part by part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.utils import obs_as_tensor

from sb3_resnet.cache import sizes
from sb3_resnet.callbacks import FeatureCacheCallback, UnfreezeCallback
from sb3_resnet.cli.check_rules import stock_name
from sb3_resnet.cli.network import ScoreNetwork
from sb3_resnet.cli.observed import by_key, described, each, flat, label
from sb3_resnet.cli.setups import Setup
from sb3_resnet.cli.trial import Speed, batch_size_of
from sb3_resnet.extractor import ResNetExtractor
from sb3_resnet.nn.encoder import rounding_error

_COMPARED = 64  # observations on which precisions are compared


def model_rows(setup: Setup, extractors: Mapping[str, ResNetExtractor]) -> list[tuple[str, str]]:
    """
    :param setup: what would be trained
    :param extractors: the ResNet of each image
    :return: names and values that describe the model
    """
    model = setup.model
    lines = [
        ("algorithm", f"{type(model).__name__} with {type(model.policy).__name__}"),
        ("observations", f"{model.n_envs} x {described(model.observation_space)}"),
        ("actions", str(model.action_space)),
        ("device", str(model.device)),
        *((label(key, "backbone"), _backbone(model, key, extractor)) for key, extractor in extractors.items()),
        ("batch size", str(batch_size_of(model))),
        ("steps of the run", f"{setup.total_timesteps:,}"),
    ]
    names = sorted({type(callback).__name__ for callback in setup.all_callbacks})
    return [*lines, ("callbacks", ", ".join(names))] if names else lines


def memory_rows(
    setup: Setup, extractors: Mapping[str, ResNetExtractor], played: Any, available: int | None
) -> list[tuple[str, int]]:
    """
    :param setup: what would be trained
    :param extractors: the ResNet of each image
    :param played: observations of :func:`~sb3_resnet.cli.trial.play`
    :param available: bytes of memory that the run may take, if that is known
    :return: each buffer that can be used, with its size in bytes; nothing for a model without a replay buffer
    """
    model, size = setup.model, setup.buffer_size
    if size is None:
        return []
    rows = [(stock_name(model), sizes.stock_buffer_bytes(model, size))]
    if not isinstance(model.observation_space, spaces.Dict):  # the others keep one image
        frames = sizes.frame_buffer_bytes(model, size, sizes.store_of(played), len(flat(played)))
        rows.append(("FrameReplayBuffer", frames))
        entries = min(size, setup.total_timesteps) * _entry_bytes(setup, extractors[""])
        cache = setup.callback(FeatureCacheCallback)
        if entries:
            limit = None if cache is None else cache.max_bytes
            on_gpu = model.device.type == "cuda" and (cache is None or cache.device != "cpu")
            name = "feature cache, on the GPU" if on_gpu else "feature cache"
            rows.append((name, entries if limit is None else min(entries, limit)))
    return rows if available is None else [*rows, ("available", available)]


def _entry_bytes(setup: Setup, extractor: ResNetExtractor) -> int:
    """The largest that a phase of this run brings."""
    cache, unfreezer = setup.callback(FeatureCacheCallback), setup.callback(UnfreezeCallback)
    phases = [] if unfreezer is None else unfreezer.reached_by(setup.total_timesteps)
    stages = [phase.unfreeze_from for phase in phases]
    return sizes.largest_entry_bytes(extractor, stages, None if cache is None else cache.augment_copies)


def precision_rows(model: Any, extractors: Mapping[str, ResNetExtractor], played: Any) -> list[tuple[str, str]]:
    """
    :param model: an SB3 model
    :param extractors: the ResNet of each image
    :param played: observations of :func:`~sb3_resnet.cli.trial.play`
    :return: the precision of frozen stages, and by how much it blurs what distinguishes observations
    """
    images, rows = by_key(flat(played)), []
    for key, extractor in extractors.items():
        if extractor.encoder.can_gain:
            steps = np.linspace(0, len(images[key]) - 1, min(_COMPARED, len(images[key]))).astype(int)
            compared = th.as_tensor(images[key][steps], device=model.device)
            share = rounding_error(extractor.encoder, compared)
            text = f"{extractor.frozen_dtype}, off by {share:.2%} of the spread over {len(compared)} observations"
            rows.append((label(key, "frozen stages"), text))
    return rows


def shape_rows(model: Any, extractors: Mapping[str, ResNetExtractor], played: Any) -> list[tuple[str, tuple[int, ...]]]:
    """
    :param model: an SB3 model
    :param extractors: the ResNet of each image
    :param played: observations of :func:`~sb3_resnet.cli.trial.play`
    :return: shapes of a random batch as it passes the network
    """
    size, observations = batch_size_of(model), flat(played)
    count = len(next(iter(by_key(observations).values())))
    chosen = np.random.default_rng(0).choice(count, size)
    batch = obs_as_tensor(each(lambda part: part[chosen], observations), model.device)
    rows = []
    with th.no_grad():
        for key, extractor in extractors.items():
            rows += [(label(key, name), shape) for name, shape in _shapes_of(extractor, by_key(batch)[key])]
        scores = ScoreNetwork(model, next(iter(extractors))).of_policy(batch)
    return [*rows, ("scores of actions", tuple(scores.shape))]


def speed_rows(speed: Speed, total_timesteps: int) -> list[tuple[str, str]]:
    """
    :param speed: what was measured
    :param total_timesteps: environment steps of the run
    :return: each part of training, with the time that it takes, as text
    """
    rows = [
        ("environment step", _milliseconds(speed.env_step)),
        ("choosing actions", _milliseconds(speed.act)),
        ("gradient update", _milliseconds(speed.update)),
    ]
    if speed.cached_update is not None:
        rows.append(("gradient update, cached", _milliseconds(speed.cached_update)))
    for key, seconds in speed.encode.items():
        rows.append((label(key, "frozen stages, fast encoder"), f"{_three_digits(1 / seconds)} images/s"))
    for name, update in (("whole run", speed.update), ("whole run, cached", speed.cached_update)):
        rate = speed.steps_per_second(update)
        if rate is not None:
            rows.append((name, f"{_three_digits(rate)} steps/s, {_duration(total_timesteps / rate)}"))
    return rows


def _backbone(model: Any, key: str, extractor: ResNetExtractor) -> str:
    arguments = model.policy_kwargs.get("features_extractor_kwargs") or {}
    own = (arguments.get("by_key") or {}).get(key) or {}
    boundary = extractor.freeze_boundary
    trains = "nothing of it trains" if boundary is None else f"trains from {boundary} up"
    return f"{own.get('backbone', arguments.get('backbone', 'resnet18'))}: {trains}"


def _shapes_of(extractor: ResNetExtractor, images: th.Tensor) -> list[tuple[str, tuple[int, ...]]]:
    x = extractor.preprocess(extractor.scale_raw(images))
    rows = [("observations", tuple(images.shape)), ("preprocessed", tuple(x.shape))]
    for stage in extractor.stages:
        x = extractor.run_stages(x, [stage])
        rows.append((stage, tuple(x.shape)))
    pooled = extractor.trunk.pool(x, len(images))
    return [*rows, (f"pooled ({extractor.pooling})", tuple(pooled.shape))]


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _milliseconds(seconds: float) -> str:
    return f"{_three_digits(1000 * seconds)} ms"


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h"
