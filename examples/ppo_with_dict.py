"""PPO on a Dict of an image and numbers: reach what the camera shows. ``python ppo_with_dict.py [STEPS]``."""

import sys
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

import sb3_resnet  # noqa: F401  # registers "ResNetMultiInputPolicy"

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000


class Reach(gym.Env[Any, Any]):
    """A camera shows the target; where the arm is comes as numbers. It pays to come closer."""

    observation_space = spaces.Dict(
        {"camera": spaces.Box(0, 255, (48, 48, 3), np.uint8), "arm": spaces.Box(0, 1, (2,), np.float32)}
    )
    action_space = spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.arm, self.target = self.np_random.random((2, 2))
        self.left = 20
        return self.seen(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        before = self.distance()
        self.arm = np.clip(self.arm + 0.1 * action, 0, 1)
        self.left -= 1
        return self.seen(), before - self.distance(), self.distance() < 0.05, self.left == 0, {}

    def distance(self) -> float:
        return float(np.abs(self.arm - self.target).max())

    def seen(self) -> dict[str, Any]:
        image = np.zeros((48, 48, 3), np.uint8)
        row, column = (self.target * 40).astype(int)
        image[row : row + 8, column : column + 8] = (240, 90, 60)
        return {"camera": image, "arm": self.arm.astype(np.float32)}


def main() -> None:
    env = make_vec_env(Reach, n_envs=8, seed=0)
    resnet = dict(last_stage="layer2", pooling="spatial_softmax", vector_arch=[32])
    model = PPO(
        "ResNetMultiInputPolicy",
        env,
        n_steps=64,
        batch_size=64,
        n_epochs=4,
        learning_rate=3e-4,
        policy_kwargs=dict(features_extractor_kwargs=resnet),
        seed=0,
        verbose=1,
    )
    model.learn(STEPS)
    print(f"Trained for {model.num_timesteps:,} steps on {', '.join(env.observation_space.spaces)}")


if __name__ == "__main__":
    main()
