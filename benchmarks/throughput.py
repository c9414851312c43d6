"""
Speed and memory of the feature cache on real Pong, against what people write by hand, in one run.

    python benchmarks/throughput.py      # about ten minutes on two CPU cores

Arms, all DQN with ResNet-18, 84x84x4, batch 32 and one update per 4 environment steps, trunk frozen:

- recipe: SB3's documentation: adapter and resnet18 in a ``BaseFeaturesExtractor``, parameters frozen
- wrapper: SB3's maintainers' advice (issue #409): features in a ``VecEnvWrapper``, ``MlpPolicy``; cannot fine-tune
- ours: ``ResNetCnnPolicy`` with ``FeatureCacheCallback``

Arms are interleaved; each figure is the median of the rounds. ``limit`` is what encoding each observation once with our
encoder, at the batch of the environments, and stepping the environments would allow.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ale_py
import gymnasium as gym
import numpy as np
import psutil
import stable_baselines3
import torch as th
import torchvision
from stable_baselines3 import DQN
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecEnvWrapper, VecFrameStack, VecTransposeImage

import sb3_resnet
from sb3_resnet.buffers import FrameReplayBuffer
from sb3_resnet.cache import EntryCache
from sb3_resnet.callbacks import FeatureCacheCallback
from sb3_resnet.encoder import FrozenEncoder

RESULTS = Path(__file__).parent / "results"
WARM_UP = 320  # environment steps before the clock starts


class Recipe(BaseFeaturesExtractor):
    """The features extractor of SB3's documentation with a ResNet in it."""

    def __init__(self, space: Any, frozen: bool = True) -> None:
        super().__init__(space, 512)
        trunk = torchvision.models.resnet18(weights=None)
        trunk.fc = th.nn.Identity()
        self.net = th.nn.Sequential(th.nn.Conv2d(space.shape[0], 3, 1), trunk)
        for parameter in self.net.parameters():
            parameter.requires_grad = not frozen

    def forward(self, observations: th.Tensor) -> th.Tensor:
        features: th.Tensor = self.net(observations)
        return features


class FeatureWrapper(VecEnvWrapper):
    """Features instead of pixels."""

    def __init__(self, venv: Any) -> None:
        self.net = Recipe(venv.observation_space).eval()
        super().__init__(venv, gym.spaces.Box(-np.inf, np.inf, (512,), np.float32))

    def _encode(self, observations: np.ndarray) -> np.ndarray:
        with th.no_grad():
            return self.net(th.as_tensor(observations).float() / 255).numpy()

    def reset(self) -> np.ndarray:
        return self._encode(self.venv.reset())

    def step_wait(self) -> Any:
        observations, rewards, dones, infos = self.venv.step_wait()
        for info in infos:
            if "terminal_observation" in info:
                info["terminal_observation"] = self._encode(info["terminal_observation"][None])[0]
        return self._encode(observations), rewards, dones, infos


def pong(n_envs: int) -> VecTransposeImage:
    return VecTransposeImage(VecFrameStack(make_atari_env("PongNoFrameskip-v4", n_envs=n_envs, seed=0), 4))


def dqn(policy: str, env: Any, **policy_kwargs: Any) -> DQN:
    rhythm = {"train_freq": 4, "gradient_steps": 1} if env.num_envs == 1 else {
        "train_freq": 1, "gradient_steps": env.num_envs // 4
    }  # fmt: skip
    options = {"buffer_size": 20_000, "learning_starts": 64, "target_update_interval": 1000, "seed": 0}
    epsilon = {"exploration_initial_eps": 0.05, "exploration_final_eps": 0.05}
    return DQN(policy, env, batch_size=32, policy_kwargs=policy_kwargs, **rhythm, **options, **epsilon)


def phase_a(n_envs: int, rounds: int) -> dict[str, float]:
    """Environment steps per second of each arm, and of the limit."""
    recipe = dqn("CnnPolicy", pong(n_envs), features_extractor_class=Recipe, net_arch=[256])
    wrapper = dqn("MlpPolicy", FeatureWrapper(pong(n_envs)), net_arch=[256])
    ours = dqn("ResNetCnnPolicy", pong(n_envs))
    models = {"recipe": (recipe, 64), "wrapper": (wrapper, 256), "ours": (ours, 512)}
    rates: dict[str, list[float]] = {name: [] for name in [*models, "limit"]}
    encoder = FrozenEncoder(ours.q_net.features_extractor)
    bare = pong(n_envs)
    observations = bare.reset()
    for round_ in range(rounds + 1):
        for name, (model, steps) in models.items():
            callback = FeatureCacheCallback() if name == "ours" else None
            steps = max(steps, 4 * n_envs) if round_ else WARM_UP
            rate = timed(lambda: model.learn(steps, callback=callback, reset_num_timesteps=False), steps)  # noqa: B023
            rates[name] += [rate] if round_ else []
        steps = max(128, 4 * n_envs)

        def limit() -> None:
            nonlocal observations
            for _ in range(steps // n_envs):  # noqa: B023
                encoder(th.as_tensor(observations))
                observations, *_ = bare.step(np.array([bare.action_space.sample() for _ in range(n_envs)]))

        rate = timed(limit, steps)
        rates["limit"] += [rate] if round_ else []
    return {name: statistics.median(values) for name, values in rates.items()}


def updates(rounds: int) -> dict[str, float]:
    """Milliseconds of one update: naive, and ours at three boundaries."""
    arms: dict[str, tuple[DQN, int]] = {}
    for name, frozen in (("naive, frozen", True), ("naive, everything", False)):
        extractor = {"features_extractor_class": Recipe, "features_extractor_kwargs": {"frozen": frozen}}
        arms[name] = (filled(dqn("CnnPolicy", pong(1), net_arch=[256], **extractor)), 2)
    for name, stage, count in (("ours, head", None, 40), ("ours, layer4", "layer4", 4), ("ours, everything", "all", 2)):
        model = filled(dqn("ResNetCnnPolicy", pong(1)))
        model.policy.set_freeze_boundary(stage)
        callback = FeatureCacheCallback()
        callback.init_callback(model)
        callback.on_training_start({}, {})
        arms[name] = (model, count)
    times: dict[str, list[float]] = {name: [] for name in arms}
    for round_ in range(rounds + 1):
        for name, (model, count) in arms.items():
            count = count if round_ else 40  # until all observations are encoded
            rate = timed(lambda: model.train(count, 32), count)  # noqa: B023
            times[name] += [1000 / rate] if round_ else []
    return {name: statistics.median(values) for name, values in times.items()}


def filled(model: DQN, steps: int = 200) -> DQN:
    """The model with real transitions in its buffer, before any update."""
    model.learning_starts = steps
    model.learn(steps)
    return model


def memory(transitions: int) -> dict[str, float]:
    """Resident bytes per transition of frames, indices and float16 entries of 512 features, all written."""
    env = pong(8)
    before = psutil.Process().memory_info().rss
    buffer = FrameReplayBuffer(transitions, env.observation_space, env.action_space, "cpu", n_envs=8)
    ours = dqn("ResNetCnnPolicy", pong(1)).q_net.features_extractor
    base = psutil.Process().memory_info().rss - before
    cache = EntryCache(FrozenEncoder(ours), "cpu")
    buffer.shared.encode_with(cache)
    entry = th.rand(512).half()
    observations = env.reset()
    for _ in range(transitions // 8):
        actions = np.array([env.action_space.sample() for _ in range(8)])
        following, rewards, dones, infos = env.step(actions)
        last = following.copy()
        for index in np.flatnonzero(dones):
            last[index] = infos[index]["terminal_observation"]
        buffer.add(observations, last, actions, rewards, dones, infos)
        observations = following
        for number in {*buffer.observations.numbers[buffer.pos - 1].tolist()} - {*cache._slots}:
            cache.put(number, entry)  # its bytes count, not its value
    used = psutil.Process().memory_info().rss - before - base
    stock = 2 * 84 * 84 * 4
    return {"transitions": transitions, "bytes per transition": used / transitions, "stock pixels": stock}


def timed(work: Callable[[], Any], count: int) -> float:
    start = time.perf_counter()
    work()
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--transitions", type=int, default=20_000)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    gym.register_envs(ale_py)
    result: dict[str, Any] = {
        "command": "python benchmarks/throughput.py",
        "machine": {
            "processor": platform.machine(), "cores": psutil.cpu_count(), "torch threads": th.get_num_threads(),
            "cpu capability": th.backends.cpu.get_cpu_capability(), "torch": th.__version__,
            "stable-baselines3": stable_baselines3.__version__, "sb3_resnet": sb3_resnet.__version__,
        },
        "rounds": arguments.rounds,
        "memory": memory(arguments.transitions),
        "update, milliseconds": updates(arguments.rounds),
        "phase A, environment steps per second": {str(n): phase_a(n, arguments.rounds) for n in (1, 8, 32)},
    }  # fmt: skip
    result["peak memory, MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "throughput.json").write_text(json.dumps(result, indent=1) + "\n")
    for name, rates in result["phase A, environment steps per second"].items():
        ratios = f"{rates['ours'] / rates['recipe']:.1f}x recipe, {rates['ours'] / rates['wrapper']:.1f}x wrapper"
        print(
            f"{name:>3} envs:",
            {k: round(v, 1) for k, v in rates.items()},
            ratios,
            f"{rates['ours'] / rates['limit']:.0%}",
        )
    print({name: round(value, 1) for name, value in result["update, milliseconds"].items()})
    print(result["memory"])


if __name__ == "__main__":
    main()
