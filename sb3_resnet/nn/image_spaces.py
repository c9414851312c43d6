"""What observation spaces say of images: their layout and their scale."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space, is_image_space_channels_first
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv, VecTransposeImage, is_vecenv_wrapped

from sb3_resnet.common.arguments import shown
from sb3_resnet.common.vec_normalize import INSTEAD
from sb3_resnet.nn.backbones import smallest_size

_MIN_SIZE = smallest_size("layer4", needs_map=False)  # pixels
_AS_THEY_ARE = (
    "If they are no images, but something like them, write normalize_images=False in policy_kwargs (or "
    "normalized_image=True for the extractor): values are taken as they are then."
)


class ImageBoundsError(ValueError, AssertionError):
    """Bounds that are not those of images; where SB3's NatureCNN meets such, it raises an ``AssertionError``."""


def scale_of(space: Any, normalized: bool = False) -> float:
    """
    The factor that brings what SB3 hands over to 0..1, decided by the space alone.

    :param space: observation space
    :param normalized: whether values of other bounds are to be taken as they are
    :return: 1 for uint8 0..255, which SB3 scales, for float 0..1, and for values that are taken as they are; 1/255 for
        float 0..255
    :raises ValueError: for anything else, and for images of 0..255 that are to be taken as they are
    """
    if not isinstance(space, spaces.Box) or len(space.shape) != 3:
        raise ValueError(
            f"ResNetExtractor needs images, a Box of shape (channels, height, width), got {space}. "
            "For vectors use MlpPolicy, and for a Dict ResNetCombinedExtractor."
        )
    low, high, uniform = _bounds(space)
    if normalized:
        return _of_normalized(space)
    if uniform and np.issubdtype(space.dtype, np.floating) and -low == high and 1.0 < high < np.inf:
        raise ImageBoundsError(
            f"Image bounds must be uint8 or float 0..255, or float 0..1; got {space.dtype} {low:g}..{high:g}. These "
            f"are the bounds of VecNormalize: {INSTEAD}. {_AS_THEY_ARE}"
        )
    _refuse_channels_last(space.shape)
    scale = _known_scale(space)
    if scale is not None:
        return scale
    same, by_channel = ("", "") if uniform else (", the same in all channels", _bounds_of_channels(space))
    raise ImageBoundsError(
        f"Image bounds must be uint8 or float 0..255, or float 0..1{same}; got {space.dtype} {low:g}..{high:g}. "
        f"{by_channel}Declare the bounds of the space, or rescale the observation in a wrapper. {_AS_THEY_ARE}"
    )


def _of_normalized(space: Any) -> float:
    _refuse_channels_last(space.shape)
    scale, of_uint8 = _known_scale(space), space.dtype == np.uint8
    if scale is not None and (of_uint8 or scale != 1.0):
        raise ValueError(
            f"normalized_image=True would leave images at 0..255, and their space says {space.dtype} 0..255: leave it "
            "out (and normalize_images=False too), so that they are scaled"
        )
    return 1.0


def check_played_images(env: VecEnv) -> None:
    """
    Refuse environments for a probe or a pretraining, where no SB3 algorithm transposes the images.

    :param env: environments
    :raises TypeError: for other than a ``VecEnv``
    :raises ValueError: for environments in other processes, other than images, and images whose channels come last
    """
    if not isinstance(env, VecEnv):
        raise TypeError(f"env must be a VecEnv, got {shown(env)}: write DummyVecEnv([lambda: env])")
    space = env.observation_space
    if isinstance(space, spaces.Dict):
        raise ValueError("This looks at one image, not at a Dict: take the image out in a wrapper")
    if not isinstance(space, spaces.Box) or len(space.shape) != 3:
        raise ValueError(f"Images are needed, a Box of shape (channels, height, width), got {space}")
    is_transposed = is_vecenv_wrapped(env, VecTransposeImage) or not is_image_space(space)
    if not is_transposed and not is_image_space_channels_first(space):
        raise ValueError(f"Images of shape {space.shape} come channels last: write VecTransposeImage(env)")
    scale_of(space)
    if isinstance(env.unwrapped, SubprocVecEnv):
        raise ValueError("Labels are read from environments in this process: make a DummyVecEnv, not a SubprocVecEnv")


def policy_for(space: Any) -> str:
    """:return: name of the ResNet policy for an observation space, for errors"""
    return "ResNetMultiInputPolicy" if isinstance(space, spaces.Dict) else "ResNetCnnPolicy"


def take_as_they_are(space: Any, extractor_class: Any, kwargs: dict[str, Any]) -> None:
    """
    For ``normalize_images=False``: let values of other bounds than those of images be, as SB3 does with NatureCNN.

    :param space: observation space
    :param extractor_class: class of the features extractor
    :param kwargs: of the policy; its ``features_extractor_kwargs`` get ``normalized_image=True`` where it is needed
    :raises TypeError: if the class does not take this argument
    """
    if has_image_bounds(space) or len(space.shape or ()) != 3:
        return
    parameters = inspect.signature(extractor_class).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if "normalized_image" not in parameters and not takes_all:
        raise TypeError(
            f"normalize_images=False passes normalized_image=True to {extractor_class.__name__}, which does not take "
            "it: let its __init__ take **kwargs, and pass them to super().__init__"
        )
    given = kwargs.get("features_extractor_kwargs") or {}
    kwargs["features_extractor_kwargs"] = {"normalized_image": True, **given}


def has_image_bounds(space: Any) -> bool:
    """
    :param space: one of the spaces of a Dict
    :return: whether it is a ``Box`` with three axes and bounds that :func:`scale_of` takes, in whatever layout
    """
    return isinstance(space, spaces.Box) and len(space.shape) == 3 and _known_scale(space) is not None


def _known_scale(space: Any) -> float | None:
    low, high, uniform = _bounds(space)
    is_float = np.issubdtype(space.dtype, np.floating)
    if uniform and (low, high) == (0.0, 255.0) and (is_float or space.dtype == np.uint8):
        return 1.0 / 255.0 if is_float else 1.0
    return 1.0 if uniform and (low, high) == (0.0, 1.0) and is_float else None


def _bounds(space: Any) -> tuple[float, float, bool]:
    """:return: lowest and highest value of a space, and whether all pixels have these bounds"""
    low, high = float(space.low.min()), float(space.high.max())
    return low, high, float(space.low.max()) == low and float(space.high.min()) == high


def _refuse_channels_last(shape: tuple[int, ...]) -> None:
    """Columns fewer than channels and rows are channels, unless a trunk could see something in so many columns."""
    channels, rows, columns = shape
    if columns >= min(channels, rows, _MIN_SIZE):
        return
    narrow = (
        f" If they are {channels} channels of {rows}x{columns} pixels, resize them in a wrapper: at least {_MIN_SIZE} "
        "columns are needed."
    )
    raise ValueError(
        f"Images must come channels first, got shape {shape}. SB3 transposes uint8 0..255 images by itself; "
        f"transpose others in a wrapper, to {(columns, channels, rows)}.{narrow if columns > 4 else ''}"
    )


def warn_if_channels_may_be_last(space: Any) -> None:
    """
    Say how images with fewer columns than channels are read, if nothing tells what was meant.

    SB3 brings uint8 images into the right order before an extractor sees them, but no others.

    :param space: observation space that :func:`scale_of` takes
    """
    channels, rows, columns = space.shape
    if space.dtype != np.uint8 and columns < min(channels, rows):
        warnings.warn(
            f"Shape {space.shape} is read as {channels} channels of {rows}x{columns} pixels. If the channels are last, "
            f"transpose the images in a wrapper, to {(columns, channels, rows)}.",
            stacklevel=4,  # where the extractor is constructed
        )


def _bounds_of_channels(space: Any) -> str:
    """:return: which channels have which bounds, as sentences"""
    found: dict[str, list[str]] = {}
    for channel, (low, high) in enumerate(zip(space.low, space.high, strict=True)):
        bounds = f"{low.min():g}..{high.max():g}"
        if low.min() != low.max() or high.min() != high.max():
            bounds += " that differ between pixels"
        found.setdefault(bounds, []).append(str(channel))
    parts = (f"channel{'s' * (len(names) > 1)} {', '.join(names)}: {bounds}" for bounds, names in found.items())
    return f"By channel: {'; '.join(parts)}. "
