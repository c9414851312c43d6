"""What trains, at which rate, and in which mode: one truth, and a word where something else was asked for."""

import copy
import io
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch as th
from stable_baselines3 import A2C, DQN, PPO
from torch import nn

from sb3_resnet import ResNetExtractor, param_group_summary
from sb3_resnet.callbacks import FeatureCacheCallback, LRScheduleCallback, UnfreezeCallback
from tests.helpers import ALGORITHMS, TinyGame, assert_same, fill, make_model, observations, q_values, slowly, snapshot

STEPS = {PPO: {"n_steps": 8, "batch_size": 4, "n_epochs": 1}, A2C: {"n_steps": 4}}


def on_policy(cls=PPO, **extractor):
    kwargs = {
        "features_extractor_class": ResNetExtractor,
        "features_extractor_kwargs": {"backbone": "resnet_tiny", **extractor},
        "net_arch": [8],
    }
    return cls("CnnPolicy", TinyGame(), policy_kwargs=kwargs, device="cpu", seed=0, **STEPS[cls])


def saved(model):
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    return file


def thaw(extractor):
    extractor.backbone.requires_grad_(True)


def thaw_layer4(extractor):
    extractor.backbone.layer4.requires_grad_(True)


def thaw_one_bias(extractor):
    extractor.backbone.layer2[0].bn1.bias.requires_grad_(True)


def freeze_all(extractor):
    extractor.set_freeze_boundary("all")
    extractor.requires_grad_(False)


def freeze_stem(extractor):
    extractor.set_freeze_boundary("all")
    extractor.backbone.conv1.requires_grad_(False)


BY_HAND = [
    (thaw, "call set_freeze_boundary.'stem'"),
    (thaw_layer4, "layer4 are frozen.*set_freeze_boundary.'layer4'"),
    (thaw_one_bias, "layer2 are frozen.*set_freeze_boundary.None"),
    (freeze_all, "adapter, stem, layer1, layer2, layer3, layer4 are to train.*set_freeze_boundary.None"),
    (freeze_stem, "stem are to train.*set_freeze_boundary"),
]


@pytest.mark.parametrize("build", [make_model, on_policy, *slowly(lambda: on_policy(A2C))], ids=["DQN", "PPO", "A2C"])
@pytest.mark.parametrize(("change", "message"), BY_HAND, ids=[change.__name__ for change, _ in BY_HAND])
def test_requires_grad_by_hand_is_refused_before_the_first_update(build, change, message):
    model = build()
    network = getattr(model.policy, "online", model.policy)
    change(network.features_extractor)
    with pytest.warns(UserWarning, match=message):
        param_group_summary(model, show=False)
    before = snapshot(model.policy)
    with pytest.raises(ValueError, match=message):
        model.learn(24)
    assert_same(before, model.policy.state_dict())
    network.features_extractor.set_freeze_boundary("layer4")  # what the message says
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        param_group_summary(model, show=False)
        model.learn(24)


def test_requires_grad_by_hand_is_refused_by_the_cache_and_spares_prediction():
    model = make_model()
    thaw(model.q_net.features_extractor)
    model.predict(observations(model))  # nothing trains here
    with pytest.raises(ValueError, match="set_freeze_boundary"):
        model.learn(8, callback=FeatureCacheCallback())


def test_a_copy_and_a_loaded_model_check_their_own_parameters():
    model = make_model()
    for other in (copy.deepcopy(model.policy), DQN.load(saved(model), device="cpu").policy):
        thaw(other.q_net.features_extractor)
        with pytest.raises(ValueError, match="set_freeze_boundary"):
            other.set_training_mode(True)
    model.policy.set_training_mode(True)


class WithDropout(ResNetExtractor):
    """A subclass with a layer of its own, as users write it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.own = nn.Sequential(nn.Dropout(0.5))

    def forward(self, observations):
        return self.own(super().forward(observations))


@pytest.mark.parametrize("algorithm", ["dqn", *slowly("qrdqn")])
def test_layers_of_a_subclass_follow_the_mode(algorithm):
    model = fill(make_model(algorithm, policy_kwargs={"features_extractor_class": WithDropout}))
    extractor = model.policy.online.features_extractor
    assert not extractor.own[0].training
    model.train(1, 4)
    assert extractor.own[0].training
    model.predict(observations(model))
    assert not extractor.own[0].training
    assert th.equal(q_values(model, observations(model)), q_values(model, observations(model)))


@pytest.mark.parametrize("name", ["backbone.layer1", "backbone.conv1", "backbone.layer2.0.bn1", "backbone", ""])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("network", ["q_net", "q_net_target"])
def test_the_cache_refuses_hooks_that_it_would_pass_over(name, register, network):
    model = make_model()
    model.policy.set_freeze_boundary("layer4")
    extractor = getattr(model, network).features_extractor
    handle = getattr(extractor.get_submodule(name), register)(lambda *args: None)
    with pytest.raises(ValueError, match=f"hooks are registered on {name or 'the extractor'}, .*FeatureCacheCallback"):
        model.learn(8, callback=FeatureCacheCallback())
    handle.remove()
    calls = []
    extractor.backbone.layer4.register_forward_hook(lambda *args: calls.append(1))
    extractor.projection.register_forward_hook(lambda *args: calls.append(1))
    model.learn(12, callback=FeatureCacheCallback())
    assert calls


def test_new_policy_kwargs_of_a_loaded_model_warn_and_name_both_values():
    features = {"features_extractor_kwargs": {"backbone": "resnet_tiny"}}
    model = make_model(policy_kwargs={"lr_backbone": 1e-5}, learning_rate=1e-4)
    file = saved(model)
    asked = {"policy_kwargs": {**features, "lr_backbone": 1e-3, "weight_decay": 0.5, "lr_head": 2e-4}}
    with pytest.warns(UserWarning, match="keeps the settings of its file") as caught:
        loaded = DQN.load(file, env=TinyGame(), device="cpu", custom_objects=asked)
    message = " ".join(str(warning.message) for warning in caught)
    assert "lr_backbone=0.001 was asked for, 1e-05 is used" in message
    assert "lr_head=0.0002 was asked for, 0.0001 is used" in message
    assert "weight_decay=0.5 was asked for, 0.0001 is used" in message
    assert "set_learning_rates(" in message
    loaded.policy.set_learning_rates(lr_backbone=1e-3, weight_decay=0.5)
    fill(loaded).train(1, 4)
    for again in (loaded, DQN.load(saved(loaded), device="cpu")):
        rows = {row["name"]: row for row in param_group_summary(again, show=False)}
        assert {name: row["lr"] for name, row in rows.items()} == pytest.approx(
            {"head": 1e-4, "head_no_decay": 1e-4, "backbone": 1e-3, "backbone_no_decay": 1e-3}
        )
        decays = {"head": 0.5, "head_no_decay": 0.0, "backbone": 0.5, "backbone_no_decay": 0.0}
        assert {name: row["weight_decay"] for name, row in rows.items()} == decays
        assert again.policy.lr_backbone == 1e-3
        assert again.policy.weight_decay == 0.5


@pytest.mark.parametrize("algorithm", ["dqn", *slowly("qrdqn")])
def test_a_loaded_model_warns_of_nothing_where_nothing_else_was_asked_for(algorithm):
    model = make_model(algorithm, policy_kwargs={"lr_backbone": 1e-5, "lr_decay_per_stage": 0.5})
    phase = {"at_timestep": 8, "unfreeze_from": "layer4", "lr_backbone": 3e-5}
    model.learn(16, callback=[UnfreezeCallback([phase], verbose=0), LRScheduleCallback(3)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({}, {"custom_objects": {"learning_rate": 0.0, "lr_schedule": lambda _: 0.0}}):
            loaded = ALGORITHMS[algorithm].load(saved(model), device="cpu", **options)
            loaded = ALGORITHMS[algorithm].load(saved(loaded), device="cpu", **options)
    ratios = [group["lr_ratio"] for group in model.policy.optimizer.param_groups]
    assert [group["lr_ratio"] for group in loaded.policy.optimizer.param_groups] == ratios


def test_rates_that_cannot_work_are_refused_and_change_nothing():
    policy = make_model().policy
    before = copy.deepcopy(policy.optimizer.state_dict()["param_groups"])
    for wrong in ({"lr_head": 1e-3, "lr_backbone": -1.0}, {"lr_head": 1e-3, "weight_decay": float("nan")}):
        with pytest.raises(ValueError, match="must be finite and >= 0"):
            policy.set_learning_rates(**wrong)
    assert policy.optimizer.state_dict()["param_groups"] == before
    assert policy.lr_head is None


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_second_learn_at_rate_0_warns(schedule):
    model = make_model(learning_rate=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(40, callback=LRScheduleCallback(schedule=schedule))
    before = snapshot(model.q_net.q_net)
    loaded = DQN.load(saved(model), env=TinyGame(), device="cpu")
    with pytest.warns(UserWarning, match="ended at 0.*min_factor") as caught:
        loaded.learn(40, callback=LRScheduleCallback(schedule=schedule))
    assert len(caught) == 1
    weights = [name for name in before if "running" not in name]
    assert all(th.equal(before[name], loaded.q_net.q_net.state_dict()[name]) for name in weights)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded.learn(16, callback=LRScheduleCallback(schedule="constant"))
    assert not all(th.equal(before[name], loaded.q_net.q_net.state_dict()[name]) for name in weights)


def test_a_schedule_that_ends_at_0_in_the_midst_warns_once_and_again_without_the_callback():
    model = make_model()
    with pytest.warns(UserWarning, match="ended at 0") as caught:
        model.learn(60, callback=LRScheduleCallback(schedule="cosine", decay_steps=4))
    assert len(caught) == 1
    loaded = DQN.load(saved(model), env=TinyGame(), device="cpu")
    with pytest.warns(UserWarning, match="ended at 0") as caught:
        loaded.learn(40)
    assert len(caught) == 1


def test_a_phase_that_never_began_is_said_once_in_a_run_of_several_pieces():
    phases = [{"at_timestep": 1000, "unfreeze_from": "layer4"}, {"at_timestep": 2000, "unfreeze_from": "layer3"}]
    model = make_model(learning_starts=1000)
    with pytest.warns(UserWarning, match="never began") as caught:
        model.learn(4, callback=UnfreezeCallback(phases))
    assert len(caught) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(4, callback=UnfreezeCallback(phases), reset_num_timesteps=False)
        model = DQN.load(saved(model), env=TinyGame(), device="cpu")
        model.learn(4, callback=UnfreezeCallback(phases), reset_num_timesteps=False)


@pytest.mark.parametrize("algorithm", ["dqn", *slowly("qrdqn")])
def test_looking_at_values_moves_nothing_and_equals_predict(algorithm):
    model = fill(make_model(algorithm, policy_kwargs={"dropout": 0.5}))
    model.train(2, 4)
    seen = th.as_tensor(observations(model))
    for policy in (ALGORITHMS[algorithm].load(saved(model), device="cpu").policy, make_model(algorithm).policy):
        assert not any(module.training for module in (policy, policy.online, policy.online.head, policy.target))
        before = snapshot(policy)
        values = policy.online(seen)
        assert_same(before, policy.state_dict())
        assert th.equal(values, q_values(policy, seen))
    model.policy.set_training_mode(True)  # as an update leaves it
    before = snapshot(model.policy)
    model.policy.online(seen)
    with th.no_grad():
        model.policy.online(seen)
    assert_same(before, model.policy.state_dict())
    count = model.policy.online.head[0].running_count.clone()
    model.train(1, 4)
    assert model.policy.online.head[0].running_count == count + 4


@pytest.mark.parametrize("options", [{}, {"feature_norm": "layer", "dropout": 0.2}, {"feature_norm": "none"}])
@pytest.mark.parametrize("algorithm", ["dqn", *slowly("qrdqn")])
def test_a_network_alone_is_saved_and_loaded(tmp_path, algorithm, options):
    model = make_model(algorithm, policy_kwargs={**options, "net_arch": [16, 8]})
    model.learn(24)
    network = model.policy.online
    network.save(tmp_path / "network.pth")
    loaded = type(network).load(tmp_path / "network.pth", device="cpu")
    assert_same(network.state_dict(), loaded.state_dict())
    assert [type(layer) for layer in loaded.head] == [type(layer) for layer in network.head]
    assert not loaded.training
    seen = observations(model)
    assert np.array_equal(loaded.predict(seen)[0], model.policy.predict(seen)[0])
    with th.no_grad():
        assert th.equal(loaded(th.as_tensor(seen)), q_values(model, seen))


@pytest.mark.parametrize("build", [make_model, lambda: make_model("qrdqn"), on_policy, lambda: on_policy(A2C)])
@pytest.mark.parametrize("boundary", [None, "layer4", "all"])
def test_parameters_are_contiguous_for_everybody(tmp_path, build, boundary):
    model = build()
    for module in model.policy.modules():
        if isinstance(module, ResNetExtractor):
            module.set_freeze_boundary(boundary)
    model.learn(16)
    vector = model.policy.parameters_to_vector()
    assert vector.size == sum(parameter.numel() for parameter in model.policy.parameters())
    model.policy.load_from_vector(vector)
    assert np.array_equal(model.policy.parameters_to_vector(), vector)
    assert all(tensor.is_contiguous() for tensor in model.policy.state_dict().values())
    # Stock PPO and A2C register a shared features extractor under three names, which safetensors refuses.
    whole = hasattr(model.policy, "online")
    state = (model.policy if whole else model.policy.features_extractor).state_dict()
    safetensors.torch.save_file(state, tmp_path / "policy.safetensors")
    assert_same(safetensors.torch.load_file(tmp_path / "policy.safetensors"), dict(state))


def test_moments_that_a_file_holds_in_another_order_are_those_of_their_parameters():
    model = fill(make_model(extractor={"freeze_backbone": False}))
    model.train(2, 4)
    state = copy.deepcopy(model.policy.optimizer.state_dict())
    for moments in state["state"].values():
        for key, value in moments.items():
            if value.ndim == 4:
                moments[key] = value.contiguous(memory_format=th.channels_last)
    twin = fill(make_model(extractor={"freeze_backbone": False}))
    twin.policy.load_state_dict(model.policy.state_dict())
    twin.policy.optimizer.load_state_dict(state)
    for one in (model, twin):
        np.random.seed(3)
        one.train(2, 4)
    assert_same(model.policy.state_dict(), twin.policy.state_dict())
