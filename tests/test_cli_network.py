"""The differentiable network against the policies' own passes."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib import QRDQN
from stable_baselines3 import A2C, DQN, PPO

from sb3_resnet import ResNetExtractor
from sb3_resnet.cli.export import random_observations
from sb3_resnet.cli.loading import extractors_of
from sb3_resnet.cli.network import ScoreNetwork
from sb3_resnet.diagnosis import static_findings
from sb3_resnet.extractor import extractors_in
from tests.helpers import TinyGame, fill, make_model, q_values

VARIANTS = {
    "dqn": ("dqn", {}, (4, 32, 32)),
    "resized": ("dqn", {"image_size": [28, 40], "use_imagenet_norm": True, "features_dim": 7}, (4, 37, 51)),
    "per frame": ("dqn", {"adapter": "per_frame", "pooling": "flatten", "image_size": 33}, (6, 32, 32)),
    "quantiles": ("qrdqn", {"pooling": "spatial_softmax", "image_size": 40}, (3, 32, 32)),
    "group norm": ("qrdqn", {"norm": "group", "freeze_backbone": False}, (4, 32, 32)),
}


class FloatGame(TinyGame):
    def __init__(self, high):
        super().__init__()
        self.high = high
        self.observation_space = spaces.Box(0.0, high, (4, 32, 32), np.float32)

    def _observe(self):
        return super()._observe().astype(np.float32) * (self.high / 255)


def actor_critic(algorithm=PPO, env=None, **options):
    policy = {"features_extractor_class": ResNetExtractor, "features_extractor_kwargs": {"backbone": "resnet_tiny"}}
    return algorithm("CnnPolicy", env or TinyGame(), n_steps=8, policy_kwargs=policy, device="cpu", seed=0, **options)


@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_are_those_of_the_policy(variant):
    algorithm, extractor, shape = VARIANTS[variant]
    model = make_model(algorithm, TinyGame(shape), extractor=extractor)
    fill(model, 16).train(2, 8)
    obs = th.as_tensor(random_observations(model, 5))
    expected = q_values(model, obs).reshape(5, -1, 3).mean(dim=1)
    scores = ScoreNetwork(model)(obs)
    assert th.allclose(scores, expected, rtol=0, atol=1e-5)
    assert (scores.argmax(dim=1).numpy() == model.predict(obs.numpy(), deterministic=True)[0]).all()


@pytest.mark.parametrize("high", [1.0, 255.0])
@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_scores_of_actor_critics_are_logits_of_float_images(algorithm, high):
    options = {"batch_size": 4} if algorithm is PPO else {}
    env = FloatGame(high)
    policy = {"features_extractor_class": ResNetExtractor, "features_extractor_kwargs": {"backbone": "resnet_tiny"}}
    model = algorithm("MlpPolicy", env, n_steps=8, policy_kwargs=policy, device="cpu", seed=0, **options)
    obs = th.as_tensor(random_observations(model, 5))
    assert obs.max() > 0.9 * high
    logits = model.policy.get_distribution(obs).distribution.logits
    assert th.allclose(ScoreNetwork(model)(obs).log_softmax(dim=1), logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("algorithm", [DQN, QRDQN])
def test_stock_policies_of_q_learning_are_taken_too(algorithm):
    policy = {"features_extractor_class": ResNetExtractor, "features_extractor_kwargs": {"backbone": "resnet_tiny"}}
    model = algorithm("CnnPolicy", TinyGame((4, 36, 36)), buffer_size=10, policy_kwargs=policy, device="cpu", seed=0)
    assert [finding.code for finding in static_findings(model)] == ["frozen_random_backbone"]
    assert extractors_of(model) == {"": extractors_in(model.policy)[0]}
    obs = th.as_tensor(random_observations(model, 5))
    network = model.q_net if algorithm is DQN else model.quantile_net
    expected = network(obs).reshape(5, -1, 3).mean(dim=1)
    assert th.allclose(ScoreNetwork(model)(obs), expected, rtol=0, atol=1e-5)


def test_gradients_cross_the_frozen_trunk():
    model = make_model()
    assert model.policy.freeze_boundary is None
    obs = th.as_tensor(random_observations(model, 2)).float().requires_grad_()
    ScoreNetwork(model)(obs).sum().backward()
    assert (obs.grad.abs().amax(dim=(1, 2, 3)) > 0).all()


def test_continuous_actions_are_refused():
    env = TinyGame()
    env.action_space = spaces.Box(-1, 1, (2,))
    env.step = lambda action: (env._observe(), 0.0, False, False, {})
    with pytest.raises(ValueError, match="discrete actions"):
        ScoreNetwork(actor_critic(env=env, batch_size=4))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_of_the_policy_are_those_it_acts_by(dtype):
    model = make_model(extractor={"frozen_dtype": dtype})
    fill(model, 16).train(2, 8)
    obs = random_observations(model, 40)
    network = ScoreNetwork(model).eval()
    own = network.of_policy(th.as_tensor(obs))
    assert th.equal(own, q_values(model, th.as_tensor(obs)))
    expected = float((network(th.as_tensor(obs)) - own).abs().max())
    assert network.difference(obs) == pytest.approx(expected, rel=0.2)
    assert network.difference(obs) < 1e-4 if dtype == "float32" else network.difference(obs) > 1e-4
