"""What is refused before a pretraining begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.vec_env import VecEnv

from sb3_resnet.common.arguments import path_of, shown
from sb3_resnet.common.memory import available_bytes
from sb3_resnet.common.playing import check_model
from sb3_resnet.nn.pretraining.settings import OBJECTIVES, Settings
from sb3_resnet.nn.pretraining.sources import n_actions


def read_output(output: Any) -> Path:
    """
    :param output: what the user passed
    :return: path of the weights file
    :raises ValueError: for a folder, and for another ending
    :raises ImportError: if safetensors is missing
    """
    path = path_of("output", output)
    if path.suffix.lower() != ".safetensors":
        raise ValueError(f"output={shown(str(path))} must end with .safetensors: other files have no room for the card")
    if path.is_dir():
        raise ValueError(f"output={shown(str(path))} is a folder: write the name of a file")
    try:
        import safetensors  # noqa: F401  # asked for now, and not after half an hour
    except ImportError as error:
        raise ImportError("Pretraining writes safetensors files: pip install 'sb3_resnet[safetensors]'") from error
    return path


def check_player(settings: Settings, env: VecEnv, model: Any, replay_buffer: Any) -> None:
    """
    :param settings: what was chosen
    :param env: environments
    :param model: an SB3 model that shall play there, or ``None``
    :param replay_buffer: of a run there, or ``None``
    :raises ValueError: for an objective that lacks actions, a model of other observations or actions, a buffer of other
        observations, and one of other actions where the objective looks at them
    :raises TypeError: for other than a model or a buffer
    """
    needs_actions = OBJECTIVES[settings.objective].needs_actions
    if needs_actions and n_actions(env.action_space) is None:
        raise ValueError(
            f"objective={settings.objective!r} asks which action was taken, and actions here are no choice among "
            "several: write objective='atc'"
        )
    check_model(model, env)
    check_buffer(replay_buffer)
    if replay_buffer is None:
        return
    if replay_buffer.observation_space != env.observation_space:
        raise ValueError(
            f"The replay buffer has {replay_buffer.observation_space}, and the environment {env.observation_space}: "
            "give the environment of that run, with the same wrappers"
        )
    if needs_actions and replay_buffer.action_space != env.action_space:
        raise ValueError(
            f"The replay buffer has the actions {replay_buffer.action_space}, and the environment {env.action_space}: "
            "give the environment of that run, or write objective='atc'"
        )


def check_buffer(replay_buffer: Any) -> None:
    """
    :param replay_buffer: what the user gave, or ``None``
    :raises TypeError: for other than a replay buffer
    :raises ValueError: for one of Dict observations
    """
    if replay_buffer is None:
        return
    if not isinstance(replay_buffer, ReplayBuffer):
        raise TypeError(
            f"replay_buffer must be a ReplayBuffer of SB3, got {shown(replay_buffer)}: load it first, such as with "
            "stable_baselines3.common.save_util.load_from_pkl(path)"
        )
    if isinstance(replay_buffer.observation_space, spaces.Dict):
        raise ValueError(
            "The replay buffer has Dict observations, and pretraining looks at one image: leave it out, and play an "
            "environment whose wrapper takes the image out"
        )


def check_memory(needed: int) -> None:
    """
    :param needed: bytes
    :raises ValueError: if there are not so many
    """
    available = available_bytes()
    if available is not None and needed > available:
        raise ValueError(
            f"Frames take {needed / 1e9:.1f} GB, and {available / 1e9:.1f} GB are left: write fewer frames, or fewer "
            "held_out"
        )
