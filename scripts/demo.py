"""Train a ResNet-18 DQN on Pong through RL-Zoo for a few minutes, and say how to go on: what ``make demo`` runs."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
ENV = "PongNoFrameskip-v4"
RUNS = Path("logs", "dqn")
# Each evaluation plays one game, about 800 steps, so there are only two: halfway and at the end.
EVAL_FREQ = 1500
MORE_STEPS = 10_000


def main() -> int:
    os.chdir(ROOT)  # so that the paths below can be pasted into the shell that called make
    # OpenMP's threads wait for each other by spinning. Where other programs want the cores too, that made a pass
    # through the ResNet take three times as long (measured on two cores).
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    code = subprocess.run(train_command(EVAL_FREQ, "--seed", "1"), env=environment).returncode
    if code != 0:
        print(f"Training failed with exit status {code}.", file=sys.stderr)
        return code
    run = max(RUNS.glob(f"{ENV}_*"), key=lambda folder: folder.stat().st_mtime)
    model = run / f"{ENV}.zip"
    evaluations = np.load(run / "evaluations.npz")
    steps, rewards = evaluations["timesteps"], evaluations["results"].mean(axis=1)

    print("\nThe demo shows that all parts work; learning Pong takes about a million steps.")
    print("Evaluations:", ", ".join(f"{reward:g} at step {step}" for step, reward in zip(steps, rewards, strict=True)))
    print(f"Evaluation result: mean reward {rewards[-1]:g} at step {steps[-1]} (from -21 to 21, random play: -20.7)")
    print(f"Model: {model}")
    print("Go on:", shlex.join(train_command(5000, "-n", str(MORE_STEPS), "-i", str(model))))
    return 0


def train_command(eval_freq: int, *extra: str) -> list[str]:
    """:return: RL-Zoo's training command with the shipped configuration"""
    python = Path(sys.executable)
    command = [str(python.relative_to(ROOT) if python.is_relative_to(ROOT) else python), "-m", "rl_zoo3.train"]
    command += ["--algo", "dqn", "--env", ENV, "--gym-packages", "sb3_resnet", "--conf-file", "zoo_configs/dqn.yml"]
    command += ["--log-folder", str(RUNS.parent), "--progress"]
    return [*command, "--eval-freq", str(eval_freq), "--eval-episodes", "1", *extra]


if __name__ == "__main__":
    sys.exit(main())
