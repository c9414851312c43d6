"""From a feature map to a vector: sizes and numbers."""

import pytest
import torch as th

from sb3_resnet.nn.pooling import POOLINGS, Pooling


def maps(*shape):
    return th.randn(shape, generator=th.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("pooling", "dim"), [("avg", 7), ("flatten", 7 * 3 * 5), ("spatial_softmax", 14), ("grid", 7 * 16)], ids=POOLINGS
)
def test_the_dimension_is_that_of_the_features(pooling, dim):
    assert Pooling(pooling).dim(7, (3, 5)) == dim
    assert Pooling(pooling)(maps(2, 7, 3, 5)).shape == (2, dim)


def test_avg_is_the_mean_of_the_map():
    x = th.arange(24.0).reshape(2, 2, 2, 3)
    assert Pooling("avg")(x).tolist() == [[2.5, 8.5], [14.5, 20.5]]


def test_flatten_keeps_every_number_in_order():
    assert Pooling("flatten")(th.arange(24.0).reshape(2, 2, 2, 3)).tolist()[1] == [*range(12, 24)]


@pytest.mark.parametrize("row", range(3))
@pytest.mark.parametrize("column", range(5))
def test_spatial_softmax_of_one_bright_pixel_is_its_position(row, column):
    x = th.zeros(1, 2, 3, 5)
    x[0, 0, row, column] = 1e4
    x[0, 1, 2, 0] = 1e4  # bottom left
    rows, columns = Pooling("spatial_softmax")(x).reshape(2, 2)
    assert rows.tolist() == pytest.approx([row - 1.0, 1.0], abs=1e-6)
    assert columns.tolist() == pytest.approx([column / 2 - 1.0, -1.0], abs=1e-6)


def test_spatial_softmax_is_the_expected_position():
    x, expected = maps(2, 3, 4, 5), []
    for channels in x.double():
        probabilities = [channel.exp() / channel.exp().sum() for channel in channels]
        rows = [sum(p[i, j] * (2 * i / 3 - 1) for i in range(4) for j in range(5)) for p in probabilities]
        columns = [sum(p[i, j] * (2 * j / 4 - 1) for i in range(4) for j in range(5)) for p in probabilities]
        expected.append(rows + columns)
    th.testing.assert_close(Pooling("spatial_softmax")(x), th.tensor(expected).float())


def test_spatial_softmax_of_an_even_map_is_the_middle():
    th.testing.assert_close(Pooling("spatial_softmax")(th.full((1, 2, 4, 4), 3.0)), th.zeros(1, 4))


@pytest.mark.parametrize("dtype", [th.float16, th.bfloat16])
def test_spatial_softmax_of_half_precision_computes_in_float32(dtype):
    x = maps(2, 3, 4, 5).to(dtype)
    pooled = Pooling("spatial_softmax")(x)
    assert pooled.dtype == th.float32
    assert th.equal(pooled, Pooling("spatial_softmax")(x.float()))


def test_spatial_softmax_leaves_its_input_alone_and_is_differentiable():
    x = maps(2, 3, 4, 5).requires_grad_()
    before = x.detach().clone()
    assert th.autograd.gradcheck(
        Pooling("spatial_softmax"), (x.double().detach().requires_grad_(),), atol=1e-2, eps=1e-2
    )
    Pooling("spatial_softmax")(x).sum().backward()
    assert th.equal(x, before)


def test_spatial_softmax_does_not_overflow():
    x = th.full((1, 1, 3, 3), -3e38)
    x[0, 0, 1, 2] = 3e38
    assert Pooling("spatial_softmax")(x).tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("memory", [th.contiguous_format, th.channels_last])
def test_grid_is_the_means_of_its_parts(memory):
    x = th.arange(2 * 3 * 4 * 8.0).reshape(2, 3, 4, 8).contiguous(memory_format=memory)
    parts = [
        x[:, :, rows, columns].mean((2, 3)) for rows in (slice(2), slice(2, 4)) for columns in (slice(4), slice(4, 8))
    ]
    assert th.equal(Pooling("grid", 2)(x), th.stack(parts, dim=2).flatten(1))


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (4, 7), (11, 11)])
def test_grid_has_the_same_length_for_maps_of_any_size(size):
    assert Pooling("grid", 3)(maps(2, 5, *size)).shape == (2, 45)
    assert Pooling("grid", 3).dim(5, size) == 45


def test_a_grid_without_a_grid_is_refused():
    with pytest.raises(ValueError, match="grid_size has no effect on pooling='avg': write pooling='grid'"):
        Pooling("avg", 3)
