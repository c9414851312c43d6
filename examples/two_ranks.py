"""
Two processes train one model, each with games of its own.

    torchrun --nproc-per-node 2 two_ranks.py [STEPS]

``python two_ranks.py`` trains the same with one process.
"""

import os
import sys

from stable_baselines3 import DQN

import sb3_resnet  # noqa: F401  # registers "ResNetCnnPolicy"
from sb3_resnet.callbacks import DataParallelCallback, FeatureCacheCallback
from sb3_resnet.envs import make_atari_vec_env

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000  # of both together


def main() -> None:
    model = DQN(
        "ResNetCnnPolicy",
        make_atari_vec_env("PongNoFrameskip-v4", n_envs=4, seed=0),
        buffer_size=20_000,
        learning_starts=STEPS // 20,
        train_freq=1,
        gradient_steps=1,
        policy_kwargs=dict(features_extractor_kwargs=dict(adapter="per_frame", last_stage="layer2")),
        seed=0,
    )
    model.learn(STEPS, callback=[DataParallelCallback(), FeatureCacheCallback()])
    if os.environ.get("RANK", "0") == "0":  # all have the same weights, so one of them saves
        model.save("two_ranks")
        print(f"{os.environ.get('WORLD_SIZE', '1')} ranks, {model.num_timesteps} steps together", flush=True)


if __name__ == "__main__":
    main()
