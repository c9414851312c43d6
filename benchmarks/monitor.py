"""
What MonitorCallback and DoctorCallback cost: phase A on Pong, ResNet-18, feature cache, one environment.

python benchmarks/monitor.py    # about ten minutes on two CPU cores; writes benchmarks/results/monitor.json

Two measurements, since other programs on the machine disturb the first by more than what is to be measured:

* pairs: stretches of training with and without the callback take turns in one run; ratio of their CPU times
* share: CPU time inside the callback's own methods and hooks, relative to all CPU time of the stretch
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import ale_py
import gymnasium as gym
import torch as th
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecFrameStack

from sb3_resnet.callbacks import DoctorCallback, FeatureCacheCallback, MonitorCallback
from sb3_resnet.diagnosis.episodes import EpisodeValues
from sb3_resnet.diagnosis.probe import Probe, _Armed

RESULTS = Path(__file__).parent / "results" / "monitor.json"
WATCHED = ((MonitorCallback, 1), (MonitorCallback, 10), (MonitorCallback, 100), (DoctorCallback, 100))
#: Where the callbacks' code is entered; none of them calls another.
ENTRIES = {
    Probe: ("prepare", "before_step", "_after_step", "pause"),
    _Armed: ("_see_values", "_see_head", "_see_units", "_see_norm", "_see_gradient"),
    EpisodeValues: ("step",),
}


class Stopwatch:
    """Adds up the CPU time within some methods, not twice where one calls another."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._inside = False

    def watch(self, owner: type, name: str) -> None:
        method = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return method(*args, **kwargs)
            self._inside = True
            start = time.process_time()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - start
                self._inside = False

        setattr(owner, name, timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="environment steps of a stretch")
    parser.add_argument("--pairs", type=int, default=5, help="stretches with and without")
    arguments = parser.parse_args()
    th.set_num_threads(1)
    model = build()
    stretch(model, arguments.steps)  # fills the cache, warms up
    pairs = []
    for _ in range(arguments.pairs):
        without, watched = (stretch(model, arguments.steps, *extra) for extra in ((), (MonitorCallback(),)))
        pairs.append(watched / without)
    stopwatch = Stopwatch()
    for owner, names in ENTRIES.items():
        for name in names:
            stopwatch.watch(owner, name)
    shares = {
        f"{cls.__name__}(every={every})": share(model, stopwatch, cls, every, arguments.steps) for cls, every in WATCHED
    }
    result = {
        "setting": "Pong, 1 environment, frozen ResNet-18, FeatureCacheCallback, batch 32, train_freq 4, 1 thread",
        "torch": th.__version__,
        "steps_per_stretch": arguments.steps,
        "cpu_time_with_over_without": {"median": statistics.median(pairs), "all": pairs},
        "share_of_cpu_time": shares,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def build() -> DQN:
    gym.register_envs(ale_py)
    env = VecFrameStack(make_atari_env("PongNoFrameskip-v4", seed=0), 4)
    model = DQN(
        "ResNetCnnPolicy",
        env,
        buffer_size=20_000,
        learning_starts=100,
        exploration_fraction=0.001,
        seed=0,
        device="cpu",
    )
    model.set_logger(Logger(None, []))
    return model


def stretch(model: DQN, steps: int, *callbacks: BaseCallback) -> float:
    """:return: CPU seconds of some steps"""
    start = time.process_time()
    model.learn(steps, callback=[FeatureCacheCallback(), *callbacks], reset_num_timesteps=False)
    return time.process_time() - start


def share(model: DQN, stopwatch: Stopwatch, cls: Any, every: int, steps: int) -> dict[str, Any]:
    """:return: share of the CPU time in the callback's code, median of three stretches"""
    seen = []
    for _ in range(3):
        stopwatch.seconds = 0.0
        seconds = stretch(model, steps, cls(every=every, verbose=0))
        seen.append(stopwatch.seconds / seconds)
    return {"median": statistics.median(seen), "all": seen}


if __name__ == "__main__":
    main()
