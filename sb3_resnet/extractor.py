"""A torchvision ResNet as a Stable-Baselines3 features extractor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_resnet.common import host
from sb3_resnet.common.arguments import choice, flag, integer
from sb3_resnet.common.lending import mode_was_set
from sb3_resnet.nn import backbones
from sb3_resnet.nn.agents import adapter_for, normalisation, read_eyes
from sb3_resnet.nn.augment import read_augment
from sb3_resnet.nn.encoder import FrozenEncoder, overridden, refuse_overridden
from sb3_resnet.nn.freezing import FreezeBoundary, warn_that_it_learns_little
from sb3_resnet.nn.frozen_dtype import FrozenDtype
from sb3_resnet.nn.image_spaces import warn_if_channels_may_be_last
from sb3_resnet.nn.micro_batches import in_slices, read_micro_batch_size
from sb3_resnet.nn.pooling import POOLINGS, Pooling, warn_if_grid_repeats
from sb3_resnet.nn.precision import MixedPrecision, autocast
from sb3_resnet.nn.preprocessing import Preprocessing, check_combination, check_size
from sb3_resnet.nn.trunk import Trunk
from sb3_resnet.nn.weights import check_weights, checkpoint_follows, read_into

SelfExtractor = TypeVar("SelfExtractor", bound="ResNetExtractor")


class ResNetExtractor(BaseFeaturesExtractor):
    """
    ResNet features of image observations, channels first: ``(batch, C, H, W)`` to ``(batch, features_dim)``.

    Scaling follows the observation *space*, never the values of a batch, since a dark frame must be scaled as a bright
    one: SB3 divides uint8 0..255 by 255, float 0..255 is divided here, float 0..1 is left alone.

    :param observation_space: image space, ``(C, H, W)``; SB3 transposes ``(H, W, C)`` uint8 images itself
    :param backbone: a torchvision ResNet, such as ``"resnet18"`` or ``"resnet50"``
    :param pretrained: use torchvision's default ImageNet weights, from torch's hub cache or by download
    :param weights: other weights: a member of torchvision's enum or its name, or the path of a ``.pth``, ``.pt`` or
        ``.safetensors`` file, or of a saved agent (whose adapter is taken too, if it fits); goes before ``pretrained``
    :param weights_prefix: which ResNet of that file, where it holds several, such as ``"module.encoder_q."``
    :param freeze_backbone: start with all stages frozen; ``set_freeze_boundary`` or an ``UnfreezeCallback`` thaws them
    :param adapter: how ``C != 3`` channels reach the trunk. ``"conv1x1"``: a 1x1 convolution to three channels that
        begins as the newest frame, the mean of those between, and the oldest. All channels have a weight above zero.
        ``"per_frame"``: each frame alone, features concatenated. ``"inflate"``: ``conv1`` of the trunk takes all
        channels; it begins with the mean of the pretrained weights over their three channels, repeated and scaled by
        ``3 / C``, as in timm. For channels that are not frames, such as depth or spectral bands
    :param last_stage: the highest stage, ``"layer4"`` down to ``"stem"``; nothing above is built. Lower ones cost less
    :param frozen_dtype: precision of the frozen stages, wherever they compute: ``"float32"``, ``"bfloat16"``,
        ``"float16"``, or ``"auto"``, which takes what the hardware is fast in (bfloat16 where it has it, float16 on
        older GPUs, else float32). It is decided once and saved with the model. Stages that train compute from their
        float32 weights
    :param pooling: ``"avg"``: mean over the last map; ``"flatten"``: the whole map; ``"spatial_softmax"``: expected
        row and column in -1..1 per channel (arXiv 1504.00702); ``"grid"``: means over ``grid_size`` x ``grid_size``
        parts of the map, of the same length for images of any size
    :param grid_size: rows and columns of ``pooling="grid"``, up to those of the map: at 84 pixels ``layer4`` has 3
    :param norm: ``"frozen"``: BatchNorm with stored statistics; ``"batch"``: BatchNorm that follows ``train()`` above
        the boundary; ``"sync"``: the same, synchronised between processes; ``"group"``: GroupNorm with 32 groups,
        ``"layer"``: LayerNorm over channels and space (GroupNorm with one group), both from scratch only
    :param use_imagenet_norm: normalise with the ImageNet statistics; ``None``: if pretrained, or as a given agent did
    :param input_mean: own mean of three channels, on the 0..1 scale (divide statistics of 0..255 by 255); with
        ``adapter="inflate"`` also of all channels. In place of ``use_imagenet_norm``
    :param input_std: own standard deviation, likewise
    :param image_size: resize to this height and width (one number or two) with antialiasing before the trunk
    :param features_dim: size of an additional linear projection; ``None``: the pooled features themselves
    :param micro_batch_size: so many observations pass the trunk at once: the same gradient, less memory, more time
    :param augment: change images at random in training, never those acted upon: a list of names as in
        :func:`~sb3_resnet.nn.augment.read_augment`, or a callable of ``(batch, frames, channels, H, W)`` in 0..1
    :param train_adapter: train the adapter even below a frozen trunk; gradients then cross the whole trunk
    :param frame_channels: channels of one frame: 3 (RGB) or 1 (grey, or no frames); ``None``: 3 where ``C`` is a
        multiple of three. Write 1 for three stacked grey frames. With ``adapter="inflate"``, 3 lets each channel begin
        with the weights of its own colour
    :param normalized_image: take values of any bounds as they are, as SB3's NatureCNN with this argument;
        ``normalize_images=False`` of ``ResNetCnnPolicy`` writes it
    :raises ValueError: for values that cannot work, with what to write instead
    :raises TypeError: for wrong types
    :raises FileNotFoundError: if the weights are not there
    """

    input_mean: th.Tensor
    input_std: th.Tensor

    #: Stages from the input up to the last; ``adapter`` only where there is one.
    stages: tuple[str, ...]

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
        last_stage: str = "layer4",
        frozen_dtype: str = "float32",
        pooling: str = "avg",
        grid_size: int = 4,
        norm: str = "frozen",
        use_imagenet_norm: bool | None = None,
        input_mean: Sequence[float] | None = None,
        input_std: Sequence[float] | None = None,
        image_size: int | Sequence[int] | None = None,
        features_dim: int | None = None,
        micro_batch_size: int | None = None,
        augment: Sequence[Any] | Callable[[th.Tensor], th.Tensor] | None = None,
        train_adapter: bool = False,
        frame_channels: int | None = None,
        normalized_image: bool = False,
    ) -> None:
        images = Preprocessing(observation_space, adapter, image_size, frame_channels, normalized_image)
        pool = Pooling(choice("pooling", pooling, POOLINGS), integer("grid_size", grid_size, 1))
        has_weights = check_weights(flag("pretrained", pretrained), weights, weights_prefix)
        check_combination(has_weights, norm, flag("train_adapter", train_adapter), augment, images)
        check_size(images.size, pooling, choice("last_stage", last_stage, backbones.STAGES))
        trunk = backbones.build(backbone, norm, last_stage, images.trunk_channels, images.keeps_colours)
        pooled = images.n_frames * pool.dim(trunk.out_channels, backbones.map_size(*images.size, last_stage))
        out = pooled if features_dim is None else integer("features_dim", features_dim, 1)
        super().__init__(observation_space, out)

        #: Mixed precision of the live stages, while an AMPCallback is at work.
        self.precision: MixedPrecision | None = None
        #: Whether images are changed at random: those sampled for training, never those that are acted upon.
        self.augments = False
        loads = checkpoint_follows()
        self.augmentation = read_augment(augment, images.observed_size, images.frame_channels, quiet=loads)
        self.preprocessing, self.image_size, self.pooling, self.norm_name = images, images.image_size, pooling, norm
        self.trains_adapter, self.micro_batch_size = train_adapter, read_micro_batch_size(micro_batch_size, norm)
        self._images_at_once = None if self.micro_batch_size is None else self.micro_batch_size * images.n_frames
        eyes = None if loads else read_eyes(weights, weights_prefix)
        mean, std = normalisation(eyes, has_weights, use_imagenet_norm, input_mean, input_std, images)
        self.register_buffer("input_mean", images.per_channel(mean or (0.0,) * 3))
        self.register_buffer("input_std", images.per_channel(std or (1.0,) * 3))
        self.adapter = adapter_for(images, eyes)
        # Weights stay contiguous, which SB3's parameters_to_vector() and safetensors need.
        self.backbone = trunk
        self.projection = nn.Identity() if features_dim is None else nn.Linear(pooled, out)
        if has_weights and not loads:
            read_into(trunk, backbone, weights, weights_prefix, images.seen(last_stage, mean, std))
        self._join(last_stage, flag("freeze_backbone", freeze_backbone), FrozenDtype(frozen_dtype), pool, bool(mean))
        refuse_overridden(type(self), ResNetExtractor, frozen_dtype)
        if not loads:
            warn_if_channels_may_be_last(observation_space)
            warn_that_it_learns_little(freeze_backbone and not has_weights)

    def _join(self, last_stage: str, freezes: bool, frozen_dtype: FrozenDtype, pool: Pooling, normalizes: bool) -> None:
        """Make functions of the modules: the stages, and those that are frozen."""
        warn_if_grid_repeats(pool, self.preprocessing.size, last_stage, quiet=checkpoint_follows())
        names = backbones.stages_up_to(last_stage)
        self.stages = names if self.adapter is None else ("adapter", *names)
        stages = {name: self.stage_modules(name) for name in self.stages}
        follows_batch = self.norm_name in ("batch", "sync")
        self.boundary = FreezeBoundary(stages, None if freezes else "all", self.trains_adapter, follows_batch)
        self.frozen_precision = frozen_dtype
        #: The stages as functions. It shares this module's buffers, whose tensors ``to()`` replaces.
        self.trunk = Trunk(stages, self.boundary, self.preprocessing, self._buffers, normalizes, pool, frozen_dtype)
        #: The frozen stages as one fast function; acting, training and the feature cache all use it.
        self.encoder = FrozenEncoder(self.trunk)

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
    def frozen_dtype(self) -> str:
        """Precision of the frozen stages: ``"float32"``, ``"bfloat16"`` or ``"float16"``."""
        return self.frozen_precision.name

    def set_frozen_dtype(self, name: str) -> None:
        """
        Convert the model: its frozen stages compute in another precision from here on. The weights stay float32.

        :param name: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"`` for what this hardware is fast in
        :raises ValueError: for another name
        """
        refuse_overridden(type(self), ResNetExtractor, name)
        self.frozen_precision.convert(name)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        """
        :param observations: ``(batch, C, H, W)``; uint8 spaces as SB3 scales them (0..1), float spaces as they are
        :return: float32 features ``(batch, features_dim)``
        :raises ValueError: if SB3 was told not to scale, and for NaN, infinity and floats outside of their space
        """
        self.preprocessing.check_scaled(observations)
        if self._can_encode():
            return self.live_part(self.encode(observations))
        x = self.preprocess(observations)
        if not self.trunk.frozen_stages:
            return self.live_part(self.frozen_part(x))
        with th.no_grad():
            entries = in_slices(self.frozen_part, x, self._images_at_once)
        return self.live_part(entries)

    def encode(self, observations: th.Tensor) -> th.Tensor:
        """
        Run what is below the freeze boundary in :attr:`frozen_dtype`, without a gradient.

        :return: pooled features ``(batch, n)`` if all stages are frozen, else the map that the lowest trainable stage
            takes, ``(batch, frames, c, h, w)``
        """
        self.encoder.refresh(by_value=True)
        raw = self.preprocessing.to_raw(observations, self.augmentation if self.augments else None)
        return self.trunk.per_observation(in_slices(self.encoder.encode_checked, raw, self._images_at_once))

    def plain_features(self, observations: th.Tensor) -> th.Tensor:
        """As ``forward`` with the plain float32 modules, so that gradients of the image cross frozen stages too."""
        return self.live_part(self.frozen_part(self.preprocess(observations)))

    def _can_encode(self) -> bool:
        """Not where a graph is recorded, a hook wants to see a frozen module, or a subclass has it its own way."""
        recorded = th.compiler.is_compiling() or th.jit.is_tracing()  # type: ignore[no-untyped-call,attr-defined]  # PyTorch
        return self.encoder.can_replace_modules and not recorded and not overridden(type(self), ResNetExtractor)

    def scale_raw(self, observations: th.Tensor) -> th.Tensor:
        """:return: raw observations of the space as SB3 hands them to ``forward``: uint8 images divided by 255"""
        return self.preprocessing.scale_raw(observations)

    def preprocess(self, observations: th.Tensor) -> th.Tensor:
        """:return: float32 images in 0..1, resized; in ``per_frame`` mode ``(batch * frames, 3, H, W)``"""
        return self.preprocessing(observations, self.augmentation if self.augments else None)

    def frozen_part(self, x: th.Tensor) -> th.Tensor:
        """As :meth:`encode` of preprocessed images, but with the plain float32 modules; differentiable."""
        x = self.run_stages(x, self.trunk.frozen_stages)
        return self.trunk.per_observation(x if self.trunk.live_stages else self.trunk.pooling(x))

    def live_part(self, entries: th.Tensor) -> th.Tensor:
        """Run the rest: :meth:`encode`'s result to features ``(batch, features_dim)``."""
        if self.trunk.live_stages:
            with autocast(self.precision, entries.device):
                entries = in_slices(self.live_trunk, entries, self.micro_batch_size)
            if self.precision is not None:
                entries = self.precision.leave_trunk(entries, self)
        features: th.Tensor = self.projection(entries.float()).float()
        return features

    def live_trunk(self, entries: th.Tensor) -> th.Tensor:
        """:return: pooled features ``(batch, n)`` of the maps that the lowest trainable stage takes"""
        maps = entries.flatten(0, 1).float()
        # Entries are channels last and the weights are not: oneDNN takes a third longer for such a mixture.
        maps = maps.contiguous() if maps.is_cpu else maps
        return self.trunk.pool(self.run_stages(maps, self.trunk.live_stages), len(entries))

    def run_stages(self, x: th.Tensor, stages: Sequence[str]) -> th.Tensor:
        """Run some successive stages; the input is normalised right before the stem."""
        return self.trunk.run(x, stages)

    def train(self: SelfExtractor, mode: bool = True) -> SelfExtractor:
        """
        Switch all but the trunk, and BatchNorm above the boundary. SB3 calls this before each update: it must be fast.

        :raises ValueError: before an update, if the ``requires_grad`` of a parameter contradicts the freeze boundary
        """
        if mode:
            self.boundary.check()
        self.training = self.augments = mode
        others = (child for name, child in self.named_children() if name not in ("adapter", "backbone"))
        for module in (*others, *self.boundary.live_norms):
            module.train(mode)
        mode_was_set(self, mode)
        return self

    def apply(self: SelfExtractor, fn: Callable[[nn.Module], None]) -> SelfExtractor:
        """As ``nn.Module.apply``, but PPO's and A2C's orthogonal initialisation spares trunk and adapter."""
        if host.is_initializer(fn):
            self.projection.apply(fn)
            return self
        return super().apply(fn)


def extractors_in(module: nn.Module) -> list[ResNetExtractor]:
    """:return: all within a module, each once"""
    return [child for child in module.modules() if isinstance(child, ResNetExtractor)]
