"""Pretrain a ResNet on a game without rewards, then train with it. ``python pretrain_and_use.py [STEPS]``."""

import sys

import ale_py  # noqa: F401  # registers the games
from stable_baselines3 import DQN
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecFrameStack, VecTransposeImage

import sb3_resnet  # noqa: F401  # registers "ResNetCnnPolicy"
from sb3_resnet.callbacks import FeatureCacheCallback
from sb3_resnet.envs import make_atari_vec_env
from sb3_resnet.pretraining import pretrain

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 50_000
GAME = "PongNoFrameskip-v4"
FILE = f"pong_{STEPS}.safetensors"


def main() -> None:
    # The features are scored by the game's memory, which games in C++ do not show.
    game = VecFrameStack(make_atari_env(GAME, n_envs=8, seed=0), 4)
    result = pretrain(
        VecTransposeImage(game),  # as the agent sees them: channels first
        FILE,
        updates=max(STEPS // 100, 2),
        frames=max(STEPS // 5, 400),
        held_out=max(STEPS // 25, 240),
        batch_size=32,
        warmup=20,
    )
    print(f"How well the features show the game's state: {result.random_score:.2f} before, {result.score:.2f} after")
    env = make_atari_vec_env(GAME, n_envs=8, seed=0)
    resnet = dict(weights=FILE, adapter="per_frame", last_stage="layer2", pooling="spatial_softmax")
    model = DQN(
        "ResNetCnnPolicy",
        env,
        buffer_size=min(STEPS, 50_000),
        gradient_steps=8,
        n_steps=3,
        policy_kwargs=dict(features_extractor_kwargs=resnet),
        seed=0,
    )
    model.learn(STEPS, callback=FeatureCacheCallback())
    print(f"Trained for {model.num_timesteps:,} steps on {FILE}")


if __name__ == "__main__":
    main()
