"""Parameter groups and effective learning rates (invariants 1 and 2)."""

import copy
import warnings

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.utils import update_learning_rate
from torch import nn

from sb3_resnet import param_group_summary
from sb3_resnet.callbacks import LRScheduleCallback, UnfreezeCallback
from sb3_resnet.common.step_hooks import before_step
from sb3_resnet.optim.classes import optimizer_class_of
from sb3_resnet.optim.groups import (
    audit,
    build_optimizer,
    install_effective_lr,
    is_part,
    lr_ratios,
    set_lr_factor,
)
from tests.helpers import POLICYS, fill, make_model, slowly


def parts():
    return {"head": [nn.Parameter(th.ones(2, 2)), nn.Parameter(th.ones(2))], "backbone": [nn.Parameter(th.ones(3, 3))]}


def built(cls=th.optim.AdamW, lr=1e-3, **ratios):
    return build_optimizer(cls, parts(), lr, {"head": 1.0, "backbone": 0.1, **ratios}, 1e-4)


def rates(optimizer):
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


def step(optimizer):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = th.ones_like(parameter)
    optimizer.step()


def test_invariant_1_groups_hold_every_parameter_once_frozen_ones_included():
    model = make_model(extractor={"freeze_backbone": True})
    optimizer = model.policy.optimizer
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.policy.q_net.parameters())
    assert [group["name"] for group in optimizer.param_groups] == [
        "head",
        "head_no_decay",
        "backbone",
        "backbone_no_decay",
    ]
    before = [{**group, "params": [*map(id, group["params"])]} for group in optimizer.param_groups]
    for stage in ("layer4", "all", None):
        model.policy.set_freeze_boundary(stage)
    assert before == [{**group, "params": [*map(id, group["params"])]} for group in optimizer.param_groups]


def test_norm_weights_and_biases_do_not_decay():
    groups = {group["name"]: group for group in make_model().policy.optimizer.param_groups}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "head": 1e-4,
        "head_no_decay": 0.0,
        "backbone": 1e-4,
        "backbone_no_decay": 0.0,
    }
    assert all(parameter.ndim == 1 for parameter in groups["backbone_no_decay"]["params"])
    assert all(parameter.ndim > 1 for parameter in groups["backbone"]["params"])


@pytest.mark.parametrize(
    ("optimizer_class", "given", "head"),
    [
        ("AdamW", None, 1e-4),
        ("SGD", None, 1e-4),
        ("RMSprop", None, 1e-4),
        ("Adam", None, 0.0),
        ("Adam", 1e-3, 1e-3),
        ("AdamW", 0.0, 0.0),
        (type("MyAdam", (th.optim.Adam,), {}), None, 0.0),
        (type("MyAdamW", (th.optim.AdamW,), {}), None, 1e-4),
    ],
)
def test_plain_adam_has_no_weight_decay_unless_given(optimizer_class, given, head):
    policy = make_model(policy_kwargs={"optimizer_class": optimizer_class, "weight_decay": given}).policy
    decays = {group["name"]: group["weight_decay"] for group in policy.optimizer.param_groups}
    assert decays == {"head": head, "head_no_decay": 0.0, "backbone": head, "backbone_no_decay": 0.0}
    assert policy.weight_decay == head


def test_a_model_of_adam_with_weight_decay_loads_with_it(tmp_path):
    """Files from before the default depended on the optimizer."""
    model = make_model(policy_kwargs={"optimizer_class": "Adam"})
    for group in model.policy.optimizer.param_groups:
        group["weight_decay"] = 0.0 if group["name"].endswith("no_decay") else 1e-4
    model.save(tmp_path / "model.zip")
    loaded = type(model).load(tmp_path / "model.zip", device="cpu")
    assert [group["weight_decay"] for group in loaded.policy.optimizer.param_groups] == [1e-4, 0.0, 1e-4, 0.0]


def test_audit_names_missing_foreign_and_double_parameters():
    net = nn.Linear(2, 2)
    audit(net, th.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"'missing': \['bias'\]"):
        audit(net, th.optim.SGD([net.weight], lr=0.1))
    with pytest.raises(ValueError, match="'foreign'"):
        audit(net, th.optim.SGD([*net.parameters(), nn.Parameter(th.ones(1))], lr=0.1))
    twice = th.optim.SGD(net.parameters(), lr=0.1)
    twice.param_groups[0]["params"].append(net.bias)
    with pytest.raises(ValueError, match=r"'twice': \['bias'\]"):
        audit(net, twice)


def constant(progress):
    return 1e-3


def linear(progress):
    return 1e-3 * progress


def cosine(progress):
    return 0.5e-3 * (1 + np.cos(np.pi * (1 - progress)))


def by_ten(progress):
    """Factor 0.1 = the backbone's ratio: the host's second rate is the backbone's first effective one."""
    return 1e-3 if progress > 0.5 else 1e-4


SCHEDULES = [constant, linear, cosine, by_ten]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimizer_class", [th.optim.AdamW, th.optim.SGD, *slowly(th.optim.Adam, th.optim.RMSprop)])
def test_invariant_2_effective_learning_rates_after_each_train(optimizer_class, schedule):
    model = fill(
        make_model(learning_rate=schedule, policy_kwargs={"optimizer_class": optimizer_class, "lr_backbone": 1e-4})
    )
    for progress in (1.0, 0.8, 0.5, 0.4, 0.1):
        model._current_progress_remaining = progress
        model.train(gradient_steps=2, batch_size=2)
        lr = schedule(progress)
        assert rates(model.policy.optimizer) == pytest.approx(
            {"head": lr, "head_no_decay": lr, "backbone": lr / 10, "backbone_no_decay": lr / 10}, rel=1e-12
        )


def test_invariant_2_holds_where_all_groups_have_the_ratio_of_the_step():
    optimizer = built(head=0.1)
    for host, expected in ((1e-3, 1e-4), (1e-4, 1e-5), (1e-5, 1e-6)):
        update_learning_rate(optimizer, host)
        for _ in range(3):
            step(optimizer)
            assert rates(optimizer) == pytest.approx(dict.fromkeys(rates(optimizer), expected))


def test_invariant_2_the_rate_in_the_group_is_the_rate_of_the_update():
    optimizer = built(th.optim.SGD, lr=1.0)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    update_learning_rate(optimizer, 0.5)
    step(optimizer)
    head, _, backbone = (group["params"][0] for group in optimizer.param_groups)
    assert head[0, 0].item() == pytest.approx(0.5)
    assert backbone[0, 0].item() == pytest.approx(0.95)


@pytest.mark.parametrize("through_file", [False, True])
def test_invariant_2_survives_a_state_dict(tmp_path, through_file):
    old = built()
    set_lr_factor(old, "ramp", 0.5, lambda group: is_part(group, "backbone"))
    update_learning_rate(old, 2e-3)
    step(old)
    state = old.state_dict()
    if through_file:
        th.save(state, tmp_path / "optimizer.pth")
        state = th.load(tmp_path / "optimizer.pth", weights_only=True)
    new = built(lr=7.0)
    new.load_state_dict(state)
    expected = {"head": 2e-3, "head_no_decay": 2e-3, "backbone": 1e-4}
    assert rates(new) == pytest.approx(expected)
    step(new)  # without the host's write, as in a hand-written loop
    assert rates(new) == pytest.approx(expected)
    update_learning_rate(new, 4e-3)
    step(new)
    assert rates(new) == pytest.approx({name: 2 * rate for name, rate in expected.items()})


@pytest.mark.parametrize("through_file", [False, True])
def test_invariant_2_holds_after_loading_where_the_step_is_the_ratio_of_all_groups(tmp_path, through_file):
    old = built(head=0.1)
    update_learning_rate(old, 1e-3)
    step(old)
    state = old.state_dict()
    if through_file:
        th.save(state, tmp_path / "optimizer.pth")
        state = th.load(tmp_path / "optimizer.pth", weights_only=True)
    assert {type(group[key]) for group in state["param_groups"] for key in ("lr", "effective_lr", "base_lr")} == {float}
    new = built(head=0.1, lr=7.0)
    new.load_state_dict(state)
    step(new)  # ours is taken for ours
    assert rates(new) == pytest.approx(dict.fromkeys(rates(new), 1e-4))
    update_learning_rate(new, 1e-4)  # and the same number for the host's, if the host wrote it
    step(new)
    assert rates(new) == pytest.approx(dict.fromkeys(rates(new), 1e-5))


def test_rates_do_not_lean_on_which_object_a_number_is():
    optimizer = built()
    for group in optimizer.param_groups:
        group["lr"] = copy.deepcopy(group["lr"])
    before = rates(optimizer)
    step(optimizer)
    assert rates(optimizer) == before
    step(copy.deepcopy(optimizer))
    assert rates(optimizer) == before


def test_hooks_are_installed_once_and_again_after_deepcopy():
    model = make_model()
    install_effective_lr(model.policy.optimizer)
    clone = copy.deepcopy(model.policy)
    for optimizer in (model.policy.optimizer, clone.optimizer):
        assert before_step(optimizer).keys == POLICYS
        assert len(optimizer._optimizer_step_pre_hooks) == 1
        # Of the rates, and of the order of moments in memory.
        assert len(optimizer._optimizer_load_state_dict_post_hooks) == 2
    update_learning_rate(clone.optimizer, 1e-2)
    step(clone.optimizer)
    assert rates(clone.optimizer)["backbone"] == pytest.approx(1e-3)
    assert rates(model.policy.optimizer)["backbone"] == pytest.approx(1e-5)


def test_factors_multiply_and_stay():
    optimizer = built()
    set_lr_factor(optimizer, "schedule", 0.5)
    set_lr_factor(optimizer, "ramp", 0.2, lambda group: is_part(group, "backbone"))
    assert rates(optimizer) == pytest.approx({"head": 5e-4, "head_no_decay": 5e-4, "backbone": 1e-5})
    update_learning_rate(optimizer, 1e-2)
    step(optimizer)
    assert rates(optimizer) == pytest.approx({"head": 5e-3, "head_no_decay": 5e-3, "backbone": 1e-4})
    set_lr_factor(optimizer, "schedule", 0.0)
    set_lr_factor(optimizer, "schedule", 1.0)
    assert rates(optimizer)["head"] == pytest.approx(1e-2)


def test_a_plain_optimizer_can_have_factors_too():
    optimizer = th.optim.Adam([nn.Parameter(th.ones(2))], lr=1e-3)
    install_effective_lr(optimizer)
    set_lr_factor(optimizer, "schedule", 0.5)
    update_learning_rate(optimizer, 2e-3)
    step(optimizer)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((1e-3,), (1.0, 0.1)),
        ((1e-3, 2e-3), (2.0, 0.2)),
        ((1e-3, None, 1e-5), (1.0, 0.01)),
        ((1e-3, 5e-4, 0.0), (0.5, 0.0)),
        ((1e-3, "5e-4", "1e-5"), (0.5, 0.01)),
        ((0.0,), (1.0, 0.1)),
    ],
)
def test_lr_ratios(arguments, expected):
    assert [*lr_ratios(*arguments).values()] == pytest.approx(expected)


@pytest.mark.parametrize("lr", [-1e-3, float("nan"), float("inf"), "nan"])
@pytest.mark.parametrize("name", ["lr_head", "lr_backbone", "weight_decay"])
def test_bad_rates_are_refused_at_construction(name, lr):
    with pytest.raises(ValueError, match=f"{name} must be finite and >= 0"):
        make_model(policy_kwargs={name: lr})


@pytest.mark.parametrize("value", ["fast", True, [1e-3]])
def test_rates_that_are_no_numbers_are_refused(value):
    with pytest.raises(TypeError, match="lr_backbone must be a number"):
        make_model(policy_kwargs={"lr_backbone": value})


def test_a_learning_rate_that_starts_at_zero_or_is_negative_is_refused():
    with pytest.raises(ValueError, match="warm up with LRScheduleCallback"):
        make_model(learning_rate=lambda progress: 1e-3 * (1 - progress), policy_kwargs={"lr_backbone": 1e-5})
    with pytest.raises(ValueError, match="learning_rate must be finite"):
        make_model(learning_rate=-1.0)


def test_an_optimizer_without_weight_decay_says_so():
    with pytest.raises(ValueError, match=r"Rprop knows no weight decay: write weight_decay=0\.0"):
        make_model(policy_kwargs={"optimizer_class": th.optim.Rprop})
    make_model(policy_kwargs={"optimizer_class": th.optim.Rprop, "weight_decay": 0.0})


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD", "RMSprop", "torch.optim.SGD"])
def test_optimizers_by_name(name):
    assert optimizer_class_of(name).__name__ == name.rsplit(".", 1)[-1]


def test_unknown_optimizers_are_refused():
    with pytest.raises(ValueError, match="did you mean 'AdamW'"):
        optimizer_class_of("AdmaW")
    with pytest.raises(TypeError, match="must be a torch optimizer"):
        optimizer_class_of(nn.Linear)


def test_param_group_summary_returns_and_prints_the_groups(capsys):
    model = make_model(learning_rate=1e-3)
    model.policy.set_freeze_boundary("layer4")
    rows = param_group_summary(model)
    layer4 = [*model.policy.q_net.features_extractor.backbone.layer4.parameters()]
    assert [row["name"] for row in rows] == ["head", "head_no_decay", "backbone", "backbone_no_decay"]
    assert [row["lr"] for row in rows] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4])
    assert sum(row["parameters"] for row in rows) == sum(p.numel() for p in model.policy.q_net.parameters())
    assert sum(row["trainable_parameters"] for row in rows[2:]) == sum(p.numel() for p in layer4)
    printed = capsys.readouterr().out
    assert all(row["name"] in printed and f"{row['parameters']:,}" in printed for row in rows)
    assert param_group_summary(model.policy.optimizer, show=False) == rows
    assert capsys.readouterr().out == ""
    with pytest.raises(TypeError, match="takes a model"):
        param_group_summary(nn.Linear(1, 1))


@pytest.mark.parametrize("cls", [th.optim.AdamW, th.optim.SGD])
@pytest.mark.parametrize(
    "given",
    [{"foreach": True}, {"foreach": False}, {"differentiable": True}, {"fused": False}, {"fused": True}],
    ids=str,
)
def test_a_way_of_stepping_that_the_user_chose_is_taken_alone(cls, given):
    optimizer = build_optimizer(cls, parts(), 1e-3, {"head": 1.0, "backbone": 0.1}, 1e-4, **given)
    (name,) = given
    assert {group[name] for group in optimizer.param_groups} == {given[name]}
    assert name == "fused" or not optimizer.defaults["fused"]


def test_fused_is_the_default_where_nothing_is_chosen():
    for given in ({}, {"foreach": None}):
        optimizer = build_optimizer(th.optim.AdamW, parts(), 1e-3, {"head": 1.0, "backbone": 0.1}, 1e-4, **given)
        assert optimizer.defaults["fused"] is True


def test_a_policy_takes_foreach():
    model = fill(make_model(policy_kwargs={"optimizer_kwargs": {"foreach": True}}))
    model.train(2, 4)
    assert all(group["foreach"] for group in model.policy.optimizer.param_groups)


@pytest.mark.parametrize(
    ("callback", "resets"),
    [
        (LRScheduleCallback(warmup_steps=100), LRScheduleCallback()),
        (
            UnfreezeCallback([{"at_timestep": 12, "unfreeze_from": "layer4", "ramp": 100}]),
            UnfreezeCallback([{"at_timestep": 12, "unfreeze_from": "layer4"}]),
        ),
    ],
)
def test_factors_that_a_callback_left_behind_are_warned_of_once(callback, resets):
    model = make_model(extractor={"backbone": "resnet_mini"})
    model.learn(24, callback=callback)
    for other, warned in ((None, True), (None, False), (resets, False)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.learn(8, callback=other, reset_num_timesteps=False)
        said = [str(warning.message) for warning in caught if "what was asked for" in str(warning.message)]
        assert [type(callback).__name__ in text for text in said] == [True] * warned
    assert all(
        factor == 1.0 for group in model.policy.optimizer.param_groups for factor in group["lr_factors"].values()
    )


def test_rates_that_are_relative_to_a_rate_that_rises_are_warned_of():
    kwargs = {"lr_head": 1e-6, "lr_backbone": 1e-7}
    with pytest.warns(UserWarning, match=r"lr_head and lr_backbone hold at the start.* rises to 0\.001.*warmup_steps="):
        make_model(policy_kwargs=kwargs, learning_rate=lambda left: 1e-3 - 999e-6 * left)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*hold at the start")
        make_model(policy_kwargs=kwargs, learning_rate=lambda left: 1e-3 * left)
        make_model(learning_rate=lambda left: 1e-3 - 999e-6 * left)
