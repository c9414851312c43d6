"""
Train a DQN with a ResNet-18 on RoadRunner through RL-Zoo for a few minutes, and show whether it learned: ``make demo``.

Before, it plays at random; afterwards the trained agent plays as many games. It ends with both scores, a learning
curve, a GIF of the agent with what it looks at, and the command to go on. All of it is in the folder of the run.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3 import DQN
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_resnet.envs import make_atari_vec_env

ROOT = Path(__file__).resolve().parent.parent
GAME = "RoadRunnerNoFrameskip-v4"
GAMES, AT_ONCE = 16, 8  # played before and after
GAME_STEPS = 2000  # an agent that stands still would else play for 27,000
MORE_STEPS = 100_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, help="of training; what zoo_configs/demo.yml says if not given")
    parser.add_argument("--logs", type=Path, default=Path("logs", "demo"), help="folder of the runs")
    parser.add_argument("--game-steps", type=int, default=GAME_STEPS, help="of a game before and after, at most")
    arguments = parser.parse_args()
    os.chdir(ROOT)  # so that the paths below can be pasted into the shell that called make
    # OpenMP's threads wait for each other by spinning. Where other programs want the cores too, that made a pass
    # through the ResNet take three times as long (measured on two cores).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    start = time.perf_counter()

    before = scores(None, arguments.seed, arguments.game_steps)
    print(f"Before: random play scores {described(before)}\n", flush=True)
    extra = ["--seed", str(arguments.seed), *(["-n", str(arguments.steps)] if arguments.steps else [])]
    code = subprocess.run(train_command(arguments.logs, *extra)).returncode
    if code != 0:
        print(f"Training failed with exit status {code}.", file=sys.stderr)
        return code
    run = max((arguments.logs / "dqn").glob(f"{GAME}_*"), key=lambda folder: folder.stat().st_mtime)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SB3's, about the replay buffer, which is not needed here
        model = DQN.load(run / f"{GAME}.zip", device="cpu", custom_objects={"buffer_size": 1})
    after = scores(model, arguments.seed, arguments.game_steps)
    pictures = draw(run)
    seconds = time.perf_counter() - start

    result = {"game": GAME, "seed": arguments.seed, "steps": model.num_timesteps, "seconds": round(seconds)}
    result |= {"before": before, "after": after, "rises": rises(before, after)}
    (run / "demo.json").write_text(json.dumps(result, indent=1) + "\n")
    print(*report(result, pictures, run), sep="\n")
    return 0


def scores(model: DQN | None, seed: int, game_steps: int = GAME_STEPS) -> list[float]:
    """
    :param model: the agent; ``None`` plays at random
    :param seed: of the first game
    :param game_steps: steps after which a game ends, if it has not ended by itself
    :return: the score of each of the games, as the game counts it
    """
    # Other games than those of the training, whose environments begin with the seed itself.
    env = make_atari_vec_env(GAME, AT_ONCE, seed + 10_000, terminal_on_life_loss=False, max_episode_steps=game_steps)
    try:
        player: Any = RandomPlay(env.action_space) if model is None else model
        found, _ = evaluate_policy(player, env, GAMES, deterministic=model is None, return_episode_rewards=True)
    finally:
        env.close()
    return [float(score) for score in found]


class RandomPlay:
    """What ``evaluate_policy`` needs of a model."""

    def __init__(self, action_space: Any):
        self.action_space = action_space

    def predict(self, observation: Any, **kwargs: Any) -> tuple[Any, None]:
        return np.array([self.action_space.sample() for _ in observation]), None


def rises(before: list[float], after: list[float]) -> bool:
    """:return: whether the mean has risen by more than two standard errors of the difference"""
    error = float(np.sqrt(np.var(before) / len(before) + np.var(after) / len(after)))
    return bool(np.mean(after) - np.mean(before) > 2 * error)


def draw(run: Path) -> list[Path]:
    """:return: pictures of the run that could be drawn: a learning curve, and the agent with what it looks at"""
    curve, gif = run / "curve.png", run / "agent.gif"
    command = [sys.executable, "-m", "sb3_resnet"]
    watch = ["watch", str(run / f"{GAME}.zip"), "--env", GAME, "--output", str(gif), "--gradcam", "--epsilon", "0.02"]
    subprocess.run([*command, "plot", str(run), "--output", str(curve), "--window", str(GAMES)])
    subprocess.run([*command, *watch, "--steps", "300"])
    return [picture for picture in (curve, gif) if picture.exists()]


def report(result: dict[str, Any], pictures: list[Path], run: Path) -> list[str]:
    """:return: the lines that end the demo, which claim nothing that this run did not show"""
    before, after = result["before"], result["after"]
    if result["rises"]:
        said = "The agent has learned: its score has risen clearly above random play."
    else:
        said = "This run did not learn: the score is not clearly above random play. Try another --seed, or go on."
    go_on = train_command(run.parent.parent, "-n", str(MORE_STEPS), "-i", str(run / f"{GAME}.zip"))
    return [
        "",
        f"Before: {described(before)} (random play)",
        f"After:  {described(after)} ({result['steps']:,} steps; all in all {result['seconds']} s)",
        said,
        *(f"Picture: {picture}" for picture in pictures),
        f"Model: {run / GAME}.zip",
        f"Go on: {shlex.join(go_on)}",
    ]


def described(found: list[float]) -> str:
    """:return: mean and range of scores"""
    return f"{np.mean(found):.1f} points, {min(found):g} to {max(found):g} in {len(found)} games"


def train_command(logs: Path, *extra: str) -> list[str]:
    """:return: RL-Zoo's training command with the shipped configuration"""
    python = Path(sys.executable)
    command = [str(python.relative_to(ROOT) if python.is_relative_to(ROOT) else python), "-m", "rl_zoo3.train"]
    command += ["--algo", "dqn", "--env", GAME, "--gym-packages", "sb3_resnet", "--conf-file", "zoo_configs/demo.yml"]
    return [*command, "--log-folder", str(logs), "--eval-freq", "-1", "--progress", *extra]


if __name__ == "__main__":
    sys.exit(main())
