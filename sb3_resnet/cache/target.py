"""The target network's part above the freeze boundary, as fast as the encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch as th

from sb3_resnet.cache.encoder import arrange_for_inference, folded_stages

if TYPE_CHECKING:
    from sb3_resnet.extractor import ResNetExtractor

_OFTEN = 100  # environment steps; a copy takes as long as some updates save


class FastTrunk:
    """
    Runs the live stages of a network that seldom changes (:func:`seldom_changes`), without gradients.

    Always from a copy with folded norms and packed weights, made anew when the weights change: a resumed run computes
    the same to the bit. SB3 writes to ``tensor.data``, which no version counter sees, so the weights are compared.

    :param extractor: of the target network, on a CPU
    """

    def __init__(self, extractor: ResNetExtractor) -> None:
        self._extractor = extractor
        self._weights: list[th.Tensor] = []
        self._stages: dict[str, Any] = {}

    def __call__(self, entries: th.Tensor) -> th.Tensor:
        """
        :param entries: the map that the lowest live stage takes, ``(batch, frames, c, h, w)``
        :return: pooled features, ``(batch, n)``
        """
        extractor = self._extractor
        if "stem" in extractor.live_stages:  # its input is normalised: left to the extractor
            return extractor.live_trunk(entries)
        self._refresh()
        x = entries.flatten(0, 1).float().contiguous(memory_format=th.channels_last)
        for stage in self._stages.values():
            x = stage(x)
        return extractor.pool(x, len(entries))

    def _refresh(self) -> None:
        extractor, live = self._extractor, self._extractor.live_stages
        modules = [module for name in live for module in extractor.stage_modules(name)]
        weights = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        if _same(self._weights, weights):
            return
        self._weights = [tensor.detach().clone() for tensor in weights]
        self._stages = folded_stages(extractor, live)
        arrange_for_inference(self._stages, th.float32)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # a copied policy has a target network of its own

    def __reduce__(self) -> Any:
        return (_nothing, ())


def seldom_changes(model: Any) -> bool:
    """:return: whether the target network of an SB3 model stays as it is for long enough that a copy of it pays"""
    return bool(model.tau == 1.0 and model.target_update_interval >= _OFTEN)


def _same(before: Sequence[th.Tensor], now: Sequence[th.Tensor]) -> bool:
    return len(before) == len(now) and all(map(th.equal, before, now))


def _nothing() -> None:
    """What a pickled one comes back as."""
