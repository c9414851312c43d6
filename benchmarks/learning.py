"""
What helps a frozen, random ResNet-18 to learn Pong, and how it compares with SB3's NatureCNN.

    python benchmarks/learning.py run --arm base --seed 0       # one run; called again, it goes on where it stopped
    python benchmarks/learning.py run --arm nature --seed 0 --steps 150000
    python benchmarks/learning.py report                        # table and curves of all runs in results/learning/

Eight environments, one torch thread, no pretrained weights (so nothing is downloaded). All arms are the stock DQN
with the same hyperparameters; an arm changes what its name says against ``base``: pooled features, standardised,
3-step returns, one update per environment step. A run writes one file: each episode's environment step, reward and
second (epsilon ends at 0.02). Seconds are of one core: what else the machine did does not count. Nothing depends on
the run's length, so a longer run goes on where a shorter one of the same arm and seed ended.

Equal update ratios: ``nature``, ``base``, ``spatial_softmax`` and ``per_frame_layer2`` make an update per environment
step with 3-step returns; ``nature_ratio_quarter`` and ``ratio_quarter`` make one per four steps. ``atari.py`` compares
with more games, intervals, and a head that all arms share.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import ale_py
import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecFrameStack, VecTransposeImage

import sb3_resnet  # noqa: F401  # registers "ResNetCnnPolicy"
from sb3_resnet.callbacks import FeatureCacheCallback

RESULTS = Path(__file__).parent / "results" / "learning"
CHECKPOINTS = Path("runs") / "learning"
ENVS = 8
SAVE_EVERY = 20_000  # environment steps
EXPLORE = 12_000  # environment steps in which epsilon falls to 0.02
WINDOW = 10  # episodes of a running mean
#: What an arm changes; ``ratio`` is gradient updates per environment step.
ARMS: dict[str, dict[str, Any]] = {
    "base": {},
    "norm_none": {"feature_norm": "none"},
    "norm_layer": {"feature_norm": "layer"},
    "flatten": {"pooling": "flatten"},
    "spatial_softmax": {"pooling": "spatial_softmax"},
    "one_step": {"n_steps": 1},
    "ratio_quarter": {"ratio": 0.25},
    "ratio_4": {"ratio": 4},
    "spatial_softmax_ratio_4": {"pooling": "spatial_softmax", "ratio": 4},
    "per_frame_layer2": {
        "pooling": "spatial_softmax",
        "extractor": {"adapter": "per_frame", "last_stage": "layer2", "frozen_dtype": "auto"},
    },
    "nature": {"policy": "CnnPolicy"},
    "nature_ratio_quarter": {"policy": "CnnPolicy", "ratio": 0.25},
}


def pong(seed: int) -> VecTransposeImage:
    return VecTransposeImage(VecFrameStack(make_atari_env("PongNoFrameskip-v4", n_envs=ENVS, seed=seed), 4))


def build(arm: str, seed: int, steps: int) -> DQN:
    """The model of an arm, untrained."""
    change = {"policy": "ResNetCnnPolicy", "pooling": "avg", "feature_norm": "standardize", "n_steps": 3, "ratio": 1}
    change.update(ARMS[arm])
    extractor = {"backbone": "resnet18", "pooling": change["pooling"], **change.get("extractor", {})}
    own = {"feature_norm": change["feature_norm"], "features_extractor_kwargs": extractor}
    return DQN(
        change["policy"],
        pong(seed),
        policy_kwargs=own if change["policy"] == "ResNetCnnPolicy" else {},
        learning_rate=1e-4,
        buffer_size=100_000,
        learning_starts=2_000,
        batch_size=32,
        train_freq=1,
        gradient_steps=max(1, int(change["ratio"] * ENVS)),
        n_steps=change["n_steps"],
        target_update_interval=1_000,
        exploration_fraction=EXPLORE / steps,
        exploration_final_eps=0.02,
        seed=seed,
        device="cpu",
    )


class Recorder(BaseCallback):
    """Writes down each episode, and saves the run so that it can go on."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.log: dict[str, Any] = {"seconds": 0.0, "episodes": []}
        if (folder / "log.json").exists():
            self.log = json.loads((folder / "log.json").read_text())
        self.saved = len(self.log["episodes"]) and self.log["episodes"][-1][0]

    def _on_training_start(self) -> None:
        self.start = time.process_time() - self.log["seconds"]

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info:
                seconds = round(time.process_time() - self.start, 1)
                self.log["episodes"].append([self.num_timesteps, info["episode"]["r"], seconds])
        return True

    def _on_rollout_end(self) -> None:
        if self.num_timesteps - self.saved >= SAVE_EVERY:
            self.save()

    def save(self) -> None:
        self.saved = self.num_timesteps
        self.log["seconds"] = time.process_time() - self.start
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model.save(self.folder / "model.part")
        self.model.save_replay_buffer(self.folder / "buffer.part")
        (self.folder / "log.part").write_text(json.dumps(self.log))
        for part, whole in (("model.part", "model.zip"), ("buffer.part", "buffer.pkl"), ("log.part", "log.json")):
            (self.folder / part).replace(self.folder / whole)


def run(arm: str, seed: int, steps: int) -> None:
    """Train one arm to its end, or from its last checkpoint on."""
    name = f"{arm}-{steps // 1000}k-s{seed}"
    folder = CHECKPOINTS / f"{arm}-s{seed}"
    if (RESULTS / f"{name}.json").exists():
        sys.exit(f"{name} is done: delete its file in {RESULTS.name}/ to run it again")
    recorder = Recorder(folder)
    callbacks: list[BaseCallback] = [recorder]
    if (folder / "log.json").exists():
        model = DQN.load(folder / "model.zip", env=pong(seed), device="cpu")
        model.load_replay_buffer(folder / "buffer.pkl")
    else:
        model = build(arm, seed, steps)
    if ARMS[arm].get("policy") != "CnnPolicy":
        callbacks.append(FeatureCacheCallback())
    left = steps - model.num_timesteps
    model.learn(left, callback=callbacks, reset_num_timesteps=model.num_timesteps == 0, progress_bar=True)
    recorder.save()
    result = {
        "command": f"python benchmarks/learning.py run --arm {arm} --seed {seed} --steps {steps}",
        "arm": arm,
        "change": ARMS[arm],
        "seed": seed,
        "steps": steps,
        "seconds": round(recorder.log["seconds"], 1),
        "torch": th.__version__,
        "threads": th.get_num_threads(),
        "episodes (step, reward, second)": recorder.log["episodes"],
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result) + "\n")
    print(f"{name}: last {WINDOW} episodes {last_mean(result):.1f}")


def last_mean(result: dict[str, Any]) -> float:
    return float(np.mean([reward for _, reward, _ in result["episodes (step, reward, second)"][-WINDOW:]]))


def report() -> None:
    """Print the table, and draw the curves by environment step and by time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    rows = ["| arm | seed | steps | last 10 episodes | minutes |", "|---|---|---|---|---|"]
    for result in sorted(results, key=lambda result: (result["steps"], -last_mean(result))):
        cells = (f"{last_mean(result):.1f}", f"{result['seconds'] / 60:.0f}")
        rows.append(f"| {result['arm']} | {result['seed']} | {result['steps']:,} | {' | '.join(cells)} |")
    (RESULTS / "table.md").write_text("\n".join(rows) + "\n")
    print("\n".join(rows))
    for steps in sorted({result["steps"] for result in results}):
        figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
        for result in (result for result in results if result["steps"] == steps):
            episodes = np.array(result["episodes (step, reward, second)"])
            mean = np.convolve(episodes[:, 1], np.ones(WINDOW) / WINDOW, mode="valid")
            label = f"{result['arm']}, seed {result['seed']}"
            axes[0].plot(episodes[WINDOW - 1 :, 0], mean, label=label)
            axes[1].plot(episodes[WINDOW - 1 :, 2] / 60, mean)
        axes[0].set(xlabel="environment steps", ylabel=f"reward, mean of {WINDOW} episodes")
        axes[1].set(xlabel="minutes on one core")
        axes[0].legend(fontsize=7)
        figure.tight_layout()
        figure.savefig(RESULTS / f"curves_{steps // 1000}k.png", dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="one run")
    one.add_argument("--arm", choices=[*ARMS], required=True)
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--steps", type=int, default=60_000)
    commands.add_parser("report", help="table and curves of all runs")
    arguments = parser.parse_args()
    if arguments.command == "report":
        report()
        return
    th.set_num_threads(1)
    warnings.filterwarnings("ignore", message="The backbone is frozen with random weights")
    gym.register_envs(ale_py)
    run(arguments.arm, arguments.seed, arguments.steps)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
