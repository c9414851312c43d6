"""
How much faster does PPO train with ``FeatureCacheCallback``?

One process, one thread: two models of Pong with a frozen ResNet-18, one with the callback and one without, take turns;
each turn is a rollout and the training on it. The median of the turns counts.

    python benchmarks/ppo_cache.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ale_py
import gymnasium as gym
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecFrameStack

import sb3_resnet  # noqa: F401  # registers "ResNetCnnPolicy"
from sb3_resnet.callbacks import FeatureCacheCallback

gym.register_envs(ale_py)
RESULT = Path(__file__).parent / "results" / "ppo_cache.json"
GAME = "PongNoFrameskip-v4"


def processor() -> str:
    """:return: name of the CPU, where Linux tells it"""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def build(n_envs: int, n_steps: int, n_epochs: int, batch_size: int) -> PPO:
    """:return: a model of Pong with a frozen ResNet-18 of random weights, which cost what others cost"""
    env = VecFrameStack(make_atari_env(GAME, n_envs, seed=0), 4)
    options: dict[str, Any] = {"n_steps": n_steps, "n_epochs": n_epochs, "batch_size": batch_size}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PPO("ResNetCnnPolicy", env, seed=0, device="cpu", **options)


def turn(model: PPO, cached: bool) -> float:
    """:return: environment steps per second of one rollout and the training on it"""
    steps = model.n_steps * model.n_envs
    start = time.perf_counter()
    model.learn(steps, callback=FeatureCacheCallback() if cached else None, reset_num_timesteps=False)
    return steps / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="turns of each model, after one to warm up")
    parser.add_argument("--envs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=128, help="steps of each environment in a rollout")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    th.set_num_threads(1)
    sizes = (arguments.envs, arguments.steps, arguments.epochs, arguments.batch_size)
    models = {cached: build(*sizes) for cached in (False, True)}
    rates: dict[bool, list[float]] = {False: [], True: []}
    for repeat in range(arguments.repeats + 1):
        for cached, model in models.items():
            rate = turn(model, cached)
            print(f"turn {repeat}, {'with' if cached else 'without'} the cache: {rate:.1f} steps/s", flush=True)
            if repeat:
                rates[cached].append(rate)
    plain, with_cache = (statistics.median(rates[cached]) for cached in (False, True))
    result = {
        "question": "environment steps per second of PPO with a frozen ResNet-18, without and with the cache",
        "command": " ".join(["python", "benchmarks/ppo_cache.py", *sys.argv[1:]]),
        "setting": f"{GAME}, {arguments.envs} environments, {arguments.steps} steps, {arguments.epochs} epochs, "
        f"batch {arguments.batch_size}, 84x84x4, float32, one thread",
        "cpu": processor(),
        "torch": version("torch"),
        "stable_baselines3": version("stable-baselines3"),
        "without": {"median": round(plain, 2), "turns": [round(rate, 2) for rate in rates[False]]},
        "with": {"median": round(with_cache, 2), "turns": [round(rate, 2) for rate in rates[True]]},
        "speedup": round(with_cache / plain, 2),
        "wanted": round(0.6 * (1 + arguments.epochs), 2),
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['speedup']} times as fast")


if __name__ == "__main__":
    main()
