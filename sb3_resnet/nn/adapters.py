"""How observations of other than three channels reach a network for RGB images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch as th
from torch import nn

from sb3_resnet.common.arguments import integer, shown

ADAPTERS = ("conv1x1", "per_frame", "inflate")


def read_frame_channels(value: Any, channels: int) -> int:
    """
    :param value: what the user passed; ``None``: RGB frames where ``channels`` is a multiple of three
    :param channels: of an observation
    :return: channels of one frame: 3 for RGB, 1 for grey frames and for channels that are no frames
    :raises ValueError: if it is neither, or does not divide ``channels``
    :raises TypeError: if it is no number
    """
    if value is None:
        return 3 if channels % 3 == 0 else 1
    size = integer("frame_channels", value, 1)
    if size not in (1, 3):
        raise ValueError(f"frame_channels must be 1 (grey) or 3 (RGB), got {shown(value)}")
    if channels % size:
        raise ValueError(
            f"frame_channels=3 needs a multiple of three channels, and the observations have {channels}: write "
            "frame_channels=1, or leave it out"
        )
    return size


def check_adapter(adapter: str, channels: int, frame_channels: int) -> None:
    """
    Refuse an adapter that would change nothing.

    :param adapter: one of :data:`ADAPTERS`
    :param channels: of an observation
    :param frame_channels: of one frame
    :raises ValueError: with what to write instead
    """
    if channels != 3 or adapter == "conv1x1":
        return
    if adapter == "inflate":
        raise ValueError(
            "adapter='inflate' has no effect on three channels, which the first convolution takes already: leave "
            "adapter out; for three grey frames write frame_channels=1 beside it"
        )
    if frame_channels == 3:
        raise ValueError(
            f"adapter={adapter!r} has no effect on three channels that are one RGB image: leave adapter out, or write "
            "frame_channels=1 if they are three grey frames"
        )


def make_adapter(channels: int, frame_channels: int) -> nn.Conv2d:
    """
    A 1x1 convolution to R, G and B: the newest frame, the mean of those between, and the oldest.

    SB3 stacks the newest frame last. An RGB frame counts as the mean of its three channels. All frames have a weight
    above zero, so no channel starts unseen, whatever it shows. Rows are non-negative and sum to 1, so the output stays
    in the range for which the ImageNet statistics are made.

    :param channels: of an observation
    :param frame_channels: of one frame
    """
    frames = channels // frame_channels
    between = range(1, frames - 1) or range(frames // 2, frames // 2 + 1)
    conv = nn.Conv2d(channels, 3, 1)
    with th.no_grad():
        conv.weight.zero_()
        assert conv.bias is not None
        conv.bias.zero_()
        for row, group in enumerate((range(frames - 1, frames), between, range(1))):
            seen = slice(group.start * frame_channels, group.stop * frame_channels)
            conv.weight[row, seen] = 1.0 / (len(group) * frame_channels)
    return conv


class InflatedConv2d(nn.Conv2d):
    """
    The first convolution of a trunk, for any number of channels; random until weights are read.

    :param conv: the one for three channels, in whose place it goes
    :param channels: of an observation
    :param keeps_colours: whether each channel of an RGB frame gets the weights of its own colour; else all channels get
        the mean of the three
    """

    def __init__(self, conv: Any, channels: int, keeps_colours: bool) -> None:
        super().__init__(channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=False)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's ResNets begin
        self.keeps_colours = keeps_colours

    def inflated(self, weight: th.Tensor) -> th.Tensor:
        """
        Weights for all channels, scaled so that activations keep their size, as timm does.

        :param weight: for three channels, ``(out, 3, h, w)``
        :return: for all of them, ``(out, channels, h, w)``; other tensors as they are, such as weights that are
            inflated already
        """
        if weight.shape[1:2] != (3,) or not weight.is_floating_point() or weight.layout != th.strided:
            return weight
        sources = weight.double()  # no overflow of float16
        if not self.keeps_colours:
            sources = sources.mean(dim=1, keepdim=True)
        copies = self.in_channels // sources.shape[1]
        return sources.repeat(1, copies, *(1,) * (weight.ndim - 2)) * (3.0 / self.in_channels)


def inflated_statistics(values: Sequence[float], channels: int, keeps_colours: bool) -> tuple[float, ...]:
    """
    :param values: mean or standard deviation of three channels, or of all
    :param channels: of an observation
    :param keeps_colours: as for :class:`InflatedConv2d`
    :return: that of all channels: repeated, or the mean of the three
    """
    if len(values) == channels:
        return tuple(values)
    return (*values,) * (channels // 3) if keeps_colours else (sum(values) / 3.0,) * channels
