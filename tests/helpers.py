"""A tiny image game, a tiny ResNet, and models of both: real SB3 parts at 32x32 pixels."""

import copy

import gymnasium as gym
import numpy as np
import torch as th
import torchvision
from gymnasium import spaces
from sb3_contrib import QRDQN
from stable_baselines3 import A2C, DQN, PPO
from torchvision.models.resnet import BasicBlock, ResNet

import sb3_resnet  # noqa: F401  # registers "ResNetCnnPolicy"

ALGORITHMS = {"dqn": DQN, "qrdqn": QRDQN}
ON_POLICY = {"ppo": PPO, "a2c": A2C}
#: Keys of the hooks that a ResNet policy's own optimizer always has.
POLICYS = ["learning rates", "non-finite gradients"]


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
