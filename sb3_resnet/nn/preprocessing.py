"""What the extractor asks of images: bounds, size, statistics, and how many channels become three."""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from torch import nn
from torch.nn import functional as F

from sb3_resnet.common.arguments import flag, integer, number, shown
from sb3_resnet.common.nonfinite import check_observations
from sb3_resnet.nn.augment import Augmentation
from sb3_resnet.nn.backbones import FROM_SCRATCH, smallest_size

#: Statistics of ImageNet in 0..1, RGB; those of torchvision's weights and of R3M.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Preprocessing:
    """
    How observations become images for the trunk: scale, size, and what passes the trunk at once.

    :param space: observation space, ``(C, H, W)``
    :param per_frame: pass each frame alone; with three channels there is only one
    :param image_size: height and width to resize to, or one number for both; ``None``: as they are
    :raises ValueError: if these are no images
    """

    def __init__(self, space: Any, per_frame: bool, image_size: Any) -> None:
        #: Factor that brings what SB3 hands over to 0..1.
        self.scale = scale_of(space)
        #: Channels of an observation.
        self.channels = int(space.shape[0])
        #: Height and width of an observation.
        self.observed_size: tuple[int, int] = tuple(space.shape[1:])
        self.image_size = read_image_size(image_size)
        #: Height and width of the images.
        self.size = self.image_size or self.observed_size
        self.resizes = self.size != self.observed_size
        self.is_uint8 = space.dtype == np.uint8
        #: Channels of one frame.
        self.frame_channels = 3 if self.channels % 3 == 0 else 1
        self.per_frame = per_frame and self.channels != 3
        #: Whether an adapter makes three channels of all.
        self.needs_adapter = not self.per_frame and self.channels != 3
        #: Images that one observation becomes.
        self.n_frames = self.channels // self.frame_channels if self.per_frame else 1
        self._is_scaled = False  # not seen yet: SB3 tells no extractor of normalize_images

    def __call__(self, observations: th.Tensor, augmentation: Augmentation | None = None) -> th.Tensor:
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

    def to_raw(self, observations: th.Tensor, augmentation: Augmentation | None = None) -> th.Tensor:
        """
        Undo SB3's scaling: the encoder takes raw values, and multiplying the 255 of uint8 back is exact.

        :param observations: as SB3 hands them over, ``(batch, C, H, W)``
        :param augmentation: changes the images, at the size of the observation
        :return: images for :class:`~sb3_resnet.nn.encoder.FrozenEncoder`, which resizes them
        """
        x = observations.float()
        if augmentation is not None:
            x = augmentation(self._to_unit(observations)) / self.scale
        return self.as_images(x * 255.0 if self.is_uint8 else x)

    def resize(self, x: th.Tensor) -> th.Tensor:
        """:return: images ``(n, c, H, W)`` at the size that the trunk sees; as they are if they have it"""
        if not self.resizes or x.shape[-2:] == self.size:
            return x
        return F.interpolate(x.float(), self.size, mode="bilinear", antialias=True, align_corners=False)

    def _to_unit(self, observations: th.Tensor) -> th.Tensor:
        x = observations.float()
        if not self.is_uint8:
            check_observations(x)
        return x * self.scale if self.scale != 1.0 else x

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


def scale_of(space: Any) -> float:
    """
    The factor that brings what SB3 hands over to 0..1, decided by the space alone.

    :param space: observation space
    :return: 1 for uint8 0..255, which SB3 scales, and for float 0..1; 1/255 for float 0..255
    :raises ValueError: for anything else
    """
    if not isinstance(space, spaces.Box) or len(space.shape) != 3:
        raise ValueError(
            f"ResNetExtractor needs images, a Box of shape (channels, height, width), got {space}. "
            "For vectors use MlpPolicy; for a Dict take the image out of it with an observation wrapper."
        )
    if int(np.argmin(space.shape)) == 2 and space.shape[0] != space.shape[2]:
        raise ValueError(
            f"Images must come channels first, got shape {space.shape}. SB3 transposes uint8 0..255 images by itself; "
            f"transpose others in a wrapper, to {(space.shape[2], *space.shape[:2])}."
        )
    low, high = float(space.low.min()), float(space.high.max())
    uniform = float(space.low.max()) == low and float(space.high.min()) == high
    is_float = np.issubdtype(space.dtype, np.floating)
    if uniform and (low, high) == (0.0, 255.0) and (is_float or space.dtype == np.uint8):
        return 1.0 / 255.0 if is_float else 1.0
    if uniform and (low, high) == (0.0, 1.0) and is_float:
        return 1.0
    raise ValueError(
        f"Image bounds must be uint8 or float 0..255, or float 0..1; got {space.dtype} {low:g}..{high:g}. Declare the "
        "bounds of the space, or rescale the observation in a wrapper; normalize_images cannot repair other bounds."
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


def check_combination(has_weights: bool, norm: str, train_adapter: bool, images: Preprocessing) -> None:
    """
    :param has_weights: whether the trunk is pretrained
    :param norm: its norm layers
    :param train_adapter: whether the adapter is to train
    :param images: how observations become images
    :raises ValueError: for what cannot go together
    """
    if norm in FROM_SCRATCH and has_weights:
        raise ValueError(f"norm={norm!r} has no pretrained weights: write norm='frozen', or pretrained=False")
    if train_adapter and not images.needs_adapter:
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
    has_weights: bool, use_imagenet_norm: bool | None, mean: Any, std: Any
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """
    Mean and standard deviation by which images are normalised, three numbers each, or ``None``.

    :param has_weights: whether the trunk is pretrained
    :param use_imagenet_norm: the ImageNet statistics; ``None``: if it is pretrained
    :param mean: own statistics, which go before the others
    :param std: likewise
    :raises ValueError: if they are not three numbers each
    """
    if use_imagenet_norm is not None:
        flag("use_imagenet_norm", use_imagenet_norm)
    if (mean is None) != (std is None):
        raise ValueError("input_mean and input_std go together: write both, each with three numbers")
    if mean is not None:
        return _three("input_mean", mean, above=False), _three("input_std", std, above=True)
    wanted = has_weights if use_imagenet_norm is None else use_imagenet_norm
    return (IMAGENET_MEAN, IMAGENET_STD) if wanted else (None, None)


def _three(name: str, values: Any, *, above: bool) -> tuple[float, ...]:
    if isinstance(values, str) or not hasattr(values, "__len__") or len(values) != 3:
        raise ValueError(f"{name} must be three numbers, one a channel of the trunk (R, G, B), got {shown(values)}")
    return tuple(number(name, value, 0.0 if above else -1e6, above=above) for value in values)


def information_keeping_adapter(channels: int) -> nn.Conv2d:
    """
    A 1x1 convolution that begins as newest, middle and oldest frame (SB3 stacks the newest last).

    Rows are non-negative and sum to 1, so its output stays in range for the ImageNet statistics. Where the channels
    are RGB triples, a frame is the mean of its three.
    """
    size = 3 if channels % 3 == 0 else 1
    frames = channels // size
    conv = nn.Conv2d(channels, 3, 1)
    with th.no_grad():
        conv.weight.zero_()
        assert conv.bias is not None
        conv.bias.zero_()
        for row, frame in enumerate((frames - 1, frames // 2, 0)):
            conv.weight[row, frame * size : (frame + 1) * size] = 1.0 / size
    return conv
