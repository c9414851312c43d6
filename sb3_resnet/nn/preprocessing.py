"""What the extractor asks of images: bounds, size, statistics, and values that are those of their space."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch as th
from torch.nn import functional as F

from sb3_resnet.common.arguments import choice, flag, integer, number, shown
from sb3_resnet.common.nonfinite import check_observations
from sb3_resnet.common.vec_normalize import INSTEAD
from sb3_resnet.nn.adapters import ADAPTERS, check_adapter, inflated_statistics, read_frame_channels
from sb3_resnet.nn.augment import Transform
from sb3_resnet.nn.backbones import FROM_SCRATCH, smallest_size
from sb3_resnet.nn.image_spaces import scale_of

#: Statistics of ImageNet in 0..1, RGB; those of torchvision's weights and of R3M.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Statistics that can be meant for images in 0..1. The deviation of such images is at most 0.5, and 1 means no division;
# 1/255 brings images to 0..255, for weights that were trained on these.
_MAX_MEAN, _MIN_STD, _MAX_STD = 1.0, 1e-3, 2.0
_ROUNDING = 1e-3  # how far values of a float space may be outside of it, as a part of its size


class Preprocessing:
    """
    How observations become images for the trunk: scale, size, and what passes the trunk at once.

    :param space: observation space, ``(C, H, W)``
    :param adapter: one of :data:`~sb3_resnet.nn.adapters.ADAPTERS`
    :param image_size: height and width to resize to, or one number for both; ``None``: as they are
    :param frame_channels: channels of one frame, 1 or 3; ``None``: 3 where the channels are a multiple of three
    :param normalized: whether values of any bounds are taken as they are
    :raises ValueError: if these are no images, and for an adapter that changes nothing
    """

    def __init__(
        self, space: Any, adapter: str, image_size: Any, frame_channels: Any = None, normalized: Any = False
    ) -> None:
        self.normalized = flag("normalized_image", normalized)
        #: Factor that brings what SB3 hands over to 0..1; 1 for values that are taken as they are.
        self.scale = scale_of(space, self.normalized)
        #: Channels of an observation.
        self.channels = int(space.shape[0])
        #: Height and width of an observation.
        self.observed_size: tuple[int, int] = tuple(space.shape[1:])
        self.image_size = read_image_size(image_size)
        #: Height and width of the images.
        self.size = self.image_size or self.observed_size
        self.resizes = self.size != self.observed_size
        self.is_uint8 = space.dtype == np.uint8 and not self.normalized
        #: Channels of one frame.
        self.frame_channels = read_frame_channels(frame_channels, self.channels)
        check_adapter(choice("adapter", adapter, ADAPTERS), self.channels, self.frame_channels)
        #: Whether each frame passes the trunk alone.
        self.per_frame = adapter == "per_frame"
        #: Channels that the trunk takes.
        self.trunk_channels = self.channels if adapter == "inflate" else 3
        #: Whether the user said that these are RGB frames, so that colours keep the weights of their own.
        self.keeps_colours = frame_channels is not None and self.frame_channels == 3
        #: Whether a 1x1 convolution brings the channels to three.
        self.has_adapter = adapter == "conv1x1" and (self.channels, self.frame_channels) != (3, 3)
        #: Images that one observation becomes.
        self.n_frames = self.channels // self.frame_channels if self.per_frame else 1
        self._is_scaled = False  # not seen yet: SB3 tells no extractor of normalize_images

    def __call__(self, observations: th.Tensor, augmentation: Transform | None = None) -> th.Tensor:
        """
        :param observations: as SB3 hands them over, ``(batch, C, H, W)``
        :param augmentation: changes the images, at the size of the observation
        :return: float32 images in 0..1, resized; in ``per_frame`` mode ``(batch * frames, 3, H, W)``
        """
        x = self._to_unit(observations)
        if augmentation is not None:
            x = augmentation(x)
        x = self.as_images(self.resize(x))
        return x.expand(-1, 3, -1, -1) if self.per_frame else x

    def to_raw(self, observations: th.Tensor, augmentation: Transform | None = None) -> th.Tensor:
        """
        Undo SB3's scaling: the encoder takes raw values, and multiplying the 255 of uint8 back is exact.

        :param observations: as SB3 hands them over, ``(batch, C, H, W)``
        :param augmentation: changes the images, at the size of the observation
        :return: images for :class:`~sb3_resnet.nn.encoder.FrozenEncoder`, which resizes them
        :raises ValueError: for NaN, infinity and values outside of the space, before images are changed
        """
        x = observations.float()
        if augmentation is None:
            self.check_range(x)
        else:
            x = augmentation(self._to_unit(observations)) / self.scale
        return self.as_images(x * 255.0 if self.is_uint8 else x)

    def unit_images(self, images: th.Tensor) -> th.Tensor:
        """
        :param images: raw, as :meth:`as_images` gives them
        :return: the same as float32 in 0..1, resized, with the channels that the trunk or the adapter takes
        """
        x = self.resize(self._to_unit(self.scale_raw(images)))
        return x.expand(-1, 3, -1, -1) if self.per_frame else x

    def seen(self, last_stage: str, mean: Sequence[float] | None, std: Sequence[float] | None) -> dict[str, Any]:
        """:return: what a trunk up to ``last_stage`` sees of observations, in plain values, as a card keeps it"""
        adapter = "per_frame" if self.per_frame else "conv1x1" if self.has_adapter else "inflate"
        return {
            "adapter": "none" if adapter == "inflate" and self.channels == 3 else adapter,
            "channels": self.channels,
            "frame_channels": self.frame_channels,
            "image_size": [*self.size],
            "input_mean": None if mean is None else [*mean],
            "input_std": None if std is None else [*std],
            "keeps_colours": self.keeps_colours,
            "last_stage": last_stage,
        }

    def resize(self, x: th.Tensor) -> th.Tensor:
        """:return: images ``(n, c, H, W)`` at the size that the trunk sees; as they are if they have it"""
        if not self.resizes or x.shape[-2:] == self.size:
            return x
        return F.interpolate(x.float(), self.size, mode="bilinear", antialias=True, align_corners=False)

    def _to_unit(self, observations: th.Tensor) -> th.Tensor:
        x = observations.float()
        self.check_range(x)
        return x * self.scale if self.scale != 1.0 else x

    def per_channel(self, values: Sequence[float]) -> th.Tensor:
        """:return: statistics for the channels that the trunk takes, ``(c, 1, 1)``, from those of three or of all"""
        inflated = inflated_statistics(values, self.trunk_channels, self.keeps_colours)
        return th.tensor(inflated).reshape(-1, 1, 1)

    def as_images(self, x: th.Tensor) -> th.Tensor:
        """:return: what passes the trunk at once: in ``per_frame`` mode ``(batch * frames, 1 or 3, H, W)``"""
        return x.reshape(-1, self.frame_channels, *x.shape[-2:]) if self.per_frame else x

    def scale_raw(self, observations: th.Tensor) -> th.Tensor:
        """:return: raw observations of the space as SB3 hands them over: uint8 images divided by 255"""
        return observations.float() / 255.0 if self.is_uint8 else observations.float()

    def check_scaled(self, observations: th.Tensor) -> None:
        """
        Look at images until one of them shows that SB3 divides them by 255; black ones do not.

        :param observations: as SB3 hands them over
        :raises ValueError: if they are not divided
        """
        if self.is_uint8 and not self._is_scaled:
            self._is_scaled = is_scaled(observations)

    def check_range(self, observations: th.Tensor) -> None:
        """
        Compare the values of a float space with it; those of uint8 cannot be outside.

        :param observations: as the space describes them
        :raises ValueError: for NaN and infinity, and for values that the space does not have
        """
        if self.is_uint8 or not observations.numel() or th.compiler.is_compiling():
            return
        if self.normalized:
            return check_observations(observations)
        # One pass and one wait for the device finds NaN too, which would be looked for in any case.
        low, high = th.stack(observations.detach().aminmax()).tolist()
        top = 1.0 / self.scale
        slack = _ROUNDING * top
        if -slack <= low and high <= top + slack:
            return
        check_observations(observations)
        what = f"The observations go from {low:.4g} to {high:.4g}, but their space says 0..{top:.0f}"
        if low < -slack:
            raise ValueError(f"{what}. Negative values are what VecNormalize makes of images: {INSTEAD}.")
        raise ValueError(
            f"{what}. Declare the bounds that they have: Box(0, 255, ...), or Box(0, 1, ...) with values divided by "
            f"255. If VecNormalize makes them, {INSTEAD}."
        )


def is_scaled(observations: th.Tensor) -> bool:
    """
    :param observations: images of a uint8 space, as SB3 hands them over
    :return: whether they are known to be divided by 255; black images do not tell
    :raises ValueError: if they are not divided
    """
    if th.compiler.is_compiling():  # an exported graph has no such branch
        return False
    highest = float(observations.detach().max())
    if highest > 1.0:
        raise ValueError(
            "uint8 images come as 0..255 instead of 0..1: leave normalize_images=False out of policy_kwargs"
        )
    return highest > 0.0


def read_image_size(value: Any) -> tuple[int, int] | None:
    """
    :param value: ``None``, one number, or height and width
    :return: height and width in pixels, or ``None``
    :raises ValueError: for anything else
    """
    if value is None:
        return None
    try:
        sides = [value] * 2 if isinstance(value, (Real, str)) else [*value]
    except TypeError:
        sides = []
    if len(sides) != 2:
        raise ValueError(f"image_size must be one number or [height, width], got {shown(value)}")
    return integer("image_size", sides[0], 1), integer("image_size", sides[1], 1)


def check_combination(has_weights: bool, norm: str, train_adapter: bool, augment: Any, images: Preprocessing) -> None:
    """
    :param has_weights: whether the trunk is pretrained
    :param norm: its norm layers
    :param train_adapter: whether the adapter is to train
    :param augment: how images are to be changed at random
    :param images: how observations become images
    :raises ValueError: for what cannot go together
    """
    if norm in FROM_SCRATCH and has_weights:
        raise ValueError(f"norm={norm!r} has no pretrained weights: write norm='frozen', or pretrained=False")
    if augment and images.normalized:
        raise ValueError("augment changes images in 0..1, and normalized_image=True takes other values: write one")
    if train_adapter and not images.has_adapter:
        raise ValueError("train_adapter=True needs an adapter: adapter='conv1x1' and other than three channels")


def check_size(size: tuple[int, int], pooling: str, last_stage: str = "layer4") -> None:
    """
    Refuse images of which the trunk leaves nothing.

    :param size: height and width in pixels
    :param pooling: one of :data:`~sb3_resnet.nn.pooling.POOLINGS`
    :param last_stage: the highest stage of the trunk
    :raises ValueError: with the smallest size that works
    """
    needs_map = pooling == "spatial_softmax"
    smallest = smallest_size(last_stage, needs_map)
    if min(size) < smallest:
        why = "its last map is a single pixel" if needs_map else "the trunk sees little but padding"
        raise ValueError(
            f"Images of {size[0]}x{size[1]} are too small for a ResNet up to {last_stage} with pooling={pooling!r}: "
            f"{why}. The smallest size that works is {smallest}x{smallest}: write image_size={smallest} or more, or a "
            "lower last_stage."
        )


def statistics(
    has_weights: bool, use_imagenet_norm: bool | None, mean: Any, std: Any, images: Preprocessing
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """
    Mean and standard deviation by which images are normalised, three numbers each, or ``None``.

    :param has_weights: whether the trunk is pretrained
    :param use_imagenet_norm: the ImageNet statistics; ``None``: if it is pretrained
    :param mean: own statistics, on the scale of 0..1
    :param std: likewise
    :param images: how observations become images; own statistics may also be one number for each channel of the trunk
    :raises ValueError: if they are not so many numbers, cannot be on that scale, or come beside those of ImageNet
    """
    if use_imagenet_norm is not None:
        flag("use_imagenet_norm", use_imagenet_norm)
    if (mean is None) != (std is None):
        raise ValueError("input_mean and input_std go together: write both, each with three numbers")
    channels = images.trunk_channels
    if mean is not None:
        if use_imagenet_norm:
            raise ValueError(
                "use_imagenet_norm=True has no effect beside input_mean and input_std: leave it out, or leave them out"
            )
        return (
            _on_scale("input_mean", mean, channels, -_MAX_MEAN, _MAX_MEAN),
            _on_scale("input_std", std, channels, _MIN_STD, _MAX_STD),
        )
    wanted = has_weights and not images.normalized if use_imagenet_norm is None else use_imagenet_norm
    return (IMAGENET_MEAN, IMAGENET_STD) if wanted else (None, None)


def _on_scale(name: str, values: Any, channels: int, smallest: float, largest: float) -> tuple[float, ...]:
    if isinstance(values, str) or not hasattr(values, "__len__") or len(values) not in (3, channels):
        more = "" if channels == 3 else f", or {channels}, one per channel of an observation"
        raise ValueError(
            f"{name} must be three numbers, one per channel of the trunk (R, G, B){more}, got {shown(values)}"
        )
    above = smallest > 0  # an std of 0 is no scale at all, whatever its unit
    read = tuple(number(name, value, 0.0 if above else -np.inf, above=above) for value in values)
    if max(read) > largest or min(read) < smallest:
        by_255 = ", ".join(f"{value / 255:.4g}" for value in read)
        instead = f"divide statistics of images in 0..255 by 255: [{by_255}]"
        if min(read) < smallest:
            instead = f"write values from {smallest:g} to {largest:g}, the statistics of images in 0..1"
        raise ValueError(f"{name}={shown(values)} cannot be on the scale of 0..1: {instead}")
    return read
