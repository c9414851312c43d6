"""
Environment steps per second of one rank on one core, and of two ranks on two cores, all else equal.

python benchmarks/data_parallel.py    # about five minutes; writes benchmarks/results/data_parallel.json

Each rank trains ResNet-18 on Pong with environments, replay memory and batches of its own, so two ranks should make
twice the steps. Ranks are bound to a core each. The network between them is this machine's own. In turns, so that a
busy machine disturbs both alike; of each the median counts.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "data_parallel.json"
#: Freeze boundary of each measured phase.
PHASES = {"A": None, "B": "layer4"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1200, help="environment steps of a rank that are timed")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind")
    parser.add_argument("--batch", type=int, default=32, help="batch of a rank")
    parser.add_argument("--envs", type=int, default=4, help="environments of a rank")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--link", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.link:
        measure_link()
        return
    if arguments.worker is not None:
        work(arguments)
        return
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("two cores are needed")
    found: dict[str, dict[int, list[dict[str, float]]]] = {}
    for _ in range(arguments.rounds):
        for phase in PHASES:
            for size in (1, 2):
                runs = found.setdefault(phase, {1: [], 2: []})[size]
                runs.append(measure(arguments, phase, cores[:size]))
                print(phase, size, runs[-1], flush=True)
    results = {
        phase: {
            "one_rank": summary(runs[1]),
            "two_ranks": summary(runs[2]),
            "speed_up": summary(runs[2])["steps_per_second"] / summary(runs[1])["steps_per_second"],
        }
        for phase, runs in found.items()
    }
    settings = {"batch": arguments.batch, "envs": arguments.envs, "steps": arguments.steps, "rounds": arguments.rounds}
    link = launch(cores[:2], ["--link"])
    RESULTS.write_text(json.dumps({"settings": settings, "link": link, "phases": results}, indent=1) + "\n")
    print({phase: round(values["speed_up"], 2) for phase, values in results.items()})


def summary(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def measure(arguments: Any, phase: str, cores: list[int]) -> dict[str, float]:
    options = {"--worker": phase, "--steps": arguments.steps, "--batch": arguments.batch, "--envs": arguments.envs}
    return launch(cores, [str(part) for option in options.items() for part in option])


def launch(cores: list[int], options: list[str]) -> dict[str, float]:
    """
    Run this script once per core, as ranks.

    :return: what the first rank says
    """
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    common = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    workers = []
    for rank, core in enumerate(cores):
        mine = {**os.environ, **common, "RANK": str(rank), "WORLD_SIZE": str(len(cores)), "CORE": str(core)}
        line = [sys.executable, "-W", "ignore", __file__, *options]
        workers.append(subprocess.Popen(line, env=mine, stdout=subprocess.PIPE, text=True))
    outputs = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        raise SystemExit("a rank failed")
    values: dict[str, float] = json.loads(outputs[0].splitlines()[-1])
    return values


def measure_link() -> None:
    """Seconds of a hop, of which the smallest sum of two ranks makes two, and bytes per second of a large one."""
    os.sched_setaffinity(0, {int(os.environ["CORE"])})
    import torch as th

    from sb3_resnet.common.ranks import connect

    ranks = connect(th.device("cpu"), 60.0)
    seconds = {}
    for numbers in (1, 5_000_000):
        message, times = th.zeros(numbers), []
        for _ in range(20):
            ranks.any(False)
            start = time.perf_counter()
            ranks.sum_(message)
            times.append(time.perf_counter() - start)
        seconds[numbers] = statistics.median(times)
    rate = 4 * 5_000_000 / (seconds[5_000_000] - seconds[1])
    print(json.dumps({"seconds_of_a_hop": seconds[1] / 2, "bytes_per_second": rate}))


def work(arguments: Any) -> None:
    os.sched_setaffinity(0, {int(os.environ["CORE"])})
    import ale_py
    import gymnasium as gym
    import torch as th
    from stable_baselines3 import DQN
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import VecFrameStack

    from sb3_resnet.callbacks import DataParallelCallback, FeatureCacheCallback
    from sb3_resnet.common.ranks import Ranks, ranks_of

    th.set_num_threads(1)
    gym.register_envs(ale_py)
    size = int(os.environ["WORLD_SIZE"])
    env = VecFrameStack(make_atari_env("PongNoFrameskip-v4", arguments.envs, seed=int(os.environ["RANK"])), 4)
    boundary = PHASES[arguments.worker]
    extractor = {"pooling": "spatial_softmax", "frozen_dtype": "auto"}
    model = DQN(
        "ResNetCnnPolicy",
        env,
        buffer_size=20_000,
        batch_size=arguments.batch,
        learning_starts=200 * size,
        policy_kwargs={"features_extractor_kwargs": extractor},
        device="cpu",
    )
    model.policy.set_freeze_boundary(boundary)
    warm, total = 400, 400 + arguments.steps
    spent = {"average": 0.0, "updates": 0.0}
    watch(Ranks, "sum_", spent)

    class Clock(BaseCallback):
        began = (0.0, 0, 0)
        messages = (0.0, 0)

        def _on_rollout_start(self) -> None:
            if not self.began[0] and self.num_timesteps >= warm * size:
                self.began = (time.perf_counter(), self.num_timesteps, self.model._n_updates)
                self.messages = (spent["average"], ranks_of(self.model).bytes_summed)

        def _on_step(self) -> bool:
            return True

        def _on_training_end(self) -> None:
            start, steps, updates = self.began
            seconds, made = time.perf_counter() - start, self.model._n_updates - updates
            average, sent = spent["average"] - self.messages[0], ranks_of(self.model).bytes_summed - self.messages[1]
            self.found = {
                "steps_per_second": (self.model.num_timesteps - steps) / seconds,
                "seconds_per_update": seconds / made,
                "seconds_in_sums_per_update": average / made,
                "bytes_per_update": sent / made,
            }

    clock = Clock()
    callbacks = [DataParallelCallback(), clock] + ([FeatureCacheCallback()] if boundary is None else [])
    model.learn(total * size, callback=callbacks)
    print(json.dumps(clock.found))


def watch(owner: type, name: str, spent: dict[str, float]) -> None:
    """Add up the time within a method: what messages take, and what this rank waits for the others in them."""
    method = getattr(owner, name)

    def timed(*args: Any) -> Any:
        start = time.perf_counter()
        try:
            return method(*args)
        finally:
            spent["average"] += time.perf_counter() - start

    setattr(owner, name, timed)


if __name__ == "__main__":
    main()
