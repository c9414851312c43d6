"""Stages, their input and their output, as plain functions: what an extractor and its encoder share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch as th
from torch import nn

from sb3_resnet.nn.freezing import FreezeBoundary
from sb3_resnet.nn.frozen_dtype import FrozenDtype
from sb3_resnet.nn.pooling import Pooling
from sb3_resnet.nn.preprocessing import Preprocessing


class Trunk:
    """
    The stages of an extractor with all that is needed to run them. It owns no module, so it is in no state dict.

    :param stages: the modules of each stage, from the input up
    :param boundary: which of them are frozen
    :param preprocessing: how observations become images
    :param statistics: the extractor's buffers by name, among them ``input_mean`` and ``input_std``
    :param normalizes: whether images are normalised with these
    :param pooling: how the last map becomes a vector
    :param frozen_dtype: precision of the frozen stages
    """

    def __init__(
        self,
        stages: Mapping[str, tuple[nn.Module, ...]],
        boundary: FreezeBoundary,
        preprocessing: Preprocessing,
        statistics: Mapping[str, th.Tensor | None],
        normalizes: bool,
        pooling: Pooling,
        frozen_dtype: FrozenDtype,
    ) -> None:
        self.stages = stages
        self.boundary = boundary
        self.preprocessing = preprocessing
        self.statistics = statistics
        self.normalizes = normalizes
        self.pooling = pooling
        self.frozen_dtype = frozen_dtype

    @property
    def device(self) -> th.device:
        """Where the stages compute."""
        return self._statistic("input_mean").device

    @property
    def frozen_stages(self) -> tuple[str, ...]:
        """The stages below the freeze boundary."""
        return self.boundary.frozen_stages

    @property
    def live_stages(self) -> tuple[str, ...]:
        """The stages that train."""
        return tuple(self.stages)[len(self.frozen_stages) :]

    def modules(self, names: Sequence[str]) -> list[nn.Module]:
        """:return: the modules of some stages, in order"""
        return [module for name in names for module in self.stages[name]]

    def run(self, x: th.Tensor, names: Sequence[str]) -> th.Tensor:
        """Run some successive stages; the input is normalised right before the stem."""
        for name in names:
            if name == "stem":
                x = self.normalize(x)
            for module in self.stages[name]:
                x = module(x)
        return x

    def normalize(self, x: th.Tensor) -> th.Tensor:
        """:return: images by mean and standard deviation of the input, if there is such a normalisation"""
        return (x - self._statistic("input_mean")) / self._statistic("input_std") if self.normalizes else x

    def pool(self, x: th.Tensor, batch: int) -> th.Tensor:
        """:return: pooled features ``(batch, n)`` of the last map; those of several frames side by side"""
        return self.pooling(x).reshape(batch, -1)

    def per_observation(self, entries: th.Tensor) -> th.Tensor:
        """
        Put the entries of an observation's frames side by side.

        :param entries: one per image: pooled features ``(batch * frames, n)`` or maps ``(batch * frames, c, h, w)``
        :return: ``(batch, frames * n)``, or ``(batch, frames, c, h, w)``
        """
        frames = self.preprocessing.n_frames
        if entries.ndim == 2:
            return entries.reshape(-1, frames * entries.shape[1])
        return entries.reshape(-1, frames, *entries.shape[1:])

    def input_map(self) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
        """
        What happens to raw images (of :meth:`Preprocessing.as_images`) before the stem, unless they are resized.

        :return: matrix ``(n, channels)`` and offset ``(n,)``, then mean and standard deviation ``(n,)``; n is 3, or all
            channels where the first convolution takes them
        """
        images = self.preprocessing
        scale = 1.0 / 255.0 if images.is_uint8 else images.scale
        mean, std = (self._statistic(name).flatten() for name in ("input_mean", "input_std"))
        if not self.normalizes:
            mean, std = th.zeros_like(mean), th.ones_like(std)
        if "adapter" in self.stages:
            adapter: Any = self.stages["adapter"][0]
            return adapter.weight[:, :, 0, 0] * scale, adapter.bias, mean, std
        matrix = th.ones(3, 1) if images.per_frame and images.frame_channels == 1 else th.eye(len(mean))
        return matrix.to(mean) * scale, th.zeros_like(mean), mean, std

    def _statistic(self, name: str) -> th.Tensor:
        value = self.statistics[name]
        assert value is not None
        return value
