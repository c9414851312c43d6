"""NanGuardCallback: rewards and gradients that are not finite are named before they are trained on."""

import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3 import A2C, DQN, PPO, SAC
from stable_baselines3.common.env_util import make_vec_env

from sb3_resnet import ResNetExtractor
from sb3_resnet.callbacks import NanGuardCallback
from tests.helpers import TinyGame, fill, make_model
from tests.test_unfreeze_callback import start


class Continuous(TinyGame):
    """The tiny game with an action that SAC can choose."""

    def __init__(self):
        super().__init__()
        self.action_space = spaces.Box(-1, 1, (1,), np.float32)

    def step(self, action):
        return super().step(int(action[0] > 0))


class Broken(TinyGame):
    """Pays once what it should not."""

    def __init__(self, value=0.0, at=6):
        super().__init__()
        self.value, self.at, self.steps = value, at, 0

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        self.steps += 1
        return observation, self.value if self.steps == self.at else reward, terminated, truncated, info


def buffer_of(rewards, model=None):
    """A model whose buffer of 10 rows gets these rewards, one by one."""
    model = model or fill(make_model(buffer_size=10), n=8)
    for reward in rewards:
        obs = np.zeros((1, 4, 32, 32), np.uint8)
        model.replay_buffer.add(obs, obs, np.zeros((1, 1)), np.array([reward]), np.zeros(1), [{}])
    return model


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["dqn", "qrdqn", "ppo"])
def test_learning_stops_before_the_update(name, value):
    env = Broken(value)
    if name == "ppo":
        model = PPO("MlpPolicy", make_vec_env(lambda: Broken(value), 2), n_steps=8, batch_size=8, device="cpu")
    else:
        model = make_model(name, env, learning_starts=0)
    with pytest.raises(
        ValueError, match=r"The rewards hold NaN or inf: \[.*(nan|inf).*\] in row 5 of the buffer. SB3's"
    ):
        model.learn(100, callback=NanGuardCallback())
    assert model.num_timesteps == (8 if name != "ppo" else 16)
    assert model._n_updates == (1 if name != "ppo" else 0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("algorithm", "kwargs"),
    [
        (PPO, {"n_steps": 8, "batch_size": 8, "n_epochs": 1}),
        (A2C, {"n_steps": 8}),
        (SAC, {"buffer_size": 50, "learning_starts": 8, "batch_size": 4}),
    ],
)
def test_a_gradient_that_is_not_finite_is_not_stepped_on(algorithm, kwargs, value):
    extractor = {"features_extractor_class": ResNetExtractor, "features_extractor_kwargs": {"backbone": "resnet_mini"}}
    env = Continuous() if algorithm is SAC else TinyGame()
    model = algorithm("CnnPolicy", env, policy_kwargs=extractor, device="cpu", seed=0, **kwargs)
    network = model.policy.actor.mu if algorithm is SAC else model.policy.action_net
    network.weight.register_hook(lambda gradient: gradient * value)
    with pytest.raises(ValueError, match="The gradient holds NaN or inf, so this update was not made"):
        model.learn(32, callback=NanGuardCallback())
    assert all(parameter.isfinite().all() for parameter in model.policy.parameters())


def test_finite_rewards_pass_in_every_turn_of_the_buffer():
    make_model(env=Broken(), buffer_size=10).learn(60, callback=NanGuardCallback())
    model = PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, n_epochs=1, device="cpu")
    model.learn(24, callback=NanGuardCallback())


@pytest.mark.parametrize("before", [0, 1, 2, 7])
def test_each_new_row_is_seen_where_the_buffer_wraps_around(before):
    model = buffer_of([1.0] * before)
    callback = start(model, NanGuardCallback())
    callback.on_rollout_end()
    for added in ([1.0, np.inf], [np.inf], [1.0] * 9 + [np.inf], [np.inf] + [1.0] * 9):
        with pytest.raises(ValueError, match="The rewards hold NaN or inf"):
            start(buffer_of(added, model), callback).on_rollout_end()
        model.replay_buffer.rewards[:] = 0.0
        start(model, callback)
        buffer_of(added, model)
        with pytest.raises(ValueError, match="The rewards hold NaN or inf"):
            callback.on_rollout_end()
        model.replay_buffer.rewards[:] = 0.0


def test_a_loaded_buffer_is_checked_at_the_start():
    with pytest.raises(ValueError, match=r"The rewards hold NaN or inf: \[nan\]"):
        start(buffer_of([np.nan]), NanGuardCallback())


def test_a_model_without_rewards_has_nothing_to_check():
    model = DQN("MlpPolicy", "CartPole-v1", device="cpu")
    model.replay_buffer = None
    start(model, NanGuardCallback()).on_rollout_end()
