"""Measures of the health of a network: functions of tensors, without SB3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch as th
from torch import nn

#: A unit is dormant if its mean activation is below this share of its layer's mean (definition: arXiv 2302.12902).
DORMANT = 0.025
#: A feature is dead if it varies over the batch by less than this share of the mean spread of its image's.
DEAD = 1e-3


def joint_norm(tensors: Sequence[th.Tensor]) -> th.Tensor:
    """
    :param tensors: tensors of any shape
    :return: the Euclidean norm of all of them as one vector, in float32
    """
    norm: th.Tensor = th.linalg.vector_norm(th.stack([th.linalg.vector_norm(tensor).float() for tensor in tensors]))
    return norm


def relative_distance(pairs: Sequence[tuple[th.Tensor, th.Tensor]]) -> th.Tensor:
    """
    :param pairs: the same parameters of two networks
    :return: the norm of the difference, relative to the norm of the first network
    """
    with th.no_grad():
        distance = joint_norm([mine - other for mine, other in pairs])
        return distance / joint_norm([mine for mine, _ in pairs]).clamp_min(1e-12)


def dead_features(images: Sequence[th.Tensor]) -> th.Tensor:
    """
    :param images: features of each image, ``(batch, dim)``
    :return: share of the features that hardly vary over the batch, and so carry no information
    """
    dead = []
    for features in images:
        spread = features.float().std(dim=0, unbiased=False)
        dead.append(spread <= DEAD * spread.mean())
    return th.cat(dead).float().mean()


def dormant_units(layers: Sequence[th.Tensor]) -> th.Tensor:
    """
    :param layers: activations of hidden layers, each ``(batch, units)``
    :return: share of dormant units in all layers
    """
    dormant = []
    for activations in layers:
        size = activations.float().abs().mean(dim=0)
        dormant.append(size <= DORMANT * size.mean())
    return th.cat(dormant).float().mean()


def batchnorm_drift(layer: nn.Module, x: th.Tensor) -> th.Tensor:
    """
    :param layer: a BatchNorm layer with running statistics
    :param x: its input, ``(batch, channels, ...)``
    :return: distance between the batch's mean and the running mean, in running standard deviations, averaged over the
        channels: how much the network that trains differs from the one that acts
    """
    mean, var, eps = layer.running_mean, layer.running_var, layer.eps
    assert isinstance(mean, th.Tensor)
    assert isinstance(var, th.Tensor)
    batch = x.float().transpose(0, 1).flatten(1).mean(dim=1)
    return ((batch - mean).abs() * th.rsqrt(var + float(eps))).mean()  # type: ignore[arg-type]  # any real number, at run time


def norms_of(values: Mapping[str, th.Tensor | float]) -> dict[str, float]:
    """
    Read all tensors at once, since on a GPU each read waits for the device.

    :param values: scalars by name
    :return: the same as floats
    """
    names = [name for name, value in values.items() if isinstance(value, th.Tensor)]
    read = th.stack([th.as_tensor(values[name], dtype=th.float32) for name in names]).tolist() if names else []
    plain = {name: float(value) for name, value in values.items() if name not in names}
    return {**plain, **dict(zip(names, read, strict=True))}
