"""A torchvision ResNet as a Stable-Baselines3 features extractor."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_resnet.common import host
from sb3_resnet.common.arguments import choice, flag, integer
from sb3_resnet.nn import backbones
from sb3_resnet.nn import weights as weight_files
from sb3_resnet.nn.augment import read_augment
from sb3_resnet.nn.freezing import FreezeBoundary
from sb3_resnet.nn.micro_batches import in_slices, read_micro_batch_size
from sb3_resnet.nn.pooling import POOLINGS, pooled_dim
from sb3_resnet.nn.precision import MixedPrecision, autocast
from sb3_resnet.nn.preprocessing import Preprocessing, check_size, information_keeping_adapter, statistics
from sb3_resnet.nn.trunk import Trunk

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
    :raises TypeError: for wrong types
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
    ) -> None:
        images = Preprocessing(observation_space, choice("adapter", adapter, ADAPTERS) == "per_frame", image_size)
        check_size(images.size, choice("pooling", pooling, POOLINGS))
        if weights_prefix is not None and weights is None:
            raise ValueError("weights_prefix says which ResNet of a file is meant: write weights=PATH beside it")
        has_weights = flag("pretrained", pretrained) or weights is not None
        _check_combination(has_weights, norm, flag("train_adapter", train_adapter), images)
        trunk = backbones.build(backbone, norm)
        pooled = images.n_frames * pooled_dim(pooling, trunk.out_channels, backbones.map_size(*images.size))
        out = pooled if features_dim is None else integer("features_dim", features_dim, 1)
        super().__init__(observation_space, out)

        #: Mixed precision of the live stages, while an AMPCallback is at work.
        self.precision: MixedPrecision | None = None
        #: Whether images are changed at random: those sampled for training, never those that are acted upon.
        self.augments = False
        quiet = weight_files.checkpoint_follows()
        self.augmentation = read_augment(augment, images.observed_size, images.frame_channels, quiet)
        self.preprocessing = images
        self.micro_batch_size = read_micro_batch_size(micro_batch_size, norm)
        self.norm_name = norm
        self.trains_adapter = train_adapter
        mean, std = statistics(has_weights, use_imagenet_norm, input_mean, input_std)
        self.register_buffer("input_mean", th.tensor(mean or (0.0,) * 3).reshape(3, 1, 1))
        self.register_buffer("input_std", th.tensor(std or (1.0,) * 3).reshape(3, 1, 1))
        has_adapter = not images.per_frame and images.channels != 3
        self.adapter = information_keeping_adapter(images.channels) if has_adapter else None
        # Weights stay contiguous, which SB3's parameters_to_vector() and safetensors need.
        self.backbone = trunk
        self.projection = nn.Identity() if features_dim is None else nn.Linear(pooled, out)
        if has_weights and not weight_files.checkpoint_follows():
            weight_files.read_into(trunk, backbone, weights, weights_prefix)
        stages = {name: self.stage_modules(name) for name in self.stages}
        unfrozen = None if flag("freeze_backbone", freeze_backbone) else "all"
        self.boundary = FreezeBoundary(stages, unfrozen, train_adapter, live_norm=norm in ("batch", "sync"))
        #: The stages as functions. It shares this module's buffers, whose tensors ``to()`` replaces.
        self.trunk = Trunk(stages, self.boundary, images, self._buffers, mean is not None, pooling)
        if freeze_backbone and not has_weights and not weight_files.checkpoint_follows():
            _warn_that_it_learns_little()

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

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width that images are resized to, or ``None``."""
        return self.preprocessing.image_size

    @property
    def pooling(self) -> str:
        """How the last map becomes a vector."""
        return self.trunk.pooling

    def forward(self, observations: th.Tensor) -> th.Tensor:
        """
        :param observations: ``(batch, C, H, W)``; uint8 spaces as SB3 scales them (0..1), float spaces as they are
        :return: float32 features ``(batch, features_dim)``
        :raises ValueError: if SB3 was told not to scale, and for NaN and infinity
        """
        self.preprocessing.check_scaled(observations)
        x = self.preprocess(observations)
        size = None if self.micro_batch_size is None else self.micro_batch_size * self.preprocessing.n_frames
        with th.no_grad(), autocast(self.precision, x.device):
            entries = in_slices(self.frozen_part, x, size)
        return self.live_part(entries)

    def scale_raw(self, observations: th.Tensor) -> th.Tensor:
        """:return: raw observations of the space as SB3 hands them to ``forward``: uint8 images divided by 255"""
        return self.preprocessing.scale_raw(observations)

    def preprocess(self, observations: th.Tensor) -> th.Tensor:
        """:return: float32 images in 0..1, resized; in ``per_frame`` mode ``(batch * frames, 3, H, W)``"""
        return self.preprocessing(observations, self.augmentation if self.augments else None)

    def frozen_part(self, x: th.Tensor) -> th.Tensor:
        """
        Run what is below the freeze boundary, without a gradient.

        :param x: preprocessed images
        :return: pooled features ``(batch, n)`` if all stages are frozen, else the map that the lowest trainable stage
            takes, ``(batch, frames, c, h, w)``
        """
        with th.no_grad():
            return self.trunk.entries_of(self.run_stages(x, self.boundary.frozen_stages))

    def live_part(self, entries: th.Tensor) -> th.Tensor:
        """Run the rest: ``frozen_part``'s result to features ``(batch, features_dim)``."""
        if self.trunk.live_stages:
            with autocast(self.precision, entries.device):
                entries = in_slices(self.live_trunk, entries, self.micro_batch_size)
            if self.precision is not None:
                entries = self.precision.leave_trunk(entries, self)
        features: th.Tensor = self.projection(entries.float()).float()
        return features

    def live_trunk(self, entries: th.Tensor) -> th.Tensor:
        """:return: pooled features ``(batch, n)`` of the maps that the lowest trainable stage takes"""
        x = self.run_stages(entries.flatten(0, 1).float(), self.trunk.live_stages)
        return self.trunk.pool(x, len(entries))

    def run_stages(self, x: th.Tensor, stages: Sequence[str]) -> th.Tensor:
        """Run some successive stages; the input is normalised right before the stem."""
        return self.trunk.run(x, stages)

    def train(self: SelfExtractor, mode: bool = True) -> SelfExtractor:
        """
        Switch the mode of what depends on it: all but the trunk, and BatchNorm above the boundary.

        SB3 calls this before each rollout and each update; walking the whole trunk costs more than a small head's step.

        :raises ValueError: before an update, if the ``requires_grad`` of a parameter contradicts the freeze boundary
        """
        if mode:
            self.boundary.check()
        self.training = self.augments = mode
        for name, child in self.named_children():
            if name not in ("adapter", "backbone"):
                child.train(mode)
        for norm in self.boundary.live_norms:
            norm.train(mode)
        return self

    def apply(self: SelfExtractor, fn: Callable[[nn.Module], None]) -> SelfExtractor:
        """As ``nn.Module.apply``, but PPO's and A2C's orthogonal initialisation spares trunk and adapter."""
        if host.is_initializer(fn):
            self.projection.apply(fn)
            return self
        return super().apply(fn)


def extractors_of(model: BaseAlgorithm) -> list[ResNetExtractor]:
    """:return: the online and the target network's; PPO's may be shared or two"""
    return [module for module in model.policy.modules() if isinstance(module, ResNetExtractor)]


def _check_combination(has_weights: bool, norm: str, train_adapter: bool, images: Preprocessing) -> None:
    if norm == "group" and has_weights:
        raise ValueError("norm='group' has no pretrained weights: write norm='frozen', or pretrained=False")
    if train_adapter and (images.per_frame or images.channels == 3):
        raise ValueError("train_adapter=True needs an adapter: adapter='conv1x1' and other than three channels")


def _warn_that_it_learns_little() -> None:
    warnings.warn(
        "The backbone is frozen with random weights and learns little. Write pretrained=True (or weights=PATH), or "
        "unfreeze it: freeze_backbone=False, or with ResNetCnnPolicy an UnfreezeCallback.",
        stacklevel=3,
    )
