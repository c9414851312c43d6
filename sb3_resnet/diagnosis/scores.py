"""What features show of a recording, and the one number by which they are compared."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sb3_resnet.common.recording import Recording
from sb3_resnet.diagnosis.features import features_at
from sb3_resnet.diagnosis.readout import Score, read_out, split_episodes
from sb3_resnet.extractor import ResNetExtractor

Array = NDArray[Any]

_OFTEN = 0.5  # share of repeated observations
_ACTION, _REWARD = "action", "reward"  # labels of every environment


def features_of(recording: Recording, extractor: ResNetExtractor) -> Array:
    """
    :param recording: of :func:`~sb3_resnet.probing.record`
    :param extractor: in eval mode, without a projection
    :return: the pooled features of every observation, ``(rows, n)``
    """
    end = (extractor.stages[-1], extractor.pooling)
    ((_, _, features, _),) = features_at(extractor, recording.observations, [end])
    return features


def splits_of(recording: Recording, seed: int = 0, held_out: int | None = None) -> tuple[Array, Array, Array]:
    """
    Divide a recording into whole episodes, without the rows to which no action led.

    :param recording: of :func:`~sb3_resnet.probing.record`
    :param seed: of the order in which episodes are dealt out
    :param held_out: as :class:`~sb3_resnet.nn.pretraining.settings.Settings` has it, where it says how many steps there
        are, for the error
    :return: masks of the rows, ``(rows,)``: to fit, to choose the penalty, to score
    :raises ValueError: where one has no rows
    """
    led = recording.actions >= 0
    fit, choose, score = (split & led for split in split_episodes(recording.episodes, seed))
    given, more = ("These", "record steps=2400 or so")
    if held_out is not None:
        given, more = (f"held_out={held_out}", "write held_out=2400 or so")
    if not (fit.any() and choose.any() and score.any()):
        short = "" if led.any() else ". Episodes that are over after one step cannot be probed"
        raise ValueError(f"{given} are too few steps to be probed: {more}{short}")
    return fit, choose, score


def warn_of_repeated(recording: Recording, seed: int = 0) -> None:
    """
    Say so where episodes repeat each other, so that a readout may know by heart what is scored.

    :param recording: of :func:`~sb3_resnet.probing.record`
    :param seed: of the splits
    """
    fit, _, score = splits_of(recording, seed)
    share = float(np.isin(recording.kinds[score], recording.kinds[fit]).mean())
    if share > _OFTEN:
        warnings.warn(
            f"{share:.0%} of the observations that are scored were fitted too, since episodes repeat each other. A "
            "readout may know them by heart, so high scores say little. If a model plays, write a larger epsilon.",
            stacklevel=3,
        )


def scores_of(recording: Recording, features: Array, seed: int = 0) -> dict[str, Score]:
    """
    :param recording: of :func:`~sb3_resnet.probing.record`
    :param features: of every observation, ``(rows, n)``
    :param seed: of the splits
    :return: how well each label can be read from them
    """
    led = recording.actions >= 0
    fit, choose, score = (split[led] for split in splits_of(recording, seed))
    labels = {name: values[led] for name, values in recording.labels.items()}
    found = read_out(features[led], labels, (fit, choose, score))
    # Inverse dynamics: which action led from the observation before to this one?
    pairs = np.concatenate([features[:-1][led[1:]], features[1:][led[1:]]], axis=1)
    parts = recording.actions[:, None] if recording.parts is None else recording.parts
    taken = {str(part): values for part, values in enumerate(parts[led].T)}
    return {**found, _ACTION: _mean_of_all(read_out(pairs, taken, (fit, choose, score)))}


def mark_of(scores: Mapping[str, Score]) -> float:
    """
    :param scores: of each label
    :return: the mean R² of the numbers among them; without any, the mean F1 of the classes; without both, the score of
        the actions; NaN where that is not known
    """
    action = scores[_ACTION].value if _ACTION in scores else None
    marks = (mean_of(scores, "R2"), mean_of(scores, "F1"), math.nan if action is None else action)
    return next((mark for mark in marks if not math.isnan(mark)), math.nan)


def know_state(scores: Mapping[str, Score]) -> bool:
    """
    :param scores: of each label
    :return: whether :func:`mark_of` is of labels of the state, and not of the actions alone
    """
    return not all(math.isnan(mean_of(scores, kind)) for kind in ("R2", "F1"))


def mean_of(scores: Mapping[str, Score], kind: str) -> float:
    """
    :param scores: of each label
    :param kind: ``"R2"`` or ``"F1"``
    :return: mean of the scores of this kind but that of the actions, and the F1 of rewards; NaN where there are none
    """
    values = [
        score.value
        for name, score in scores.items()
        if score.kind == kind and score.value is not None and name != _ACTION and (name, kind) != (_REWARD, "F1")
    ]
    return float(np.mean(values)) if values else math.nan


def _mean_of_all(scores: Mapping[str, Score]) -> Score:
    """:return: the mean over those parts that vary"""
    known = [score.value for score in scores.values() if score.value is not None]
    return Score(float(np.mean(known)) if known else None, next(iter(scores.values())).kind)
