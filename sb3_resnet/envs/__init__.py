"""Atari games in C++ threads, as Stable-Baselines3's own environments play them."""

from sb3_resnet.envs.atari import make_atari_vec_env
from sb3_resnet.envs.vec_env import AtariVecEnv
from sb3_resnet.envs.zoo import to_atari_vec_env

__all__ = ["AtariVecEnv", "make_atari_vec_env", "to_atari_vec_env"]
