"""The head: what the standardizer knows of the data, and the order of the layers."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.utils import get_parameters_by_name, polyak_update
from torch import nn

from sb3_resnet import ResNetExtractor
from sb3_resnet.nn.heads import FEATURE_NORMS, FeatureStandardizer, activation_of, make_head
from tests.helpers import make_model


def samples(n, dim=3, loc=0.0, scale=1.0, seed=0):
    return np.random.default_rng(seed).normal(loc, scale, (n, dim)).astype(np.float32)


def trained(*batches, **kwargs):
    layer = FeatureStandardizer(batches[0].shape[1], **kwargs).train()
    for batch in batches:
        layer(th.as_tensor(batch))
    return layer


def numbers(layer):
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    loc=st.floats(-10, 10),
    scale=st.floats(0.1, 10),
    seed=st.integers(0, 2**16),
)
def test_the_moments_are_those_of_all_data_however_it_is_split(sizes, loc, scale, seed):
    data = samples(sum(sizes), loc=loc, scale=scale, seed=seed)
    layer = trained(*np.split(data, np.cumsum(sizes)[:-1]))
    np.testing.assert_allclose(layer.running_mean, data.mean(axis=0, dtype=float), rtol=1e-4, atol=1e-4 * scale)
    np.testing.assert_allclose(layer.running_var, data.var(axis=0, dtype=float), rtol=1e-3, atol=1e-4 * scale**2)
    assert layer.running_count == len(data)


def test_the_output_is_standardised_by_the_running_moments():
    first, second = samples(50, loc=2.0, scale=3.0), samples(10, loc=5.0, seed=1)
    layer = trained(first)
    data = np.concatenate([first, second])
    expected = (second - data.mean(axis=0)) / np.sqrt(data.var(axis=0) + 1e-5)
    # Training and acting compute the same function; the batch at hand is in the moments.
    in_training = layer(th.as_tensor(second))
    np.testing.assert_allclose(in_training, expected, atol=1e-4)
    assert th.equal(layer.eval()(th.as_tensor(second)), in_training)


def test_a_fresh_standardizer_changes_nothing():
    x = th.as_tensor(samples(5))
    th.testing.assert_close(FeatureStandardizer(3).eval()(x), x, rtol=1e-4, atol=1e-4)


def test_eval_mode_does_not_update():
    layer = trained(samples(20)).eval()
    before = numbers(layer)
    layer(th.as_tensor(samples(20, loc=9.0)))
    assert all(th.equal(value, before[name]) for name, value in layer.named_buffers())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_features_of_any_scale_come_out_with_unit_spread(scale):
    features = 0.5 + scale * th.randn(4000, 5, generator=th.Generator().manual_seed(0), dtype=th.double)
    layer = FeatureStandardizer(5)
    for batch in features.float().split(100):
        layer(batch)
    assert layer.eval()(features.float()).std(dim=0).tolist() == pytest.approx([1.0] * 5, abs=0.01)


def test_features_of_a_random_trunk_behind_a_spatial_softmax_come_out_with_unit_spread():
    space = spaces.Box(0, 255, (4, 84, 84), np.uint8)
    extractor = ResNetExtractor(space, adapter="per_frame", last_stage="layer2", pooling="spatial_softmax")
    images = th.full((64, 4, 84, 84), 0.3)
    for image, (row, column) in zip(images, th.randint(0, 82, (64, 2)).tolist(), strict=True):
        image[:, row : row + 2, column : column + 2] = 0.9  # a ball
    with th.no_grad():
        features = extractor(images)
    assert features.std(dim=0).median() < 0.005  # the reason of this test
    layer = FeatureStandardizer(features.shape[1])
    layer(features)
    assert layer.eval()(features).std(dim=0).median() > 0.97


def old_standardizer():
    """As before the share was limited: BatchNorm's eps, whatever the variance."""
    layer = FeatureStandardizer(3, eps_share=1e30)
    layer(1e-3 * th.randn(50, 3))
    return layer.eval()


def test_a_standardizer_keeps_what_it_was_trained_with():
    features, old = 1e-3 * th.randn(50, 3), old_standardizer()
    th.testing.assert_close(old(features), (features - old.running_mean) / (old.running_var + 1e-5).sqrt())
    assert old(features).std() < 0.5
    loaded = FeatureStandardizer(3)
    loaded.load_state_dict(old.state_dict())
    assert th.equal(loaded.eval()(features), old(features))


def test_files_from_before_the_share_was_saved_compute_what_they_computed():
    old = old_standardizer()
    state = {f"0.{key}": value for key, value in old.state_dict().items() if key != "eps_share"}
    loaded = nn.Sequential(FeatureStandardizer(3))
    loaded.load_state_dict(state)
    features = th.randn(4, 3)
    assert th.equal(loaded.eval()(features), old(features))
    loaded.load_state_dict(loaded.state_dict())
    assert th.equal(loaded(features), old(features))


def test_a_feature_that_varies_like_the_others_of_large_ones_is_as_with_batch_norm():
    x = th.randn(200, 4, generator=th.Generator().manual_seed(0))
    layer = FeatureStandardizer(4)
    layer(x)
    th.testing.assert_close(layer.eval()(x), (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt())


def test_constant_and_rare_features_stay_in_range():
    layer = trained(np.zeros((1000, 3), np.float32), clip=4.0)
    assert layer(th.zeros(2, 3)).tolist() == [[0.0] * 3] * 2
    layer.eval()
    assert layer(th.tensor([[100.0, -100.0, 1e-3]])).tolist()[0] == pytest.approx([4.0, -4.0, 1e-3 / 1e-5**0.5])
    assert FeatureStandardizer(1).eval()(th.tensor([[99.0]])) == 10.0


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_comes_out_as_nan_and_spares_the_rest(value):
    layer = trained(samples(20))
    x = th.as_tensor(samples(4, seed=1))
    expected = layer.eval()(x)
    x[1, 2] = value
    found = layer(x)
    assert found.isnan().nonzero().tolist() == [[1, 2]]
    expected[1, 2] = found[1, 2] = 0.0
    assert th.equal(found, expected)


def test_gradients_do_not_cross_the_statistics():
    layer = trained(samples(30, scale=2.0))
    x = th.as_tensor(samples(4, seed=1)).requires_grad_()
    layer(x).sum().backward()
    expected = (layer.running_var + layer.eps).rsqrt().expand(4, 3)
    th.testing.assert_close(x.grad, expected)
    assert not any(buffer.requires_grad for buffer in layer.buffers())
    assert [*layer.parameters()] == []


def test_beyond_the_horizon_old_data_fades():
    layer = trained(samples(100, loc=1.0), horizon=100)
    for _ in range(30):  # each new batch of 10 has a share of a tenth
        layer(th.full((10, 3), 5.0))
    remains = 0.9**30
    np.testing.assert_allclose(
        layer.running_mean, 5.0 + remains * (samples(100, loc=1.0).mean(axis=0) - 5.0), rtol=1e-4
    )
    assert layer.running_count == 100


def test_a_batch_beyond_the_horizon_counts_as_all_there_is():
    data = samples(40, loc=3.0)
    layer = trained(data, horizon=10)
    np.testing.assert_allclose(layer.running_mean, data.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(layer.running_var, data.var(axis=0), rtol=1e-4)


def test_sb3_copies_the_statistics_to_the_target():
    online, target = nn.Sequential(trained(samples(30, loc=4.0))), nn.Sequential(trained(samples(7)))
    names = [name for name, _ in online.named_buffers() if name.split(".")[-1].startswith("running_")]
    assert len(names) == 3
    assert all(buffer.is_floating_point() for buffer in online.buffers())
    # As SB3's DQN does, with the lists of tensors that it takes once.
    source, copy = (get_parameters_by_name(module, ["running_"]) for module in (online, target))
    for _ in range(2):
        online.train()(th.as_tensor(samples(5, seed=2)))
        polyak_update(source, copy, 1.0)
        assert all(th.equal(target.get_buffer(name), online.get_buffer(name)) for name in names)
    assert target[0].running_count == 40


def test_the_statistics_are_saved():
    layer = trained(samples(30, loc=4.0))
    loaded = FeatureStandardizer(3)
    loaded.load_state_dict(layer.state_dict())
    x = th.as_tensor(samples(5))
    assert th.equal(loaded.eval()(x), layer.eval()(x))


@pytest.mark.parametrize(
    ("kwargs", "layers"),
    [
        ({"net_arch": [8]}, ["Linear 5 8", "ReLU", "Linear 8 2"]),
        ({"net_arch": []}, ["Linear 5 2"]),
        ({"net_arch": [], "dropout": 0.5, "feature_norm": "layer"}, ["LayerNorm", "Linear 5 2"]),
        ({"net_arch": [8, 6]}, ["Linear 5 8", "ReLU", "Linear 8 6", "ReLU", "Linear 6 2"]),
        ({"net_arch": [8], "dropout": 0.25}, ["Linear 5 8", "ReLU", "Dropout 0.25", "Linear 8 2"]),
        (
            {"net_arch": [8, 6], "dropout": 0.25, "activation_fn": nn.Tanh, "feature_norm": "standardize"},
            [
                *("FeatureStandardizer", "Linear 5 8", "Tanh", "Dropout 0.25"),
                *("Linear 8 6", "Tanh", "Dropout 0.25", "Linear 6 2"),
            ],
        ),
        ({"net_arch": [8], "feature_norm": "layer"}, ["LayerNorm", "Linear 5 8", "ReLU", "Linear 8 2"]),
    ],
    ids=str,
)
def test_the_layers_of_the_head_come_in_order(kwargs, layers):
    def describe(layer):
        sizes = {nn.Linear: ("in_features", "out_features"), nn.Dropout: ("p",)}.get(type(layer), ())
        return " ".join([type(layer).__name__, *(str(getattr(layer, size)) for size in sizes)])

    head = make_head(5, 2, **kwargs)
    assert [describe(layer) for layer in head] == layers
    assert head.eval()(th.rand(3, 5)).shape == (3, 2)


@pytest.mark.parametrize("norm", FEATURE_NORMS)
def test_the_head_computes_what_its_layers_say(norm):
    head = make_head(5, 2, [8], feature_norm=norm).train()
    x = th.as_tensor(samples(6, dim=5, loc=2.0))
    scaled = {
        "standardize": (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt(),
        "layer": (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt(),
        "none": x,
    }[norm]
    first, last = (layer for layer in head if isinstance(layer, nn.Linear))
    expected = (scaled @ first.weight.T + first.bias).clamp(min=0) @ last.weight.T + last.bias
    th.testing.assert_close(head(x), expected, rtol=1e-4, atol=1e-5)


def test_dropout_works_in_training_only():
    th.manual_seed(0)
    head = make_head(5, 2, [64], dropout=0.5)
    x = th.ones(1, 5)
    assert th.equal(head.eval()(x), head(x))
    head.train()
    assert not th.equal(head(x), head(x))


@pytest.mark.parametrize("value", ["ReLU", "nn.Tanh", "torch.nn.SiLU", "PReLU", "RReLU", "Softmax", nn.GELU])
def test_activations_by_name_and_class(value):
    state = th.random.get_rng_state()
    assert issubclass(activation_of(value), nn.Module)
    assert th.equal(state, th.random.get_rng_state())


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("Linear", "activation_fn=Linear is no activation that can be built without arguments"),
        (nn.Conv2d, "activation_fn=Conv2d is no activation"),
        ("MaxPool2d", "activation_fn=MaxPool2d is no activation"),
        (nn.Module, "activation_fn=Module is no activation"),
        ("GLU", "activation_fn=GLU is no activation"),
        ("LSTM", "activation_fn=LSTM is no activation"),
        ("relu", "must be a class of torch.nn or its name, such as 'ReLU', got 'relu'"),
        (nn.ReLU(), "must be a class"),
        (3, "got 3"),
    ],
)
def test_what_is_no_activation_is_refused(value, says):
    with pytest.raises(ValueError, match=says):
        activation_of(value)


def test_a_layer_is_no_activation_of_a_policy():
    with pytest.raises(ValueError, match="activation_fn=Linear is no activation"):
        make_model(policy_kwargs={"activation_fn": "Linear"})
