"""A torchvision ResNet as a Stable-Baselines3 features extractor."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn
from torch.nn import functional as F

from sb3_resnet.common.arguments import choice, flag, integer, no_unknown
from sb3_resnet.common.nonfinite import check_observations
from sb3_resnet.nn import backbones
from sb3_resnet.nn import weights as weight_files
from sb3_resnet.nn.augment import read_augment
from sb3_resnet.nn.freezing import FreezeBoundary
from sb3_resnet.nn.micro_batches import in_slices, read_micro_batch_size
from sb3_resnet.nn.pooling import POOLINGS, pooled_dim, pooled_features
from sb3_resnet.nn.precision import MixedPrecision, autocast
from sb3_resnet.nn.preprocessing import (
    check_size,
    information_keeping_adapter,
    is_scaled,
    read_image_size,
    scale_of,
    statistics,
)

ADAPTERS = ("conv1x1", "per_frame")

SelfExtractor = TypeVar("SelfExtractor", bound="ResNetExtractor")


class ResNetExtractor(BaseFeaturesExtractor):
    """
    ResNet features of image observations, channels first: ``(batch, C, H, W)`` to ``(batch, features_dim)``.

    Scaling follows the observation *space*, never the values of a batch: uint8 0..255 is divided by 255 by SB3,
    float 0..255 is divided by 255 here, float 0..1 is left alone. (Guessing from a batch's maximum scales a dark
    frame differently from a bright one.) With ``normalize_images=False`` SB3 would not divide, and the first images
    that are not black are refused.

    :param observation_space: image space, ``(C, H, W)``; SB3 transposes ``(H, W, C)`` uint8 images itself
    :param backbone: a torchvision ResNet, such as ``"resnet18"`` or ``"resnet50"``
    :param pretrained: use torchvision's default ImageNet weights, from torch's hub cache or by download
    :param weights: other weights: a member of torchvision's enum or its name, or the path of a ``.pth``, ``.pt`` or
        ``.safetensors`` file or of a model that SB3 saved with this extractor; goes before ``pretrained``
    :param weights_prefix: which ResNet of that file, where it holds several, such as ``"module.encoder_q."``
    :param freeze_backbone: start with all stages frozen; ``set_freeze_boundary`` moves the boundary later, and so does
        an ``UnfreezeCallback`` with ``ResNetCnnPolicy``
    :param adapter: how ``C != 3`` channels reach the trunk. ``"conv1x1"``: a 1x1 convolution to three channels that
        begins as newest, middle and oldest frame. ``"per_frame"``: each frame alone (each RGB triple where ``C`` is a
        multiple of three), features concatenated
    :param pooling: ``"avg"``: mean over the last map; ``"flatten"``: the whole map; ``"spatial_softmax"``: expected
        row and column in -1..1 per channel (arXiv 1504.00702)
    :param norm: ``"frozen"``: BatchNorm with stored statistics; ``"batch"``: BatchNorm that follows ``train()`` above
        the boundary; ``"sync"``: the same, synchronised between processes; ``"group"``: GroupNorm, from scratch only
    :param use_imagenet_norm: normalise with the ImageNet statistics; ``None``: if there are pretrained weights
    :param input_mean: own mean of three channels, on the 0..1 scale; goes before ``use_imagenet_norm``
    :param input_std: own standard deviation, likewise
    :param image_size: resize to this height and width (one number or two) with antialiasing before the trunk
    :param features_dim: size of an additional linear projection; ``None``: the pooled features themselves
    :param micro_batch_size: pass so many observations through the trunk at once, the others after them: the gradient
        is that of the whole batch, activations are kept for one slice and computed again for the others
    :param augment: change sampled images at random in training, never those acted upon: a list of names as
        :func:`~sb3_resnet.nn.augment.read_augment` explains, or a callable of ``(batch, frames, channels, H, W)`` in
        0..1
    :param train_adapter: train the adapter even below a frozen trunk; gradients then cross the whole trunk
    :raises ValueError: for values that cannot work, with what to write instead
    :raises TypeError: for unknown arguments and wrong types
    :raises FileNotFoundError: if the weights are not there
    """

    input_mean: th.Tensor
    input_std: th.Tensor

    def __init__(
        self,
        observation_space: spaces.Box,
        *,
        backbone: str = "resnet18",
        pretrained: bool = False,
        weights: str | Path | Enum | None = None,
        weights_prefix: str | None = None,
        freeze_backbone: bool = True,
        adapter: str = "conv1x1",
        pooling: str = "avg",
        norm: str = "frozen",
        use_imagenet_norm: bool | None = None,
        input_mean: Sequence[float] | None = None,
        input_std: Sequence[float] | None = None,
        image_size: int | Sequence[int] | None = None,
        features_dim: int | None = None,
        micro_batch_size: int | None = None,
        augment: Sequence[Any] | Callable[[th.Tensor], th.Tensor] | None = None,
        train_adapter: bool = False,
        **unknown: Any,
    ) -> None:
        no_unknown("ResNetExtractor", unknown, ResNetExtractor.__init__.__kwdefaults__ or ())
        scale = scale_of(observation_space)
        channels, height, width = observation_space.shape
        image_size = read_image_size(image_size)
        size = image_size or (height, width)
        choice("adapter", adapter, ADAPTERS)
        choice("pooling", pooling, POOLINGS)
        check_size(size, pooling)
        if weights_prefix is not None and weights is None:
            raise ValueError("weights_prefix says which ResNet of a file is meant: write weights=PATH beside it")
        has_weights = flag("pretrained", pretrained) or weights is not None
        if norm == "group" and has_weights:
            raise ValueError("norm='group' has no pretrained weights: write norm='frozen', or pretrained=False")
        per_frame = adapter == "per_frame" and channels != 3
        if flag("train_adapter", train_adapter) and (per_frame or channels == 3):
            raise ValueError("train_adapter=True needs an adapter: adapter='conv1x1' and other than three channels")
        trunk = backbones.build(backbone, norm)
        frame_channels = 3 if channels % 3 == 0 else 1
        n_frames = channels // frame_channels if per_frame else 1
        pooled = n_frames * pooled_dim(pooling, trunk.out_channels, backbones.map_size(*size))
        out = pooled if features_dim is None else integer("features_dim", features_dim, 1)
        super().__init__(observation_space, out)

        #: Encodes what is acted upon, while a FeatureCacheCallback is at work.
        self.actor: Any = None
        #: Takes the place of the live part of the trunk where there is no gradient, likewise.
        self.fast_trunk: Any = None
        self.precision: MixedPrecision | None = None
        self.pooling = pooling
        self.augmentation = read_augment(
            augment, (height, width), frame_channels, quiet=weight_files.checkpoint_follows()
        )
        #: Whether observations come from a buffer, to be trained on. The target network's policy tells it.
        self.sees_samples = False
        self.micro_batch_size = read_micro_batch_size(micro_batch_size, norm)
        self.norm_name = norm
        self.trains_adapter = train_adapter
        self.image_size = image_size
        self.resizes = image_size is not None and image_size != (height, width)
        self._scale = scale
        self._is_uint8 = observation_space.dtype == np.uint8
        self._is_scaled = False  # not seen yet: SB3 tells no extractor of normalize_images
        self._per_frame = per_frame
        self._frame_channels = frame_channels
        self._n_frames = n_frames
        mean, std = statistics(has_weights, use_imagenet_norm, input_mean, input_std)
        self._normalize = mean is not None
        self.register_buffer("input_mean", th.tensor(mean or (0.0,) * 3).reshape(3, 1, 1))
        self.register_buffer("input_std", th.tensor(std or (1.0,) * 3).reshape(3, 1, 1))
        self.adapter = None if per_frame or channels == 3 else information_keeping_adapter(channels)
        # In this order forward and backward pass of all stages took a sixth less time on a CPU.
        self.backbone = trunk.to(memory_format=th.channels_last)
        self.projection = nn.Identity() if features_dim is None else nn.Linear(pooled, out)
        if has_weights and not weight_files.checkpoint_follows():
            weight_files.read_into(trunk, backbone, weights, weights_prefix)
        self.boundary = FreezeBoundary(
            {name: self.stage_modules(name) for name in self.stages},
            None if flag("freeze_backbone", freeze_backbone) else "all",
            train_adapter,
            live_norm=norm in ("batch", "sync"),
        )
        if freeze_backbone and not has_weights and not weight_files.checkpoint_follows():
            warnings.warn(
                "The backbone is frozen with random weights and learns little. Write pretrained=True (or "
                "weights=PATH), or unfreeze it: freeze_backbone=False, or with ResNetCnnPolicy an UnfreezeCallback.",
                stacklevel=2,
            )

    @property
    def stages(self) -> tuple[str, ...]:
        """Stages from the input up; ``adapter`` only where there is one."""
        return backbones.STAGES if self.adapter is None else ("adapter", *backbones.STAGES)

    def stage_modules(self, stage: str) -> tuple[nn.Module, ...]:
        """:return: the modules of one stage in the order in which they run"""
        if stage == "adapter":
            assert self.adapter is not None
            return (self.adapter,)
        return backbones.stage_modules(self.backbone, stage)

    @property
    def freeze_boundary(self) -> str | None:
        """The lowest stage that trains, or ``None``."""
        return self.boundary.stage

    def set_freeze_boundary(self, stage: str | None, at_update: int = 0) -> None:
        """
        Train ``stage`` and everything above it; freeze what is below.

        :param stage: a stage, ``"all"`` for the lowest, ``None`` to freeze all
        :param at_update: gradient updates done so far, saved with the model
        :raises ValueError: for an unknown stage
        """
        self.boundary.move(stage, at_update)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        """
        :param observations: ``(batch, C, H, W)``; uint8 spaces as SB3 scales them (0..1), float spaces as they are
        :return: float32 features ``(batch, features_dim)``
        :raises ValueError: if SB3 was told not to scale, and for NaN and infinity
        """
        if self._is_uint8 and not self._is_scaled:
            self._is_scaled = is_scaled(observations)
        x = self.preprocess(observations)
        size = None if self.micro_batch_size is None else self.micro_batch_size * self._n_frames
        with th.no_grad(), autocast(self.precision, x.device):
            entries = in_slices(self.frozen_part, x, size)
        return self.live_part(entries)

    def scale_raw(self, observations: th.Tensor) -> th.Tensor:
        """:return: raw observations of the space as SB3 hands them to ``forward``: uint8 images divided by 255"""
        return observations.float() / 255.0 if self._is_uint8 else observations.float()

    def preprocess(self, observations: th.Tensor) -> th.Tensor:
        """:return: float32 images in 0..1, resized; in ``per_frame`` mode ``(batch * frames, 3, H, W)``"""
        x = observations.float()
        if not self._is_uint8:
            check_observations(x)
        if self._scale != 1.0:
            x = x * self._scale
        if self.augmentation is not None and self.sees_samples:
            x = self.augmentation(x)
        if self.image_size is not None and x.shape[-2:] != self.image_size:
            x = F.interpolate(x, self.image_size, mode="bilinear", antialias=True, align_corners=False)
        return self.as_images(x).expand(-1, 3, -1, -1) if self._per_frame else x

    def as_images(self, x: th.Tensor) -> th.Tensor:
        """:return: what passes the trunk at once: in ``per_frame`` mode ``(batch * frames, 1 or 3, H, W)``"""
        return x.reshape(-1, self._frame_channels, *x.shape[-2:]) if self._per_frame else x

    def input_map(self) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
        """
        What happens to raw images (of :meth:`as_images`) before the stem, unless they are resized.

        :return: matrix ``(3, channels)`` and offset ``(3,)``, then mean and standard deviation ``(3,)``
        """
        scale = 1.0 / 255.0 if self._is_uint8 else self._scale
        mean, std = self.input_mean.flatten(), self.input_std.flatten()
        if self.adapter is not None:
            assert self.adapter.bias is not None
            return self.adapter.weight[:, :, 0, 0] * scale, self.adapter.bias, mean, std
        matrix = th.ones(3, 1) if self._per_frame and self._frame_channels == 1 else th.eye(3)
        return matrix.to(mean) * scale, th.zeros_like(mean), mean, std

    def frozen_part(self, x: th.Tensor) -> th.Tensor:
        """
        Run what is below the freeze boundary, without a gradient.

        :param x: preprocessed images
        :return: pooled features ``(batch, n)`` if all stages are frozen, else the map that the lowest trainable stage
            takes, ``(batch, frames, c, h, w)``
        """
        with th.no_grad():
            return self.entries_of(self.run_stages(x, self.boundary.frozen_stages))

    def live_part(self, entries: th.Tensor) -> th.Tensor:
        """Run the rest: ``frozen_part``'s result to features ``(batch, features_dim)``."""
        frozen = self.boundary.frozen_stages
        if len(frozen) < len(self.stages):
            plain = self.fast_trunk is None or self.precision is not None or th.is_grad_enabled()
            with autocast(self.precision, entries.device):
                entries = in_slices(self.live_trunk if plain else self.fast_trunk, entries, self.micro_batch_size)
            if self.precision is not None:
                entries = self.precision.leave_trunk(entries, self)
        features: th.Tensor = self.projection(entries.float()).float()
        return features

    def live_trunk(self, entries: th.Tensor) -> th.Tensor:
        x = self.run_stages(entries.flatten(0, 1).float(), self.live_stages)
        return self.pool(x, len(entries))

    @property
    def live_stages(self) -> tuple[str, ...]:
        """The stages that train."""
        return self.stages[len(self.boundary.frozen_stages) :]

    def pool(self, x: th.Tensor, batch: int) -> th.Tensor:
        """:return: pooled features ``(batch, n)`` of the last map, that of frames side by side"""
        return pooled_features(self.pooling, x).reshape(batch, -1)

    def entries_of(self, x: th.Tensor) -> th.Tensor:
        """Bring the last frozen activations into the form that ``frozen_part`` returns."""
        if len(self.boundary.frozen_stages) == len(self.stages):
            return self.pool(x, len(x) // self._n_frames)
        return x.reshape(-1, self._n_frames, *x.shape[1:])

    def run_stages(self, x: th.Tensor, stages: Sequence[str]) -> th.Tensor:
        """Run some successive stages; the input is normalised right before the stem."""
        for name in stages:
            if name == "stem":
                x = self.normalize(x)
            for module in self.stage_modules(name):
                x = module(x)
        return x

    def normalize(self, x: th.Tensor) -> th.Tensor:
        """:return: images by mean and standard deviation of the input, if there is such a normalisation"""
        return (x - self.input_mean) / self.input_std if self._normalize else x

    def train(self: SelfExtractor, mode: bool = True) -> SelfExtractor:
        """
        Switch the mode of what depends on it: the projection, and BatchNorm above the boundary.

        SB3 calls this before each rollout and each update; walking the whole trunk costs more than a small head's step.
        """
        self.training = self.sees_samples = mode
        self.projection.train(mode)
        for norm in self.boundary.live_norms:
            norm.train(mode)
        return self

    def apply(self: SelfExtractor, fn: Callable[[nn.Module], None]) -> SelfExtractor:
        """As ``nn.Module.apply``, but PPO's and A2C's orthogonal initialisation spares trunk and adapter."""
        if isinstance(fn, partial) and fn.func is BasePolicy.init_weights:
            self.projection.apply(fn)
            return self
        return super().apply(fn)


def extractors_of(model: BaseAlgorithm) -> list[ResNetExtractor]:
    """:return: the online and the target network's; PPO's may be shared or two"""
    return [module for module in model.policy.modules() if isinstance(module, ResNetExtractor)]
