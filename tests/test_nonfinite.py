"""NaN and infinity are named before anything is trained on them."""

import copy

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from torch import nn

from sb3_resnet import ResNetExtractor
from sb3_resnet.buffers import FrameNStepReplayBuffer, FrameReplayBuffer
from sb3_resnet.callbacks import FeatureCacheCallback
from sb3_resnet.common.nonfinite import any_non_finite, install_gradient_check, remove_gradient_check
from sb3_resnet.common.step_hooks import before_step
from sb3_resnet.optim.groups import build_optimizer
from tests.helpers import ALGORITHMS, POLICYS, TinyGame, assert_same, fill, make_model, snapshot


class FloatGame(TinyGame):
    """The same game with float observations, one of which is broken."""

    def __init__(self, value, at):
        super().__init__()
        self.observation_space = spaces.Box(0.0, 1.0, (4, 32, 32), np.float32)
        self.value, self.at, self.observed = value, at, 0

    def _observe(self):
        observation = super()._observe().astype(np.float32) / 255.0
        self.observed += 1
        if self.observed == self.at:
            observation[2, 3, 4] = self.value
        return observation


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ([], False),
        ([th.zeros(3), th.full((2, 2), 3e38)], False),  # their norm overflows
        ([th.zeros(3), th.tensor([1.0, float("nan")])], True),
        ([th.tensor([float("-inf")]), th.zeros(2)], True),
        ([th.tensor([float("inf"), float("-inf")])], True),
        ([th.full((2, 2), 6e4, dtype=th.float16), th.full((8,), 3e38, dtype=th.bfloat16)], False),
        ([th.tensor([float("nan")], dtype=th.float16)], True),
        ([nn.Parameter(th.full((2,), float("inf")))], True),
        ([th.zeros(3), th.zeros(2, dtype=th.float64), th.tensor([float("inf")], dtype=th.float64)], True),
    ],
)
def test_any_non_finite(tensors, expected):
    before = [tensor.clone() for tensor in tensors]
    assert any_non_finite(tensors) == expected
    assert all(th.equal(*pair) for pair in zip(tensors, before, strict=True) if not expected)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_float_observations_are_named(value, cached):
    model = make_model(env=FloatGame(value, at=30), learning_starts=4)
    callback = FeatureCacheCallback() if cached else None
    with pytest.raises(ValueError, match=r"The observations hold NaN or inf. SB3's VecCheckNan"):
        model.learn(200, callback=callback)
    assert model.num_timesteps < 200
    assert all(value.isfinite().all() for value in model.policy.state_dict().values())


def test_float_observations_without_a_fault_pass():
    make_model(env=FloatGame(0.5, at=30)).learn(40)


def test_an_exported_extractor_has_no_such_branch():
    space = spaces.Box(0.0, 1.0, (3, 32, 32), np.float32)
    extractor = ResNetExtractor(space, backbone="resnet_mini").eval()
    images = th.rand(2, 3, 32, 32)
    exported = th.export.export(extractor, (images,)).module()
    th.testing.assert_close(exported(images), extractor(images))


@pytest.mark.parametrize("algorithm", ["dqn", "qrdqn"])
@pytest.mark.parametrize("boundary", [None, "layer4"])
def test_a_gradient_that_is_not_finite_is_named_and_not_used(algorithm, boundary):
    model = fill(make_model(algorithm))
    model.policy.set_freeze_boundary(boundary)
    model.train(1, 4)
    weights = {name: value.clone() for name, value in model.policy.named_parameters()}
    moments = copy.deepcopy(model.policy.optimizer.state_dict()["state"])
    model.replay_buffer.rewards[:] = np.nan
    with pytest.raises(ValueError, match=r"The gradient holds NaN or inf, so this update was not made.*learning_rate"):
        model.train(1, 4)
    assert_same(weights, dict(model.policy.named_parameters()))
    for index, state in model.policy.optimizer.state_dict()["state"].items():
        assert_same(moments[index], state)


def test_the_guard_is_there_after_a_deepcopy_and_once():
    model = fill(make_model())
    policy = copy.deepcopy(model.policy)
    for _ in range(2):
        policy = copy.deepcopy(policy)
    assert before_step(policy.optimizer).keys == POLICYS
    before = snapshot(policy)
    for parameter in policy.q_net.q_net.parameters():
        parameter.grad = th.full_like(parameter, float("inf"))
    with pytest.raises(ValueError, match="The gradient holds NaN or inf"):
        policy.optimizer.step()
    assert_same(before, policy.state_dict())
    assert isinstance(policy, nn.Module)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("reward", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("buffer_class", [FrameReplayBuffer, FrameNStepReplayBuffer])
def test_rewards_that_are_not_finite_are_named_without_any_callback_by_our_buffers(algorithm, reward, buffer_class):
    model = fill(make_model(algorithm, replay_buffer_class=buffer_class))
    model.train(2, 4)
    before = [parameter.clone() for parameter in model.policy.parameters()]
    model.replay_buffer.rewards[:] = reward
    with pytest.raises(ValueError, match="The sampled rewards hold NaN or inf, so this update was not made"):
        model.train(1, 4)
    assert all(map(th.equal, before, model.policy.parameters()))


def test_rewards_whose_sum_alone_overflows_are_trained_on():
    model = fill(make_model(replay_buffer_class=FrameReplayBuffer))
    model.replay_buffer.rewards[:] = 3e38
    assert model.replay_buffer.sample(8).rewards.sum().item() == float("inf")


def test_an_older_pytorch_checks_in_the_same_way(monkeypatch):
    monkeypatch.delattr(th.nn.utils, "get_total_norm", raising=False)
    assert any_non_finite([th.zeros(3), th.tensor([float("nan")])])
    assert not any_non_finite([th.zeros(3), th.full((4,), 3e38)])


def test_the_check_and_the_rates_are_installed_and_removed_apart():
    weight = nn.Parameter(th.ones(2, 2))
    optimizer = build_optimizer(th.optim.SGD, {"head": [weight]}, 1.0, {"head": 0.5}, 0.0)
    for _ in range(2):
        install_gradient_check(optimizer)
    optimizer.param_groups[0]["lr"] = 2.0
    weight.grad = th.full_like(weight, float("nan"))
    with pytest.raises(ValueError, match="The gradient holds NaN or inf"):
        optimizer.step()
    assert th.equal(weight, th.ones(2, 2))
    remove_gradient_check(optimizer)
    remove_gradient_check(optimizer)
    weight.grad = th.ones_like(weight)
    optimizer.param_groups[0]["lr"] = 0.2
    optimizer.step()
    assert weight[0, 0].item() == pytest.approx(0.9)  # the rates still hold
    weight.grad = th.full_like(weight, float("nan"))
    optimizer.step()
    assert weight.isnan().all()
    alone = th.optim.SGD([nn.Parameter(th.ones(1))], lr=1.0)
    install_gradient_check(alone)
    assert before_step(alone).keys == ["non-finite gradients"]
