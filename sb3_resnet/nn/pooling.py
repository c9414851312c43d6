"""From the last feature map to a vector."""

from __future__ import annotations

import torch as th

#: ``avg`` throws position away (at 84 pixels the map is 3x3); the other two keep it.
POOLINGS = ("avg", "flatten", "spatial_softmax")


def pooled_dim(pooling: str, channels: int, size: tuple[int, int]) -> int:
    """:return: length of the pooled vector of a ``(channels, *size)`` map"""
    if pooling == "flatten":
        return channels * size[0] * size[1]
    return 2 * channels if pooling == "spatial_softmax" else channels


def pooled_features(pooling: str, x: th.Tensor) -> th.Tensor:
    """
    :param pooling: one of :data:`POOLINGS`
    :param x: feature maps ``(batch, channels, h, w)``
    :return: ``(batch, pooled_dim)`` in float32: rounding a mean to bfloat16 errs more than the values it is made of
    """
    x = x.float()
    if pooling == "avg":
        return x.mean(dim=(2, 3))
    if pooling == "flatten":
        return x.flatten(1)
    return _spatial_softmax(x)


def _spatial_softmax(x: th.Tensor) -> th.Tensor:
    """Expected row and column of each channel's activation, in -1..1 (arXiv 1504.00702, temperature 1)."""
    height, width = x.shape[-2:]
    probability = x.flatten(2).softmax(dim=-1).reshape(x.shape)
    rows = th.linspace(-1.0, 1.0, height, device=x.device)
    columns = th.linspace(-1.0, 1.0, width, device=x.device)
    # Not a matrix product, which autocast would compute in half precision.
    return th.cat([(probability.sum(3) * rows).sum(2), (probability.sum(2) * columns).sum(2)], dim=1)
