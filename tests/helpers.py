"""A tiny image game, a tiny ResNet, and models of both: real SB3 parts at 32x32 pixels."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import torchvision
from gymnasium import spaces
from sb3_contrib import QRDQN
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from torchvision.models.resnet import BasicBlock, ResNet
from typer.testing import CliRunner

import sb3_resnet  # noqa: F401  # registers "ResNetCnnPolicy"
from sb3_resnet.callbacks import (
    AMPCallback,
    BestCheckpointCallback,
    FeatureCacheCallback,
    GradientClipCallback,
    LRScheduleCallback,
    UnfreezeCallback,
)
from sb3_resnet.cli.app import app

ALGORITHMS = {"dqn": DQN, "qrdqn": QRDQN}
ON_POLICY = {"ppo": PPO, "a2c": A2C}
#: Keys of the hooks that a ResNet policy's own optimizer always has.
POLICYS = ["learning rates", "non-finite gradients"]
ROOT = Path(__file__).parent.parent
CONFIGS = {name: ROOT / "zoo_configs" / f"{name}.yml" for name in ALGORITHMS}
PONG = "PongNoFrameskip-v4"
#: Hyperparameters for RL-Zoo. The first update comes after step 24, so that 60 steps make 10 updates.
SHORT_RUN = {"learning_starts": 20, "buffer_size": 100, "batch_size": 4}
#: Extractor arguments: the whole trunk trains.
LIVE = {"freeze_backbone": False}


def slowly(*values):
    """Values of a parameter whose tests `make test-slow` runs."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow) for value in values
    ]


class _TinyResNet(ResNet):
    thinner = 2

    def _make_layer(self, block, planes, blocks, stride=1, dilate=False):
        return super()._make_layer(block, planes // self.thinner, blocks, stride, dilate)


class _MiniResNet(_TinyResNet):
    thinner = 8

    def __setattr__(self, name, value):
        first = name == "inplanes" and not hasattr(self, "conv1")  # the stem's width, 64 in torchvision
        super().__setattr__(name, value // self.thinner if first else value)


def resnet_tiny(*, weights=None, progress=True, **kwargs):
    """A ResNet of one block a stage and half the width: a tenth of ResNet-18's parameters."""
    resnet = _TinyResNet(BasicBlock, [1, 1, 1, 1], **kwargs)
    resnet.fc = th.nn.Linear(256, 1000)
    return resnet


def resnet_mini(*, weights=None, progress=True, **kwargs):
    """Thinner still, for float16, which a CPU computes slowly."""
    resnet = _MiniResNet(BasicBlock, [1, 1, 1, 1], **kwargs)
    resnet.fc = th.nn.Linear(64, 1000)
    return resnet


for _builder in (resnet_tiny, resnet_mini):
    for _module in (torchvision.models, torchvision.models.resnet):
        setattr(_module, _builder.__name__, _builder)


class TinyGame(gym.Env):
    """A bar moves; naming its column pays. Deterministic given the seed; episodes end or are truncated in turn."""

    def __init__(self, shape=(4, 32, 32), length=13):
        self.observation_space = spaces.Box(0, 255, shape, np.uint8)
        self.action_space = spaces.Discrete(3)
        self.length = length
        self.episode = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.clock = 0
        self.episode += 1
        self.frames = np.zeros(self.observation_space.shape, np.uint8)
        return self._observe(), {}

    def step(self, action):
        reward = float(action == self.column)
        self.clock += 1
        over = self.clock >= self.length
        return self._observe(), reward, over and self.episode % 2 == 0, over and self.episode % 2 == 1, {}

    def _observe(self):
        self.column = int(self.np_random.integers(3))
        frame = np.full(self.frames.shape[1:], 20 * self.clock % 256, np.uint8)
        frame[:, 10 * self.column : 10 * self.column + 10] = 255
        self.frames = np.concatenate([self.frames[1:], frame[None]])
        return self.frames.copy()


class DictGame(gym.Env):
    """Images and numbers: each step draws all of them; episodes end or are truncated in turn."""

    def __init__(self, length=13, render_mode=None, **parts):  # gymnasium 1.1 hands render_mode to all
        self.parts = parts or {
            "camera": spaces.Box(0, 255, (32, 32, 3), np.uint8),
            "count": spaces.Discrete(4),
            "depth": spaces.Box(0.0, 1.0, (1, 36, 36), np.float32),
            "speed": spaces.Box(-np.inf, np.inf, (5,), np.float32),
        }
        self.observation_space = spaces.Dict(self.parts)
        self.action_space = spaces.Discrete(3)
        self.length = length
        self.episode = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.clock = 0
        self.episode += 1
        return self._observe(), {}

    def step(self, action):
        self.clock += 1
        over = self.clock >= self.length
        reward = float(action == self.clock % 3)
        return self._observe(), reward, over and self.episode % 2 == 0, over and self.episode % 2 == 1, {}

    def _observe(self):
        return {key: draw(space, self.np_random) for key, space in self.parts.items()}


class GoalGame(DictGame):
    """A picture of the place, and a place to reach; :class:`stable_baselines3.HerReplayBuffer` makes goals of it."""

    def __init__(self, length=5):
        place = spaces.Box(-1.0, 1.0, (2,), np.float32)
        goals = {"achieved_goal": place, "desired_goal": place, "observation": place}
        super().__init__(length, picture=spaces.Box(0, 255, (32, 32, 3), np.uint8), **goals)

    def step(self, action):
        observation, _, *rest = super().step(action)
        reward = self.compute_reward(observation["achieved_goal"], observation["desired_goal"], {})
        return observation, float(reward), *rest

    def compute_reward(self, achieved, desired, info):
        return -np.float32(np.linalg.norm(achieved - desired, axis=-1) > 0.1)


def draw(space, rng):
    """A random value of a space."""
    if isinstance(space, spaces.Discrete):
        return int(rng.integers(space.n))
    if isinstance(space, (spaces.MultiBinary, spaces.MultiDiscrete)):
        return rng.integers(0, getattr(space, "nvec", 2), space.shape).astype(space.dtype)
    if space.dtype == np.uint8:
        return rng.integers(0, 256, space.shape, dtype=np.uint8)
    low, high = (bound.clip(-9, 300) for bound in (space.low, space.high))
    return np.asarray(rng.uniform(low, high), space.dtype)


class Rewards(EvalCallback):
    """SB3's EvalCallback with given rewards instead of an evaluation; one of ``stop_at`` ends training."""

    def __init__(self, rewards, eval_freq=4, stop_at=None, **kwargs):
        super().__init__(TinyGame(), eval_freq=eval_freq, warn=False, verbose=0, **kwargs)
        self.rewards = [*rewards]
        self.stop_at = stop_at

    def _on_step(self):
        if self.n_calls % self.eval_freq == 0:
            self.last_mean_reward = self.rewards.pop(0)
            return self.last_mean_reward != self.stop_at
        return True


class ForgetfulGame(TinyGame):
    """All that it remembers is the state of its random generator, so that a resumed run can bring it back."""

    def reset(self, *, seed=None, options=None):
        gym.Env.reset(self, seed=seed)
        return self._image(), {}

    def step(self, action):
        over, truncated = (bool(self.np_random.random() < 0.08) for _ in range(2))
        return self._image(), float(action == self.np_random.integers(3)), over, truncated and not over, {}

    def _image(self):
        return self.np_random.integers(0, 256, self.observation_space.shape, dtype=np.uint8)


def make_model(algorithm="dqn", env=None, policy_kwargs=None, extractor=None, **kwargs):
    """A model on the tiny game that trains from the first steps on."""
    policy_kwargs = {**(policy_kwargs or {})}
    if algorithm == "qrdqn":
        policy_kwargs.setdefault("n_quantiles", 5)
    policy_kwargs["features_extractor_kwargs"] = {"backbone": "resnet_tiny", **(extractor or {})}
    options = {
        "buffer_size": 300,
        "learning_starts": 8,
        "batch_size": 4,
        "train_freq": 4,
        "target_update_interval": 24,
        "seed": 0,
        "device": "cpu",
        **kwargs,
    }
    return ALGORITHMS[algorithm]("ResNetCnnPolicy", env or TinyGame(), policy_kwargs=policy_kwargs, **options)


def make_actor_critic(algorithm="ppo", env=None, policy_kwargs=None, extractor=None, **kwargs):
    """PPO with four updates in each ``train()``, or A2C with one."""
    policy_kwargs = {**(policy_kwargs or {})}
    policy_kwargs["features_extractor_kwargs"] = {"backbone": "resnet_mini", **(extractor or {})}
    batches = {"batch_size": 4, "n_epochs": 2} if algorithm == "ppo" else {}
    options = {"n_steps": 8, "seed": 0, "device": "cpu", **batches, **kwargs}
    return ON_POLICY[algorithm]("ResNetCnnPolicy", env or TinyGame(), policy_kwargs=policy_kwargs, **options)


def make_dict_model(algorithm="dqn", env=None, policy_kwargs=None, extractor=None, **kwargs):
    """A model with "ResNetMultiInputPolicy" that trains from the first steps on; PPO makes four updates each time."""
    policy_kwargs = {"net_arch": [16], **(policy_kwargs or {})}
    policy_kwargs["features_extractor_kwargs"] = {"backbone": "resnet_mini", **(extractor or {})}
    off_policy = {"buffer_size": 60, "learning_starts": 8, "batch_size": 4, "target_update_interval": 24}
    options = {"ppo": {"batch_size": 4, "n_epochs": 2, "n_steps": 8}, "a2c": {"n_steps": 8}}.get(algorithm, off_policy)
    cls = {**ALGORITHMS, **ON_POLICY}[algorithm]
    options = {"seed": 0, "device": "cpu", **options, **kwargs}
    return cls("ResNetMultiInputPolicy", env or DictGame(), policy_kwargs=policy_kwargs, **options)


def dict_observations(model, n=4, seed=1):
    """Random observations of the model's Dict, channels first."""
    rng = np.random.default_rng(seed)
    parts = model.observation_space.spaces
    return {key: np.stack([draw(space, rng) for _ in range(n)]) for key, space in parts.items()}


def scores(model_or_policy, obs):
    """What the policy says in eval mode: Q-values, or probabilities and values, ``(batch, n)``."""
    policy = getattr(model_or_policy, "policy", model_or_policy)
    policy.set_training_mode(False)
    obs, _ = policy.obs_to_tensor(obs)
    with th.no_grad():
        if hasattr(policy, "online"):
            return policy.online(obs)
        return th.cat([policy.get_distribution(obs).distribution.probs, policy.predict_values(obs)], dim=1)


def probabilities_and_values(model_or_policy, obs):
    """What actor and critic say in eval mode, ``(batch, actions + 1)``."""
    policy = getattr(model_or_policy, "policy", model_or_policy)
    policy.set_training_mode(False)
    with th.no_grad():
        obs = th.as_tensor(obs, device=policy.device)
        return th.cat([policy.get_distribution(obs).distribution.probs, policy.predict_values(obs)], dim=1)


def fill(model, n=64, seed=0):
    """Put random transitions into the buffer and set up a logger, so that ``train()`` runs without ``learn()``."""
    rng = np.random.default_rng(seed)
    shape = (model.n_envs, *model.observation_space.shape)
    for _ in range(n):
        obs, following = (rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(2))
        action = rng.integers(0, model.action_space.n, (model.n_envs, 1))
        model.replay_buffer.add(obs, following, action, rng.normal(size=model.n_envs), np.zeros(model.n_envs), [{}])
    model._setup_learn(1, None)
    return model


def observations(model, n=8, seed=1):
    """Random images of the model's space."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, *model.observation_space.shape), dtype=np.uint8)


def q_values(model_or_policy, obs):
    """Values of the online network in eval mode."""
    policy = getattr(model_or_policy, "policy", model_or_policy)
    policy.set_training_mode(False)
    with th.no_grad():
        return policy.online(th.as_tensor(obs, device=policy.device)).cpu()


def snapshot(module):
    """A copy of everything in the state dict."""
    return copy.deepcopy(module.state_dict())


def assert_same(left, right):
    """Two state dicts are equal bit for bit."""
    assert left.keys() == right.keys()
    different = [key for key in left if not th.equal(left[key], right[key])]
    assert not different, different


def start(model, *callbacks, **locals_):
    """
    Begin training as ``learn()`` does, for these callbacks alone.

    :return: the callback, or all if there are several
    """
    for callback in callbacks:
        callback.init_callback(model)
        callback.on_training_start(locals_, {})
    return callbacks[0] if len(callbacks) == 1 else callbacks


def trained(model):
    """As if the trunk had been trained."""
    with th.no_grad():
        for network in (model.policy.online, model.policy.target):
            network.features_extractor.backbone.bn1.bias += 1e-3
    return model


def drive(model, used, rounds, after_round=lambda done: None):
    """``learn()``'s loop without an environment."""
    for callback in used:
        callback.init_callback(model)
        callback.on_training_start({}, {})
    for done in range(1, rounds + 1):
        model.num_timesteps += 4
        for callback in used:
            callback.on_rollout_end()
        model.train(gradient_steps=1, batch_size=4)
        after_round(done)


def random_state(state=None):
    """Get or set the generators that sampling and dropout use."""
    if state is not None:
        np.random.set_state(state[0])
        th.set_rng_state(state[1])
    return np.random.get_state(), th.get_rng_state()


def everything(model):
    """What training changes: weights, moments and the settings of the optimizer's groups."""
    return {"policy": model.policy.state_dict(), "optimizer": model.policy.optimizer.state_dict()}


def small(algorithm="dqn", extractor=LIVE, size=17, **kwargs):
    """CPUs compute float16 slowly."""
    extractor = {"backbone": "resnet_mini", **extractor}
    return fill(make_model(algorithm, TinyGame((4, size, size)), extractor=extractor, **kwargs))


def amp(model, dtype="float16", **kwargs):
    """Begin mixed precision in a model."""
    return start(model, AMPCallback(dtype, verbose=0, **kwargs))


def zoo(command, algorithm, folder, *arguments, env=PONG):
    """Run one of RL-Zoo's commands on a game; return what it prints."""
    line = [sys.executable, "-m", f"rl_zoo3.{command}", "--algo", algorithm, "--env", env, "-f", folder]
    line += ["--gym-packages", "sb3_resnet", "--device", "cpu", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, line)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_command(*arguments, width=200):
    """:return: exit status, and what was printed"""
    result = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": str(width)})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


class CutError(Exception):
    """Stands for a crash."""


class Fuse(BaseCallback):
    """Ends ``learn()`` after so many steps and updates, in the midst of whatever is going on."""

    def __init__(self, left):
        super().__init__()
        self.left = left

    def _on_training_start(self):
        self.model.policy.optimizer.register_step_post_hook(lambda *args: self._on_step())

    def _on_step(self):
        self.left -= 1
        if self.left < 0:
            raise CutError
        return True


class Evaluation(EvalCallback):
    """Rewards that depend on the step alone; goes on counting where the run was cut."""

    def __init__(self):
        super().__init__(ForgetfulGame(), eval_freq=12, warn=False, verbose=0)

    def _init_callback(self):
        super()._init_callback()
        self.n_calls = self.model.num_timesteps // self.model.n_envs

    def _on_step(self):
        if self.n_calls % self.eval_freq == 0:
            self.last_mean_reward = 5.0 * np.sin(self.model.num_timesteps / 25)
        return True


def resuming_callbacks(folder, cached=False, **saving):
    phases = [
        {"at_timestep": 60, "unfreeze_from": "layer4", "lr_backbone": 5e-4, "ramp": 8, "restore_best": True},
        {"on_plateau": {"patience": 1, "latest_timestep": 110}, "unfreeze_from": "layer3", "restore_best": True},
    ]
    return [
        BestCheckpointCallback(save_path=folder, save_replay_buffer=True, keep_last=2, **{"save_freq": 15, **saving}),
        UnfreezeCallback(phases, verbose=0),
        LRScheduleCallback(4, "cosine", decay_steps=60),
        GradientClipCallback(1.0),
        Evaluation(),
        *([FeatureCacheCallback()] if cached else []),
    ]


def resumed_in_a_new_process(test, folder, algorithm, points):
    """:return: the files of what ``resume`` of a test file makes of the models that were saved at some points"""
    script = (
        f"import sys; from tests.{test} import resume\n"
        "folder, algorithm, *points = sys.argv[1:]\n"
        "for point in points:\n"
        "    resume(folder, algorithm, int(point)).save(f'{folder}/resumed {point}.zip')"
    )
    points = [*map(str, points)]
    subprocess.run([sys.executable, "-c", script, str(folder), algorithm, *points], check=True)
    return [folder / f"resumed {point}.zip" for point in points]
