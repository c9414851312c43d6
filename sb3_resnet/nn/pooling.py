"""From the last feature map to a vector."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch as th
from torch.nn import functional as F

from sb3_resnet.nn.backbones import map_size

_GRID = 4  # rows and columns of a grid
#: ``avg`` throws position away (at 84 pixels ``layer4``'s map is 3x3); the others keep it.
POOLINGS = ("avg", "flatten", "spatial_softmax", "grid")


@dataclass(frozen=True)
class Pooling:
    """
    Turns maps into vectors, in float32: rounding a mean to bfloat16 errs more than the values it is made of.

    :param name: one of :data:`POOLINGS`
    :param grid_size: rows and columns of ``"grid"``
    :raises ValueError: for a ``grid_size`` of other poolings, which have no grid
    """

    name: str
    grid_size: int = _GRID

    def __post_init__(self) -> None:
        if self.name != "grid" and self.grid_size != _GRID:
            raise ValueError(f"grid_size has no effect on pooling={self.name!r}: write pooling='grid', or leave it out")

    def __call__(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: feature maps ``(batch, channels, h, w)``, of any type and memory order
        :return: ``(batch, dim)`` in float32
        """
        if self.name == "spatial_softmax":
            return _spatial_softmax(x)
        x = x.float()
        if self.name == "avg":
            return x.mean(dim=(2, 3))
        if self.name == "grid":
            x = F.adaptive_avg_pool2d(x, self.grid_size)
        return x.flatten(1)

    def dim(self, channels: int, size: tuple[int, int]) -> int:
        """:return: length of the vector of a ``(channels, *size)`` map"""
        per_channel = {"flatten": size[0] * size[1], "spatial_softmax": 2, "grid": self.grid_size**2}
        return channels * per_channel.get(self.name, 1)


def warn_if_grid_repeats(pooling: Pooling, size: tuple[int, int], last_stage: str, quiet: bool) -> None:
    """
    Say what to write where a grid has more rows or columns than the map, so that its parts overlap.

    :param pooling: what the user asked for
    :param size: height and width of an image
    :param last_stage: the stage whose map is pooled
    :param quiet: whether a model is loaded, whose grid is as it was trained
    """
    rows, columns = map_size(*size, last_stage)
    most = min(rows, columns)
    if pooling.name == "grid" and pooling.grid_size > most and not quiet:
        smaller = f"grid_size={most} or less" if most > 1 else "pooling='avg'"
        warnings.warn(
            f"pooling='grid' with grid_size={pooling.grid_size} repeats values: the map of {last_stage} is "
            f"{rows}x{columns}. Write {smaller}, pooling='flatten', or a lower last_stage.",
            stacklevel=4,  # where the extractor is constructed
        )


def _spatial_softmax(x: th.Tensor) -> th.Tensor:
    """Expected row and column of each channel's activation, in -1..1 (arXiv 1504.00702, temperature 1)."""
    height, width = x.shape[-2:]
    x = x.float()
    # One temporary of the map's size, in its memory order; the softmax is divided by its sum only at the end.
    weights = (x - x.amax(dim=(2, 3), keepdim=True)).exp_()
    rows = th.linspace(-1.0, 1.0, height, device=x.device)[:, None].expand(height, width)
    columns = th.linspace(-1.0, 1.0, width, device=x.device).expand(height, width)
    sums = th.stack([rows, columns, th.ones_like(rows)], dim=-1).flatten(0, 1)
    with th.autocast(x.device.type, enabled=False):  # autocast would compute the product in half precision
        # In one pass over the map, whichever its memory order: a quarter of the time of sums one after the other.
        products = th.bmm(weights.flatten(2), sums.expand(x.shape[0], -1, -1))
    return (products[..., :2] / products[..., 2:]).transpose(1, 2).flatten(1)
