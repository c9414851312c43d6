"""A backbone with an optimizer of its own: one optimizer towards Stable-Baselines3, two inside."""

import copy
import pickle

import numpy as np
import pytest
import torch as th
from stable_baselines3 import DQN
from stable_baselines3.common.utils import update_learning_rate
from torch import nn

from sb3_resnet import ResNetCnnPolicy
from sb3_resnet.callbacks import AMPCallback, GradientClipCallback, LRScheduleCallback, UnfreezeCallback
from sb3_resnet.common.step_hooks import before_step
from sb3_resnet.optim.combined import CombinedOptimizer
from tests.helpers import ALGORITHMS, POLICYS, TinyGame, assert_same, fill, make_model, snapshot

BESIDE = {"backbone_optimizer_class": "SGD", "backbone_optimizer_kwargs": {"momentum": 0.9}}


def parameters(seed=0):
    generator = th.Generator().manual_seed(seed)
    return [nn.Parameter(th.randn(3, 2, generator=generator)) for _ in range(4)]


def parts(held):
    return [
        th.optim.AdamW([{"params": held[:1]}, {"params": held[1:2], "weight_decay": 0.1}], lr=1e-2),
        th.optim.SGD(held[2:], lr=1e-1, momentum=0.9, weight_decay=1e-2),
    ]


def step(held, optimizers, seed):
    generator = th.Generator().manual_seed(seed)
    for parameter in held:
        parameter.grad = th.randn(3, 2, generator=generator)
    for optimizer in optimizers:
        optimizer.step()


def test_its_steps_are_those_of_the_parts():
    separate, together = parameters(), parameters()
    optimizers, combined = parts(separate), CombinedOptimizer(parts(together))
    for seed in range(5):
        step(separate, optimizers, seed)
        step(together, [combined], seed)
    assert all(map(th.equal, separate, together))
    assert {*combined.state} == {*together}
    assert "exp_avg" in combined.state[together[0]]
    assert "momentum_buffer" in combined.state[together[3]]


def test_a_rate_written_into_a_group_is_the_one_that_its_part_uses():
    held = parameters()
    combined = CombinedOptimizer(parts(held))
    update_learning_rate(combined, 0.0)
    before = [parameter.detach().clone() for parameter in held]
    step(held, [combined], 0)
    assert all(map(th.equal, held, before))
    combined.param_groups[2]["lr"] = 0.5
    step(held, [combined], 1)
    assert [th.equal(*pair) for pair in zip(held, before, strict=True)] == [True, True, False, False]


@pytest.mark.parametrize("through", ["state dict", "file", "copy", "pickle"])
def test_it_goes_on_where_it_stopped(through, tmp_path):
    held = parameters()
    combined = CombinedOptimizer(parts(held))
    step(held, [combined], 0)
    if through == "copy":
        resumed, others = copy.deepcopy((combined, held))
    elif through == "pickle":
        resumed, others = pickle.loads(pickle.dumps((combined, held)))
    else:
        state = copy.deepcopy(combined.state_dict())  # loading does not copy tensors
        if through == "file":
            th.save(state, tmp_path / "optimizer.pth")
            state = th.load(tmp_path / "optimizer.pth", weights_only=True)
        others = [nn.Parameter(parameter.detach().clone()) for parameter in held]
        resumed = CombinedOptimizer(parts(others))
        resumed.load_state_dict(state)
    for seed in (1, 2):
        step(held, [combined], seed)
        step(others, [resumed], seed)
    assert all(map(th.equal, held, others))
    assert not {*map(id, held)} & {id(p) for group in resumed.param_groups for p in group["params"]}
    resumed.param_groups[0]["lr"] = 7.0
    assert [group["lr"] for part in resumed.parts for group in part.param_groups] == [7.0, 1e-2, 1e-1]
    assert combined.param_groups[0]["lr"] == 1e-2


def test_a_closure_is_called_once():
    held, calls = parameters(), []

    def loss():
        calls.append(th.is_grad_enabled())
        return 3.0

    with th.no_grad():
        assert CombinedOptimizer(parts(held)).step(loss) == 3.0
    assert calls == [True]


def test_a_parameter_in_two_parts_and_a_later_group_are_refused():
    held = parameters()
    with pytest.raises(ValueError, match="more than one parameter group"):
        CombinedOptimizer([th.optim.SGD(held[:2], lr=0.1), th.optim.SGD(held[1:], lr=0.1)])
    with pytest.raises(ValueError, match="takes no further groups"):
        CombinedOptimizer(parts(held)).add_param_group({"params": parameters(1)})


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_backbone_has_its_own_kind_of_optimizer(algorithm):
    model = fill(make_model(algorithm, policy_kwargs=BESIDE, learning_rate=1e-3, extractor={"freeze_backbone": False}))
    optimizer = model.policy.optimizer
    before = snapshot(model.policy.online)
    model.train(gradient_steps=2, batch_size=4)
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert {name: group["lr"] for name, group in groups.items()} == pytest.approx(
        {"head": 1e-3, "head_no_decay": 1e-3, "backbone": 1e-4, "backbone_no_decay": 1e-4}
    )
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "head": 1e-4,
        "head_no_decay": 0.0,
        "backbone": 1e-4,
        "backbone_no_decay": 0.0,
    }
    kept = {name: {*optimizer.state[group["params"][0]]} for name, group in groups.items()}
    assert kept["head"] == kept["head_no_decay"] == {"step", "exp_avg", "exp_avg_sq"}
    assert kept["backbone"] == kept["backbone_no_decay"] == {"momentum_buffer"}
    moved = [name for name, value in model.policy.online.named_parameters() if not th.equal(value, before[name])]
    assert {name for name, _ in model.policy.online.named_parameters()} == {*moved}
    assert isinstance(optimizer, th.optim.Optimizer)
    assert before_step(optimizer).keys == POLICYS


def train_on(model):
    np.random.seed(0)
    model.train(gradient_steps=3, batch_size=4)


@pytest.mark.parametrize("copied", [False, True])
def test_a_saved_model_goes_on_with_both(copied, tmp_path):
    model = fill(make_model(policy_kwargs=BESIDE, learning_rate=1e-3, extractor={"freeze_backbone": False}))
    train_on(model)
    if copied:
        other = copy.deepcopy(model)
    else:
        model.save(tmp_path / "model.zip")
        other = fill(DQN.load(tmp_path / "model.zip", env=TinyGame(), device="cpu"))
    for one in (model, other):
        train_on(one)
    assert_same(model.policy.state_dict(), other.policy.state_dict())
    states = [one.policy.optimizer.state_dict() for one in (model, other)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for index, kept in states[0]["state"].items():
        assert_same(kept, states[1]["state"][index])
    assert before_step(other.policy.optimizer).keys == POLICYS


def test_rates_of_a_saved_model_can_be_changed(tmp_path):
    model = make_model(policy_kwargs=BESIDE, learning_rate=1e-3)
    model.policy.set_learning_rates(lr_head=2e-3, lr_backbone=4e-4, weight_decay=0.1)
    model.save(tmp_path / "model.zip")
    other = DQN.load(tmp_path / "model.zip", env=TinyGame(), device="cpu", learning_rate=1e-2)
    groups = {group["name"]: group for group in other.policy.optimizer.param_groups}
    assert [groups[part]["lr_ratio"] for part in ("head", "backbone")] == pytest.approx([2.0, 0.4])
    assert [groups[part]["weight_decay"] for part in ("head", "backbone")] == [0.1, 0.1]
    assert "momentum" not in groups["head"]
    assert other.policy.optimizer.defaults["lr"] == 1e-2
    kwargs = {**model.policy_kwargs, "lr_backbone": 7e-5, "weight_decay": 0.2}
    with pytest.warns(UserWarning, match=r"weight_decay=0\.2 was .*lr_backbone=7e-05 was asked for, 0\.0004 is"):
        DQN.load(tmp_path / "model.zip", device="cpu", custom_objects={"policy_kwargs": kwargs})


def test_a_policy_alone_keeps_its_optimizers(tmp_path):
    arguments = {**BESIDE, "optimizer_class": "Adam"}
    policy = make_model(policy_kwargs=arguments).policy
    policy.save(tmp_path / "policy.pth")
    loaded = ResNetCnnPolicy.load(tmp_path / "policy.pth")
    for one in (policy, loaded):
        assert [type(part) for part in one.optimizer.parts] == [th.optim.Adam, th.optim.SGD]
        assert [group["weight_decay"] for group in one.optimizer.param_groups] == [0.0, 0.0, 1e-4, 0.0]
        assert one.optimizer.param_groups[2]["momentum"] == 0.9


def test_callbacks_see_one_optimizer():
    """Phase, ramp, schedule and clipping reach the backbone's own optimizer."""
    model = make_model(policy_kwargs=BESIDE, learning_rate=1e-2)
    phases = [{"at_timestep": 16, "unfreeze_from": "layer4", "ramp": 4}]
    before = snapshot(model.policy.online)
    model.learn(24, callback=[UnfreezeCallback(phases), LRScheduleCallback(8), GradientClipCallback(1.0)])
    rates = {group["name"]: group["lr"] for group in model.policy.optimizer.param_groups}
    updates = model._n_updates
    assert rates["head"] == pytest.approx(1e-2 * updates / 8)
    assert 0 < rates["backbone"] < rates["head"] / 10
    after = model.policy.online.state_dict()
    moved = {key.split(".")[2] for key in after if "backbone" in key and not th.equal(after[key], before[key])}
    assert moved == {"layer4"}


def test_a_skipped_update_of_mixed_precision_leaves_both_alone():
    model = fill(make_model(policy_kwargs=BESIDE, extractor={"freeze_backbone": False, "backbone": "resnet_mini"}))
    callback = AMPCallback("float16", verbose=0, init_scale=2.0**126)  # overflows
    callback.init_callback(model)
    callback.on_training_start({}, {})
    before = {name: value.detach().clone() for name, value in model.policy.online.named_parameters()}
    model.train(gradient_steps=1, batch_size=4)
    assert model.logger.name_to_value["train/amp_skipped"] == 1
    assert_same(before, dict(model.policy.online.named_parameters()))
    assert not model.policy.optimizer.state


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"backbone_optimizer_class": "sgd"}, ValueError, "backbone_optimizer_class must be one of .*'SGD'"),
        ({"backbone_optimizer_class": nn.Linear}, TypeError, "backbone_optimizer_class must be a torch optimizer or"),
        ({"backbone_optimizer_kwargs": {"momentum": 0.9}}, ValueError, "needs a backbone_optimizer_class beside it"),
        ({**BESIDE, "backbone_optimizer_kwargs": {"lr": 1}}, ValueError, "kwargs must not hold 'lr': write lr_head"),
        ({**BESIDE, "backbone_optimizer_kwargs": "momentum"}, TypeError, "backbone_optimizer_kwargs must be a dict"),
        ({"backbone_optimizer_class": th.optim.Rprop}, ValueError, r"Rprop knows no weight decay: write weight_decay"),
    ],
)
def test_what_cannot_work_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        make_model(policy_kwargs=arguments)
