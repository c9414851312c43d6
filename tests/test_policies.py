"""The Q-learning policies: construction, saving, the target network (invariants 8, 9, 11 and 14)."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib import QRDQN
from stable_baselines3 import DQN
from stable_baselines3.common.torch_layers import NatureCNN
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn

import sb3_resnet
from sb3_resnet import ResNetExtractor
from sb3_resnet.extractor import extractors_in
from sb3_resnet.nn import weights as weight_files
from sb3_resnet.nn.preprocessing import IMAGENET_MEAN
from tests.helpers import (
    ALGORITHMS,
    TinyGame,
    assert_same,
    fill,
    make_actor_critic,
    make_model,
    observations,
    q_values,
    slowly,
    snapshot,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not th.cuda.is_available(), reason="needs a GPU"))]


def test_the_defaults_are_those_of_the_seed_document():
    with pytest.warns(UserWarning, match="frozen with random weights") as caught:
        model = DQN("ResNetCnnPolicy", TinyGame(), buffer_size=10)
    assert len(caught) == 1
    assert "pretrained=True" in str(caught[0].message)
    assert "freeze_backbone=False" in str(caught[0].message)
    extractor = model.q_net.features_extractor
    assert type(extractor.backbone).__name__ == "ResNet"
    assert sum(p.numel() for p in extractor.backbone.parameters()) == 11_176_512  # ResNet-18 without fc
    assert model.policy.freeze_boundary is None
    assert isinstance(model.policy.optimizer, th.optim.AdamW)
    assert [layer.out_features for layer in model.q_net.q_net if isinstance(layer, nn.Linear)] == [256, 3]


@pytest.mark.parametrize("algorithm", ["dqn", *slowly("qrdqn")])
@pytest.mark.parametrize("device", DEVICES)
def test_save_and_load_give_the_same_values(tmp_path, algorithm, device):
    policy_kwargs = {"net_arch": [16, 8], "dropout": 0.3, "lr_backbone": 1e-5, "optimizer_class": "AdamW"}
    model = make_model(algorithm, device=device, policy_kwargs=policy_kwargs, extractor={"freeze_backbone": False})
    model.learn(40)
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy")
    other = make_model(algorithm, device=device, policy_kwargs=policy_kwargs, seed=5)
    obs = observations(model)
    assert not th.equal(q_values(other, obs), q_values(model, obs))
    other.set_parameters(tmp_path / "model", device=device)
    loaded = ALGORITHMS[algorithm].load(tmp_path / "model", device=device)
    for policy in (
        loaded.policy,
        other.policy,
        type(model.policy).load(tmp_path / "policy", device=device),
        copy.deepcopy(model.policy),
        pickle.loads(pickle.dumps(model.policy)),
    ):
        assert th.equal(q_values(policy, obs), q_values(model, obs))
        assert np.array_equal(policy.predict(obs, deterministic=True)[0], model.policy.predict(obs)[0])
        assert_same(model.policy.target.state_dict(), policy.target.state_dict())
        assert policy.online.training is False
    assert loaded.policy.optimizer.state_dict()["param_groups"] == model.policy.optimizer.state_dict()["param_groups"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_loaded_model_goes_on_learning(tmp_path, algorithm):
    model = make_model(algorithm, extractor={"freeze_backbone": False})
    model.learn(24)
    model.save(tmp_path / "model")
    loaded = ALGORITHMS[algorithm].load(tmp_path / "model", env=TinyGame(), device="cpu")
    before = snapshot(loaded.policy.online)
    loaded.learn(24, reset_num_timesteps=False)
    moved = [key for key, value in loaded.policy.online.state_dict().items() if not th.equal(value, before[key])]
    assert any("layer1" in key for key in moved)
    assert loaded._n_updates == model._n_updates + 6  # learning_starts is behind us


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_rates_of_its_own_load_with_a_learning_rate_of_0(tmp_path, algorithm):
    """As ``rl_zoo3.enjoy`` loads; what is built anew with 0 stays refused."""
    rates = {"lr_head": 2e-4, "lr_backbone": 1e-5}
    model = make_model(algorithm, policy_kwargs=dict(rates))
    model.save(tmp_path / "model")
    nothing = {"learning_rate": 0.0, "lr_schedule": lambda _: 0.0}
    loaded = ALGORITHMS[algorithm].load(tmp_path / "model", device="cpu", custom_objects=nothing)
    groups, expected = loaded.policy.optimizer.param_groups, model.policy.optimizer.param_groups
    assert [group["lr_ratio"] for group in groups] == [group["lr_ratio"] for group in expected]
    assert [group["lr"] for group in groups] == [group["lr"] for group in expected]
    with pytest.raises(ValueError, match="which is 0"):
        make_model(algorithm, policy_kwargs=dict(rates), learning_rate=0.0)


def test_channels_last_images_equal_channels_first_ones():
    class Last(TinyGame):
        def __init__(self):
            super().__init__()
            self.observation_space = spaces.Box(0, 255, (32, 48, 4), np.uint8)

        def _observe(self):
            self.column = 0
            return self.np_random.integers(0, 256, (32, 48, 4), dtype=np.uint8)

    last = make_model(env=Last())
    first = make_model(env=TinyGame((4, 32, 48)))
    obs = observations(first)
    assert last.observation_space.shape == (4, 32, 48)
    assert th.equal(q_values(last, obs), q_values(first, obs))
    assert np.array_equal(last.predict(obs.transpose(0, 2, 3, 1), deterministic=True)[0], first.policy.predict(obs)[0])
    last.learn(16)


@pytest.mark.parametrize("algorithm", ["dqn", *slowly("qrdqn")])
def test_invariant_8_loading_needs_neither_network_nor_weights_file(tmp_path, hub_weights, monkeypatch, algorithm):
    model = make_model(algorithm, extractor={"backbone": "resnet18", "pretrained": True})
    trunk = th.load(hub_weights, weights_only=True)
    assert_same(
        {key: value for key, value in trunk.items() if not key.startswith("fc.")},
        model.policy.online.features_extractor.backbone.state_dict(),
    )
    assert model.policy.online.features_extractor.input_mean.flatten().tolist() == pytest.approx(IMAGENET_MEAN)
    model.learn(16)
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy")
    hub_weights.unlink()
    with pytest.raises(FileNotFoundError, match="weights=PATH"):
        make_model(algorithm, extractor={"backbone": "resnet18", "pretrained": True})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = ALGORITHMS[algorithm].load(tmp_path / "model", env=TinyGame(), device="cpu")
        policy = type(model.policy).load(tmp_path / "policy", device="cpu")
    obs = observations(model)
    assert th.equal(q_values(loaded, obs), q_values(model, obs))
    assert th.equal(q_values(policy, obs), q_values(model, obs))
    loaded.learn(8)


def test_invariant_8_weights_are_read_once(hub_weights, monkeypatch):
    reads = []
    original = weight_files.read_file
    monkeypatch.setattr(weight_files, "read_file", lambda path: reads.append(path) or original(path))
    model = make_model(extractor={"backbone": "resnet18", "pretrained": True})
    assert len(reads) == 1
    assert_same(model.q_net.state_dict(), model.q_net_target.state_dict())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("tau", [1.0, 0.3])
def test_invariant_9_the_target_has_its_own_parameters_and_follows(algorithm, tau):
    model = fill(make_model(algorithm, tau=tau, extractor={"freeze_backbone": False, "norm": "batch"}))
    online, target = model.policy.online, model.policy.target
    assert not {p.data_ptr() for p in online.parameters()} & {p.data_ptr() for p in target.parameters()}
    model.train(3, 4)
    before_online, before_target = snapshot(online), snapshot(target)
    for _ in range(24):
        model._on_step()
    assert_same(before_online, online.state_dict())
    for name, parameter in target.named_parameters():
        expected = (1 - tau) * before_target[name] + tau * before_online[name]
        assert th.allclose(parameter, expected, atol=1e-7)
    for name, buffer in target.named_buffers():
        if "running_" in name:  # SB3 copies BatchNorm's statistics; ours have names that it finds
            assert th.equal(buffer, before_online[name])


def test_invariant_11_everything_in_a_checkpoint_is_data(tmp_path):
    """SB3 pickles ``model.__dict__``; tensors are loaded with ``weights_only=True``."""
    model = make_model()
    plain = DQN("CnnPolicy", TinyGame((4, 36, 36)), buffer_size=10)
    assert {*model.__dict__} == {*plain.__dict__}
    assert all(isinstance(value, th.Tensor) for value in model.policy.state_dict().values())
    model.save(tmp_path / "model")
    assert_same(model.policy.state_dict(), DQN.load(tmp_path / "model", device="cpu").policy.state_dict())


BAD = [
    ({"dropuot": 0.1}, None, TypeError, "ResNetCnnPolicy has no argument 'dropuot'; did you mean 'dropout'"),
    ({"backbone": "resnet18"}, None, TypeError, "no argument 'backbone': write it in features_extractor_kwargs"),
    (
        {"freeze_backbone": False},
        None,
        TypeError,
        "no argument 'freeze_backbone': write it in features_extractor_kwargs",
    ),
    ({"pretrained": True}, None, TypeError, "no argument 'pretrained': write it in features_extractor_kwargs"),
    ({}, {"lr_backbone": 1e-5}, TypeError, "ResNetExtractor has no argument 'lr_backbone': write it in policy_kwargs"),
    ({}, {"net_arch": [8]}, TypeError, "ResNetExtractor has no argument 'net_arch': write it in policy_kwargs"),
    ({"dropout": 1.5}, None, ValueError, "dropout must be finite and >= 0 and <= 0.99"),
    ({"net_arch": [0]}, None, ValueError, "net_arch must be finite and >= 1"),
    ({"net_arch": 256}, None, TypeError, r"such as \[256\]"),
    ({"net_arch": "256"}, None, TypeError, r"such as \[256\]"),
    ({"feature_norm": "batch"}, None, ValueError, "feature_norm must be one of"),
    ({"activation_fn": "Rellu"}, None, ValueError, "such as 'ReLU'"),
    ({"optimizer_class": "Adamax2"}, None, ValueError, "optimizer_class must be one of"),
    ({"optimizer_kwargs": {"weight_decay": 0.1}}, None, ValueError, "must not hold 'weight_decay'"),
    ({"optimizer_kwargs": {"lr": 0.1}}, None, ValueError, "write lr_head"),
    ({"normalize_images": False}, None, ValueError, "leave the argument out"),
    ({"features_extractor_class": NatureCNN}, None, TypeError, "must be ResNetExtractor"),
    ({}, {"backbone": "resnet19"}, ValueError, "did you mean 'resnet1"),
    ({}, {"bakbone": "resnet18"}, TypeError, "did you mean 'backbone'"),
    ({}, {"input_mean": [0.5], "input_std": [0.5]}, ValueError, "must be three numbers"),
    ({}, {"input_mean": [0.5] * 3}, ValueError, "go together"),
    ({}, {"pretrained": "yes"}, TypeError, "pretrained must be true or false"),
    ({}, {"weights": "nowhere.pth"}, FileNotFoundError, "no such file"),
]


@pytest.mark.parametrize(("policy", "extractor", "error", "message"), BAD)
def test_invariant_14_wrong_arguments_fail_at_construction(policy, extractor, error, message):
    with pytest.raises(error, match=message):
        make_model(policy_kwargs=policy, extractor=extractor)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-1, 1, (4, 32, 32), np.float32),
        spaces.Box(0, 200, (4, 32, 32), np.uint8),
        spaces.Box(-np.inf, np.inf, (4, 32, 32), np.float32),
        spaces.Box(0, 255, (32,), np.uint8),
    ],
)
def test_invariant_14_spaces_that_are_no_images_fail_at_construction(space):
    game = TinyGame()
    game.observation_space = space
    with pytest.raises(ValueError, match=r"bounds.*normalize_images|needs images"):
        make_model(env=game)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_without_image_scaling_observations_of_vec_normalize_are_taken_as_sb3_takes_them(algorithm, tmp_path):
    """As SB3 with NatureCNN: an ``AssertionError``, unless ``normalize_images=False`` says that these are no images."""
    env = VecNormalize(DummyVecEnv([TinyGame]))
    with pytest.raises(AssertionError, match="These are the bounds of VecNormalize"):
        make_model(algorithm, env=env)
    model = make_model(algorithm, env=env, policy_kwargs={"normalize_images": False})
    model.learn(40)
    obs = env.normalize_obs(env.get_original_obs())
    model.save(tmp_path / "model")
    loaded = ALGORITHMS[algorithm].load(tmp_path / "model", device="cpu")
    assert th.equal(q_values(loaded, th.as_tensor(obs)), q_values(model, th.as_tensor(obs)))


@pytest.mark.parametrize("algorithm", ["dqn", "ppo"])
def test_a_subclass_that_cannot_take_observations_as_they_are_is_told_how_it_could(algorithm):
    class Closed(ResNetExtractor):
        def __init__(self, observation_space, backbone="resnet_mini"):
            super().__init__(observation_space, backbone=backbone)

    class Open(ResNetExtractor):
        def __init__(self, observation_space, **kwargs):
            super().__init__(observation_space, **kwargs)

    def build(extractor_class, env):
        policy = {"normalize_images": False, "features_extractor_class": extractor_class}
        make = make_model if algorithm == "dqn" else make_actor_critic
        return make(algorithm, env=env, policy_kwargs=policy, extractor={"backbone": "resnet_mini"})

    odd, known = TinyGame(), TinyGame()
    odd.observation_space = spaces.Box(-1, 1, (4, 32, 32), np.float32)
    known.observation_space = spaces.Box(0, 1, (4, 32, 32), np.float32)
    assert extractors_in(build(Open, odd).policy)[0].preprocessing.normalized
    assert not extractors_in(build(Closed, known).policy)[0].preprocessing.normalized
    with pytest.raises(TypeError, match=r"normalized_image=True to Closed, .*: let its __init__ take \*\*kwargs"):
        build(Closed, odd)


def test_head_options_reach_the_network():
    policy = make_model(
        policy_kwargs={"net_arch": [], "feature_norm": "none", "activation_fn": "Tanh", "dropout": 0.5}
    ).policy
    assert [type(layer) for layer in policy.q_net.q_net] == [nn.Linear]
    policy = make_model(
        policy_kwargs={"net_arch": [7], "feature_norm": "layer", "activation_fn": "Tanh", "dropout": 0.5}
    ).policy
    assert [type(layer) for layer in policy.q_net.q_net] == [nn.LayerNorm, nn.Linear, nn.Tanh, nn.Dropout, nn.Linear]
    assert [type(layer) for layer in policy.q_net_target.q_net] == [type(layer) for layer in policy.q_net.q_net]


def test_features_dim_belongs_to_the_head():
    model = make_model(extractor={"features_dim": 11})
    groups = {group["name"]: {*map(id, group["params"])} for group in model.policy.optimizer.param_groups}
    assert id(model.q_net.features_extractor.projection.weight) in groups["head"]
    assert model.q_net.q_net[1].in_features == 11


def test_qrdqn_gets_adamw_with_the_papers_eps_unless_the_user_names_one():
    model = make_model("qrdqn", batch_size=32)
    assert type(model.policy.optimizer) is th.optim.AdamW
    assert model.policy.optimizer.defaults["eps"] == pytest.approx(0.01 / 32)
    assert type(make_model("qrdqn", policy_kwargs={"optimizer_class": "SGD"}).policy.optimizer) is th.optim.SGD
    assert type(make_model("qrdqn", policy_kwargs={"optimizer_class": th.optim.Adam}).policy.optimizer) is th.optim.Adam
    by_name = {"optimizer_class": "Adam", "optimizer_kwargs": {"eps": 1e-5}}
    optimizer = make_model("qrdqn", policy_kwargs=by_name).policy.optimizer
    assert type(optimizer) is th.optim.Adam
    assert optimizer.defaults["eps"] == 1e-5


@pytest.mark.parametrize("own", [{}, {"n_quantiles": 5}])
def test_the_class_of_dqn_given_to_qrdqn_says_what_to_write(own):
    eyes = {"features_extractor_kwargs": {"backbone": "resnet_mini"}, **own}
    with pytest.raises(TypeError, match="QRDQN write its name as a string, 'ResNetCnnPolicy'"):
        QRDQN(sb3_resnet.ResNetCnnPolicy, TinyGame(), buffer_size=10, policy_kwargs=eyes)
    assert not hasattr(make_model().policy, "quantile_net")


def test_registering_twice_changes_nothing():
    before = {**DQN.policy_aliases}
    sb3_resnet.register_policies()
    assert before == DQN.policy_aliases
    assert DQN.policy_aliases["ResNetCnnPolicy"] is sb3_resnet.ResNetCnnPolicy


def test_a_copied_model_learns_by_itself():
    model = make_model(extractor={"freeze_backbone": False})
    model.learn(24)
    before = snapshot(model.policy)
    clone = copy.deepcopy(model)
    clone.learn(24)
    assert_same(before, model.policy.state_dict())
    assert not th.equal(before["q_net.q_net.1.weight"], clone.policy.state_dict()["q_net.q_net.1.weight"])
    rates = {group["name"]: group["lr"] for group in clone.policy.optimizer.param_groups}
    assert rates["backbone"] == pytest.approx(rates["head"] / 10)


def test_the_same_seed_gives_the_same_bits():
    states = []
    for _ in range(2):
        model = make_model(extractor={"freeze_backbone": False}, policy_kwargs={"dropout": 0.2})
        model.learn(40)
        states.append(snapshot(model.policy))
    assert_same(*states)


def test_parameters_are_those_that_a_walk_finds_also_in_a_copy():
    policy = make_model().policy
    for one in (policy, copy.deepcopy(policy)):
        assert [*map(id, one.parameters())] == [*map(id, th.nn.Module.parameters(one))]
    assert {*map(id, policy.parameters())}.isdisjoint(map(id, copy.deepcopy(policy).parameters()))
    assert [*policy.parameters(recurse=False)] == []


def test_the_optimizer_is_fused_where_pytorch_can_unless_told_otherwise():
    assert make_model().policy.optimizer.defaults["fused"] is True
    told = make_model(policy_kwargs={"optimizer_kwargs": {"fused": False}})
    assert told.policy.optimizer.defaults["fused"] is False
    assert "fused" not in make_model(policy_kwargs={"optimizer_class": "RMSprop"}).policy.optimizer.defaults


@pytest.mark.parametrize("norm", ["frozen", "batch"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_as_with_sb3s_policies_random_values_fit_a_whole_state_dict(algorithm, norm, tmp_path):
    """SB3's own test_save_load.py draws them for each entry, of the policy and of the online network."""
    model = make_model(algorithm, extractor={"backbone": "resnet_mini", "norm": norm})
    obs = observations(model, 3)
    for module in (model.policy, model.policy.online):
        before = snapshot(module)
        assert {value.dtype for value in before.values()} == {th.float32}
        drawn = {name: th.rand_like(value) for name, value in before.items()}
        module.load_state_dict(drawn)
        assert not [name for name, value in module.state_dict().items() if th.equal(value, before[name])]
        assert_same(snapshot(module), drawn)
        module.save(tmp_path / "module.pth")
        loaded = type(module).load(tmp_path / "module.pth")
        assert_same(snapshot(loaded), drawn)
        for one, other in zip(module.parameters(), loaded.parameters(), strict=True):
            assert one.requires_grad == other.requires_grad
        assert np.array_equal(module.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])


def test_state_dicts_with_whole_numbers_from_older_files_load():
    policy = make_model(extractor={"backbone": "resnet_mini", "frozen_dtype": "bfloat16"}).policy
    policy.set_freeze_boundary("layer3", at_update=70_001)
    whole = ("boundary.index", "boundary.moved_at", "frozen_precision.index", "num_batches_tracked")
    old = {name: value.long() if name.endswith(whole) else value for name, value in policy.state_dict().items()}
    other = make_model(extractor={"backbone": "resnet_mini"}).policy
    other.load_state_dict(old)
    extractor = other.online.features_extractor
    assert (other.freeze_boundary, extractor.boundary.moved_at_update) == ("layer3", 70_001)
    assert extractor.frozen_dtype == "bfloat16"
    assert_same(other.state_dict(), policy.state_dict())
