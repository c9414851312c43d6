"""C++ Atari environments for RL-Zoo, by one line of its configuration."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from stable_baselines3.common import atari_wrappers
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecFrameStack

from sb3_resnet.common import host
from sb3_resnet.envs.rules import Rules, game_arguments, import_ale
from sb3_resnet.envs.vec_env import AtariVecEnv


def to_atari_vec_env(venv: VecEnv, frame_stack: int = 1, n_threads: int | None = None) -> VecEnv:
    """
    Replace SB3's Atari environments by those of :func:`~sb3_resnet.envs.make_atari_vec_env` with the same settings.

    For RL-Zoo, beside the lines that its Atari configurations have anyway; it stacks the frames itself::

        env_wrapper:
          - stable_baselines3.common.atari_wrappers.AtariWrapper
        frame_stack: 4
        vec_env_wrapper: sb3_resnet.envs.to_atari_vec_env

    A little faster: stacks made here. Then leave out ``frame_stack: 4`` and write::

        vec_env_wrapper:
          - sb3_resnet.envs.to_atari_vec_env:
              frame_stack: 4

    :param venv: environments of ``make_atari_env``, or of RL-Zoo with ``AtariWrapper``; closed afterwards. Those that
        show a window (``rl_zoo3.enjoy``) and those in processes of their own (with a warning) stay as they are, only
        stacked: they play the same
    :param frame_stack: frames of an observation
    :param n_threads: the most environments that work at the same time; ``None``: as many as this process may use CPUs
    :return: the environments in C++, with the seeds and log files of the old ones
    :raises ValueError: if they are not Atari games in ``AtariWrapper``, or have settings that C++ cannot follow
    """
    in_processes = isinstance(venv, SubprocVecEnv)
    if in_processes:
        advice = "make a DummyVecEnv (in RL-Zoo the default)"
        warnings.warn(f"to_atari_vec_env leaves a SubprocVecEnv as it is: {advice}", stacklevel=2)
    if in_processes or venv.render_mode == "human":
        return VecFrameStack(venv, frame_stack) if frame_stack > 1 else venv
    if not isinstance(venv, DummyVecEnv):
        raise ValueError(
            f"to_atari_vec_env would lose {type(venv).__name__}: put to_atari_vec_env first in vec_env_wrapper"
        )
    import_ale()
    if not (venv.env_is_wrapped(atari_wrappers.AtariWrapper)[0] and venv.env_is_wrapped(Monitor)[0]):
        raise ValueError(
            "to_atari_vec_env needs the environments of make_atari_env. In RL-Zoo write "
            "'env_wrapper: stable_baselines3.common.atari_wrappers.AtariWrapper'"
        )
    spec = venv.get_attr("spec", 0)[0]
    arguments = game_arguments(spec)
    if spec.kwargs["frameskip"] != 1:
        raise ValueError(
            f"{spec.id} skips {spec.kwargs['frameskip']} frames and AtariWrapper skips frames again: write "
            "'env_kwargs: {frameskip: 1}', or take a game whose name ends in NoFrameskip-v4"
        )
    rules = Rules(**arguments, **_settings(venv))
    log = venv.get_attr("results_writer", 0)[0]
    folder = None if log is None else str(Path(log.file_handler.name).parent)
    seeds, n_envs = host.seeds_of(venv), venv.num_envs
    venv.close()
    env = AtariVecEnv(spec, rules, n_envs, frame_stack=frame_stack, n_threads=n_threads, monitor_dir=folder)
    env.seed_each(seeds)
    return env


def _settings(venv: VecEnv) -> dict[str, Any]:
    """Read the arguments of ``AtariWrapper`` from the wrappers that it made."""

    def wrapped(wrapper: Any) -> bool:
        return venv.env_is_wrapped(wrapper, 0)[0]

    if wrapped(atari_wrappers.StickyActionEnv):
        raise ValueError(
            "AtariWrapper's action_repeat_probability is not supported by the C++ environments: write "
            "'env_kwargs: {repeat_action_probability: 0.25}' instead"
        )
    skips = wrapped(atari_wrappers.MaxAndSkipEnv)
    return {
        "noop_max": venv.get_attr("noop_max", 0)[0] if wrapped(atari_wrappers.NoopResetEnv) else 0,
        "frame_skip": host.frames_skipped(venv) if skips else 1,
        "screen_size": venv.observation_space.shape[0] if venv.observation_space.shape else 84,
        "terminal_on_life_loss": wrapped(atari_wrappers.EpisodicLifeEnv),
        "clip_reward": wrapped(atari_wrappers.ClipRewardEnv),
    }
