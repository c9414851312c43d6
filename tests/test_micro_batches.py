"""micro_batch_size: the gradient of the whole batch in the memory of a slice."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from sb3_resnet import ResNetExtractor
from sb3_resnet.callbacks import AMPCallback, FeatureCacheCallback
from sb3_resnet.nn.micro_batches import in_slices
from tests.helpers import TinyGame, assert_same, fill, make_model, observations, q_values, slowly, snapshot, start


def gradients(size, boundary="all", batch=10, **kwargs):
    """Features and gradients of a batch; the weights are the same for each size."""
    th.manual_seed(0)
    space = spaces.Box(0, 255, (4, 32, 32), np.uint8)
    extractor = ResNetExtractor(space, backbone="resnet_tiny", micro_batch_size=size, **kwargs)
    extractor.set_freeze_boundary(boundary)
    extractor.train()
    images = th.rand(batch, 4, 32, 32)
    features = extractor(images)
    (features * th.randn(features.shape)).sum().backward()
    return features.detach(), {n: p.grad for n, p in extractor.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("size", [1, 5, 9, *slowly(3, 10, 64)])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"boundary": "layer3"},
        {"norm": "group", "adapter": "per_frame", "features_dim": 7},
        {"pooling": "flatten", "image_size": 40},
    ],
    ids=str,
)
def test_gradients_are_those_of_the_whole_batch(size, kwargs):
    features, whole = gradients(None, **kwargs)
    sliced_features, sliced = gradients(size, **kwargs)
    th.testing.assert_close(sliced_features, features, rtol=1e-5, atol=1e-5)
    assert sliced.keys() == whole.keys()
    for name, gradient in whole.items():
        error = (sliced[name] - gradient).norm() / gradient.norm()
        assert error < 1e-5, name


def saved_bytes(size):
    """Memory that autograd keeps between the forward and the backward pass, each storage once."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = (storage, storage.nbytes())
        return tensor

    th.manual_seed(0)
    space = spaces.Box(0, 255, (4, 32, 32), np.uint8)
    extractor = ResNetExtractor(space, backbone="resnet_tiny", freeze_backbone=False, micro_batch_size=size).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in extractor.parameters()}
    with th.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = extractor(th.rand(16, 4, 32, 32))
    assert features.requires_grad
    return sum(nbytes for pointer, (_, nbytes) in storages.items() if pointer not in weights)


def test_only_one_slice_keeps_its_activations():
    whole = saved_bytes(None)
    assert saved_bytes(16) == whole
    assert saved_bytes(4) < 0.3 * whole
    assert saved_bytes(8) < 0.55 * whole


def test_no_more_than_a_slice_passes_the_trunk_at_once():
    model = fill(make_model(extractor={"micro_batch_size": 3, "adapter": "per_frame"}))
    seen = []
    for network in (model.q_net, model.q_net_target):
        for name in ("conv1", "layer4"):
            module = getattr(network.features_extractor.backbone, name)
            module.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    for boundary in (None, "layer4", "all"):
        model.policy.set_freeze_boundary(boundary)
        model.train(1, 8)
    assert max(seen) == 3 * 4  # frames
    obs = observations(model, 8)
    expected = q_values(model, obs)
    assert max(seen) == 12
    model.q_net.features_extractor.micro_batch_size = None
    th.testing.assert_close(q_values(model, obs), expected, rtol=1e-5, atol=1e-5)
    assert max(seen) == 32


@pytest.mark.parametrize("algorithm", ["dqn", "qrdqn"])
def test_training_is_that_of_the_whole_batch(algorithm):
    def trained(size):
        policy_kwargs = {"optimizer_class": "SGD"}  # Adam divides rounding errors by their own size
        extractor = {"freeze_backbone": False, "micro_batch_size": size}
        model = fill(make_model(algorithm, extractor=extractor, policy_kwargs=policy_kwargs, learning_rate=1e-2))
        np.random.seed(0)
        model.train(3, 8)
        return model.policy.state_dict()

    whole, sliced = trained(None), trained(2)
    for name, value in whole.items():
        th.testing.assert_close(sliced[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_with_amp_recomputation_is_reduced_as_well(dtype):
    def trained(size):
        extractor = {"freeze_backbone": False, "micro_batch_size": size, "backbone": "resnet_mini"}
        model = fill(make_model(env=TinyGame((4, 17, 17)), extractor=extractor, max_grad_norm=1e9))
        callback = start(model, AMPCallback(dtype, verbose=0, **({"init_scale": 16.0} if dtype == "float16" else {})))
        seen = []
        model.q_net.features_extractor.backbone.layer1.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
        np.random.seed(0)
        model.train(1, 8)
        callback.on_training_end()
        return seen, [p.grad for p in model.q_net.parameters()]

    seen, whole = trained(None)
    assert len(seen) == 1
    seen, sliced = trained(2)
    assert len(seen) == 4 + 3  # three slices are computed twice
    assert {*seen} == {getattr(th, dtype)}
    for one, other in zip(whole, sliced, strict=True):
        assert (one - other).norm() < 0.05 * one.norm()


def test_with_a_cache_the_live_part_is_sliced():
    model = fill(make_model(extractor={"micro_batch_size": 3}))
    model.policy.set_freeze_boundary("layer4")
    start(model, FeatureCacheCallback())
    seen = []
    layer4 = model.q_net.features_extractor.backbone.layer4
    layer4.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))  # recomputing stops early inside
    model.train(1, 8)
    assert sorted(seen) == [2, 3, 3, 3, 3]


def test_ppo_takes_it():
    model = PPO(
        "CnnPolicy",
        make_vec_env(TinyGame, 2),
        n_steps=4,
        batch_size=8,
        n_epochs=1,
        device="cpu",
        policy_kwargs={
            "features_extractor_class": ResNetExtractor,
            "features_extractor_kwargs": {
                "backbone": "resnet_tiny",
                "freeze_backbone": False,
                "micro_batch_size": 3,
            },
        },
    )
    before = snapshot(model.policy)
    model.learn(8)
    after = model.policy.state_dict()
    assert not th.equal(
        before["features_extractor.backbone.conv1.weight"], after["features_extractor.backbone.conv1.weight"]
    )


def test_it_is_no_part_of_the_weights(tmp_path):
    model = make_model(extractor={"micro_batch_size": 3})
    assert_same(model.policy.state_dict(), make_model().policy.state_dict())
    model.save(tmp_path / "model.zip")
    assert type(model).load(tmp_path / "model.zip").q_net_target.features_extractor.micro_batch_size == 3


@pytest.mark.parametrize("norm", ["batch", "sync"])
def test_norms_over_the_batch_are_refused_with_the_reason(norm):
    with pytest.raises(ValueError, match=f"norm='{norm}' takes its statistics over the whole batch.*norm='frozen'"):
        make_model(extractor={"norm": norm, "micro_batch_size": 4})


@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (2.5, ValueError), ("few", TypeError), (True, TypeError)]
)
def test_bad_sizes_are_refused(value, error):
    with pytest.raises(error, match="micro_batch_size must be"):
        make_model(extractor={"micro_batch_size": value})


def test_slices_of_a_plain_function():
    seen = []

    def double(x):
        seen.append(len(x))
        return 2 * x

    x = th.arange(7.0)[:, None]
    for size, expected in {None: [7], 7: [7], 3: [3, 3, 1]}.items():
        assert th.equal(in_slices(double, x, size), 2 * x)
        assert seen == expected
        seen.clear()
