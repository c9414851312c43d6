"""The trunk as it is pretrained: live BatchNorm, one image at a time, pooled as it will be used."""

from __future__ import annotations

from collections.abc import Sequence

import torch as th
from torch import nn

from sb3_resnet.nn import backbones
from sb3_resnet.nn.adapters import make_adapter
from sb3_resnet.nn.pooling import Pooling
from sb3_resnet.nn.preprocessing import Preprocessing


class PretrainedTrunk(nn.Module):
    """
    A trunk with random weights whose BatchNorm follows ``train()``.

    A ``conv1x1`` adapter stays as it begins in every extractor, so the weights of the trunk alone tell all.

    :param images: how observations become images
    :param backbone: a torchvision ResNet
    :param last_stage: the highest stage
    :param pooling: of the last map
    :param mean: of the images, by channel of the trunk; ``None``: they are not normalised
    :param std: likewise
    """

    input_mean: th.Tensor
    input_std: th.Tensor

    def __init__(
        self,
        images: Preprocessing,
        backbone: str,
        last_stage: str,
        pooling: Pooling,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
    ) -> None:
        super().__init__()
        self.resnet = backbones.build(backbone, "batch", last_stage, images.trunk_channels, images.keeps_colours)
        for layer in self.resnet.modules():
            if isinstance(layer, backbones.FreezableNorm):
                layer.live = True
        self.adapter: nn.Module = nn.Identity()
        if images.has_adapter:
            self.adapter = make_adapter(images.channels, images.frame_channels).requires_grad_(False)
        self.register_buffer("input_mean", images.per_channel(mean or (0.0,) * 3))
        self.register_buffer("input_std", images.per_channel(std or (1.0,) * 3))
        self.to(memory_format=th.channels_last)  # twice as fast on a CPU
        self._images, self._pooling = images, pooling
        self._stages = backbones.stages_up_to(last_stage)
        #: Length of the features of an image.
        self.features = pooling.dim(self.resnet.out_channels, backbones.map_size(*images.size, last_stage))

    def forward(self, images: th.Tensor) -> th.Tensor:
        """
        :param images: raw, ``(n, channels, H, W)``; with ``adapter="per_frame"`` single frames
        :return: features ``(n, features)`` in float32
        """
        x = (self.adapter(self._images.unit_images(images)) - self.input_mean) / self.input_std
        x = x.contiguous(memory_format=th.channels_last)
        for stage in self._stages:
            for module in backbones.stage_modules(self.resnet, stage):
                x = module(x)
        return self._pooling(x)

    def weights(self) -> dict[str, th.Tensor]:
        """:return: a copy of the trunk's weights under torchvision's names"""
        return {
            key: value.detach().cpu().clone(memory_format=th.contiguous_format)
            for key, value in self.resnet.state_dict().items()
        }
