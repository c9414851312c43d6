"""Winograd's algorithm computes what a convolution computes, and is used only where it gains."""

import pytest
import torch as th
from torch import nn

from sb3_resnet.cache.inference import PackedConv2d
from sb3_resnet.cache.winograd import WinogradConv2d, gains, suits

LAST = th.channels_last


@pytest.mark.parametrize("size", [(3, 3), (6, 6), (9, 3), (5, 8)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("after", ["nothing", "relu", "addition", "both"])
def test_it_equals_the_convolution(size, bias, after):
    th.manual_seed(0)
    conv = nn.Conv2d(16, 24, 3, padding=1, bias=bias).requires_grad_(False)
    x = th.randn(4, 16, *size).to(memory_format=LAST)
    added = th.randn(4, 24, *size).to(memory_format=LAST) if after in ("addition", "both") else None
    exact = nn.functional.conv2d(x.double(), conv.weight.double(), conv.bias.double() if bias else None, padding=1)
    exact = exact if added is None else exact + added
    exact = exact.relu() if after in ("relu", "both") else exact
    before = None if added is None else added.clone()
    got = WinogradConv2d(conv)(x, after in ("relu", "both"), added)
    assert got.is_contiguous(memory_format=LAST)
    assert (got - exact).abs().max() < 2e-5 * exact.std()
    assert added is None or th.equal(added, before)


@pytest.mark.parametrize(
    "change",
    [{"stride": 2}, {"padding": 0}, {"dilation": 2}, {"groups": 2}, {"kernel_size": 1}, {"in_channels": 128}],
    ids=lambda change: next(iter(change)),
)
def test_other_convolutions_do_not_suit(change):
    usual = {"in_channels": 256, "out_channels": 256, "kernel_size": 3, "padding": 1}
    assert suits(nn.Conv2d(**usual))
    assert not suits(nn.Conv2d(**usual).bfloat16())
    assert not suits(nn.Conv2d(**{**usual, **change}))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((16, 3, 3), True), ((15, 3, 3), False), ((64, 6, 6), True), ((64, 4, 4), False), ((64, 11, 11), False)],
)
def test_it_is_used_for_batches_of_maps_that_tiles_fill(shape, expected):
    batch, height, width = shape
    assert gains(th.Size((batch, 256, height, width))) is expected


def test_a_packed_convolution_switches_with_the_batch(monkeypatch):
    conv = nn.Conv2d(256, 256, 3, padding=1).requires_grad_(False)
    packed, calls = PackedConv2d(conv), []
    monkeypatch.setattr(WinogradConv2d, "forward", lambda self, x, relu, added: calls.append(len(x)) or x)
    for batch in (1, 16, 2, 32):
        packed(th.randn(batch, 256, 3, 3).to(memory_format=LAST))
    assert calls == [16, 32]
