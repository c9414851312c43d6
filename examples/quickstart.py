"""Train on an Atari game on a CPU for a few minutes, and score the agent. ``python quickstart.py [STEPS]``."""

import sys

from stable_baselines3 import DQN
from stable_baselines3.common.evaluation import evaluate_policy

import sb3_resnet  # noqa: F401  # registers "ResNetCnnPolicy"
from sb3_resnet.callbacks import FeatureCacheCallback
from sb3_resnet.envs import make_atari_vec_env

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 30_000


def main() -> None:
    # A game that does not end by itself is cut, so that the evaluation below cannot take long.
    env = make_atari_vec_env("RoadRunnerNoFrameskip-v4", n_envs=8, seed=0, max_episode_steps=2000)
    resnet = dict(
        adapter="per_frame",  # each step brings one new frame to encode
        last_stage="layer2",
        pooling="spatial_softmax",
        frozen_dtype="auto",  # bfloat16 where the CPU has it
    )
    model = DQN(
        "ResNetCnnPolicy",
        env,
        learning_rate=3e-4,
        buffer_size=min(STEPS, 30_000),
        gradient_steps=8,  # for the 32 steps of 8 games between two calls of train()
        target_update_interval=500,
        n_steps=10,
        policy_kwargs=dict(features_extractor_kwargs=resnet),
        seed=0,
    )
    model.learn(STEPS, callback=FeatureCacheCallback())
    score, _ = evaluate_policy(model, env, 8, deterministic=False)
    print(f"{score:.0f} points per game after {STEPS:,} steps")


if __name__ == "__main__":
    main()
