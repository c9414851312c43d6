"""
Speed and memory of the feature cache on real Pong, against what people write by hand, in one run.

    python benchmarks/throughput.py      # about fifteen minutes on two CPU cores

Arms, all DQN with ResNet-18, 84x84x4, batch 32 and one update per 4 environment steps, trunk frozen:

- recipe: SB3's documentation: adapter and resnet18 in a ``BaseFeaturesExtractor``, parameters frozen
- wrapper: the advice of SB3's maintainers: features in a ``VecEnvWrapper``, ``MlpPolicy``; cannot fine-tune
- ours: ``ResNetCnnPolicy`` with ``FeatureCacheCallback``

Arms are interleaved; each figure is the median of the rounds. ``limit`` is what stepping the environments and encoding
each observation once, at the batch of the environments, would allow. Results are written as they come.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
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
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecEnvWrapper, VecFrameStack, VecTransposeImage

import sb3_resnet
from sb3_resnet.buffers import FrameReplayBuffer
from sb3_resnet.cache.entries import EntryCache
from sb3_resnet.callbacks import FeatureCacheCallback

RESULTS = Path(__file__).parent / "results"
FILLED = 4_000  # transitions in our buffer before the clock starts, all encoded, as after some time of training
#: Environment steps in a round, by arm and number of environments: some seconds each.
STEPS = {
    "recipe": {1: 24, 8: 48, 32: 64},
    "wrapper": {1: 120, 8: 320, 32: 512},
    "ours": {1: 240, 8: 480, 32: 768},
    "limit": {1: 240, 8: 480, 32: 768},
}


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


def pong(n_envs: int) -> VecTransposeImage:
    gym.register_envs(ale_py)
    return VecTransposeImage(VecFrameStack(make_atari_env("PongNoFrameskip-v4", n_envs=n_envs, seed=0), 4))


def dqn(policy: str, env: Any, **policy_kwargs: Any) -> DQN:
    """One update per 4 environment steps, whatever the number of environments; almost greedy, as after exploration."""
    alone = env.num_envs == 1
    rhythm = {"train_freq": 4 if alone else 1, "gradient_steps": 1 if alone else env.num_envs // 4}
    options = {"buffer_size": 20_000, "learning_starts": 0, "target_update_interval": 1000, "seed": 0, "device": "cpu"}
    epsilon = {"exploration_initial_eps": 0.05, "exploration_final_eps": 0.05}
    return DQN(policy, env, batch_size=32, policy_kwargs=policy_kwargs, **rhythm, **options, **epsilon)


def filled(model: DQN, transitions: int = 500) -> DQN:
    """The model with real transitions in its buffer, before any update."""
    model.learning_starts, rhythm = transitions, model.gradient_steps
    model.gradient_steps = 0
    model.learn(transitions)
    model.learning_starts, model.gradient_steps = 0, rhythm
    return model


def encoded(model: DQN) -> FeatureCacheCallback:
    """The callback at work on a buffer of which all is encoded."""
    callback = FeatureCacheCallback()
    callback.init_callback(model)
    callback.on_training_start({}, {})
    buffer = model.replay_buffer
    rows = np.arange(buffer.pos)
    for env in range(model.n_envs):
        for column in (buffer.observations, buffer.next_observations):
            column[rows, np.full(len(rows), env)]
    return callback


def phase_a(n_envs: int, rounds: int) -> dict[str, float]:
    """Environment steps per second of each arm, and of the limit."""
    models = {
        "recipe": filled(dqn("CnnPolicy", pong(n_envs), features_extractor_class=Recipe, net_arch=[256])),
        "wrapper": filled(dqn("MlpPolicy", FeatureWrapper(pong(n_envs)), net_arch=[256])),
        "ours": filled(dqn("ResNetCnnPolicy", pong(n_envs)), FILLED),
    }
    callbacks = {"ours": encoded(models["ours"])}
    encoder = models["ours"].policy.online.features_extractor.encoder
    bare = pong(n_envs)
    bare.reset()
    actions = [np.array([bare.action_space.sample() for _ in range(n_envs)]) for _ in range(1000)]

    def limit(steps: int) -> None:
        for step in range(steps // n_envs):
            observations, *_ = bare.step(actions[step])
            encoder(th.as_tensor(observations))

    def learn(name: str) -> Callable[[int], Any]:
        return lambda steps: models[name].learn(steps, callback=callbacks.get(name), reset_num_timesteps=False)

    work = {**{name: learn(name) for name in models}, "limit": limit}
    rates: dict[str, list[float]] = {name: [] for name in work}
    for round_ in range(rounds + 1):
        for name, run in work.items():
            steps = STEPS[name][n_envs]
            seconds = timed(lambda: run(steps))  # noqa: B023  # called at once
            rates[name] += [steps / seconds] if round_ else []
    return {name: statistics.median(values) for name, values in rates.items()}


def updates(rounds: int) -> dict[str, float]:
    """Milliseconds of one update: naive, and ours at three boundaries."""
    arms: dict[str, tuple[DQN, int]] = {}
    for name, frozen in (("naive, frozen", True), ("naive, everything", False)):
        extractor = {"features_extractor_class": Recipe, "features_extractor_kwargs": {"frozen": frozen}}
        arms[name] = (filled(dqn("CnnPolicy", pong(1), net_arch=[256], **extractor)), 4)
    for name, stage, count in (
        ("ours, head", None, 200),
        ("ours, layer4", "layer4", 8),
        ("ours, everything", "all", 4),
    ):
        model = filled(dqn("ResNetCnnPolicy", pong(1)))
        model.policy.set_freeze_boundary(stage)
        if stage != "all":
            encoded(model)
        arms[name] = (model, count)
    times: dict[str, list[float]] = {name: [] for name in arms}
    for round_ in range(rounds + 1):
        for name, (model, count) in arms.items():
            seconds = timed(lambda: model.train(count, 32))  # noqa: B023  # called at once
            times[name] += [1000 * seconds / count] if round_ else []
    return {name: statistics.median(values) for name, values in times.items()}


def memory(arm: str, transitions: int) -> float:
    """Resident bytes per transition of a buffer with real transitions; ours with all of them encoded."""
    env = pong(8)
    cls = ReplayBuffer if arm == "stock" else FrameReplayBuffer
    extractor = dqn("ResNetCnnPolicy", pong(1), features_extractor_kwargs={}).policy.online.features_extractor
    encoder = extractor.encoder
    entry = encoder(th.as_tensor(env.reset()))[:1]
    before = psutil.Process().memory_info().rss
    buffer = cls(transitions, env.observation_space, env.action_space, "cpu", n_envs=8)
    cache = EntryCache(encoder, "cpu", expected=transitions)
    observations = env.reset()
    for _ in range(transitions // 8):
        actions = np.array([env.action_space.sample() for _ in range(8)])
        following, rewards, dones, infos = env.step(actions)
        last = following.copy()
        for index in np.flatnonzero(dones):
            last[index] = infos[index]["terminal_observation"]
        buffer.add(observations, last, actions, rewards, dones, infos)
        observations = following
    if arm == "ours":
        for obs_id in buffer.shared.store.obs_ids():
            cache.put(np.array([obs_id]), entry)  # the bytes of an entry count here, not their values
    return (psutil.Process().memory_info().rss - before) / transitions


def in_fresh_process(function: Callable[..., float], *arguments: Any) -> float:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def machine() -> dict[str, Any]:
    return {
        "processor": platform.machine(),
        "cores": psutil.cpu_count(),
        "torch threads": th.get_num_threads(),
        "cpu capability": th.backends.cpu.get_cpu_capability(),
        "torch": th.__version__,
        "stable-baselines3": stable_baselines3.__version__,
        "sb3_resnet": sb3_resnet.__version__,
    }


def ratios(result: dict[str, Any]) -> dict[str, float]:
    """The figures that compare, from those that were measured."""
    found: dict[str, float] = {}
    for n, rates in result.get("phase A, environment steps per second", {}).items():
        for peer in ("recipe", "wrapper", "limit"):
            found[f"{n} environments, ours to {peer}"] = rates["ours"] / rates[peer]
    if times := result.get("update, milliseconds"):
        found["head, naive frozen to ours"] = times["naive, frozen"] / times["ours, head"]
        for stage in ("layer4", "everything"):
            found[f"{stage}, naive to ours"] = times["naive, everything"] / times[f"ours, {stage}"]
    return {name: round(value, 2) for name, value in found.items()}


def draw(result: dict[str, Any]) -> None:
    """Bars of environment steps per second."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = result["phase A, environment steps per second"]
    figure, axes = plt.subplots(figsize=(7, 3))
    for index, arm in enumerate(("recipe", "wrapper", "ours", "limit")):
        places = [place + 0.2 * index for place in range(len(cells))]
        axes.bar(places, [rates[arm] for rates in cells.values()], 0.18, label=arm)
    axes.set_xticks([place + 0.3 for place in range(len(cells))], [f"{n} environments" for n in cells])
    axes.set(ylabel="environment steps per second")
    axes.legend()
    figure.tight_layout()
    figure.savefig(RESULTS / "throughput.png", dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--transitions", type=int, default=100_000, help="in the buffers whose memory is measured")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    result: dict[str, Any] = {
        "command": "python benchmarks/throughput.py",
        "machine": machine(),
        "rounds": arguments.rounds,
        "phase A, environment steps per second": {},
    }
    parts: dict[str, Callable[[], Any]] = {
        "update, milliseconds": lambda: updates(arguments.rounds),
        **{str(n): (lambda n=n: phase_a(n, arguments.rounds)) for n in (1, 8, 32)},
        "resident bytes per transition": lambda: {
            "transitions": arguments.transitions,
            "ours, pixels and entries": in_fresh_process(memory, "ours", arguments.transitions),
            "stock, pixels": in_fresh_process(memory, "stock", arguments.transitions // 5),
        },
    }
    for name, measure in parts.items():
        place = result["phase A, environment steps per second"] if name.isdigit() else result
        place[name] = {key: round(value, 1) for key, value in measure().items()}
        result["ratios"] = ratios(result)
        print(name, place[name], flush=True)
        (RESULTS / "throughput.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["ratios"], indent=1))
    draw(result)


if __name__ == "__main__":
    main()
