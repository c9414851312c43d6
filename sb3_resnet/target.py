"""The target network's part above the freeze boundary, as fast as the encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch as th

from sb3_resnet.encoder import arrange_for_inference, folded_stages

if TYPE_CHECKING:
    from sb3_resnet.extractor import ResNetExtractor


class FastTrunk:
    """
    Runs the live stages of a network that seldom changes, as SB3's target network with ``tau=1``, without gradients.

    A copy with folded norms and packed weights is made when the same weights are used for the second time, and dropped
    when they change; a network that changes all the time (``tau<1``) runs as it is. SB3 writes to ``tensor.data``,
    which no version counter sees: so the weights themselves are compared.

    :param extractor: of the target network, on a CPU
    """

    def __init__(self, extractor: ResNetExtractor) -> None:
        self._extractor = extractor
        self._small: list[th.Tensor] = []
        self._all: list[th.Tensor] = []
        self._stages: dict[str, Any] = {}

    def __call__(self, entries: th.Tensor) -> th.Tensor:
        """
        :param entries: the map that the lowest live stage takes, ``(batch, frames, c, h, w)``
        :return: pooled features, ``(batch, n)``
        """
        extractor = self._extractor
        if not self._is_ready():
            return extractor.live_trunk(entries)
        x = entries.flatten(0, 1).float().contiguous(memory_format=th.channels_last)
        for stage in self._stages.values():
            x = stage(x)
        return extractor.pool(x, len(entries))

    def _is_ready(self) -> bool:
        """:return: whether there is a copy of the weights as they are"""
        extractor, live = self._extractor, self._extractor.live_stages
        if "stem" in live:  # its input is normalised: left to the extractor
            return False
        modules = [module for name in live for module in extractor.stage_modules(name)]
        tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        if _same(self._all, tensors):
            return True
        small = [tensor for tensor in tensors if tensor.ndim < 2]
        self._all, self._stages = [], {}
        if not _same(self._small, small):
            self._small = [tensor.detach().clone() for tensor in small]
            return False
        self._all = [tensor.detach().clone() for tensor in tensors]
        self._stages = folded_stages(extractor, live)
        arrange_for_inference(self._stages, th.float32)
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # a copied policy has a target network of its own

    def __reduce__(self) -> Any:
        return (_nothing, ())


def _same(before: Sequence[th.Tensor], now: Sequence[th.Tensor]) -> bool:
    return len(before) == len(now) and all(map(th.equal, before, now))


def _nothing() -> None:
    """What a pickled one comes back as."""
