"""Convolutions for inference: norms and input scaling folded in, one precision, weights arranged once."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch as th
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import skip_init
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sb3_resnet.common import host

# Images for which the order of the weights is chosen, whatever batch comes first, so that a run is as fast as the next
# one. It saves a tenth at eight images; at one and sixteen others were up to a fifth faster in one run (packing.json).
_PACKED_FOR = 32


class PackedConv2d(nn.Module):
    """
    A convolution with weights, input and output in one precision, sums in float32, and ReLU and addition inside.

    On a CPU the weights stay in oneDNN's own order: PyTorch reorders them at each call, a quarter of the time of a
    single image (``benchmarks/results/choices.json``). Where the CPU has no instructions for the precision, weights,
    input and output are rounded to it and multiplied in float32. That computes the same, up to the order of sums.

    :param conv: a float32 convolution
    :param dtype: the precision
    """

    weight: th.Tensor
    bias: th.Tensor | None
    rounded_bias: th.Tensor | None

    def __init__(self, conv: nn.Conv2d, dtype: th.dtype = th.float32) -> None:
        super().__init__()
        self._geometry: tuple[Any, ...] = (conv.padding, conv.stride, conv.dilation, conv.groups)
        self._dtype = dtype
        self._computes_in = dtype if is_native(dtype, conv.weight.device) else th.float32
        weight = conv.weight.detach().to(dtype).to(self._computes_in, memory_format=th.channels_last)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach().float())
        # With an addition inside, oneDNN wants the bias in the type of the input.
        rounded = None if self.bias is None else self.bias.to(dtype).to(self._computes_in)
        self.register_buffer("rounded_bias", rounded)
        self._packs = can_pack(weight)
        self._packed: th.Tensor | None = None

    def forward(self, x: th.Tensor, relu: bool = False, added: th.Tensor | None = None) -> th.Tensor:
        """
        :param x: the input, channels last, in the precision
        :param relu: apply ReLU
        :param added: added before that
        :return: the result, channels last, in the precision
        """
        if self._computes_in != self._dtype:
            x, added = x.to(self._computes_in), None if added is None else added.to(self._computes_in)
        out = self._with_onednn(x, relu, added) if self._packs else self._plain(x, relu, added)
        return out.to(self._dtype)

    def _with_onednn(self, x: th.Tensor, relu: bool, added: th.Tensor | None) -> th.Tensor:
        if self._packed is None:
            self._packed = host.pack_convolution(self.weight, self._geometry, (_PACKED_FOR, *x.shape[1:]))
        bias = self.bias if added is None else self.rounded_bias
        return host.packed_convolution(x, self._packed, bias, self._geometry, relu, added)

    def _plain(self, x: th.Tensor, relu: bool, added: th.Tensor | None) -> th.Tensor:
        padding, stride, dilation, groups = self._geometry
        exact = added is None and x.dtype == th.float32
        out = F.conv2d(x, self.weight, self.bias if exact else self.rounded_bias, stride, padding, dilation, groups)
        if added is not None:
            out = out + added
        return out.relu_() if relu else out


class PackedBlock(nn.Module):
    """
    A residual block whose addition and ReLUs happen inside its convolutions.

    :param block: torchvision's ``BasicBlock`` or ``Bottleneck``, its norms folded
    :param dtype: the precision
    """

    def __init__(self, block: nn.Module, dtype: th.dtype = th.float32) -> None:
        super().__init__()
        parts = dict(block.named_children())
        convs: list[Any] = [parts[name] for name in ("conv1", "conv2", "conv3") if name in parts]
        self._convs = nn.ModuleList([PackedConv2d(conv, dtype) for conv in convs])
        shortcut: Any = parts.get("downsample")
        self._shortcut = None if shortcut is None else PackedConv2d(shortcut[0], dtype)

    def forward(self, x: th.Tensor) -> th.Tensor:
        """:return: what the block returns, channels last"""
        shortcut = x if self._shortcut is None else self._shortcut(x)
        *inner, last = self._convs
        for conv in inner:
            x = conv(x, relu=True)
        out: th.Tensor = last(x, relu=True, added=shortcut)
        return out


class SixteenBitMaxPool2d(nn.Module):
    """
    The stem's 3x3 maximum in every second row and column, of 16-bit numbers that are not negative, as after ReLU.

    Read as whole numbers, their bits are in the same order, and a CPU compares these faster than bfloat16. On a GPU
    and of other numbers this is ``nn.MaxPool2d(3, 2, 1)``.
    """

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: channels last, ``(batch, channels, height, width)``
        :return: half as high and wide
        """
        if x.device.type != "cpu" or x.element_size() != 2:
            return F.max_pool2d(x, 3, 2, 1)
        bits = x.permute(0, 2, 3, 1).view(th.int16)
        return self._halved(self._halved(bits, 1), 2).view(x.dtype).permute(0, 3, 1, 2)

    @staticmethod
    def _halved(x: th.Tensor, axis: int) -> th.Tensor:
        if x.shape[axis] % 2:  # the smallest number makes it even
            x = th.cat([x, th.zeros_like(x.narrow(axis, 0, 1))], axis)
        even, odd = x.reshape(*x.shape[:axis], -1, 2, *x.shape[axis + 1 :]).unbind(axis + 1)
        out = th.maximum(even, odd)
        rest = out.narrow(axis, 1, out.shape[axis] - 1)
        th.maximum(rest, odd.narrow(axis, 0, rest.shape[axis]), out=rest)
        return out


class RawInputConv2d(nn.Module):
    """
    The first convolution, and before it scale, adapter and normalisation, as one convolution of raw pixels.

    Zero padding of normalised images is padding of raw ones with the value that becomes zero. Where there is no such
    value (one grey channel and three different means), one more channel says where the image is.

    :param conv: convolution of raw pixels; without padding where the border is not zero
    :param padding: rows and columns around the image that are added here
    :param border: what becomes zero, ``(C, 1, 1)``
    :param has_mask: whether the last channel is one inside the image and zero outside
    """

    border: th.Tensor

    def __init__(self, conv: nn.Conv2d, padding: tuple[int, int], border: th.Tensor, has_mask: bool) -> None:
        super().__init__()
        self.conv: Any = conv
        self._padding = padding
        self._has_mask = has_mask
        #: Whether ReLU follows inside the convolution.
        self.has_relu = False
        self.register_buffer("border", border)

    def forward(self, pixels: th.Tensor) -> th.Tensor:
        """
        :param pixels: of any type, ``(batch, C, H, W)``
        :return: what the stem's convolution returns
        """
        if self._padding == (0, 0):
            return self._convolve(pixels.to(self.border.dtype, memory_format=th.channels_last))
        (batch, channels, height, width), (rows, columns) = pixels.shape, self._padding
        shape = (batch, len(self.border), height + 2 * rows, width + 2 * columns)
        x = th.empty(shape, dtype=self.border.dtype, device=self.border.device, memory_format=th.channels_last)
        x.copy_(self.border.expand(shape))
        inside = x[:, :, rows : rows + height, columns : columns + width]
        inside[:, :channels] = pixels
        if self._has_mask:
            inside[:, -1] = 1.0
        return self._convolve(x)

    def _convolve(self, x: th.Tensor) -> th.Tensor:
        result: th.Tensor = self.conv(x, relu=True) if self.has_relu else self.conv(x)
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
) -> RawInputConv2d:
    """
    :param conv: the first convolution of the trunk, of ``n`` channels
    :param mixing: from raw channels to these, ``(n, C)``
    :param offset: added to them, ``(n,)``
    :param mean: subtracted from them, ``(n,)``
    :param std: by which they are divided, ``(n,)``
    :return: the same function of raw pixels
    """
    tensors = (mixing, offset, mean, std, conv.weight)
    mixing, offset, mean, std, weight = (tensor.detach().cpu().double() for tensor in tensors)
    mixing, offset = mixing / std[:, None], (offset - mean) / std
    border = th.linalg.pinv(mixing) @ -offset
    has_mask = not th.allclose(mixing @ border, -offset, atol=1e-9)
    if has_mask:
        mixing, border = th.cat([mixing, offset[:, None]], dim=1), th.zeros(mixing.shape[1] + 1).double()
        offset = th.zeros_like(offset)
    kernel, stride = (conv.kernel_size, conv.stride)
    padding: Any = conv.padding
    adds_border = has_mask or bool(border.abs().max() > 0)
    # Not initialised at random: that would take numbers from a training that is to be reproducible.
    arguments = (mixing.shape[1], conv.out_channels, kernel, stride, 0 if adds_border else padding)
    new: Any = skip_init(nn.Conv2d, *arguments)  # type: ignore[no-untyped-call]  # PyTorch
    bias = th.zeros(conv.out_channels) if conv.bias is None else conv.bias.cpu()
    with th.no_grad():
        new.weight.copy_(th.einsum("ochw,cr->orhw", weight, mixing))
        new.bias.copy_(bias.double() + weight.sum(dim=(2, 3)) @ offset)
    around = padding if adds_border else (0, 0)
    return RawInputConv2d(new, around, border.float().reshape(-1, 1, 1), has_mask).to(conv.weight.device)


def pack(module: nn.Module, blocks: tuple[type[nn.Module], ...] = (), dtype: th.dtype = th.float32) -> None:
    """
    Bring everything inside a module into one precision, convolutions as :class:`PackedConv2d`.

    :param module: its norms folded
    :param blocks: exact classes to take as residual blocks
    :param dtype: the precision
    """
    for name, child in module.named_children():
        if type(child) in blocks and _is_folded(child):
            setattr(module, name, PackedBlock(child, dtype))
        elif isinstance(child, nn.Conv2d):
            setattr(module, name, PackedConv2d(child, dtype))
        elif isinstance(child, RawInputConv2d):
            child.conv, child.border = PackedConv2d(child.conv, dtype), child.border.to(dtype)
        elif [*child.children()]:
            pack(child, blocks, dtype)
        else:
            child.to(dtype)


def is_native(dtype: th.dtype, device: th.device) -> bool:
    """:return: whether the hardware multiplies in this precision"""
    return dtype == th.float32 or device.type != "cpu" or (dtype == th.bfloat16 and host.cpu_has_bfloat16())


def can_pack(weight: th.Tensor) -> bool:
    """:return: whether oneDNN computes with such weights here; PyTorch's own compiler uses the same functions"""
    if weight.device.type != "cpu" or not th.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]  # PyTorch's
        return False
    return weight.dtype in (th.float32, th.bfloat16) and host.can_pack_convolutions(weight.dtype)


def _is_folded(block: nn.Module) -> bool:
    """:return: whether nothing but convolutions and ReLU is left in it"""
    leaves = [module for module in block.modules() if not [*module.children()]]
    return all(isinstance(leaf, (nn.Conv2d, nn.Identity, nn.ReLU)) for leaf in leaves)
