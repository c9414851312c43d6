"""Folded and packed convolutions compute what the plain ones compute."""

import pytest
import torch as th
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1

from sb3_resnet.common import host
from sb3_resnet.nn.inference import (
    PackedBlock,
    PackedConv2d,
    SixteenBitMaxPool2d,
    can_pack,
    fold_norms,
    from_raw_input,
    pack,
)

GREY = th.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.5, 0.5, 0.0], [0.0, 0.0, 0.5, 0.5]])
IMAGENET = th.tensor([0.485, 0.456, 0.406]), th.tensor([0.229, 0.224, 0.225])


def conv(bias=True, **kwargs):
    th.manual_seed(0)
    return nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=bias, **kwargs).requires_grad_(False)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("matrix", [th.eye(3), GREY], ids=["rgb", "adapter"])
@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_the_first_convolution_takes_raw_pixels_up_to_the_border(bias, matrix, offset):
    mean, std = IMAGENET
    offset = th.full((3,), offset)
    pixels = th.randint(0, 256, (2, matrix.shape[1], 21, 18), dtype=th.uint8)
    mixed = th.einsum("rc,bchw->brhw", matrix, pixels / 255) + offset[:, None, None]
    expected = conv(bias)((mixed - mean[:, None, None]) / std[:, None, None])
    got = from_raw_input(conv(bias), matrix / 255, offset, mean, std)(pixels)
    assert th.allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("statistics", [IMAGENET, (th.zeros(3), th.ones(3))], ids=["imagenet", "none"])
def test_one_grey_channel_is_taken_raw_too(statistics):
    """Three different means have no raw grey value that becomes zero: one more channel says where the image is."""
    mean, std = statistics
    pixels = th.randint(0, 256, (2, 1, 21, 18), dtype=th.uint8)
    expected = conv()(((pixels / 255).expand(-1, 3, -1, -1) - mean[:, None, None]) / std[:, None, None])
    got = from_raw_input(conv(), th.ones(3, 1) / 255, th.zeros(3), mean, std)(pixels)
    assert th.allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [th.bfloat16, th.float16])
@pytest.mark.parametrize("added", [False, True])
def test_float32_arithmetic_takes_the_place_of_missing_instructions(monkeypatch, dtype, added):
    plain = nn.Conv2d(16, 32, 3, padding=1).requires_grad_(False)
    x, other = (th.rand(2, n, 9, 9).to(dtype).to(memory_format=th.channels_last) for n in (16, 32))
    monkeypatch.setattr(host, "cpu_has_bfloat16", lambda: False)
    got = PackedConv2d(plain, dtype)(x, True, other if added else None)
    bias = plain.bias.to(dtype).float() if added else plain.bias
    exact = nn.functional.conv2d(x.float(), plain.weight.to(dtype).float(), bias, padding=1)
    expected = (exact + other.float() if added else exact).relu().to(dtype)
    assert got.dtype == dtype
    assert (got != expected).float().mean() < 0.02  # the order of a sum decides where a value lies between two
    assert th.allclose(got.float(), expected.float(), rtol=2**-7 if dtype == th.bfloat16 else 2**-10)


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from([th.bfloat16, th.float16, th.float32]),
    seed=st.integers(0, 1000),
)
def test_the_maximum_of_16_bit_numbers_is_that_of_max_pool2d(shape, dtype, seed):
    values = th.randn(shape, generator=th.Generator().manual_seed(seed)).mul(1e4).relu()
    x = values.to(dtype).to(memory_format=th.channels_last)
    got = SixteenBitMaxPool2d()(x)
    assert got.dtype == dtype
    assert th.equal(got, nn.functional.max_pool2d(x, 3, 2, 1))


@pytest.mark.parametrize("batches", [(1, 32), (32, 1), (8, 3)])
@pytest.mark.parametrize("groups", [1, 2])
def test_packed_weights_suit_all_batch_sizes(batches, groups):
    plain = nn.Conv2d(16, 32, 3, stride=2, padding=1, groups=groups).requires_grad_(False)
    packed = PackedConv2d(plain)
    with th.inference_mode():
        for batch in batches:
            x = th.rand(batch, 16, 11, 9).to(memory_format=th.channels_last)
            assert th.allclose(packed(x), plain(x), rtol=1e-4, atol=1e-6)


def test_norms_are_folded_and_convolutions_packed_at_any_depth():
    th.manual_seed(0)
    inner = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.GroupNorm(2, 8))
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), inner).train()
    net(th.rand(16, 3, 12, 12))
    net.eval().requires_grad_(False)
    x = th.rand(4, 3, 12, 12)
    expected = net(x)
    fold_norms(net)
    pack(net)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    assert [type(net[0]), type(inner[0])] == [PackedConv2d] * 2
    assert isinstance(inner[2], nn.GroupNorm)
    assert th.allclose(net(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("stride", [1, 2])
def test_additions_and_relus_move_into_the_convolutions_of_a_block(block, stride):
    th.manual_seed(0)
    channels = 8 * block.expansion
    shortcut = nn.Sequential(conv1x1(channels, channels, stride), nn.BatchNorm2d(channels)) if stride > 1 else None
    net = nn.Sequential(block(channels, 8, stride, shortcut)).eval().requires_grad_(False)
    x = th.randn(3, channels, 9, 7).to(memory_format=th.channels_last)
    expected, before = net(x), x.clone()
    fold_norms(net)
    pack(net, (block,))
    assert type(net[0]) is PackedBlock
    assert th.allclose(net(x), expected, rtol=1e-4, atol=1e-6)
    assert th.equal(x, before)


# oneDNN's own addition fails for maps of one pixel in PyTorch 2.6 and 2.8.
@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("relu", [False, True])
def test_addition_with_and_without_relu(size, relu):
    plain = nn.Conv2d(4, 4, 1).requires_grad_(False)
    x = th.randn(2, 4, size, size).to(memory_format=th.channels_last)
    expected, before = plain(x) + x, x.clone()
    expected = expected.relu() if relu else expected
    assert th.allclose(PackedConv2d(plain)(x, relu, added=x), expected, rtol=1e-4, atol=1e-6)
    assert th.equal(x, before)


def test_blocks_with_another_norm_or_another_class_keep_their_own_forward():
    class Own(BasicBlock):
        pass

    for block in (BasicBlock(8, 8, norm_layer=lambda n: nn.GroupNorm(2, n)), Own(8, 8)):
        net = nn.Sequential(block).eval().requires_grad_(False)
        x = th.randn(2, 8, 6, 6)
        expected = net(x)
        fold_norms(net)
        pack(net, (BasicBlock,))
        assert net[0] is block
        assert type(block.conv1) is PackedConv2d
        assert th.allclose(net(x), expected, rtol=1e-4, atol=1e-6)


def test_where_onednn_is_missing_pytorch_computes_the_same(monkeypatch):
    plain = nn.Conv2d(16, 16, 3, padding=1).requires_grad_(False)
    x = th.rand(2, 16, 9, 9).to(memory_format=th.channels_last)
    expected = PackedConv2d(plain)(x, True, x)
    assert can_pack(th.zeros(1))
    monkeypatch.setattr(th.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert not can_pack(th.zeros(1, dtype=th.bfloat16))
    monkeypatch.delattr(th._C._nn, "mkldnn_reorder_conv2d_weight")
    assert not can_pack(th.zeros(1))
    monkeypatch.setattr(th.backends.mkldnn, "is_available", lambda: False)
    assert not can_pack(th.zeros(1))
    assert th.allclose(PackedConv2d(plain)(x, True, x), expected, rtol=1e-4, atol=1e-5)
