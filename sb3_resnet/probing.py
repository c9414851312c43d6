"""
What do the features of a frozen ResNet show of an environment? Ask before training.

:func:`record` plays an environment and keeps observations with labels; :func:`probe` reads every label from the
features of every combination of weights, depth, pooling and adapter with a linear readout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from gymnasium.spaces import Discrete
from numpy.typing import NDArray
from stable_baselines3.common.utils import get_device
from stable_baselines3.common.vec_env import VecEnv

from sb3_resnet.common.arguments import integer, listed, number, read_device
from sb3_resnet.common.labels import LabelReader
from sb3_resnet.common.playing import check_model, next_actions
from sb3_resnet.common.recording import Recording, joined
from sb3_resnet.common.vec_normalize import resting
from sb3_resnet.diagnosis.combinations import RANDOM, combinations
from sb3_resnet.diagnosis.features import features_at
from sb3_resnet.diagnosis.playing import Progress, played
from sb3_resnet.diagnosis.readout import Score
from sb3_resnet.diagnosis.scores import mark_of, mean_of, scores_of, warn_of_repeated
from sb3_resnet.envs.atari_ram import ram_labels
from sb3_resnet.nn.image_spaces import check_played_images

__all__ = ["Recording", "Row", "check_probe", "probe", "record"]

Array = NDArray[Any]
#: Labels of one environment by name, given the innermost environment; the same names at each step. ``float`` is a
#: number, ``bool`` a class, and ``int`` a class where it has up to 20 different values, else a number.
LabelFunction = Callable[[Any], Mapping[str, Any]]

_LAST_STAGES = ("layer1", "layer2", "layer3", "layer4")
_POOLINGS = ("avg", "grid", "spatial_softmax")


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
        return mean_of(self.scores, "R2")

    @property
    def mean_f1(self) -> float:
        """Mean F1 of the classes among the labels; ``reward`` and ``action`` do not count. NaN where there are none."""
        return mean_of(self.scores, "F1")

    @property
    def mark(self) -> float:
        """By which rows are ordered: the mean R²; without numbers the mean F1; without both that of the actions."""
        return mark_of(self.scores)


def record(
    env: VecEnv,
    steps: int = 2400,
    seed: int = 0,
    model: Any = None,
    epsilon: float = 0.1,
    labels: LabelFunction = ram_labels,
    info_keys: Sequence[str] = (),
    spread: int = 1,
    progress: Progress = lambda done, total: None,
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
    :param progress: called with the steps done of each environment, and their number in all
    :return: the recording, ordered by environment and time
    :raises ValueError: for values that cannot work, other than images channels first, environments in other processes,
        a model of other observations or actions, labels that are no numbers or not finite, names that are taken or
        differ between steps, and a key that ``info`` does not have
    :raises TypeError: for wrong types
    """
    check_played_images(env)
    check_model(model, env)
    steps, spread = integer("steps", steps, 1), integer("spread", spread, 1)
    epsilon = number("epsilon", epsilon, 0.0, 1.0)
    reader = LabelReader(env, labels, listed("info_keys", info_keys))
    act = partial(next_actions, env, model=model, epsilon=epsilon, rng=np.random.default_rng(seed))
    with resting(env):
        observations, tracks = played(env, seed, act, reader, -(-steps // env.num_envs), spread, progress)
    return joined(observations, tracks, env.observation_space, isinstance(env.action_space, Discrete))


def probe(
    recording: Recording,
    weights: Sequence[str] = (RANDOM,),
    last_stage: Sequence[str] = _LAST_STAGES,
    pooling: Sequence[str] = _POOLINGS,
    adapter: Sequence[str] | None = None,
    seed: int = 0,
    backbone: str = "resnet18",
    device: str = "cpu",
    progress: Progress = lambda done, total: None,
    frame_channels: int | None = None,
    image_size: int | Sequence[int] | None = None,
) -> list[Row]:
    """
    Read every label from the features of every combination.

    :param recording: of :func:`record`
    :param weights: ``"random"``, ``"pretrained"``, or paths of weights files; of these and the next three, one may be
        written without a list
    :param last_stage: where the trunk is cut
    :param pooling: of the last map
    :param adapter: how frames reach the trunk; ``None``: ``"conv1x1"`` and ``"per_frame"``, only ``"conv1x1"`` for
        one RGB or grey frame, and for weights of a pretraining the one with which they were trained
    :param seed: of random weights and of the splits
    :param backbone: a torchvision ResNet
    :param device: where features are computed; ``"auto"``: on a GPU where there is one
    :param progress: called with the observations done and their number in all
    :param frame_channels: channels of one frame, as :class:`~sb3_resnet.ResNetExtractor` takes it; for weights of a
        pretraining those with which they were trained
    :param image_size: to which images are resized, likewise
    :return: a row per combination, the best :attr:`Row.mark` first; weights of
        :func:`~sb3_resnet.pretraining.pretrain` are read as they were trained, and left out of combinations with
        another adapter or a higher stage; so are stages and poolings for which images of this size are too small
    :raises ValueError: for values that cannot work
    :raises TypeError: for wrong types
    :raises FileNotFoundError: if weights are not there
    """
    found = combinations(recording.space, weights, adapter, last_stage, pooling, backbone, frame_channels, image_size)
    where = get_device(read_device(device))
    warn_of_repeated(recording, seed)
    rows: list[Row] = []
    for index, one in enumerate(found):

        def report(done: int, first: int = index) -> None:
            progress(first * len(recording.actions) + done, len(found) * len(recording.actions))

        extractor = one.extractor(recording.space, seed).to(where)
        for stage, pool, features, rate in features_at(extractor, recording.observations, one.ends, report):
            scores = scores_of(recording, features, seed)
            rows.append(Row(one.source, stage, pool, one.adapter, features.shape[1], rate, scores))
    return sorted(rows, key=lambda row: (math.isnan(row.mark), -np.nan_to_num(row.mark), row.features))


def check_probe(
    env: VecEnv,
    weights: Sequence[str] = (RANDOM,),
    last_stage: Sequence[str] = _LAST_STAGES,
    pooling: Sequence[str] = _POOLINGS,
    adapter: Sequence[str] | None = None,
    backbone: str = "resnet18",
    frame_channels: int | None = None,
    image_size: int | Sequence[int] | None = None,
) -> None:
    """
    Find before an environment is played what :func:`probe` would refuse, weights that cannot be read included.

    :param env: environments that are to be played
    :param weights: as for :func:`probe`, and so are the others
    :param last_stage: where the trunk is cut
    :param pooling: of the last map
    :param adapter: how frames reach the trunk
    :param backbone: a torchvision ResNet
    :param frame_channels: channels of one frame
    :param image_size: to which images are resized
    :raises ValueError: for values that cannot work
    :raises TypeError: for wrong types
    :raises FileNotFoundError: if weights are not there
    """
    check_played_images(env)
    space = env.observation_space
    for one in combinations(space, weights, adapter, last_stage, pooling, backbone, frame_channels, image_size):
        one.extractor(space, seed=0)
