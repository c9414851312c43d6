"""Environments by their id, wrapped as RL-Zoo wraps them."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import gymnasium as gym
from gymnasium import spaces
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.preprocessing import is_image_space, is_image_space_channels_first
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecTransposeImage

from sb3_resnet.cli.extras import missing_extra
from sb3_resnet.cli.observed import described
from sb3_resnet.cli.texts import one_line
from sb3_resnet.common.arguments import integer

ATARI_STACK = 4
_ATARI_HINT = "Atari games need ale-py: pip install 'sb3_resnet[atari]'"


def make_env(
    env_id: str,
    n_envs: int = 1,
    seed: int = 0,
    frame_stack: int | None = None,
    wrapper: str | None = None,
    serves: bool = False,
) -> VecEnv:
    """
    Make an environment for evaluation: Atari games with SB3's wrappers, but with unclipped rewards and whole episodes.

    :param env_id: id of gymnasium's registry
    :param n_envs: number of environments
    :param seed: seed of the first one
    :param frame_stack: frames per observation; ``None``: 4 for Atari games, 1 for others
    :param wrapper: dotted path of a further wrapper class
    :param serves: whether a lost life ends an Atari episode, though not the game: then FIRE is pressed as in training
    :return: the environments, with images channels first
    :raises ValueError: if they cannot be made, with the reason in one line
    """
    atari = is_atari(env_id)
    wrap = None if wrapper is None else class_of("--wrapper", wrapper)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*render_mode")  # SB3 sets one that not every environment has
            if atari and wrap is None:
                kwargs = {"clip_reward": False, "terminal_on_life_loss": serves}
                env = make_atari_env(env_id, n_envs, seed, wrapper_kwargs=kwargs, env_kwargs=_one_frame(env_id))
            else:
                env = make_vec_env(env_id, n_envs, seed, wrapper_class=wrap)
    except Exception as error:  # a missing game, package or display raises an error of its own class
        raise ValueError(f"{env_id} cannot be made: {one_line(error)} {missing_extra(error)}".rstrip()) from error
    return _stacked(env, frame_stack or (ATARI_STACK if atari else 1))


def env_for(model: Any, env_id: str, seed: int = 0, wrapper: str | None = None, serves: bool = False) -> VecEnv:
    """
    Make one environment that fits a model; frames are stacked until the shapes agree.

    :param model: an SB3 model of images, or of a Dict
    :param env_id: id of gymnasium's registry
    :param seed: seed of the environment
    :param wrapper: dotted path of a further wrapper class
    :param serves: as in :func:`make_env`
    :return: the environment, as a vector of one
    :raises ValueError: if its observations or actions differ from the model's
    """
    env = make_env(env_id, 1, seed, 1, wrapper, serves)
    frames = _frames_of(model.observation_space, env.observation_space)
    if frames > 1:
        env = _stacked(env, frames)
    if env.observation_space != model.observation_space or env.action_space != model.action_space:
        env.close()
        raise ValueError(
            f"The model was trained on {_brief(model)}, but {env_id} gives {_brief(env)}: give the environment of the "
            "training, and --wrapper if it had one"
        )
    return env


def make_played_env(
    env_id: str, n_envs: int, seed: int, frame_stack: int | None, wrapper: str | None, player: Any
) -> VecEnv:
    """
    Make environments to be played, with the frames that a model or replay buffer has, if it has some.

    :param env_id: id of gymnasium's registry
    :param n_envs: number of environments
    :param seed: seed of the first one
    :param frame_stack: frames of an observation; ``None``: those of the player
    :param wrapper: dotted path of a further wrapper class
    :param player: model or replay buffer, or ``None``
    :return: the environments, with images channels first
    :raises ValueError: if they cannot be made, with the reason in one line
    """
    n_envs = integer("--n-envs", n_envs, 1)
    frame_stack = None if frame_stack is None else integer("--frame-stack", frame_stack, 1)
    wanted = getattr(player, "observation_space", None)
    if frame_stack is None and wanted is not None:
        single = make_env(env_id, 1, seed, 1, wrapper)
        frame_stack = _frames_of(wanted, single.observation_space)
        single.close()
        frame_stack = None if frame_stack == 1 and wanted != single.observation_space else frame_stack
    return make_env(env_id, n_envs, seed, frame_stack, wrapper)


def is_atari(env_id: str) -> bool:
    """
    :param env_id: id of gymnasium's registry
    :return: whether it is an Atari game
    :raises ValueError: for an id that is not registered
    """
    register_atari()
    try:
        return "AtariEnv" in str(gym.spec(env_id).entry_point)
    except gym.error.Error as error:
        looks = env_id.startswith("ALE/") or "NoFrameskip" in env_id
        if looks and not any(name.startswith("ALE/") for name in gym.registry):
            raise ValueError(f"{env_id} is not registered. {_ATARI_HINT}") from error
        hint = "Is the package that registers it named with --gym-packages?"
        raise ValueError(f"{env_id} is not registered: {one_line(error)} {hint}") from error


def register_atari() -> None:
    """Make the Atari games known to gymnasium, where ale-py is installed."""
    try:
        import ale_py
    except ImportError:
        return
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # hides its banner
    gym.register_envs(ale_py)


def import_packages(names: Sequence[str]) -> None:
    """
    Import packages that register environments.

    :param names: names of the packages
    :raises ValueError: if one cannot be imported
    """
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ValueError(f"--gym-packages {name}: {one_line(error)}") from error


def _one_frame(env_id: str) -> dict[str, int]:
    """AtariWrapper skips frames, as :func:`~sb3_resnet.envs.make_atari_vec_env` does: ``ALE/...-v5`` must not too."""
    skip = gym.spec(env_id).kwargs.get("frameskip", 1)
    return {"frameskip": 1} if isinstance(skip, int) and skip > 1 else {}


def _stacked(env: VecEnv, frames: int) -> VecEnv:
    if isinstance(env, VecTransposeImage):
        env = env.venv
    if frames > 1:
        env = VecFrameStack(env, frames)
    space: Any = env.observation_space
    parts: Iterable[Any] = space.spaces.values() if isinstance(space, spaces.Dict) else [space]
    # As SB3 does: if the images of a Dict differ in their layout, VecTransposeImage says so.
    if any(is_image_space(part) and not is_image_space_channels_first(part) for part in parts):
        env = VecTransposeImage(env)
    return env


def _frames_of(wanted: Any, given: Any) -> int:
    """:return: how many observations of one space make one of the other; 1 where stacking does not make it fit"""
    if isinstance(wanted, spaces.Dict) and isinstance(given, spaces.Dict) and wanted.keys() == given.keys():
        counts = {_frames_of(wanted[key], given[key]) for key in given}
        return counts.pop() if len(counts) == 1 else 1
    old, new = getattr(given, "shape", None) or (), getattr(wanted, "shape", None) or ()
    # VecFrameStack puts images of uint8 together by channel, and all others by the last axis.
    axis = 0 if len(old) == 3 else len(old) - 1
    if len(old) != len(new) or not old or old[:axis] + old[axis + 1 :] != new[:axis] + new[axis + 1 :]:
        return 1
    return new[axis] // old[axis] if new[axis] % old[axis] == 0 else 1


def class_of(option: str, path: str, kind: str = "Class") -> Any:
    """
    :param option: option or argument that holds the path, for the error
    :param path: dotted path, ``package.module.Class``
    :param kind: what the path ends with, for the error
    :return: the class, or whatever has this name
    :raises ValueError: if it cannot be imported
    """
    module, _, name = path.rpartition(".")
    if not module:
        raise ValueError(f"{option} {path}: no module is named. Write package.module.{kind}")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{option} {path}: {one_line(error)}. Write package.module.{kind}") from error


def _brief(owner: Any) -> str:
    space = owner.observation_space
    if isinstance(space, spaces.Dict):
        return f"a Dict of {described(space)} and {owner.action_space}"
    return f"{space.dtype} observations {space.shape} and {owner.action_space}"
