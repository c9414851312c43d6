"""What is measured against what: models on real Pong, ours and those that people write by hand."""

from __future__ import annotations

import copy
import platform
import time
from collections.abc import Callable
from typing import Any

import ale_py
import gymnasium as gym
import numpy as np
import psutil
import stable_baselines3
import torch as th
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecEnvWrapper, VecFrameStack, VecTransposeImage
from synthetic import Recipe, fill
from torch.nn import functional as F

import sb3_resnet
from sb3_resnet.callbacks import FeatureCacheCallback
from sb3_resnet.envs import make_atari_vec_env

GAME = "PongNoFrameskip-v4"
#: The extractor that costs least: each frame alone, up to layer2, positions of what is active.
LEAN = {"adapter": "per_frame", "last_stage": "layer2", "pooling": "spatial_softmax", "frozen_dtype": "auto"}


class FeatureWrapper(VecEnvWrapper):
    """Features instead of pixels, as SB3's maintainers advise; cannot fine-tune."""

    def __init__(self, venv: Any) -> None:
        self.net = Recipe(venv.observation_space).eval()
        super().__init__(venv, gym.spaces.Box(-np.inf, np.inf, (512,), np.float32))

    def _encode(self, observations: np.ndarray) -> np.ndarray:
        with th.no_grad():
            features: np.ndarray = self.net(th.as_tensor(observations).float() / 255).numpy()
        return features

    def reset(self) -> np.ndarray:
        return self._encode(self.venv.reset())

    def step_wait(self) -> Any:
        observations, rewards, dones, infos = self.venv.step_wait()
        for info in infos:
            if "terminal_observation" in info:
                info["terminal_observation"] = self._encode(info["terminal_observation"][None])[0]
        return self._encode(observations), rewards, dones, infos


def pong(n_envs: int, cpp: bool = False) -> VecTransposeImage:
    """Stacks of four frames, channels first, from SB3's environments or from those in C++ threads."""
    gym.register_envs(ale_py)
    if cpp:
        return VecTransposeImage(make_atari_vec_env(GAME, n_envs, seed=0))
    return VecTransposeImage(VecFrameStack(make_atari_env(GAME, n_envs=n_envs, seed=0), 4))


def dqn(policy: str, env: Any, updates_per_step: float = 0.25, device: str = "cpu", **policy_kwargs: Any) -> DQN:
    """So many updates per environment step, with any number of environments; almost greedy, as after exploration."""
    each = round(1 / updates_per_step)
    steps = max(1, each // env.num_envs)  # steps of all environments between two trainings
    rhythm = {"train_freq": steps, "gradient_steps": max(1, round(steps * env.num_envs * updates_per_step))}
    options = {"buffer_size": 20_000, "learning_starts": 0, "target_update_interval": 1000, "seed": 0}
    epsilon = {"exploration_initial_eps": 0.05, "exploration_final_eps": 0.05}
    return DQN(policy, env, batch_size=32, policy_kwargs=policy_kwargs, device=device, **rhythm, **options, **epsilon)


def filled(model: DQN, transitions: int = 500) -> DQN:
    """The model with real transitions in its buffer, before any update."""
    return fill(model, transitions)


def encoded(model: DQN) -> FeatureCacheCallback:
    """The callback at work on a buffer of which all is encoded."""
    callback = FeatureCacheCallback()
    at_work(callback, model)
    buffer = model.replay_buffer
    rows = np.arange(buffer.buffer_size if buffer.full else buffer.pos)
    # In small pieces, as training does: what is made at once is memory that the process keeps.
    for part in np.array_split(rows, max(1, len(rows) // 64)):
        for env in range(model.n_envs):
            for column in (buffer.observations, buffer.next_observations):
                column[part, np.full(len(part), env)]
    return callback


def at_work(callback: BaseCallback, model: DQN) -> None:
    """As in ``learn()``, before its first step; without it ``model.train()`` can be timed alone."""
    callback.init_callback(model)
    callback.on_training_start({}, {})


def head_alone(model: DQN) -> Callable[[], None]:
    """One update of the head with the arithmetic that it cannot do without, on features that lie ready."""
    policy = model.policy
    head, target = copy.deepcopy(policy.online.head), copy.deepcopy(policy.target.head)
    optimizer = th.optim.AdamW(head.parameters(), lr=1e-4, fused=True)
    features = th.randn(2, 32, policy.online.features_dim, device=model.device)
    actions = th.randint(model.action_space.n, (32, 1), device=model.device)
    rewards = th.randn(32, 1, device=model.device)

    def update() -> None:
        with th.no_grad():
            wanted = rewards + 0.99 * target(features[1]).max(dim=1, keepdim=True).values
        loss = F.smooth_l1_loss(head(features[0]).gather(1, actions), wanted)
        optimizer.zero_grad()
        loss.backward()
        th.nn.utils.clip_grad_norm_(head.parameters(), 10)
        optimizer.step()

    return update


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def machine() -> dict[str, Any]:
    capabilities = getattr(th.cpu, "get_capabilities", dict)()
    return {
        "processor": platform.machine(),
        "cores": psutil.cpu_count(),
        "torch threads": th.get_num_threads(),
        "cpu capability": th.backends.cpu.get_cpu_capability(),
        "bfloat16": bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")),
        "torch": th.__version__,
        "stable-baselines3": stable_baselines3.__version__,
        "sb3_resnet": sb3_resnet.__version__,
    }
