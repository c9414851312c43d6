"""A batch of observations that the frozen stages have already seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch as th


@dataclass(frozen=True)
class EncodedBatch:
    """
    Takes the place of pixels in SB3's ``train()`` and in ``predict()``.

    :param entries: ``(batch, ...)``, as a :class:`~sb3_resnet.nn.encoder.FrozenEncoder` made them
    :param centre: what it subtracted from them, if anything
    """

    entries: th.Tensor
    centre: th.Tensor | None = None

    @property
    def features(self) -> th.Tensor:
        """Pooled features, or the activations below the freeze boundary; float32, ``(batch, ...)``."""
        if self.centre is None:
            return self.entries.float()
        return self.entries.to(self.centre.device).float() + self.centre

    def to(self, device: th.device) -> EncodedBatch:
        """:return: the batch on a device"""
        return EncodedBatch(self.entries.to(device), self.centre)

    def __len__(self) -> int:
        return len(self.entries)

    def __deepcopy__(self, memo: dict[int, Any]) -> EncodedBatch:
        return self  # VecNormalize copies what it is given before it leaves it alone


class Encoding(Protocol):
    """What a policy asks for the frozen stages' part of acting, while a FeatureCacheCallback is at work."""

    def encode(self, observations: th.Tensor) -> EncodedBatch | None:
        """
        :param observations: raw, one per environment, ``(n_envs, C, H, W)``
        :return: what the frozen stages make of them; ``None``: the network computes them itself
        """
