"""From a feature map to a vector: sizes and numbers."""

import pytest
import torch as th

from sb3_resnet.nn.pooling import POOLINGS, pooled_dim, pooled_features


def maps(*shape):
    return th.randn(shape, generator=th.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("pooling", "dim"), [("avg", 7), ("flatten", 7 * 3 * 5), ("spatial_softmax", 14)], ids=POOLINGS
)
def test_the_dimension_is_that_of_the_features(pooling, dim):
    assert pooled_dim(pooling, 7, (3, 5)) == dim
    assert pooled_features(pooling, maps(2, 7, 3, 5)).shape == (2, dim)


def test_avg_is_the_mean_of_the_map():
    x = th.arange(24.0).reshape(2, 2, 2, 3)
    assert pooled_features("avg", x).tolist() == [[2.5, 8.5], [14.5, 20.5]]


def test_flatten_keeps_every_number_in_order():
    assert pooled_features("flatten", th.arange(24.0).reshape(2, 2, 2, 3)).tolist()[1] == [*range(12, 24)]


@pytest.mark.parametrize("row", range(3))
@pytest.mark.parametrize("column", range(5))
def test_spatial_softmax_of_one_bright_pixel_is_its_position(row, column):
    x = th.zeros(1, 2, 3, 5)
    x[0, 0, row, column] = 1e4
    x[0, 1, 2, 0] = 1e4  # bottom left
    rows, columns = pooled_features("spatial_softmax", x).reshape(2, 2)
    assert rows.tolist() == pytest.approx([row - 1.0, 1.0], abs=1e-6)
    assert columns.tolist() == pytest.approx([column / 2 - 1.0, -1.0], abs=1e-6)


def test_spatial_softmax_is_the_expected_position():
    x, expected = maps(2, 3, 4, 5), []
    for channels in x.double():
        probabilities = [channel.exp() / channel.exp().sum() for channel in channels]
        rows = [sum(p[i, j] * (2 * i / 3 - 1) for i in range(4) for j in range(5)) for p in probabilities]
        columns = [sum(p[i, j] * (2 * j / 4 - 1) for i in range(4) for j in range(5)) for p in probabilities]
        expected.append(rows + columns)
    th.testing.assert_close(pooled_features("spatial_softmax", x), th.tensor(expected).float())


def test_spatial_softmax_of_an_even_map_is_the_middle():
    th.testing.assert_close(pooled_features("spatial_softmax", th.full((1, 2, 4, 4), 3.0)), th.zeros(1, 4))


@pytest.mark.parametrize("dtype", [th.float16, th.bfloat16])
def test_spatial_softmax_of_half_precision_computes_in_float32(dtype):
    x = maps(2, 3, 4, 5).to(dtype)
    pooled = pooled_features("spatial_softmax", x)
    assert pooled.dtype == th.float32
    assert th.equal(pooled, pooled_features("spatial_softmax", x.float()))
