"""GradientClipCallback: head and backbone are clipped apart."""

import warnings

import pytest
import torch as th
from stable_baselines3 import A2C, DQN, PPO, SAC
from stable_baselines3.common.callbacks import CallbackList

from sb3_resnet import ResNetExtractor
from sb3_resnet.callbacks import AMPCallback, GradientClipCallback, NanGuardCallback
from sb3_resnet.common.step_hooks import before_step
from sb3_resnet.optim.groups import is_part
from tests.helpers import POLICYS, TinyGame, fill, make_actor_critic, make_model, start


def norms(optimizer):
    parts = {}
    for part in ("head", "backbone"):
        grads = [
            p.grad.norm() for g in optimizer.param_groups if is_part(g, part) for p in g["params"] if p.grad is not None
        ]
        parts[part] = th.stack(grads).norm().item()
    return parts


def used_norms(max_grad_norm, callback=None):
    model = fill(make_model(extractor={"freeze_backbone": False}, max_grad_norm=max_grad_norm))
    if callback is not None:
        start(model, callback)
    seen = {}
    model.policy.optimizer.register_step_post_hook(lambda optimizer, args, kwargs: seen.update(norms(optimizer)))
    model.train(1, 8)
    if callback is not None:
        callback.on_training_end()
        assert before_step(model.policy.optimizer).keys == POLICYS
    return seen


def test_each_part_keeps_its_own_norm():
    free = used_norms(1e9)
    limit = 0.5 * min(free.values())
    assert used_norms(1e9, GradientClipCallback(limit)) == pytest.approx({"head": limit, "backbone": limit}, rel=1e-4)
    joint = used_norms(limit)
    assert joint["head"] < 0.99 * limit  # SB3's joint norm takes the backbone's share from the head


def test_norms_below_the_limit_are_left_alone():
    assert used_norms(1e9, GradientClipCallback(1e6)) == pytest.approx(used_norms(1e9))


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(("algorithm", "kwargs"), [(PPO, {"batch_size": 8, "n_epochs": 1}), (A2C, {})])
def test_ppo_and_a2c_with_the_extractor_are_clipped_too(algorithm, kwargs, share):
    policy = {
        "features_extractor_class": ResNetExtractor,
        "features_extractor_kwargs": {"backbone": "resnet_mini", "freeze_backbone": False, "features_dim": 8},
        "share_features_extractor": share,
    }
    model = algorithm(
        "CnnPolicy", TinyGame(), n_steps=8, max_grad_norm=1e9, policy_kwargs=policy, device="cpu", seed=0, **kwargs
    )
    seen = []

    def look(*_):
        named = [(name, p.grad) for name, p in model.policy.named_parameters() if p.grad is not None]
        trunk = [grad for name, grad in named if ".backbone." in name or ".adapter." in name]
        head = [grad for name, grad in named if not (".backbone." in name or ".adapter." in name)]
        seen.append([th.stack([grad.norm() for grad in part]).norm().item() for part in (head, trunk)])

    model.policy.optimizer.register_step_post_hook(look)
    model.learn(16, callback=GradientClipCallback(1e-6))
    assert seen == [pytest.approx([1e-6, 1e-6], rel=1e-3)] * 2


def test_what_only_the_model_decides_is_refused_before_any_callback_begins():
    begun = []

    class First(NanGuardCallback):
        def _on_training_start(self):
            begun.append(True)

    plain = DQN("CnnPolicy", TinyGame((1, 36, 36)), buffer_size=10, device="cpu")
    for callback in (GradientClipCallback(), AMPCallback()):
        with pytest.raises(TypeError, match="CnnPolicy has no ResNetExtractor"):
            plain.learn(1, callback=CallbackList([First(), callback]))
    with pytest.raises(TypeError, match="leave it out, and write max_grad_norm in the algorithm's arguments"):
        plain.learn(1, callback=GradientClipCallback())
    with pytest.raises(TypeError, match="SACPolicy has no ResNetExtractor"):
        SAC("MlpPolicy", "Pendulum-v1", buffer_size=10, device="cpu").learn(1, callback=GradientClipCallback())
    assert not begun


@pytest.mark.parametrize(("joint", "works"), [(0.5, False), (2.0, False), (1000, True), (None, True)])
def test_it_says_so_where_the_algorithm_clips_first_and_leaves_nothing(joint, works):
    model = make_actor_critic("ppo", max_grad_norm=0.5)
    model.max_grad_norm = joint
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start(model, GradientClipCallback(2.0)).on_training_end()
    said = [str(warning.message) for warning in caught]
    assert any("PPO clips the joint norm" in text and "write max_grad_norm=1000" in text for text in said) != works


@pytest.mark.parametrize(("value", "error"), [(0.0, ValueError), (-1, ValueError), ("much", TypeError)])
def test_bad_norms_are_refused(value, error):
    with pytest.raises(error, match="max_norm must be"):
        GradientClipCallback(value)
