"""The precision of the frozen stages is part of the model."""

import copy

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import DQN

from sb3_resnet import ResNetExtractor
from sb3_resnet.callbacks import AMPCallback, FeatureCacheCallback
from sb3_resnet.common import host
from sb3_resnet.nn.frozen_dtype import FrozenDtype
from tests.helpers import assert_same, fill, make_model, observations, q_values, snapshot

SPACE = spaces.Box(0, 255, (4, 32, 32), np.uint8)


def build(**options):
    th.manual_seed(0)
    return ResNetExtractor(SPACE, backbone="resnet_tiny", **options)


@pytest.mark.parametrize(("has_bfloat16", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_auto_is_decided_once_by_the_hardware_and_saved(monkeypatch, tmp_path, has_bfloat16, expected):
    monkeypatch.setattr(host, "cpu_has_bfloat16", lambda: has_bfloat16)
    model = make_model(extractor={"frozen_dtype": "auto"})
    assert model.q_net.features_extractor.frozen_dtype == expected
    model.save(tmp_path / "model")
    monkeypatch.setattr(host, "cpu_has_bfloat16", lambda: not has_bfloat16)  # another machine
    loaded = DQN.load(tmp_path / "model", device="cpu")
    for network in (loaded.q_net, loaded.q_net_target):
        assert network.features_extractor.frozen_dtype == expected
    loaded.set_parameters(tmp_path / "model", device="cpu")
    assert copy.deepcopy(loaded.policy).q_net.features_extractor.frozen_dtype == expected
    obs = observations(model)
    assert th.equal(q_values(model, obs), q_values(loaded, obs))


def test_auto_follows_a_move_to_another_kind_of_device_until_it_is_used(monkeypatch):
    kinds = {"cpu": th.float32, "meta": th.float16}  # a device that is always there stands for a GPU
    monkeypatch.setattr("sb3_resnet.nn.frozen_dtype.resolve_dtype", lambda name, device: kinds[device.type])
    moved, used, chosen = FrozenDtype("auto"), FrozenDtype("auto"), FrozenDtype("bfloat16")
    used.settle()
    assert [module.to("meta").name for module in (moved, used, chosen)] == ["float16", "float32", "bfloat16"]


def test_models_from_before_there_was_a_choice_load_as_float32():
    state = build().state_dict()
    old = {key: value for key, value in state.items() if "frozen_precision" not in key}
    assert len(old) == len(state) - 1
    extractor = build()
    extractor.load_state_dict(old)
    assert extractor.frozen_dtype == "float32"


def test_a_documented_call_converts_a_model(tmp_path):
    model = fill(make_model(extractor={"frozen_dtype": "bfloat16"}))
    obs = observations(model)
    reduced, weights = q_values(model, obs), snapshot(model.q_net.features_extractor.backbone)
    model.policy.set_frozen_dtype("float32")
    exact = q_values(model, obs)
    assert 0 < (exact - reduced).abs().max() < 0.1 * exact.abs().max() + 0.1
    assert_same(weights, model.q_net.features_extractor.backbone.state_dict())
    model.save(tmp_path / "model")
    loaded = DQN.load(tmp_path / "model", device="cpu")
    assert loaded.q_net.features_extractor.frozen_dtype == "float32"
    assert th.equal(q_values(loaded, obs), exact)
    model.policy.set_frozen_dtype("bfloat16")
    assert th.equal(q_values(model, obs), reduced)


@pytest.mark.parametrize("wanted", ["half", None, "bf16"])
def test_other_names_are_refused(wanted):
    with pytest.raises(ValueError, match="frozen_dtype must be one of 'float32', 'float16', 'bfloat16', 'auto'"):
        build(frozen_dtype=wanted)
    with pytest.raises(ValueError, match="frozen_dtype must be one of"):
        build().set_frozen_dtype(wanted)


def test_a_stage_that_unfreezes_computes_from_its_float32_weights():
    extractor, reference = build(frozen_dtype="bfloat16"), build()
    x = th.rand(4, 4, 32, 32)
    extractor(x)
    for each in (extractor, reference):
        each.set_freeze_boundary("layer4")
    entries = extractor.encode(x)
    assert entries.dtype == th.bfloat16
    assert th.equal(extractor.live_part(entries), reference.live_part(entries.float()))
    for each in (extractor, reference):
        each.set_freeze_boundary("all")
    assert th.equal(extractor(x), reference(x))


def test_everything_that_acts_and_learns_computes_in_it():
    model = fill(make_model(learning_rate=1e-3, extractor={"frozen_dtype": "bfloat16"}))
    extractor = model.q_net.features_extractor
    obs = th.as_tensor(observations(model))
    with th.no_grad():
        exact = extractor.plain_features(extractor.scale_raw(obs))
        expected = extractor(extractor.scale_raw(obs))
        assert (expected - exact).abs().max() > 1e-4
        callbacks = [FeatureCacheCallback(), AMPCallback("float16", verbose=0)]
        for callback in callbacks:
            callback.init_callback(model)
            callback.on_training_start({}, {})
        assert th.equal(extractor(extractor.scale_raw(obs)), expected)
        with th.autocast("cpu", th.float16):
            assert th.equal(extractor(extractor.scale_raw(obs)), expected)
        assert th.equal(model.policy.encoding.encode(obs).features, expected)


@pytest.mark.parametrize("optimizer", ["SGD"])
def test_training_in_bfloat16_is_the_same_with_and_without_the_cache(optimizer):
    def train(cached):
        options = {"optimizer_class": optimizer, "feature_norm": "none"}
        extractor = {"frozen_dtype": "bfloat16", "adapter": "per_frame"}
        model = fill(make_model(learning_rate=1e-3, buffer_size=30, policy_kwargs=options, extractor=extractor), 30)
        if cached:
            callback = FeatureCacheCallback()
            callback.init_callback(model)
            callback.on_training_start({}, {})
        np.random.seed(0)
        th.manual_seed(0)
        model.train(60, 4)
        return model

    plain, cached = train(False), train(True)
    for (name, expected), got in zip(plain.q_net.named_parameters(), cached.q_net.parameters(), strict=True):
        assert (got - expected).norm() <= 1e-3 * expected.norm(), name
