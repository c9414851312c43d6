"""An environment of your own with RGB images: catch the ball. ``python own_environment.py [STEPS]``."""

import sys
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3 import DQN
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

import sb3_resnet  # noqa: F401  # registers "ResNetCnnPolicy"
from sb3_resnet.callbacks import FeatureCacheCallback

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
SIZE, CELL = 8, 8  # 8 x 8 cells of 8 x 8 pixels


class Catch(gym.Env[Any, Any]):
    """A ball falls; the paddle moves left, stays or moves right; it pays 1 to be where the ball comes down."""

    # What an image policy needs: uint8 from 0 to 255, height x width x channels.
    observation_space = spaces.Box(0, 255, (SIZE * CELL, SIZE * CELL, 3), np.uint8)
    action_space = spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.ball = [0, int(self.np_random.integers(SIZE))]
        self.paddle = SIZE // 2
        return self.image(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.paddle = int(np.clip(self.paddle + int(action) - 1, 0, SIZE - 1))
        self.ball[0] += 1
        down = self.ball[0] == SIZE - 1
        return self.image(), float(down and self.ball[1] == self.paddle), down, False, {}

    def image(self) -> Any:
        cells = np.zeros((SIZE, SIZE, 3), np.uint8)
        cells[SIZE - 1, self.paddle] = (60, 160, 255)
        cells[self.ball[0], self.ball[1]] = (255, 220, 60)
        return cells.repeat(CELL, axis=0).repeat(CELL, axis=1)


def main() -> None:
    check_env(Catch())
    env = make_vec_env(Catch, n_envs=8, seed=0)
    resnet = dict(last_stage="layer2", pooling="spatial_softmax", frozen_dtype="auto")
    model = DQN(
        "ResNetCnnPolicy",
        env,
        learning_rate=1e-3,
        buffer_size=20_000,
        learning_starts=min(500, STEPS // 2),
        target_update_interval=250,
        train_freq=1,
        gradient_steps=2,
        exploration_fraction=0.5,
        policy_kwargs=dict(features_extractor_kwargs=resnet),
        seed=0,
    )
    before, _ = evaluate_policy(model, env, 40)
    model.learn(STEPS, callback=FeatureCacheCallback())
    after, _ = evaluate_policy(model, env, 40)
    print(f"Balls caught, of those that fell: {before:.0%} before, {after:.0%} after {model.num_timesteps:,} steps")


if __name__ == "__main__":
    main()
