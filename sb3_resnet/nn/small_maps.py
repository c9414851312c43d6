"""Convolutions of small maps in bfloat16 as products of matrices, which a CPU computes faster."""

from __future__ import annotations

from typing import Any

import torch as th
from torch import nn
from torch.nn import functional as F

#: A product of matrices is faster where a convolution makes at least so many channels per pixel of its output map: 512
#: channels up to 5x5 pixels, 256 up to 4x4 (``benchmarks/results/small_maps.json``).
CHANNELS_PER_PIXEL = 16


class SmallMapConv2d(nn.Conv2d):
    """
    A convolution that is trained in bfloat16 on small maps, such as the 3x3 ones that ``layer4`` makes of 84x84 pixels.

    There oneDNN needs more time in bfloat16 than in float32, above all in the backward pass. So the windows are laid
    side by side and multiplied with the weights: the same sums in another order. On a GPU, in other precisions, for
    larger maps, and while the model is exported, this is ``nn.Conv2d``.

    :param conv: whose parameters it takes over, so that they are the same objects
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        kernel, stride, padding = map(_pair, (conv.kernel_size, conv.stride, conv.padding))
        super().__init__(conv.in_channels, conv.out_channels, kernel, stride, padding, bias=False, device="meta")
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: ``(batch, channels, height, width)``
        :return: the convolution of it
        """
        if _is_exported() or not _in_bfloat16_on_cpu(x):
            return super().forward(x)
        rows, columns = (self._outputs(size, axis) for axis, size in enumerate(x.shape[-2:]))
        if self.out_channels < CHANNELS_PER_PIXEL * rows * columns:
            return super().forward(x)
        windows = F.unfold(x, self.kernel_size, padding=_pair(self.padding), stride=self.stride)
        # One product for the whole batch: of a batch of matrices PyTorch would copy the weights for each image.
        product = F.linear(windows.transpose(1, 2).flatten(0, 1), self.weight.flatten(1), self.bias)
        return product.reshape(len(x), rows, columns, -1).permute(0, 3, 1, 2)

    def _outputs(self, size: int, axis: int) -> int:
        return (size + 2 * int(self.padding[axis]) - self.kernel_size[axis]) // self.stride[axis] + 1


def for_small_maps(module: nn.Module) -> None:
    """
    Let the convolutions inside a module notice small maps.

    :param module: whose ``nn.Conv2d`` are exchanged, but for grouped, dilated and 1x1 ones
    """
    for name, child in module.named_children():
        if type(child) is nn.Conv2d and child.kernel_size != (1, 1) and child.groups == 1 and child.dilation == (1, 1):
            setattr(module, name, SmallMapConv2d(child))
        else:
            for_small_maps(child)


def _pair(values: Any) -> tuple[int, int]:
    return int(values[0]), int(values[1])


def _in_bfloat16_on_cpu(x: th.Tensor) -> bool:
    reduced = th.get_autocast_dtype("cpu") if th.is_autocast_enabled("cpu") else x.dtype
    return x.device.type == "cpu" and reduced == th.bfloat16


def _is_exported() -> bool:
    """:return: whether someone looks at the operations: a graph is to have convolutions"""
    tracing: bool = th.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]  # PyTorch's
    return tracing or th.compiler.is_compiling()
