"""The freeze boundary (invariants 4, 5 and 6)."""

import copy

import pytest
import torch as th

from sb3_resnet.nn.freezing import STAGES, FreezeBoundary
from tests.helpers import ALGORITHMS, TinyGame, assert_same, fill, make_model, observations, q_values, slowly, snapshot

TRUNK = ("stem", "layer1", "layer2", "layer3", "layer4")


def trainable(policy):
    """The stages that have a parameter with ``requires_grad``; asserts that no stage is mixed."""
    extractor = policy.online.features_extractor
    flags = {
        stage: {p.requires_grad for module in extractor.stage_modules(stage) for p in module.parameters()}
        for stage in extractor.stages
    }
    assert all(len(values) == 1 for values in flags.values())
    return [stage for stage, values in flags.items() if True in values]


@pytest.mark.parametrize("stage", [*STAGES, None])
def test_the_boundary_trains_a_stage_and_all_above(stage):
    policy = make_model().policy
    policy.set_freeze_boundary(stage)
    assert policy.freeze_boundary == stage
    assert trainable(policy) == ([] if stage is None else [*STAGES[STAGES.index(stage) :]])
    assert all(parameter.requires_grad for parameter in policy.q_net.q_net.parameters())


@pytest.mark.parametrize(("channels", "lowest"), [(4, "adapter"), (3, "stem")])
def test_all_means_from_the_lowest_stage(channels, lowest):
    policy = make_model(env=TinyGame((channels, 32, 32)), extractor={"freeze_backbone": False}).policy
    assert policy.freeze_boundary == lowest
    policy.set_freeze_boundary(None)
    policy.set_freeze_boundary("all")
    assert policy.freeze_boundary == lowest


def test_unknown_stages_are_refused_and_change_nothing():
    policy = make_model(env=TinyGame((3, 32, 32))).policy
    policy.set_freeze_boundary("layer3")
    with pytest.raises(ValueError, match="did you mean 'layer4'"):
        policy.set_freeze_boundary("layer5")
    with pytest.raises(ValueError, match="unfreeze_from must be one of"):
        policy.set_freeze_boundary("adapter")  # three channels have none
    assert policy.freeze_boundary == "layer3"
    assert trainable(policy) == ["layer3", "layer4"]


def test_invariant_4_the_adapter_is_frozen_below_a_frozen_trunk_and_trains_when_forced():
    for force in (False, True):
        model = fill(make_model(extractor={"train_adapter": force}, learning_rate=1e-2))
        adapter = model.policy.q_net.features_extractor.adapter
        trunk = snapshot(model.policy.q_net.features_extractor.backbone)
        before = snapshot(adapter)
        model.train(3, 4)
        assert th.equal(before["weight"], adapter.weight) != force
        assert_same(trunk, model.policy.q_net.features_extractor.backbone.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "updates"), [("frozen", 1000), ("batch", 200)])
def test_invariant_5_frozen_means_frozen_after_1000_updates(norm, updates):
    model = fill(make_model(extractor={"norm": norm}, learning_rate=1e-3, policy_kwargs={"weight_decay": 0.1}))
    extractor = model.policy.q_net.features_extractor
    trunk, adapter, head = snapshot(extractor.backbone), snapshot(extractor.adapter), snapshot(model.policy.q_net.q_net)
    batch = model.replay_buffer.sample(64)

    def loss():
        model.policy.set_training_mode(False)
        with th.no_grad():
            values = model.q_net(batch.observations).gather(1, batch.actions)
        return th.nn.functional.smooth_l1_loss(values, batch.rewards).item()

    model.gamma = 0.0  # targets are the rewards: the loss on a fixed batch must fall
    first = loss()
    for _ in range(updates // 4):
        model.train(gradient_steps=4, batch_size=2)
        extractor.backbone.train()  # somebody else's train() must not wake BatchNorm either
    assert model._n_updates == updates
    assert_same(trunk, extractor.backbone.state_dict())
    assert_same(adapter, extractor.adapter.state_dict())
    assert not th.equal(head["1.weight"], model.policy.q_net.q_net[1].weight)
    assert loss() < 0.7 * first
    frozen = [p for stage in extractor.stages for module in extractor.stage_modules(stage) for p in module.parameters()]
    assert all(parameter.grad is None and parameter not in model.policy.optimizer.state for parameter in frozen)


@pytest.mark.parametrize("optimizer_class", ["AdamW", "SGD"])
@pytest.mark.parametrize("norm", ["frozen", "batch", "group", *slowly("sync", "layer")])
def test_invariant_5_below_the_boundary_nothing_moves_above_it_everything_does(norm, optimizer_class):
    optimizer = {"optimizer_class": optimizer_class, "weight_decay": 0.1, "lr_backbone": 1e-2}
    model = fill(make_model(extractor={"norm": norm}, learning_rate=1e-2, policy_kwargs=optimizer))
    model.policy.set_freeze_boundary("all")
    model.train(1, 4)  # gradients and moments everywhere, which the boundary must take away again
    model.policy.set_freeze_boundary("layer4")
    before = snapshot(model.policy.q_net.features_extractor)
    model.train(4, 4)
    after = model.policy.q_net.features_extractor.state_dict()
    moved = {key for key in before if not th.equal(before[key], after[key])}
    expected = {
        key
        for key in before
        if key.startswith("backbone.layer4")
        and (norm in ("batch", "sync") or not key.endswith(("running_mean", "running_var", "num_batches_tracked")))
    }
    assert moved == expected


def test_invariant_5_no_graph_is_built_below_the_boundary():
    extractor = make_model().policy.q_net.features_extractor
    images = th.rand(2, 4, 32, 32)
    assert not extractor(images).requires_grad
    extractor.set_freeze_boundary("layer4")
    seen = {}
    for name, module in extractor.backbone.named_children():
        module.register_forward_hook(lambda module, args, out, name=name: seen.update({name: out.requires_grad}))
    assert extractor(images).requires_grad
    assert {name for name, requires in seen.items() if requires} == {"layer4"}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("stage", ["layer4", "all", None])
def test_invariant_6_the_phase_comes_back_with_the_model(tmp_path, algorithm, stage):
    model = make_model(algorithm, extractor={"freeze_backbone": stage is None})
    model.policy.set_freeze_boundary(stage, at_update=17)
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy")
    cls, expected = ALGORITHMS[algorithm], model.policy.freeze_boundary
    in_place = make_model(algorithm, extractor={"freeze_backbone": stage is not None})
    in_place.set_parameters(tmp_path / "model", device="cpu")
    for policy in (
        cls.load(tmp_path / "model", device="cpu").policy,
        type(model.policy).load(tmp_path / "policy", device="cpu"),
        in_place.policy,
        copy.deepcopy(model.policy),
    ):
        assert policy.freeze_boundary == expected
        assert trainable(policy) == trainable(model.policy)
        for network in (policy.online, policy.target):
            assert int(network.features_extractor.boundary.moved_at) == 17
        obs = observations(model)
        assert th.equal(q_values(policy, obs), q_values(model, obs))


def test_a_copied_boundary_is_its_own():
    policy = make_model().policy
    clone = copy.deepcopy(policy)
    clone.set_freeze_boundary("layer4")
    assert policy.freeze_boundary is None
    assert trainable(policy) == []
    assert trainable(clone) == ["layer4"]


def test_moving_the_boundary_moves_online_and_target():
    model = make_model()
    model.policy.set_freeze_boundary("layer3", at_update=5)
    for network in (model.q_net, model.q_net_target):
        assert network.features_extractor.freeze_boundary == "layer3"


def test_a_boundary_without_adapter_knows_its_stages():
    stages = {name: (th.nn.Linear(1, 1),) for name in TRUNK}
    boundary = FreezeBoundary(stages, "all")
    assert boundary.stage == "stem"
    assert boundary.frozen_stages == ()
    boundary.move("layer2")
    assert boundary.frozen_stages == ("stem", "layer1")
