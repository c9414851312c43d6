"""What a self-supervised objective is to the loop that trains it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch as th
from torch import nn


@dataclass(frozen=True)
class Pairs:
    """
    Observations of one episode each, :attr:`Objective.gap` steps apart, both shifted at random.

    :param first: raw images, ``(n, c, H, W)``
    :param second: those that followed, likewise
    :param actions: taken at the first, ``(n,)``; -1 where it is not known
    """

    first: th.Tensor
    second: th.Tensor
    actions: th.Tensor


class Objective(nn.Module):
    """
    Heads on top of the features, and a loss. Parameters with ``requires_grad`` train with the trunk; everything in the
    state dict is in the checkpoints.

    :param trunk: what is pretrained; called with raw images, returns features ``(n, trunk.features)``. It is not a
        part of the objective: copies of it may be
    :param n_actions: number of actions; ``None`` where an action is no choice among several
    """

    #: Steps between the observations of a pair.
    gap: int = 1
    #: Whether the loss reads :attr:`Pairs.actions`.
    needs_actions: bool = False

    def __init__(self, trunk: Any, n_actions: int | None) -> None:
        super().__init__()

    def loss(self, trunk: Any, pairs: Pairs) -> th.Tensor:
        """:return: what is minimised, a number"""
        raise NotImplementedError

    def follow(self, trunk: Any) -> None:
        """Called after each step of the optimizer, such as for a momentum encoder."""
