"""NanGuardCallback: rewards and gradients that are not finite are named before they are trained on."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import A2C, DQN, PPO, SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_resnet import ResNetExtractor
from sb3_resnet.buffers import FrameReplayBuffer
from sb3_resnet.callbacks import BestCheckpointCallback, FeatureCacheCallback, NanGuardCallback
from sb3_resnet.callbacks.nan_guard import optimizers_of
from sb3_resnet.common.sampling import WatchedSample
from sb3_resnet.common.step_hooks import before_step
from tests.helpers import POLICYS, TinyGame, fill, make_model, start


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


@pytest.mark.parametrize("buffer_class", [ReplayBuffer, FrameReplayBuffer])
def test_the_sampled_batch_is_checked_while_training_lasts_and_not_after(buffer_class):
    model = fill(make_model(replay_buffer_class=buffer_class))
    callback = start(model, NanGuardCallback())
    callback.on_rollout_end()
    model.train(1, 4)
    model.replay_buffer.rewards[:] = np.inf  # long after they were checked
    with pytest.raises(ValueError, match="The sampled rewards hold NaN or inf, so this update was not made"):
        model.train(1, 4)
    for _ in range(2):
        callback.on_training_end()
    assert "sample" not in vars(model.replay_buffer)
    if buffer_class is ReplayBuffer:
        model.train(1, 4)


def test_a_buffer_that_takes_the_place_of_another_is_watched_and_the_other_is_not():
    model = fill(make_model())
    callback = start(model, NanGuardCallback())
    old, model.replay_buffer = model.replay_buffer, fill(make_model()).replay_buffer
    callback.on_rollout_end()
    assert "sample" not in vars(old)
    model.replay_buffer.rewards[:] = np.inf
    with pytest.raises(ValueError, match="The sampled rewards hold NaN or inf"):
        model.train(1, 4)


def test_a_training_that_was_interrupted_leaves_a_buffer_that_can_be_saved_and_a_second_one_that_ends_cleanly(tmp_path):
    class Stop(BaseCallback):
        def _on_step(self):
            if self.num_timesteps == 20:
                raise KeyboardInterrupt
            return True

    model = make_model()
    with pytest.raises(KeyboardInterrupt):
        model.learn(40, callback=[NanGuardCallback(), Stop()])
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    model.save(tmp_path / "model.zip")
    loaded = DQN.load(tmp_path / "model.zip", env=model.get_env())
    loaded.load_replay_buffer(tmp_path / "buffer.pkl")
    assert loaded.replay_buffer.sample(4).rewards.shape == (4, 1)
    loaded.learn(20, callback=[NanGuardCallback(), FeatureCacheCallback()])
    model.learn(20, callback=[NanGuardCallback(), FeatureCacheCallback()])
    for one in (model, loaded):
        assert not isinstance(one.replay_buffer.sample, WatchedSample)
        assert before_step(one.policy.optimizer).keys == POLICYS


def test_a_checkpoint_of_the_buffer_is_saved_while_it_is_watched(tmp_path):
    model = make_model()
    checkpoints = BestCheckpointCallback(save_freq=8, save_path=tmp_path, save_replay_buffer=True)
    with pytest.warns(UserWarning, match="keeps only the newest"):
        model.learn(24, callback=[NanGuardCallback(), checkpoints])
    files = [*tmp_path.glob("*.pkl")]
    assert files
    for file in files:
        model.load_replay_buffer(file)
        model.replay_buffer.sample(4)


@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_the_check_of_gradients_ends_with_training(algorithm):
    own = {"batch_size": 8, "n_epochs": 1} if algorithm is PPO else {}
    model = algorithm("MlpPolicy", "CartPole-v1", n_steps=8, device="cpu", seed=0, **own)
    model.learn(16, callback=NanGuardCallback())
    assert before_step(model.policy.optimizer).keys == []
    assert not model.policy.optimizer._optimizer_step_pre_hooks
    model.policy.action_net.weight.grad = th.full_like(model.policy.action_net.weight, np.nan)
    model.policy.optimizer.step()
    assert model.policy.action_net.weight.isnan().any()


def test_the_policys_own_check_stays():
    model = make_model()
    model.learn(16, callback=NanGuardCallback())
    assert before_step(model.policy.optimizer).keys == POLICYS


def test_sacs_entropy_coefficient_is_checked_too():
    model = SAC("MlpPolicy", "Pendulum-v1", learning_starts=8, batch_size=4, buffer_size=50, device="cpu", seed=0)
    assert model.ent_coef_optimizer in optimizers_of(model)
    assert len(optimizers_of(model)) == 3
    before = model.log_ent_coef.detach().clone()
    model.log_ent_coef.register_hook(lambda gradient: gradient * np.nan)
    with pytest.raises(ValueError, match="The gradient holds NaN or inf, so this update was not made"):
        model.learn(32, callback=NanGuardCallback())
    assert th.equal(model.log_ent_coef.detach(), before)


def test_a_model_without_rewards_has_nothing_to_check():
    model = DQN("MlpPolicy", "CartPole-v1", device="cpu")
    model.replay_buffer = None
    start(model, NanGuardCallback()).on_rollout_end()
