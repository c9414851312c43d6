"""
One real fine-tuning run on Pong, and its picture: learning rate of each group, freeze boundary, evaluation reward.

python benchmarks/phases.py          # trains (about ten minutes on two CPU cores), then draws
python benchmarks/phases.py --draw   # draws again from benchmarks/results/phases.csv
"""

from __future__ import annotations

import argparse
import csv
import shutil
import tempfile
from pathlib import Path

import ale_py
import gymnasium as gym
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import EvalCallback, LogEveryNTimesteps
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecFrameStack

from sb3_resnet.callbacks import BestCheckpointCallback, LRScheduleCallback, UnfreezeCallback
from sb3_resnet.nn.freezing import STAGES

RESULTS = Path(__file__).parent / "results"
STEPS = 3000
PHASES = [
    {"at_timestep": 1000, "unfreeze_from": "layer4", "ramp": 100},
    {"at_timestep": 2000, "unfreeze_from": "layer3", "ramp": 100, "restore_best": True},
]
GROUPS = {"head": "head", "backbone": "backbone (a tenth)"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="only draw")
    if not parser.parse_args().draw:
        train()
    draw()


def train() -> None:
    """Train on real Pong and keep SB3's log."""
    gym.register_envs(ale_py)
    env, eval_env = (VecFrameStack(make_atari_env("PongNoFrameskip-v4", seed=seed), 4) for seed in (0, 1))
    extractor = {"backbone": "resnet18", "freeze_backbone": True}
    model = DQN(
        "ResNetCnnPolicy",
        env,
        learning_rate=1e-4,
        buffer_size=5000,
        learning_starts=200,
        target_update_interval=500,
        seed=0,
        policy_kwargs={"features_extractor_kwargs": extractor},
    )
    with tempfile.TemporaryDirectory() as folder:
        model.set_logger(configure(folder, ["csv"]))
        callbacks = [
            LRScheduleCallback(warmup_steps=100, schedule="cosine", decay_steps=600, min_factor=0.1),
            UnfreezeCallback(PHASES),
            BestCheckpointCallback(save_freq=0, save_path=folder),
            EvalCallback(eval_env, n_eval_episodes=1, eval_freq=500),
            LogEveryNTimesteps(20),
        ]
        model.learn(STEPS, callback=callbacks, log_interval=None, progress_bar=True)
        RESULTS.mkdir(exist_ok=True)
        shutil.copy(Path(folder) / "progress.csv", RESULTS / "phases.csv")


def draw() -> None:
    """Draw ``phases.png`` from ``phases.csv``."""
    with open(RESULTS / "phases.csv", newline="") as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    figure, (rates, boundary, reward) = plt.subplots(3, 1, sharex=True, figsize=(7, 6), layout="constrained")
    updates = 0.0
    for row in rows:  # evaluations are dumped alone, without the counter
        updates = row.setdefault("train/n_updates", updates)
    for name, label in GROUPS.items():
        rates.plot(*series(rows, f"train/lr_{name}"), label=label)
    rates.set(ylabel="learning rate", yscale="symlog")
    rates.set_yscale("symlog", linthresh=1e-6)
    rates.legend(frameon=False)
    boundary.step(*series(rows, "train/freeze_boundary"), where="post", color="tab:green")
    boundary.set_yticks([*range(len(STAGES) + 1)], [*STAGES, "all frozen"])
    boundary.set_ylabel("trains from")
    boundary.invert_yaxis()
    reward.plot(*series(rows, "eval/mean_reward"), "o-", color="tab:red")
    reward.set(ylabel="evaluation reward", xlabel="gradient updates")
    figure.savefig(RESULTS / "phases.png", dpi=110)


def series(rows: list[dict[str, float]], key: str) -> tuple[list[float], list[float]]:
    """:return: updates and values of one column where it has values"""
    found = [(row["train/n_updates"], row[key]) for row in rows if key in row]
    return [x for x, _ in found], [y for _, y in found]


if __name__ == "__main__":
    main()
