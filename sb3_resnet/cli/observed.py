"""Observations of one image and of a Dict alike: one image is a Dict of one, under the key ``""``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces


def by_key(observations: Any) -> Mapping[str, Any]:
    """
    :param observations: of one image, or of a Dict by key
    :return: the same by key; one image has the key ``""``
    """
    return observations if isinstance(observations, Mapping) else {"": observations}


def each(function: Callable[[Any], Any], observations: Any) -> Any:
    """
    :param function: what is to be done with an array
    :param observations: of one image, or of a Dict by key
    :return: its results, in the same form
    """
    if isinstance(observations, Mapping):
        return {key: function(part) for key, part in observations.items()}
    return function(observations)


def stacked(observations: Sequence[Any]) -> Any:
    """
    :param observations: successive ones, of one image or of a Dict
    :return: the same as one, with a first axis for the steps
    """
    if not isinstance(observations[0], Mapping):
        return np.stack(observations)
    return {key: np.stack([one[key] for one in observations]) for key in observations[0]}


def flat(played: Any) -> Any:
    """
    :param played: observations ``(steps, envs, ...)``
    :return: the same without regard to step and environment, ``(steps * envs, ...)``
    """
    return each(lambda part: part.reshape(-1, *part.shape[2:]), played)


def label(key: str, text: str) -> str:
    """
    :param key: of an image; ``""`` for the only one
    :param text: about it
    :return: the text, with the key before it where there is one
    """
    return f"{key}: {text}" if key else text


def described(space: Any) -> str:
    """
    :param space: of observations
    :return: type and shape of an observation, of each part of a Dict
    """
    if isinstance(space, spaces.Dict):
        return ", ".join(f"{key} {described(part)}" for key, part in space.spaces.items())
    return f"{space.dtype} {space.shape}" if isinstance(space, spaces.Box) else str(space)
