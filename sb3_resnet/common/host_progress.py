"""How far a model of Stable-Baselines3 has come: a second part of the one seam, beside ``host.py``."""

from __future__ import annotations

from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm


def last_observation(model: BaseAlgorithm) -> Any:
    """
    :param model: an SB3 model
    :return: the observations on which ``learn()`` acts next; ``None`` if there are none, or nothing tells
    """
    return getattr(model, "_last_obs", None)
