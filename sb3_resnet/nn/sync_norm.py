"""BatchNorm over the batches of several processes on CPUs, for which PyTorch has none."""

from __future__ import annotations

from typing import Any

import torch as th
from torch import distributed as dist
from torch import nn

from sb3_resnet.common.ranks import explained


def synchronized_batch_norm(x: th.Tensor, layer: nn.SyncBatchNorm) -> th.Tensor:
    """
    What PyTorch's ``SyncBatchNorm`` does on GPUs, in train mode: the batches may differ in size.

    :param x: ``(batch, channels, height, width)``
    :param layer: its weights, running statistics and process group are used
    :return: the normalised batch, of the same shape and type
    """
    values, axes, columns = x.float(), (0, 2, 3), (1, -1, 1, 1)
    count = values.new_tensor([values.numel() / values.shape[1]])
    total = _Sum.apply(th.cat([values.sum(axes), count]), layer.process_group)
    mean, count = total[:-1] / total[-1], total[-1].detach()
    centred = values - mean.view(columns)
    variance = _Sum.apply(centred.square().sum(axes), layer.process_group) / count
    with th.no_grad():
        if layer.running_mean is not None and layer.running_var is not None and layer.momentum is not None:
            layer.running_mean.lerp_(mean, layer.momentum)
            layer.running_var.lerp_(variance * (count / (count - 1)), layer.momentum)  # unbiased, as in BatchNorm
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked += 1
    normal: th.Tensor = centred * (variance + layer.eps).rsqrt().view(columns)
    if layer.affine:
        normal = normal * layer.weight.view(columns) + layer.bias.view(columns)
    return normal.to(x.dtype)


class _Sum(th.autograd.Function):
    """The sum over all processes. The gradient is that of the sum of their losses."""

    @staticmethod
    def forward(ctx: Any, value: th.Tensor, group: Any) -> th.Tensor:
        ctx.group = group
        return _sum(value, group)

    @staticmethod
    def backward(ctx: Any, gradient: th.Tensor) -> tuple[th.Tensor, None]:
        return _sum(gradient, ctx.group), None


def _sum(value: th.Tensor, group: Any) -> th.Tensor:
    summed = value.clone(memory_format=th.contiguous_format)
    with explained(dist.get_rank() if group is None else group.rank()):
        dist.all_reduce(summed, group=group)
    return summed
