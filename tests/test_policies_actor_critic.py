"""``"ResNetCnnPolicy"`` of PPO and A2C: the invariants of the design, and what is their own."""

import copy
import pickle
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib import MaskablePPO
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.envs import SimpleMultiObsEnv
from stable_baselines3.common.logger import configure
from stable_baselines3.common.utils import set_random_seed
from torch import nn

import sb3_resnet
from sb3_resnet.callbacks import GradientClipCallback, LRScheduleCallback, UnfreezeCallback
from sb3_resnet.cli.network import ScoreNetwork
from sb3_resnet.cli.saved_groups import saved_groups
from sb3_resnet.nn import weights as weight_files
from sb3_resnet.optim.updates import gradient_updates
from tests.helpers import (
    ON_POLICY,
    TinyGame,
    assert_same,
    make_actor_critic,
    observations,
    probabilities_and_values,
    resumed_in_a_new_process,
    snapshot,
)

# A2C has PPO's policy and buffer; what is its own is its optimizer and how it counts updates.
algorithms = pytest.mark.parametrize("algorithm", ["ppo"])
both = pytest.mark.parametrize("algorithm", ["ppo", pytest.param("a2c", marks=pytest.mark.slow)])
sharing = pytest.mark.parametrize("shared", [True, False], ids=["one ResNet", "two ResNets"])


class Steering(TinyGame):
    def __init__(self):
        super().__init__()
        self.action_space = spaces.Box(-1, 1, (2,), np.float32)

    def step(self, action):
        return super().step(round(float(action[0]) + 1))


class Masked(TinyGame):
    def __init__(self, several=False):
        super().__init__()
        self.several = several
        self.action_space = spaces.MultiDiscrete([3, 2]) if several else spaces.Discrete(3)

    def step(self, action):
        return super().step(action[0] if self.several else action)

    def action_masks(self):
        return np.array([True, False, True, *([True, True] if self.several else [])])


def build(algorithm="ppo", shared=True, **kwargs):
    policy_kwargs = {"share_features_extractor": shared, **kwargs.pop("policy_kwargs", {})}
    return make_actor_critic(algorithm, policy_kwargs=policy_kwargs, **kwargs)


def trunks(model):
    policy = model.policy
    return [policy.pi_features_extractor, policy.vf_features_extractor][: 1 if policy.share_features_extractor else 2]


@sharing
def test_the_defaults_are_those_of_the_other_policies(shared):
    with pytest.warns(UserWarning, match="frozen with random weights") as caught:
        model = PPO(
            "ResNetCnnPolicy", TinyGame(), n_steps=8, batch_size=8, policy_kwargs={"share_features_extractor": shared}
        )
    assert len(caught) == 1
    policy = model.policy
    assert type(policy) is sb3_resnet.ResNetActorCriticCnnPolicy
    assert policy.freeze_boundary is None
    assert type(policy.optimizer) is th.optim.AdamW
    assert policy.optimizer.defaults["eps"] == 1e-5
    for head in policy.heads:
        assert [layer.out_features for layer in head if isinstance(layer, nn.Linear)] == [256]
    for extractor in trunks(model):
        assert sum(p.numel() for p in extractor.backbone.parameters()) == 11_176_512  # ResNet-18 without fc
    groups = {group["name"]: group for group in policy.optimizer.param_groups}
    assert [groups[name]["lr"] for name in ("head", "backbone")] == pytest.approx([3e-4, 3e-5])
    assert [groups[name]["weight_decay"] for name in ("head", "head_no_decay", "backbone")] == [1e-4, 0.0, 1e-4]


@pytest.mark.parametrize(
    ("kwargs", "policy_kwargs", "optimizer", "decay"),
    [
        ({}, {}, th.optim.RMSprop, 0.0),
        ({}, {"weight_decay": 1e-3}, th.optim.RMSprop, 1e-3),
        ({"use_rms_prop": False}, {}, th.optim.AdamW, 1e-4),
        ({}, {"optimizer_class": "Adam"}, th.optim.Adam, 0.0),
    ],
)
def test_a2c_keeps_its_own_optimizer(tmp_path, kwargs, policy_kwargs, optimizer, decay):
    model = make_actor_critic("a2c", policy_kwargs=policy_kwargs, **kwargs)
    model.learn(8)
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy")
    for policy in (
        model.policy,
        A2C.load(tmp_path / "model", device="cpu").policy,
        type(model.policy).load(tmp_path / "policy", device="cpu"),
    ):
        assert type(policy.optimizer) is optimizer
        assert policy.optimizer.param_groups[0]["eps"] == 1e-5
        decays = {group["name"]: group["weight_decay"] for group in policy.optimizer.param_groups}
        assert decays == {"head": decay, "head_no_decay": 0.0, "backbone": decay, "backbone_no_decay": 0.0}


@algorithms
@sharing
def test_invariant_1_groups_hold_each_parameter_once(algorithm, shared):
    model = build(algorithm, shared, env=Steering(), extractor={"features_dim": 11})
    policy = model.policy
    held = {group["name"]: {id(p) for p in group["params"]} for group in policy.optimizer.param_groups}
    assert sum(map(len, held.values())) == len({*policy.parameters()})
    for extractor in trunks(model):
        assert {id(p) for p in extractor.backbone.parameters()} <= held["backbone"] | held["backbone_no_decay"]
        assert id(extractor.adapter.weight) in held["backbone"]
        assert id(extractor.projection.weight) in held["head"]
    for layer in (policy.action_net, policy.value_net, policy.mlp_extractor.value_net[1]):
        assert id(layer.weight) in held["head"]
        assert id(layer.bias) in held["head_no_decay"]
    assert id(policy.log_std) in held["head_no_decay"]
    rows = sb3_resnet.param_group_summary(model, show=False)
    assert sum(row["parameters"] for row in rows) == sum(p.numel() for p in policy.parameters())
    assert sum(row["trainable_parameters"] for row in rows if row["name"].startswith("backbone")) == 0


@sharing
def test_stages_of_both_networks_learn_at_the_rate_of_their_stage(shared):
    model = build(shared=shared, policy_kwargs={"lr_decay_per_stage": 0.5})
    groups = {group["name"]: group for group in model.policy.optimizer.param_groups}
    assert groups["backbone.layer4"]["lr"] == pytest.approx(2 * groups["backbone.layer3"]["lr"])
    for extractor in trunks(model):
        members = {id(p) for p in groups["backbone.layer3"]["params"]}
        assert id(extractor.backbone.layer3[0].conv1.weight) in members


@algorithms
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_invariant_2_effective_rates_after_every_train(algorithm, optimizer):
    rates = {"lr_head": 2e-3, "lr_backbone": 1e-4}
    model = build(
        algorithm,
        policy_kwargs={**rates, "optimizer_class": optimizer},
        extractor={"freeze_backbone": False},
        learning_rate=lambda remaining: 1e-3 * remaining,
    )
    seen, train = [], model.train

    def watched():
        train()
        lr = {group["name"]: group["lr"] for group in model.policy.optimizer.param_groups}
        seen.append([model._current_progress_remaining, lr["head"], lr["head_no_decay"], lr["backbone"]])

    model.train = watched
    model.learn(40)
    assert len(seen) == 5
    for remaining, *rest in seen:
        assert rest == pytest.approx([2e-3 * remaining, 2e-3 * remaining, 1e-4 * remaining])


@both
def test_invariant_3_gradient_updates_are_counted_without_any_callback(tmp_path, algorithm):
    model = build(algorithm)
    model.learn(16)
    each = 4 if algorithm == "ppo" else 1
    assert gradient_updates(model) == 2 * each
    model.learn(8)  # resets the clock of environment steps
    model.save(tmp_path / "model")
    loaded = ON_POLICY[algorithm].load(tmp_path / "model", env=TinyGame(), device="cpu")
    assert gradient_updates(loaded) == 3 * each
    clone = copy.deepcopy(loaded)
    clone.learn(8, callback=LRScheduleCallback(warmup_steps=8 * each))
    assert gradient_updates(clone) == 4 * each
    assert clone.policy.optimizer.param_groups[0]["lr"] == pytest.approx(loaded.learning_rate * 4 / 8)
    assert gradient_updates(loaded) == 3 * each


@both
@sharing
def test_invariant_5_frozen_means_frozen(algorithm, shared):
    updates = 20
    model = build(
        algorithm,
        shared,
        learning_rate=1e-2,
        extractor={"norm": "batch"},
        policy_kwargs={"weight_decay": 0.1, "lr_backbone": 1e-2},
        **({"n_epochs": 10} if algorithm == "ppo" else {"n_steps": 2}),
    )
    model.policy.set_freeze_boundary("layer3")
    before = [snapshot(extractor) for extractor in trunks(model)]
    model.learn(updates * 8 // 20 if algorithm == "ppo" else updates * 2)
    assert gradient_updates(model) == updates
    for extractor, state in zip(trunks(model), before, strict=True):
        moved = {key for key, value in extractor.state_dict().items() if not th.equal(value, state[key])}
        assert any(key.startswith("backbone.layer3") for key in moved)
        assert any("layer4.0.bn1.running_mean" in key for key in moved)
        assert [key for key in moved if not key.startswith(("backbone.layer3", "backbone.layer4"))] == []


@algorithms
@sharing
def test_invariant_6_the_phase_is_part_of_the_model(tmp_path, algorithm, shared):
    model = build(algorithm, shared)
    model.policy.set_freeze_boundary("layer4", at_update=7)
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy")
    other = build(algorithm, shared)
    other.set_parameters(tmp_path / "model", device="cpu")
    loaded = ON_POLICY[algorithm].load(tmp_path / "model", device="cpu")
    for policy in (
        loaded.policy,
        other.policy,
        type(model.policy).load(tmp_path / "policy", device="cpu"),
        copy.deepcopy(model.policy),
    ):
        assert policy.freeze_boundary == "layer4"
        for extractor in (policy.pi_features_extractor, policy.vf_features_extractor):
            assert extractor.boundary.moved_at_update == 7
            assert extractor.backbone.layer4[0].conv1.weight.requires_grad
            assert not extractor.backbone.layer3[0].conv1.weight.requires_grad
        assert (policy.pi_features_extractor is policy.vf_features_extractor) == shared


def play(model, number):
    """One rollout without an environment: observations and rewards depend on its number alone."""
    rng, buffer, policy = np.random.default_rng(number), model.rollout_buffer, model.policy
    policy.set_training_mode(False)
    buffer.reset()
    for _ in range(model.n_steps):
        obs = rng.integers(0, 256, (1, *model.observation_space.shape), dtype=np.uint8)
        with th.no_grad():
            actions, values, log_probs = policy(th.as_tensor(obs))
        buffer.add(obs, actions.numpy().reshape(1, 1), rng.normal(size=1), np.zeros(1), values, log_probs)
    buffer.compute_returns_and_advantage(values, np.zeros(1))


ROUNDS = 9
SAVES = {"before": 2, "right after": 4, "in the ramp": 5, "long after": 7}


def drive(model, rounds, reset=False, after_round=lambda done: None):
    """``learn()``'s loop without an environment."""
    model._setup_learn(1, None, reset_num_timesteps=reset)
    begin = model.num_timesteps
    phase = {"at_timestep": 8 * 4, "unfreeze_from": "layer4", "lr_backbone": 5e-4, "ramp": 8}
    used = [UnfreezeCallback([phase], verbose=0), LRScheduleCallback(4, "cosine", decay_steps=60)]
    for callback in [*used, GradientClipCallback(1.0)]:
        callback.init_callback(model)
        callback.on_training_start({}, {})
    for done in rounds:
        model.num_timesteps += model.n_steps
        play(model, done)
        for callback in used:
            callback.on_rollout_end()
        model.train()
        after_round(done)
    return begin


def random_states(states=None):
    if states is not None:
        np.random.set_state(states[0])
        th.set_rng_state(states[1])
    return np.random.get_state(), th.get_rng_state()


def resume(folder, algorithm, point):
    """What a new process does."""
    model = ON_POLICY[algorithm].load(f"{folder}/{point}.zip", env=TinyGame(), device="cpu")
    model._setup_learn(1, None, reset_num_timesteps=False)
    with open(f"{folder}/{point}.pkl", "rb") as file:
        random_states(pickle.load(file))
    drive(model, range(point + 1, ROUNDS + 1))
    return model


def assert_golden(whole, resumed):
    assert_same(whole.policy.state_dict(), resumed.policy.state_dict())
    expected, got = whole.policy.optimizer.state_dict(), resumed.policy.optimizer.state_dict()
    assert expected["param_groups"] == got["param_groups"]
    assert expected["state"].keys() == got["state"].keys()
    for index, state in expected["state"].items():
        assert all(
            th.equal(th.as_tensor(value), th.as_tensor(got["state"][index][key])) for key, value in state.items()
        )


def golden_run(folder, algorithm, shared=True):
    model = build(algorithm, shared, learning_rate=1e-3, policy_kwargs={"dropout": 0.2}, extractor={"norm": "batch"})

    def save(done):
        if done in SAVES.values():
            model.save(folder / f"{done}.zip")
            (folder / f"{done}.pkl").write_bytes(pickle.dumps(random_states()))

    set_random_seed(0)
    drive(model, range(1, ROUNDS + 1), True, save)
    moved = 12 if algorithm == "ppo" else 3
    assert model.policy.pi_features_extractor.boundary.moved_at_update == moved  # else this would prove nothing
    return model


@pytest.mark.slow
@algorithms
@sharing
def test_invariant_7_golden_resume_in_a_new_process(tmp_path, algorithm, shared):
    whole = golden_run(tmp_path, algorithm, shared)
    for file in resumed_in_a_new_process("test_policies_actor_critic", tmp_path, algorithm, SAVES.values()):
        assert_golden(whole, ON_POLICY[algorithm].load(file, device="cpu"))


@algorithms
@pytest.mark.slow
def test_invariant_8_loading_needs_neither_network_nor_weights_file(tmp_path, hub_weights, monkeypatch, algorithm):
    reads, original = [], weight_files.read_file
    monkeypatch.setattr(weight_files, "read_file", lambda path: reads.append(path) or original(path))
    pretrained = {"backbone": "resnet18", "pretrained": True}
    model = build(algorithm, False, extractor=pretrained, policy_kwargs={"net_arch": [8]})
    assert len(reads) == 1
    file = th.load(hub_weights, weights_only=True)
    for extractor in trunks(model):
        assert_same({k: v for k, v in file.items() if not k.startswith("fc.")}, extractor.backbone.state_dict())
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy")
    hub_weights.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = ON_POLICY[algorithm].load(tmp_path / "model", env=TinyGame(), device="cpu")
        policy = type(model.policy).load(tmp_path / "policy", device="cpu")
    obs = observations(model, 3)
    expected = probabilities_and_values(model, obs)
    assert th.equal(probabilities_and_values(loaded, obs), expected)
    assert th.equal(probabilities_and_values(policy, obs), expected)
    loaded.learn(8)


@algorithms
@sharing
def test_save_and_load_give_the_same_predictions(tmp_path, algorithm, shared):
    policy_kwargs = {"net_arch": {"pi": [16], "vf": [12, 8]}, "dropout": 0.3, "lr_backbone": 1e-4}
    model = build(algorithm, shared, policy_kwargs=policy_kwargs, extractor={"freeze_backbone": False})
    model.learn(24)
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy")
    other = build(algorithm, shared, policy_kwargs=policy_kwargs, seed=5)
    obs = observations(model)
    expected = probabilities_and_values(model, obs)
    assert not th.equal(probabilities_and_values(other, obs), expected)
    other.set_parameters(tmp_path / "model", device="cpu")
    loaded = ON_POLICY[algorithm].load(tmp_path / "model", env=TinyGame(), device="cpu")
    for policy in (
        loaded.policy,
        other.policy,
        type(model.policy).load(tmp_path / "policy", device="cpu"),
        copy.deepcopy(model.policy),
        pickle.loads(pickle.dumps(model.policy)),
    ):
        assert policy.training is False
        assert th.equal(probabilities_and_values(policy, obs), expected)
        assert np.array_equal(policy.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])
        assert [layer.out_features for layer in policy.heads[1] if isinstance(layer, nn.Linear)] == [12, 8]
    assert loaded.policy.optimizer.state_dict()["param_groups"] == model.policy.optimizer.state_dict()["param_groups"]
    before = snapshot(loaded.policy)
    loaded.learn(8, reset_num_timesteps=False)
    moved = [key for key, value in loaded.policy.state_dict().items() if not th.equal(value, before[key])]
    assert any(key.startswith("vf_features_extractor.backbone.layer1") for key in moved)


@algorithms
@pytest.mark.parametrize("use_sde", [False, True])
def test_a_copy_learns_and_leaves_the_original_alone(algorithm, use_sde):
    env = Steering() if use_sde else TinyGame()
    model = build(algorithm, extractor={"freeze_backbone": False}, env=env, use_sde=use_sde)
    model.learn(8)
    clone = copy.deepcopy(model)
    before = snapshot(model.policy)
    clone.learn(8)
    assert_same(before, model.policy.state_dict())
    assert not th.equal(before["action_net.weight"], clone.policy.action_net.weight)
    groups = {group["name"]: group["lr"] for group in clone.policy.optimizer.param_groups}
    assert groups["backbone"] == pytest.approx(groups["head"] / 10)


@algorithms
def test_rates_of_its_own_load_with_a_learning_rate_of_0(tmp_path, algorithm):
    """As ``rl_zoo3.enjoy`` loads."""
    model = build(algorithm, policy_kwargs={"lr_head": 2e-4, "lr_backbone": 1e-5})
    model.save(tmp_path / "model")
    nothing = {"learning_rate": 0.0, "lr_schedule": lambda _: 0.0}
    loaded = ON_POLICY[algorithm].load(tmp_path / "model", device="cpu", custom_objects=nothing)
    groups, expected = loaded.policy.optimizer.param_groups, model.policy.optimizer.param_groups
    assert [group["lr_ratio"] for group in groups] == [group["lr_ratio"] for group in expected]


@algorithms
@sharing
@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_the_commands_read_the_saved_model(tmp_path, algorithm, shared, decay):
    model = build(algorithm, shared, policy_kwargs={"lr_decay_per_stage": decay})
    model.policy.set_freeze_boundary("layer4")
    model.learn(8)
    model.save(tmp_path / "model.zip")
    assert saved_groups(tmp_path / "model.zip") == sb3_resnet.param_group_summary(model, show=False)
    obs = observations(model)
    with th.no_grad():
        scores = ScoreNetwork(model)(th.as_tensor(obs))
    expected = probabilities_and_values(model, obs)[:, :-1]
    assert th.allclose(scores.softmax(dim=1), expected, atol=1e-5)


def test_invariant_11_nothing_is_hung_on_the_model():
    plain = PPO("CnnPolicy", TinyGame((4, 36, 36)), n_steps=8, batch_size=4, device="cpu")
    assert {*build().__dict__} == {*plain.__dict__}


@sharing
def test_training_equals_that_of_the_stock_policy(shared):
    """With the stock policy's layers, one rate for all and no weight decay, only the name differs."""
    common = {"n_steps": 8, "batch_size": 4, "n_epochs": 2, "seed": 0, "device": "cpu"}
    eyes = {"backbone": "resnet_mini", "freeze_backbone": False}
    plainly = {"share_features_extractor": shared, "features_extractor_kwargs": eyes}
    plainly["optimizer_kwargs"] = {"eps": 1e-5, "foreach": False}
    stock = PPO(
        "CnnPolicy",
        TinyGame(),
        policy_kwargs={**plainly, "features_extractor_class": sb3_resnet.ResNetExtractor},
        **common,
    )
    own = {"net_arch": {"pi": [64, 64], "vf": [64, 64]}, "activation_fn": "Tanh", "optimizer_class": "Adam"}
    own |= {"feature_norm": "none", "lr_backbone": 3e-4}
    ours = PPO("ResNetCnnPolicy", TinyGame(), policy_kwargs={**plainly, **own}, **common)
    ours.policy.load_state_dict(stock.policy.state_dict())
    for model in (stock, ours):
        set_random_seed(3)
        model.learn(24)
    expected = stock.policy.state_dict()
    for key, value in ours.policy.state_dict().items():
        assert th.allclose(value.float(), expected[key].float(), rtol=1e-5, atol=1e-6), key


@algorithms
@pytest.mark.parametrize("net_arch", [[8], []])
def test_statistics_of_features_move_in_updates_only(algorithm, net_arch):
    model = build(algorithm, policy_kwargs={"net_arch": net_arch})
    obs = observations(model)
    norms = [head[0] for head in model.policy.heads]
    model.predict(obs)
    probabilities_and_values(model, obs)
    assert [float(norm.running_count) for norm in norms] == [0.0, 0.0]
    model.learn(8)
    assert [float(norm.running_count) for norm in norms] == ([16.0] * 2 if algorithm == "ppo" else [8.0] * 2)
    assert not th.equal(norms[0].running_mean, th.zeros_like(norms[0].running_mean))


def test_the_statistics_alone_hardly_change_the_policy():
    """PPO's ratio is 1 where nothing is learnt: log-probabilities are of the statistics at the time of acting."""
    model = build(n_steps=64, batch_size=32, learning_rate=0.0)
    model.learn(64)
    model.set_logger(configure(None, []))
    model.learn(64, log_interval=None, reset_num_timesteps=False)
    assert abs(model.logger.name_to_value["train/approx_kl"]) < 1e-5
    assert model.logger.name_to_value["train/clip_fraction"] == 0.0


@pytest.mark.parametrize(("norm", "kind"), [("layer", nn.LayerNorm), ("none", nn.Linear)])
def test_heads_are_as_asked_for(norm, kind):
    model = build(policy_kwargs={"feature_norm": norm, "net_arch": [8], "dropout": 0.1, "activation_fn": "SiLU"})
    for head in model.policy.heads:
        assert isinstance(head[0], kind)
        assert [type(layer) for layer in head][-3:] == [nn.Linear, nn.SiLU, nn.Dropout]
    model.learn(8)


def test_no_norm_and_no_hidden_layer_leave_the_features():
    model = build(policy_kwargs={"feature_norm": "none", "net_arch": []}, extractor={"freeze_backbone": False})
    assert [len(head) for head in model.policy.heads] == [0, 0]
    assert model.policy.action_net.in_features == model.policy.features_dim
    model.learn(8)


def test_continuous_actions_and_state_dependent_noise():
    model = build(env=Steering(), use_sde=True)
    model.learn(16)
    assert model.predict(observations(model), deterministic=True)[0].shape == (8, 2)


def test_rates_and_precision_can_be_changed():
    model = build(shared=False)
    model.policy.set_learning_rates(lr_backbone=1e-3, weight_decay=0.5)
    model.policy.set_frozen_dtype("bfloat16")
    assert [extractor.frozen_dtype for extractor in trunks(model)] == ["bfloat16", "bfloat16"]
    model.learn(8)
    groups = {group["name"]: group for group in model.policy.optimizer.param_groups}
    assert groups["backbone"]["lr"] == pytest.approx(1e-3)
    assert [groups[name]["weight_decay"] for name in ("head", "head_no_decay")] == [0.5, 0.0]


def test_maskable_ppo_has_the_policy_too(tmp_path):
    policy_kwargs = {"features_extractor_kwargs": {"backbone": "resnet_mini"}, "share_features_extractor": False}
    model = MaskablePPO("ResNetCnnPolicy", Masked(), n_steps=8, batch_size=4, n_epochs=2, policy_kwargs=policy_kwargs)
    model.policy.set_freeze_boundary("layer4")
    model.learn(16)
    model.save(tmp_path / "model")
    loaded = MaskablePPO.load(tmp_path / "model")
    assert loaded.policy.freeze_boundary == "layer4"
    assert gradient_updates(loaded) == 8
    assert_same(loaded.policy.state_dict(), model.policy.state_dict())
    masks = np.tile([False, False, True], (8, 1))
    assert loaded.predict(observations(model), action_masks=masks)[0].tolist() == [2] * 8


@pytest.mark.parametrize("several", [False, True])
def test_a_copy_of_maskable_ppo_learns(several):
    policy_kwargs = {"features_extractor_kwargs": {"backbone": "resnet_mini"}}
    options = {"n_steps": 8, "batch_size": 4, "n_epochs": 2, "policy_kwargs": policy_kwargs}
    model = MaskablePPO("ResNetCnnPolicy", Masked(several), **options)
    model.learn(8)
    before = snapshot(model.policy)
    copy.deepcopy(model).learn(8)
    assert_same(before, model.policy.state_dict())


BAD = [
    ({"dropuot": 0.1}, TypeError, "ResNetCnnPolicy has no argument 'dropuot'; did you mean 'dropout'"),
    ({"pretrained": True}, TypeError, "no argument 'pretrained': write it in features_extractor_kwargs"),
    ({"net_arch": {"pi": [8], "qf": [8]}}, ValueError, "a dict of 'pi' and 'vf', got the keys"),
    ({"net_arch": {"pi": "8"}}, TypeError, "net_arch must be a list of layer widths"),
    ({"net_arch": [0]}, ValueError, "net_arch must be"),
    ({"optimizer_kwargs": {"weight_decay": 0.1}}, ValueError, "optimizer_kwargs must not hold 'weight_decay'"),
    ({"lr_backbone": -1}, ValueError, "lr_backbone must be"),
]


@pytest.mark.parametrize(("policy_kwargs", "error", "message"), BAD, ids=[str(bad[0]) for bad in BAD])
def test_wrong_arguments_say_what_to_write(policy_kwargs, error, message):
    with pytest.raises(error, match=message):
        build(policy_kwargs=policy_kwargs)


@pytest.mark.parametrize("algorithm", [PPO, A2C, DQN])
def test_a_dict_of_observations_is_refused_with_the_right_policy(algorithm):
    small = {"buffer_size": 10} if algorithm is DQN else {"n_steps": 8}
    with pytest.raises(ValueError, match="the observation space is a Dict: write policy='ResNetMultiInputPolicy'"):
        algorithm("ResNetCnnPolicy", SimpleMultiObsEnv(), **small)


@pytest.mark.parametrize(
    ("algorithm", "policy", "message"),
    [
        (PPO, sb3_resnet.ResNetCnnPolicy, "For PPO and A2C write its name as a string, 'ResNetCnnPolicy'"),
        (DQN, sb3_resnet.ResNetActorCriticCnnPolicy, "For DQN and QRDQN write its name as a string"),
    ],
)
def test_the_class_of_another_algorithm_is_refused(algorithm, policy, message):
    eyes = {"features_extractor_kwargs": {"backbone": "resnet_mini"}}
    small = {"buffer_size": 10} if algorithm is DQN else {"n_steps": 8, "batch_size": 8}
    with pytest.raises(TypeError, match=message):
        algorithm(policy, TinyGame(), policy_kwargs=eyes, **small)


def test_vectors_are_refused():
    with pytest.raises(ValueError, match="For vectors use MlpPolicy"):
        PPO("ResNetCnnPolicy", gym.make("CartPole-v1"), n_steps=8, batch_size=8)
