"""A batch of observations that the frozen stages have already seen, and who makes one for acting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch as th


@dataclass(frozen=True)
class EncodedBatch:
    """
    Takes the place of pixels in SB3's ``train()`` and in ``predict()``.

    :param entries: what the extractor's ``encode`` returns for the observations: pooled features ``(batch, n)``, or
        maps ``(batch, frames, c, h, w)`` in the precision of the frozen stages
    """

    entries: th.Tensor

    @property
    def features(self) -> th.Tensor:
        """The entries in float32."""
        return self.entries.float()

    def to(self, device: th.device) -> EncodedBatch:
        """:return: the batch on a device"""
        return EncodedBatch(self.entries.to(device))

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: Any) -> EncodedBatch:
        """Some of the observations, as algorithms take that do not train on all of a minibatch."""
        return EncodedBatch(self.entries[index])

    def __deepcopy__(self, memo: dict[int, Any]) -> EncodedBatch:
        return self  # VecNormalize copies what it is given before it leaves it alone


class Encoding(Protocol):
    """What a policy asks for the frozen stages' part of acting, while a FeatureCacheCallback is at work."""

    def encode(self, observations: th.Tensor) -> EncodedBatch | None:
        """
        :param observations: raw, one per environment, ``(n_envs, C, H, W)``
        :return: what the frozen stages make of them; ``None``: the network computes them itself
        """
