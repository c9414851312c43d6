"""Convolutions of small maps as one product of matrices: the same numbers as ``nn.Conv2d``."""

from __future__ import annotations

import copy

import pytest
import torch as th
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchvision.models import resnet18

from sb3_resnet.nn import small_maps
from sb3_resnet.nn.backbones import build
from sb3_resnet.nn.small_maps import SmallMapConv2d, for_small_maps


def gradients(conv: nn.Conv2d, x: th.Tensor) -> list[th.Tensor]:
    """Output, and gradients of input, weights and bias."""
    x = x.clone().requires_grad_()
    out = conv(x)
    out.backward(th.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape))
    return [out, x.grad, *(parameter.grad for parameter in conv.parameters())]


@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    size=st.tuples(st.integers(3, 8), st.integers(3, 8)),
    bias=st.booleans(),
)
def test_it_computes_what_conv2d_does(kernel, stride, padding, size, bias):
    plain = nn.Conv2d(3, 5, kernel, stride, padding, bias=bias).double()
    ours = SmallMapConv2d(copy.deepcopy(plain))
    x = th.randn(2, 3, *size, dtype=th.float64)
    with pytest.MonkeyPatch.context() as patch:
        # Where the sums are exact to twelve digits, a wrong window shows.
        patch.setattr(small_maps, "_in_bfloat16_on_cpu", lambda x: True)
        patch.setattr(small_maps, "CHANNELS_PER_PIXEL", 0)
        found = gradients(ours, x)
    for expected, value in zip(gradients(plain, x), found, strict=True):
        assert value.shape == expected.shape
        assert th.allclose(value, expected, rtol=1e-12, atol=1e-12)


def product_runs(
    size: int = 4, channels: int = 256, dtype: th.dtype = th.bfloat16, autocast: th.dtype | None = None
) -> bool:
    """Whether an output map of this size is not left to PyTorch's convolution."""
    conv = SmallMapConv2d(nn.Conv2d(2, channels, 3, padding=1).to(dtype))
    with pytest.MonkeyPatch.context() as patch, th.autocast("cpu", autocast, enabled=autocast is not None):
        patch.setattr(nn.Conv2d, "forward", lambda self, x: None)
        return conv(th.rand(1, 2, size, size).to(dtype)) is not None


def test_products_are_for_many_channels_of_small_maps_in_bfloat16():
    assert product_runs()
    assert product_runs(5, 512)
    assert product_runs(dtype=th.float32, autocast=th.bfloat16)
    assert not product_runs(5)
    assert not product_runs(6, 512)
    assert not product_runs(channels=128)
    assert not product_runs(dtype=th.float32)
    assert not product_runs(autocast=th.float16)


def test_under_autocast_it_gives_bfloat16():
    conv = SmallMapConv2d(nn.Conv2d(2, 256, 3, padding=1))
    with th.autocast("cpu", th.bfloat16):
        out = conv(th.rand(1, 2, 3, 3))
    assert out.dtype == th.bfloat16
    out.float().sum().backward()
    assert conv.weight.grad.dtype == th.float32


def test_only_what_it_can_do_is_exchanged_and_parameters_stay_the_same_objects():
    layers = {"a": nn.Conv2d(4, 4, 3), "grouped": nn.Conv2d(4, 4, 3, groups=2), "one": nn.Conv2d(4, 4, 1)}
    layers |= {"dilated": nn.Conv2d(4, 4, 3, dilation=2), "inside": nn.Sequential(nn.Conv2d(4, 4, 3, bias=False))}
    module = nn.Sequential()
    for name, layer in layers.items():
        module.add_module(name, layer)
    before = dict(module.named_parameters())
    for_small_maps(module)
    assert [type(module.get_submodule(name)) for name in layers] == [SmallMapConv2d, *[nn.Conv2d] * 3, nn.Sequential]
    assert type(module.inside[0]) is SmallMapConv2d
    after = dict(module.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)


def test_a_trunk_takes_the_same_random_numbers_and_keys_as_before():
    th.manual_seed(0)
    ours = build("resnet18")
    drawn = th.rand(1)
    th.manual_seed(0)
    plain = resnet18()
    assert th.equal(drawn, th.rand(1))
    state = {name: value for name, value in plain.state_dict().items() if not name.startswith("fc.")}
    assert ours.state_dict().keys() == state.keys()
    assert all(th.equal(ours.state_dict()[name].to(state[name].dtype), value) for name, value in state.items())


def test_a_traced_trunk_has_convolutions():
    conv = SmallMapConv2d(nn.Conv2d(2, 256, 3, padding=1)).bfloat16()
    graph = str(th.jit.trace(conv, th.rand(1, 2, 3, 3).bfloat16(), check_trace=False).inlined_graph)
    assert "aten::_convolution" in graph
    assert "aten::linear" not in graph
