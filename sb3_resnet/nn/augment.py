"""Random changes of sampled images, through ``torchvision.transforms.v2``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch as th
from torchvision.transforms import v2

from sb3_resnet.common.arguments import choice, no_unknown, number, shown

Transform = Callable[[th.Tensor], th.Tensor]

_EXAMPLE = "[{'random_shift': {'padding': 4}}, {'color_jitter': {'brightness': 0.2}}]"


class Augmentation:
    """
    Changes images at random, all frames of an observation alike.

    Random numbers come from torch's global generator on the CPU, so that a seed fixes them and nothing waits for a GPU.

    :param transform: takes float images in 0..1, keeps their shape
    :param frame_channels: channels of one frame
    :param one_by_one: call it for each observation, ``(frames, channels, H, W)``, so that each gets a draw of its own;
        else once for the batch, ``(batch, frames, channels, H, W)``
    """

    def __init__(self, transform: Transform, frame_channels: int, one_by_one: bool) -> None:
        self.transform = transform
        self._frame_channels = frame_channels
        self._one_by_one = one_by_one

    @th.no_grad()
    def __call__(self, images: th.Tensor) -> th.Tensor:
        """
        :param images: ``(batch, C, H, W)`` in 0..1
        :return: changed images of the same shape
        :raises ValueError: if a callable changed the shape
        """
        frames = images.reshape(len(images), -1, self._frame_channels, *images.shape[-2:])
        changed = th.stack([self.transform(one) for one in frames]) if self._one_by_one else self.transform(frames)
        if changed.shape != frames.shape:
            raise ValueError(
                f"augment must keep the shape (batch, frames, channels, height, width) = {tuple(frames.shape)}, but "
                f"returned {tuple(changed.shape)}"
            )
        return changed.reshape(images.shape)


def read_augment(value: Any, size: tuple[int, int], frame_channels: int, quiet: bool = False) -> Augmentation | None:
    """
    :param value: ``None``, a callable, or a list of names, each alone or as ``{name: {argument: value}}``

        * ``random_shift``: ``padding`` in pixels (4, as in DrQ, arXiv 2004.13649); edges are repeated
        * ``random_resized_crop``: ``scale`` (``[0.8, 1.0]`` of the area) and ``ratio`` (torchvision's 3/4 to 4/3)
        * ``color_jitter``: ``brightness``, ``contrast``, ``saturation``, ``hue``, as torchvision's; at least one
        * ``horizontal_flip``: ``p`` (0.5); warns, since it changes what left and right mean
    :param size: height and width of an observation in pixels
    :param frame_channels: channels of one frame, 1 or 3
    :param quiet: do not warn
    :return: the augmentation, or ``None`` for none
    :raises ValueError: for unknown names and values that cannot work
    :raises TypeError: for unknown arguments and wrong types
    """
    if value is None:
        return None
    if isinstance(value, Sequence) and not isinstance(value, str):
        steps = [_read_step(index, step) for index, step in enumerate(value)]
        transforms = [_BUILDERS[name](size, **arguments) for name, arguments in steps]
        if not quiet:
            _warn(dict(steps), frame_channels)
        return Augmentation(v2.Compose(transforms), frame_channels, one_by_one=True) if transforms else None
    if callable(value):
        return Augmentation(value, frame_channels, one_by_one=False)
    raise TypeError(f"augment must be a list such as {_EXAMPLE}, or a callable, got {shown(value)}")


def _read_step(index: int, step: Any) -> tuple[str, dict[str, Any]]:
    name, arguments = next(iter(step.items())) if isinstance(step, Mapping) and len(step) == 1 else (step, None)
    if not isinstance(name, str) or not isinstance(arguments, (Mapping, type(None))):
        raise TypeError(
            f"augment[{index}] must be a name or {{name: {{argument: value}}}}, as in {_EXAMPLE}; got {shown(step)}"
        )
    choice(f"augment[{index}]", name, [*_BUILDERS])
    arguments = dict(arguments or {})
    no_unknown(f"augment: {name}", arguments, _BUILDERS[name].__kwdefaults__ or ())
    return name, arguments


def _random_shift(size: tuple[int, int], *, padding: Any = 4) -> v2.Transform:
    pixels = number("random_shift: padding", padding, 1, min(size))
    if pixels != int(pixels):
        raise ValueError(f"random_shift: padding must be a whole number of pixels, got {shown(padding)}")
    return v2.RandomCrop(size, padding=int(pixels), padding_mode="edge")


def _random_resized_crop(
    size: tuple[int, int], *, scale: Any = (0.8, 1.0), ratio: Any = (3 / 4, 4 / 3)
) -> v2.Transform:
    low, high = _range("random_resized_crop: scale", scale)
    if high > 1.0:
        raise ValueError(f"random_resized_crop: scale is a part of the area, at most 1, got {shown(scale)}")
    return v2.RandomResizedCrop(
        size, scale=(low, high), ratio=_range("random_resized_crop: ratio", ratio), antialias=True
    )


def _color_jitter(
    size: tuple[int, int], *, brightness: Any = None, contrast: Any = None, saturation: Any = None, hue: Any = None
) -> v2.Transform:
    given = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
    read = {name: _strength(name, value) for name, value in given.items() if value is not None}
    if not read:
        raise ValueError(f"color_jitter does nothing without one of {', '.join(given)}, as in {_EXAMPLE}")
    try:
        return v2.ColorJitter(**read)
    except (TypeError, ValueError) as error:
        raise ValueError(f"color_jitter: {error}") from error


def _horizontal_flip(size: tuple[int, int], *, p: Any = 0.5) -> v2.Transform:
    return v2.RandomHorizontalFlip(number("horizontal_flip: p", p, 0.0, 1.0))


_BUILDERS: dict[str, Callable[..., v2.Transform]] = {
    "random_shift": _random_shift,
    "random_resized_crop": _random_resized_crop,
    "color_jitter": _color_jitter,
    "horizontal_flip": _horizontal_flip,
}


def _range(name: str, value: Any) -> tuple[float, float]:
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise ValueError(f"{name} must be two numbers, smallest and largest, got {shown(value)}")
    low, high = (number(name, bound, above=True) for bound in value)
    if low > high:
        raise ValueError(f"{name} must be smallest and largest, got {shown(value)}")
    return low, high


def _strength(name: str, value: Any) -> float | tuple[float, ...]:
    """As torchvision reads it: a number x is 1 - x to 1 + x, for hue -x to x; two numbers are the range itself."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(number(f"color_jitter: {name}", bound, -0.5) for bound in value)
    return number(f"color_jitter: {name}", value)


def _warn(steps: Mapping[str, Mapping[str, Any]], frame_channels: int) -> None:
    if "horizontal_flip" in steps:
        warnings.warn(
            "horizontal_flip changes what left and right mean, but not the action that was taken: leave it out of "
            "augment wherever an action has a direction",
            stacklevel=4,
        )
    colours = {"saturation", "hue"} & {*steps.get("color_jitter", {})}
    if colours and frame_channels == 1:
        warnings.warn(f"color_jitter: grey frames have no {' and '.join(sorted(colours))}: leave it out", stacklevel=4)
