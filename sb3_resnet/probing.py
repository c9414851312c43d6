"""
What do the features of a frozen ResNet show of an environment? Ask before training.

:func:`record` plays an environment and keeps observations with labels; :func:`probe` reads every label from the
features of every combination of weights, depth, pooling and adapter with a linear readout.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import Any

import numpy as np
import torch as th
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from sb3_resnet.common.arguments import choice, integer, listed, number
from sb3_resnet.common.labels import LabelReader, label_columns
from sb3_resnet.common.playing import check_model, next_actions
from sb3_resnet.diagnosis.combinations import RANDOM, combinations
from sb3_resnet.diagnosis.readout import Score, mean_r2, read_out, split_episodes
from sb3_resnet.envs.atari_ram import ram_labels
from sb3_resnet.extractor import ResNetExtractor
from sb3_resnet.nn.backbones import STAGES
from sb3_resnet.nn.image_spaces import check_played_images
from sb3_resnet.nn.pooling import POOLINGS, Pooling

__all__ = ["Recording", "Row", "probe", "record"]

Array = NDArray[Any]
#: Labels of one environment by name, given the innermost environment; the same names at each step. ``float`` is a
#: number, ``bool`` a class, and ``int`` a class where it has up to 20 different values, else a number.
LabelFunction = Callable[[Any], Mapping[str, Any]]

_BATCH = 64
_FEW_REWARDS = 5  # different values up to which rewards are classes
_SUCCESSIVE = 16  # steps that are kept together


@dataclass(frozen=True)
class Recording:
    """
    Played observations and what is known about each.

    :param observations: as the environment gives them, ``(rows, C, H, W)``
    :param episodes: number of the episode of each, ``(rows,)``; rows of one episode follow each other
    :param actions: the action that led to the observation, counted from 0 whatever the ``start`` of the action space,
        ``(rows,)``; -1 in rows that are not scored; 0 for numbers
    :param labels: by name, ``(rows,)``: numbers as floats, classes as integers
    :param space: of the observations
    """

    observations: Array
    episodes: Array
    actions: Array
    labels: Mapping[str, Array]
    space: Any


@dataclass(frozen=True)
class Row:
    """
    The result of one combination.

    :param weights: ``"random"``, ``"pretrained"``, or a file
    :param last_stage: where the trunk was cut
    :param pooling: how its last map was pooled
    :param adapter: how channels reached it
    :param features: length of the features
    :param images_per_second: of the stages up to the last, as plain modules in batches of 64; frames if ``per_frame``
    :param scores: of each label
    """

    weights: str
    last_stage: str
    pooling: str
    adapter: str
    features: int
    images_per_second: float
    scores: Mapping[str, Score] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Mean R² of the numbers among the labels; NaN where there are none."""
        return mean_r2(self.scores)


def record(
    env: VecEnv,
    steps: int = 2400,
    seed: int = 0,
    model: Any = None,
    epsilon: float = 0.1,
    labels: LabelFunction = ram_labels,
    info_keys: Sequence[str] = (),
    spread: int = 1,
) -> Recording:
    """
    Play an environment, and keep what is seen together with its labels.

    Labels are those of ``labels``, the keys of ``info_keys``, ``delta_<name>`` (difference from the step before) of
    every number among both, ``reward``, and ``action``. Whole numbers of up to 20 different values are classes.
    The first observation of an episode is left out of the rows that are scored, since nothing led to it; so is the
    second, where a reset lacks a number of ``info_keys``.

    :param env: environments in this process of images, channels first; more of them give more episodes
    :param steps: observations in all
    :param seed: of the environments, the actions and the choice between them
    :param model: an SB3 model whose greedy actions are played; ``None``: random actions
    :param epsilon: share of random actions beside those of the model
    :param labels: called with each innermost environment after each step; the default reads the annotated memory of
        Atari games (:mod:`sb3_resnet.envs.atari_ram`)
    :param info_keys: keys of ``info`` that are labels; one may be written without a list
    :param spread: play so many times as long, and keep 16 successive steps of as many times 16
    :return: the recording, ordered by environment and time
    :raises ValueError: for values that cannot work, other than images channels first, environments in other processes,
        a model of other observations or actions, labels that are no numbers or not finite, names that are taken or
        differ between steps, and a key that ``info`` does not have
    :raises TypeError: for wrong types
    """
    _check(env)
    check_model(model, env)
    spread, info_keys = integer("spread", spread, 1), listed("info_keys", info_keys)
    steps = integer("steps", steps, 1)
    epsilon = number("epsilon", epsilon, 0.0, 1.0)
    rng = np.random.default_rng(seed)
    env.seed(seed)
    env.action_space.seed(seed)
    observations: Any = env.reset()
    reader = LabelReader(env, labels, info_keys)
    tracks: list[list[dict[str, Any]]] = [[] for _ in range(env.num_envs)]
    starts = np.ones(env.num_envs, bool)
    choices, rewards = np.full(env.num_envs, -1), np.zeros(env.num_envs)
    infos: Sequence[Mapping[str, Any]] = [{}] * env.num_envs
    episodes = np.zeros(env.num_envs, int)
    each = -(-steps // env.num_envs)
    for step in range(each * spread):
        episodes += starts
        for index, inner in enumerate(env.get_attr("unwrapped")):
            if step // _SUCCESSIVE % spread or len(tracks[index]) == each:
                continue
            first = bool(starts[index]) or (spread > 1 and step % _SUCCESSIVE == 0)
            known = reader.read(index, inner, infos[index], bool(starts[index]))
            seen = {"observation": observations[index].copy(), "episode": int(episodes[index]), "first": first}
            then = {"labels": known, "action": int(choices[index]), "reward": float(rewards[index])}
            tracks[index].append({**seen, **then})
        actions = next_actions(env, observations, model, epsilon, rng)
        # Numbers are no classes.
        choices = actions - getattr(env.action_space, "start", 0) if actions.ndim == 1 else np.zeros(env.num_envs, int)
        observations, rewards, starts, infos = env.step(actions)
    return _joined(tracks, env.observation_space)


def probe(
    recording: Recording,
    weights: Sequence[str] = (RANDOM,),
    last_stage: Sequence[str] = ("layer1", "layer2", "layer3", "layer4"),
    pooling: Sequence[str] = ("avg", "grid", "spatial_softmax"),
    adapter: Sequence[str] | None = None,
    seed: int = 0,
    backbone: str = "resnet18",
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
    frame_channels: int | None = None,
) -> list[Row]:
    """
    Read every label from the features of every combination.

    :param recording: of :func:`record`
    :param weights: ``"random"``, ``"pretrained"``, or paths of weights files
    :param last_stage: where the trunk is cut
    :param pooling: of the last map
    :param adapter: how frames reach the trunk; ``None``: ``"conv1x1"`` and ``"per_frame"``, only ``"conv1x1"`` for RGB
        images, and for weights of a pretraining the one with which they were trained
    :param seed: of random weights and of the splits
    :param backbone: a torchvision ResNet
    :param device: where features are computed
    :param progress: called with the observations done and their number in all
    :param frame_channels: channels of one frame, as :class:`~sb3_resnet.ResNetExtractor` takes it
    :return: a row per combination, the best mean R² first; weights of :func:`~sb3_resnet.pretraining.pretrain` are
        read as they were trained, and left out of combinations with another adapter or a higher stage
    :raises ValueError: for values that cannot work
    """
    for name in last_stage:
        choice("last_stage", name, STAGES)
    for name in pooling:
        choice("pooling", name, POOLINGS)
    rows: list[Row] = []
    found = combinations(recording.space, weights, adapter, last_stage, backbone, frame_channels)
    for index, one in enumerate(found):

        def report(done: int, first: int = index) -> None:
            progress(first * len(recording.actions) + done, len(found) * len(recording.actions))

        extractor = one.extractor(recording.space, seed).to(device)
        for stage, pool, features, rate in _features(extractor, recording, one.stages, pooling, report):
            scores = scores_of(recording, features, seed)
            rows.append(Row(one.source, stage, pool, one.adapter, features.shape[1], rate, scores))
    return sorted(rows, key=lambda row: (-np.nan_to_num(row.mean, nan=-1.0), row.features))


def features_of(recording: Recording, extractor: ResNetExtractor) -> Array:
    """
    :param recording: of :func:`record`
    :param extractor: in eval mode, without a projection
    :return: the pooled features of every observation, ``(rows, n)``
    """
    stage = extractor.stages[-1]
    ((_, _, features, _),) = _features(extractor, recording, [stage], [extractor.pooling], lambda done: None)
    return features


def scores_of(recording: Recording, features: Array, seed: int = 0) -> dict[str, Score]:
    """
    :param recording: of :func:`record`
    :param features: of every observation, ``(rows, n)``
    :param seed: of the splits
    :return: how well each label can be read from them
    """
    led = recording.actions >= 0
    fit, choose, score = (split[led] for split in split_episodes(recording.episodes, seed))
    labels = {name: values[led] for name, values in recording.labels.items()}
    found = read_out(features[led], labels, (fit, choose, score))
    # Inverse dynamics: which action led from the observation before to this one?
    pairs = np.concatenate([features[:-1][led[1:]], features[1:][led[1:]]], axis=1)
    return {**found, **read_out(pairs, {"action": recording.actions[led]}, (fit, choose, score))}


def _check(env: VecEnv) -> None:
    check_played_images(env)
    if isinstance(env.unwrapped, SubprocVecEnv):
        raise ValueError("Labels are read from environments in this process: make a DummyVecEnv, not a SubprocVecEnv")


def _joined(tracks: Sequence[Sequence[Mapping[str, Any]]], space: Any) -> Recording:
    """One row per observation, environment after environment, with the labels that need a step before."""
    rows = [row for track in tracks for row in track]
    firsts = np.array([row["first"] or index == 0 for track in tracks for index, row in enumerate(track)])
    names = [(env, row["episode"]) for env, track in enumerate(tracks) for row in track]
    begins = [before != now for before, now in pairwise([None, *names])]
    actions = np.array([row["action"] for row in rows])
    labels, unknown = label_columns([row["labels"] for row in rows])
    actions[firsts | unknown] = -1
    kinds, which = np.unique(rewards := np.array([row["reward"] for row in rows]), return_inverse=True)
    labels["reward"] = which if len(kinds) <= _FEW_REWARDS else rewards
    observations = np.stack([row["observation"] for row in rows])
    return Recording(observations, np.cumsum(begins), actions, labels, space)


@th.inference_mode()
def _features(
    extractor: ResNetExtractor,
    recording: Recording,
    stages: Sequence[str],
    poolings: Sequence[str],
    report: Callable[[int], None],
) -> Iterator[tuple[str, str, Array, float]]:
    """All depths and poolings in one pass: stage, pooling, features ``(rows, n)``, and images per second."""
    images = extractor.preprocessing.as_images(th.as_tensor(recording.observations)).numpy()
    # Stacks share frames, and each is encoded once.
    alike = np.ascontiguousarray(images).reshape(len(images), -1)
    _, first, which = np.unique(
        alike.view(np.dtype((np.void, alike[0].nbytes))), return_index=True, return_inverse=True
    )
    found: dict[tuple[str, str], list[Array]] = {key: [] for key in product(stages, poolings)}
    seconds = dict.fromkeys(stages, 0.0)
    for start in range(0, len(first), _BATCH):
        batch = th.as_tensor(images[first[start : start + _BATCH]], device=extractor.input_mean.device)
        began, spent = time.perf_counter(), 0.0
        x = extractor.preprocessing.unit_images(batch)
        for stage in extractor.stages:
            x = extractor.run_stages(x, [stage])
            spent += time.perf_counter() - began
            if stage in seconds:
                seconds[stage] += spent
                for pooling in poolings:
                    found[stage, pooling].append(Pooling(pooling)(x).cpu().numpy())
            began = time.perf_counter()
        report((start + len(batch)) * len(recording.observations) // len(first))
    for (stage, pooling), parts in found.items():
        features = np.concatenate(parts)[which.ravel()].reshape(len(recording.observations), -1)
        yield stage, pooling, features, len(first) / seconds[stage]
