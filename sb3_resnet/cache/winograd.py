"""3x3 convolutions of small maps with a third of the multiplications (Winograd's algorithm, arXiv 1509.09308)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch as th
from torch import nn

_TILE = 3  # rows and columns of outputs that are computed together
_POINTS = (0.0, 1.0, -1.0, 2.0)  # where the polynomials are multiplied, besides infinity
_INPUTS = _TILE + 2
_MIN_BATCH = 16  # with fewer images, reading nearly three times the weights takes what it saves (choices.json)
_MIN_CHANNELS = 256  # with fewer, the transforms take what the products save
_MAX_MAP = 9  # rows and columns; the transforms are dense matrices over the whole map


class WinogradConv2d(nn.Module):
    """
    A 3x3 convolution as 25 products of matrices; float32, its rounding error that of a plain convolution.

    :param conv: a convolution that :func:`suits` it
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self._conv = conv
        self._weight: th.Tensor | None = None

    def forward(self, x: th.Tensor, relu: bool = False, added: th.Tensor | None = None) -> th.Tensor:
        """
        :param x: the input, channels last
        :param relu: apply ReLU
        :param added: added before that
        :return: the result, channels last
        """
        if self._weight is None:
            self._weight = _transformed(self._conv.weight)
        batch, channels, height, width = x.shape
        into, back = _transforms(height, width)
        # Positions first: so each transform is one product of matrices.
        positions = x.permute(2, 3, 0, 1).reshape(height * width, batch * channels)
        products = th.bmm((into @ positions).view(_INPUTS**2, -1, channels), self._weight)
        result = (back @ products.view(len(into), -1)).view(height, width, batch, -1).permute(2, 3, 0, 1)
        out = th.empty_like(result, memory_format=th.channels_last)
        if self._conv.bias is None:
            out.copy_(result)
        else:
            th.add(result, self._conv.bias.view(-1, 1, 1), out=out)
        if added is not None:
            out += added
        return out.relu_() if relu else out


def suits(conv: nn.Conv2d) -> bool:
    """:return: whether a convolution gains, given enough images of the right size"""
    geometry: tuple[Any, ...] = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    wide = min(conv.in_channels, conv.out_channels) >= _MIN_CHANNELS
    return wide and conv.weight.dtype == th.float32 and geometry == ((3, 3), (1, 1), (1, 1), (1, 1), 1)


def gains(shape: th.Size) -> bool:
    """:return: whether a batch of this shape is computed faster: tiles must not reach far beyond the map"""
    batch, _, height, width = shape
    tiles = (-height // _TILE) * (-width // _TILE)
    few = tiles * _INPUTS**2 <= 0.4 * 9 * height * width
    return batch >= _MIN_BATCH and max(height, width) <= _MAX_MAP and few


def _powers(count: int) -> th.Tensor:
    """:return: values of the monomials at the points, ``(5, count)``, in the last row the highest coefficient"""
    rows = [[point**power for power in range(count)] for point in _POINTS]
    return th.tensor([*rows, [0.0] * (count - 1) + [1.0]], dtype=th.float64)


def _transformed(weight: th.Tensor) -> th.Tensor:
    """:return: weights in the order of the products, ``(25, in, out)``"""
    at = _powers(3)
    products = th.einsum("pi,qj,ocij->pqco", at, at, weight.detach().double())
    return products.flatten(0, 1).float().contiguous()


@lru_cache(maxsize=16)
def _transforms(height: int, width: int) -> tuple[th.Tensor, th.Tensor]:
    """:return: from the map to the inputs of the products, and from their results to the map"""
    rows, columns = _along(height), _along(width)
    into, back = (th.einsum("apx,bqy->pqabxy", rows[0], columns[0]), th.einsum("xap,ybq->xypqab", rows[1], columns[1]))
    return into.flatten(4).flatten(0, 3).float(), back.flatten(2).flatten(0, 1).float()


def _along(size: int) -> tuple[th.Tensor, th.Tensor]:
    """:return: both transforms along one axis, ``(tiles, 5, size)`` and ``(size, tiles, 5)``; zeros pad the map"""
    inverse, forward = th.linalg.inv(_powers(_INPUTS)), _powers(_TILE)
    tiles = -(-size // _TILE)
    padded = th.zeros(tiles, _INPUTS, tiles * _TILE + 2, dtype=th.float64)
    back = th.zeros(tiles * _TILE, tiles, _INPUTS, dtype=th.float64)
    for tile in range(tiles):
        padded[tile, :, tile * _TILE : tile * _TILE + _INPUTS] = inverse.T
        back[tile * _TILE : (tile + 1) * _TILE, tile] = forward.T
    return padded[:, :, 1 : size + 1], back[:size]
