"""
Speed of the Atari environments in C++ threads against SB3's own, by random actions, in one run.

    python benchmarks/atari_envs.py -o benchmarks/results/atari_envs.json      # about five minutes on two CPU cores

Arms are interleaved; each figure is the median of the rounds. A ratio is the median of the rounds' own ratios, since
both arms of a round meet the same load of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ale_py
import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack

import sb3_resnet
from sb3_resnet.envs import make_atari_vec_env

ARMS: dict[str, Callable[[str, int], VecEnv]] = {
    "DummyVecEnv": lambda game, n: VecFrameStack(make_atari_env(game, n, seed=0), 4),
    "make_atari_vec_env": lambda game, n: make_atari_vec_env(game, n, seed=0),
}


def rates(game: str, n_envs: int, steps: int, rounds: int) -> dict[str, list[float]]:
    """Environment steps per second of each arm in each round; the first round warms up and does not count."""
    envs = {name: make(game, n_envs) for name, make in ARMS.items()}
    for env in envs.values():
        env.reset()
    draw, n_actions = np.random.default_rng(0), next(iter(envs.values())).action_space.n
    found: dict[str, list[float]] = {name: [] for name in envs}
    for round_ in range(rounds + 1):
        actions = draw.integers(0, n_actions, (max(steps // n_envs, 1), n_envs))
        for name, env in envs.items():
            start = time.perf_counter()
            for chosen in actions:
                env.step(chosen)
            found[name] += [actions.size / (time.perf_counter() - start)] if round_ else []
    for env in envs.values():
        env.close()
    return found


def summary(found: dict[str, list[float]]) -> dict[str, float]:
    ratios = [ours / theirs for theirs, ours in zip(*found.values(), strict=True)]
    speeds = {f"{name}, steps per second": round(statistics.median(values), 1) for name, values in found.items()}
    return {**speeds, "ratio": round(statistics.median(ratios), 2)}


def machine() -> dict[str, Any]:
    return {
        "processor": platform.machine(),
        "cpus of this process": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu capability": th.backends.cpu.get_cpu_capability(),
        **{name: version(name) for name in ("stable-baselines3", "ale-py", "numpy")},
        "sb3_resnet": sb3_resnet.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3_000, help="environment steps of an arm in a round")
    parser.add_argument("--envs", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--games", nargs="+", default=["PongNoFrameskip-v4", "BreakoutNoFrameskip-v4"])
    parser.add_argument("-o", "--output", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    gym.register_envs(ale_py)
    result: dict[str, Any] = {
        "command": "python benchmarks/atari_envs.py",
        "machine": machine(),
        "rounds": arguments.rounds,
        "steps of a round": arguments.steps,
        "games": {},
    }
    for game in arguments.games:
        place = result["games"].setdefault(game, {})
        for n_envs in arguments.envs:
            place[f"{n_envs} environments"] = summary(rates(game, n_envs, arguments.steps, arguments.rounds))
            print(game, n_envs, place[f"{n_envs} environments"], flush=True)
            if arguments.output:
                arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
