"""Play environments step by step, and keep what each shows and tells."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.atari_wrappers import EpisodicLifeEnv
from stable_baselines3.common.vec_env import VecEnv

from sb3_resnet.common.labels import LabelReader
from sb3_resnet.common.playing import begin
from sb3_resnet.common.vec_normalize import raw_rewards
from sb3_resnet.envs.vec_env import AtariVecEnv

Array = NDArray[Any]
#: Called with what is done and how much there is in all.
Progress = Callable[[int, int], None]

_SUCCESSIVE = 16  # steps that are kept together


def played(
    env: VecEnv, seed: int, act: Callable[[Any], Array], reader: LabelReader, each: int, spread: int, progress: Progress
) -> tuple[Array, list[list[dict[str, Any]]]]:
    """
    :param env: environments in this process
    :param seed: of environments and random actions
    :param act: gives the actions for observations
    :param reader: of labels
    :param each: observations of each environment
    :param spread: play so many times as long, and keep 16 successive steps of as many times 16
    :param progress: called after each step
    :return: observations, ``(rows, C, H, W)``, and by environment what is known about each
    """
    observations: Any = begin(env, seed)
    kept = np.empty((env.num_envs, each, *observations.shape[1:]), observations.dtype)
    tracks: list[list[dict[str, Any]]] = [[] for _ in range(env.num_envs)]
    starts = np.ones(env.num_envs, bool)
    space: Any = env.action_space
    choices, rewards = np.zeros((env.num_envs, int(np.prod(space.shape))), space.dtype), np.zeros(env.num_envs)
    infos: Sequence[Mapping[str, Any]] = [{}] * env.num_envs
    episodes = np.zeros(env.num_envs, int)
    games, has_lives = np.ones(env.num_envs, bool), lives_end_episodes(env)
    for step in range(each * spread):
        episodes += starts & games if has_lives else starts
        for index, inner in enumerate(env.get_attr("unwrapped")):
            if step // _SUCCESSIVE % spread or len(tracks[index]) == each:
                continue
            first = bool(starts[index]) or (spread > 1 and step % _SUCCESSIVE == 0)
            known = reader.read(index, inner, infos[index], bool(starts[index]))
            then = {"labels": known, "action": choices[index], "reward": float(rewards[index])}
            kept[index, len(tracks[index])] = observations[index]
            tracks[index].append({"episode": int(episodes[index]), "first": first, **then})
        actions = act(observations)
        choices = (actions - getattr(space, "start", 0)).reshape(env.num_envs, -1)
        observations, rewards, starts, infos = env.step(actions)
        rewards = raw_rewards(env, rewards)
        games = np.array(["episode" in info or info.get("TimeLimit.truncated", False) for info in infos])
        progress(step + 1, each * spread)
    return kept.reshape(-1, *kept.shape[2:]), tracks


def lives_end_episodes(env: VecEnv) -> bool:
    """
    :param env: environments
    :return: whether a game of Atari goes on where an episode ends, at a lost life: its Monitor tells when it is over
    """
    return isinstance(env.unwrapped, AtariVecEnv) or all(env.env_is_wrapped(EpisodicLifeEnv))
