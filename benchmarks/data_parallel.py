"""
Environment steps per second of one rank on one core, and of two ranks on two cores, all else equal.

python benchmarks/data_parallel.py    # about five minutes; writes benchmarks/results/data_parallel.json

Each rank trains ResNet-18 on Pong with environments, replay memory and batches of its own, so two ranks should make
twice the steps. Ranks are bound to a core each. The network between them is this machine's own. Two runs at the same
time that know nothing of each other show what the machine itself allows: its cores may share caches, memory, or more.
In turns, so that a busy machine disturbs all alike; of each the median counts.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "data_parallel.json"
#: Freeze boundary of each measured phase.
PHASES = {"A": None, "B": "layer4"}
#: Shares of the steps that are timed in it.
SHARES = {"A": 1.0, "B": 0.25}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1200, help="environment steps of a rank that are timed")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each kind")
    parser.add_argument("--batch", type=int, default=32, help="batch of a rank")
    parser.add_argument("--envs", type=int, default=4, help="environments of a rank")
    parser.add_argument("--phases", nargs="+", choices=[*PHASES], default=[*PHASES], help="others stay in the file")
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
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for _ in range(arguments.rounds):
        for phase in arguments.phases:
            runs = found.setdefault(phase, {"one_rank": [], "two_ranks": [], "two_runs_apart": []})
            runs["one_rank"].append(measure(arguments, phase, cores[:1]))
            runs["two_ranks"].append(measure(arguments, phase, cores[:2]))
            runs["two_runs_apart"].append(apart(arguments, phase, cores[:2]))
            print(phase, {name: round(of[-1]["steps_per_second"]) for name, of in runs.items()}, flush=True)
    settings = {name: getattr(arguments, name) for name in ("batch", "envs", "steps", "rounds")}
    results = {phase: {"settings": settings, **compared(runs)} for phase, runs in found.items()}
    before = json.loads(RESULTS.read_text())["phases"] if RESULTS.exists() else {}
    measured = {"link": launch(cores[:2], ["--link"]), "phases": {**before, **results}}
    RESULTS.write_text(json.dumps(measured, indent=1) + "\n")
    print({phase: {name: values[name] for name in values if "speed_up" in name} for phase, values in results.items()})


def compared(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """:return: medians, and the medians of the rounds' own ratios"""

    def ratios(one: str, other: str) -> list[float]:
        pairs = zip(runs[one], runs[other], strict=True)
        return [round(a["steps_per_second"] / b["steps_per_second"], 2) for a, b in pairs]

    return {
        **{name: summary(of) for name, of in runs.items()},
        "speed_up": statistics.median(ratios("two_ranks", "one_rank")),
        "speed_up_of_each_round": ratios("two_ranks", "one_rank"),
        "speed_up_of_two_runs_apart": statistics.median(ratios("two_runs_apart", "one_rank")),
        "two_ranks_to_two_runs_apart": statistics.median(ratios("two_ranks", "two_runs_apart")),
    }


def summary(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def measure(arguments: Any, phase: str, cores: list[int]) -> dict[str, float]:
    steps = round(arguments.steps * SHARES[phase])
    options = {"--worker": phase, "--steps": steps, "--batch": arguments.batch, "--envs": arguments.envs}
    return launch(cores, [str(part) for option in options.items() for part in option])


def apart(arguments: Any, phase: str, cores: list[int]) -> dict[str, float]:
    """:return: steps per second of runs at the same time, each a rank alone, added up"""
    with ThreadPoolExecutor(len(cores)) as pool:
        found = [*pool.map(lambda core: measure(arguments, phase, [core]), cores)]
    return {"steps_per_second": sum(one["steps_per_second"] for one in found)}


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
