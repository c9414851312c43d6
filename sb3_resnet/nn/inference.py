"""Convolutions for inference: norms and input scaling folded in, weights arranged for the CPU once."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch as th
from torch import nn
from torch.nn.utils import skip_init
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sb3_resnet.common import host


class PackedConv2d(nn.Module):
    """
    A convolution whose weights stay in oneDNN's own order.

    PyTorch reorders them at each call: 45 MB for a ResNet-18, a quarter of the time of a single image
    (``benchmarks/results/choices.json``).

    :param conv: a float32 or bfloat16 convolution on the CPU
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self._conv = conv
        self._packed: th.Tensor | None = None

    def forward(self, x: th.Tensor, relu: bool = False, added: th.Tensor | None = None) -> th.Tensor:
        """
        :param x: the input, channels last
        :param relu: apply ReLU
        :param added: added before that
        :return: the result, channels last
        """
        conv = self._conv
        if self._packed is None:
            self._packed = host.pack_convolution(conv, x.shape)
        return host.packed_convolution(x, self._packed, conv, relu, added)


class PackedBlock(nn.Module):
    """
    A residual block whose addition and ReLUs happen inside its convolutions.

    :param block: torchvision's ``BasicBlock`` or ``Bottleneck``, its norms folded
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        parts = dict(block.named_children())
        convs: list[Any] = [parts[name] for name in ("conv1", "conv2", "conv3") if name in parts]
        self._convs = nn.ModuleList(map(PackedConv2d, convs))
        shortcut: Any = parts.get("downsample")
        self._shortcut = None if shortcut is None else PackedConv2d(shortcut[0])

    def forward(self, x: th.Tensor) -> th.Tensor:
        """:return: what the block returns, channels last"""
        shortcut = x if self._shortcut is None else self._shortcut(x)
        *inner, last = self._convs
        for conv in inner:
            x = conv(x, relu=True)
        out: th.Tensor = last(x, relu=True, added=shortcut)
        return out


class RawInputConv2d(nn.Module):
    """
    The first convolution, and before it scale, adapter and normalisation, as one convolution of raw pixels.

    Zero padding of normalised images is padding of raw ones with the value that becomes zero; where there is no such
    value (one grey channel and three different means), :func:`from_raw_input` makes none of these.

    :param conv: convolution of raw pixels, without padding
    :param padding: rows and columns around the image
    :param border: what becomes zero, ``(C, 1, 1)``
    """

    def __init__(self, conv: nn.Conv2d, padding: tuple[int, int], border: th.Tensor) -> None:
        super().__init__()
        self.conv: nn.Module = conv
        self._padding = padding
        self.register_buffer("border", border)

    def forward(self, pixels: th.Tensor) -> th.Tensor:
        """
        :param pixels: of any type, ``(batch, C, H, W)``
        :return: what the stem's convolution returns
        """
        border: Any = self.border
        (batch, channels, height, width), (rows, columns) = pixels.shape, self._padding
        shape = (batch, channels, height + 2 * rows, width + 2 * columns)
        x = th.empty(shape, dtype=border.dtype, device=border.device, memory_format=th.channels_last)
        x.copy_(border.expand(shape))
        x[:, :, rows : rows + height, columns : columns + width] = pixels
        result: th.Tensor = self.conv(x)
        return result


def fold_norms(module: nn.Module) -> None:
    """Fold each BatchNorm into the convolution before it; other norms stay."""
    for child in module.children():
        fold_norms(child)
    for (name, conv), (following, norm) in pairwise([*module.named_children()]):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            setattr(module, name, fuse_conv_bn_eval(conv, norm))
            setattr(module, following, nn.Identity())


def from_raw_input(
    conv: nn.Conv2d, mixing: th.Tensor, offset: th.Tensor, mean: th.Tensor, std: th.Tensor
) -> RawInputConv2d | None:
    """
    :param conv: the first convolution of the trunk, of ``n`` channels
    :param mixing: from raw channels to these, ``(n, C)``
    :param offset: added to them, ``(n,)``
    :param mean: subtracted from them, ``(n,)``
    :param std: by which they are divided, ``(n,)``
    :return: the same function of raw pixels, or ``None`` where it is not exact
    """
    tensors = (mixing, offset, mean, std, conv.weight)
    mixing, offset, mean, std, weight = (tensor.detach().cpu().double() for tensor in tensors)
    mixing, offset = mixing / std[:, None], (offset - mean) / std
    border = th.linalg.pinv(mixing) @ -offset
    if not th.allclose(mixing @ border, -offset, atol=1e-9):
        return None
    rows, columns = (int(size) for size in conv.padding)
    kernel, stride = (tuple(map(int, pair)) for pair in (conv.kernel_size, conv.stride))
    # Not initialised at random: that would take numbers from a training that is to be reproducible.
    new: Any = skip_init(nn.Conv2d, mixing.shape[1], conv.out_channels, kernel, stride)  # type: ignore[no-untyped-call]  # PyTorch
    bias = th.zeros(conv.out_channels) if conv.bias is None else conv.bias.cpu()
    with th.no_grad():
        new.weight.copy_(th.einsum("ochw,cr->orhw", weight, mixing))
        new.bias.copy_(bias.double() + weight.sum(dim=(2, 3)) @ offset)
    return RawInputConv2d(new, (rows, columns), border.float().reshape(-1, 1, 1)).to(conv.weight.device)


def pack(module: nn.Module, blocks: tuple[type[nn.Module], ...] = ()) -> None:
    """
    Pack all convolutions inside a module, where this build of PyTorch can.

    :param module: its norms folded
    :param blocks: exact classes to take as residual blocks
    """
    for name, child in module.named_children():
        if type(child) in blocks and _is_folded(child):
            setattr(module, name, PackedBlock(child))
        elif isinstance(child, nn.Conv2d) and can_pack(child.weight):
            setattr(module, name, PackedConv2d(child))
        else:
            pack(child, blocks)


def can_pack(weight: th.Tensor) -> bool:
    """:return: whether oneDNN computes with such weights here; PyTorch's own compiler uses the same functions"""
    if weight.device.type != "cpu" or not th.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]  # PyTorch's
        return False
    return weight.dtype in (th.float32, th.bfloat16) and host.can_pack_convolutions(weight.dtype)


def _is_folded(block: nn.Module) -> bool:
    """:return: whether nothing but convolutions and ReLU is left in it, which can be packed"""
    leaves = [module for module in block.modules() if not [*module.children()]]
    convs = [leaf for leaf in leaves if isinstance(leaf, nn.Conv2d)]
    rest = (leaf for leaf in leaves if not isinstance(leaf, nn.Conv2d))
    return all(can_pack(conv.weight) for conv in convs) and all(
        isinstance(leaf, (nn.Identity, nn.ReLU)) for leaf in rest
    )
