"""What is played, and how: from an environment's id to the arguments of the emulator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gymnasium as gym

from sb3_resnet.common.arguments import flag, integer, nearest, number

if TYPE_CHECKING:
    from gymnasium.envs.registration import EnvSpec

_ENTRY_POINT = "ale_py.env:AtariEnv"
_EXAMPLES = "'PongNoFrameskip-v4' (each action counts) or 'ALE/Pong-v5' (sticky actions)"
#: Arguments of ``ale_py.AtariEnv`` that are followed here, and others with the values that change nothing.
_FOLLOWED = {"game", "frameskip", "repeat_action_probability", "full_action_space", "max_num_frames_per_episode"}
_NEUTRAL = {"obs_type": ("rgb",), "render_mode": (None, "rgb_array")}


@dataclass(frozen=True)
class Rules:
    """
    Arguments of one environment, checked. Their meaning and defaults: :func:`~sb3_resnet.envs.make_atari_vec_env`.

    :raises TypeError: for a value of the wrong type
    :raises ValueError: for a value out of range
    """

    game: str
    repeat_action_probability: float
    full_action_space: bool
    max_frames: int
    noop_max: int = 30
    frame_skip: int = 4
    screen_size: int = 84
    terminal_on_life_loss: bool = True
    clip_reward: bool = True
    max_episode_steps: int | None = None

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "repeat_action_probability": number("repeat_action_probability", self.repeat_action_probability, 0, 1),
            "noop_max": integer("noop_max", self.noop_max),
        }
        for name in ("frame_skip", "screen_size", "max_frames", "max_episode_steps"):
            if getattr(self, name) is not None or name != "max_episode_steps":
                checked[name] = integer(name, getattr(self, name), 1)
        for name in ("full_action_space", "terminal_on_life_loss", "clip_reward"):
            flag(name, getattr(self, name))
        for name, value in checked.items():  # strings and 4.0 have become the numbers that they stand for
            object.__setattr__(self, name, value)


def atari_spec(env_id: str) -> EnvSpec:
    """
    Look up a game in gymnasium's registry.

    :param env_id: an id that ale-py registers
    :return: its specification
    :raises ImportError: where ale-py or OpenCV is missing
    :raises TypeError: if ``env_id`` is no string
    :raises ValueError: if it is no Atari game
    """
    import_ale()
    if not isinstance(env_id, str):
        raise TypeError(f"env_id must be a string such as {_EXAMPLES}, got {env_id!r}")
    try:
        spec = gym.spec(env_id)
    except gym.error.Error:
        spec = None
    if spec is None or spec.entry_point != _ENTRY_POINT:
        known = [name for name, entry in gym.registry.items() if entry.entry_point == _ENTRY_POINT]
        hint = nearest(env_id, known)
        raise ValueError(f"{env_id!r} is not an Atari game of ale-py{hint}. Write {_EXAMPLES}")
    return spec


def import_ale() -> None:
    """
    Import what the ``atari`` extra brings; ale-py registers its games by this.

    :raises ImportError: with what to install
    """
    try:
        import ale_py
        import ale_py.vector_env
        import cv2  # noqa: F401  # only whether it is there
    except ImportError as error:
        message = f"{error}. make_atari_vec_env needs ale-py 0.12 and OpenCV: pip install 'sb3_resnet[atari]'"
        raise ImportError(message) from error
    gym.register_envs(ale_py)
    # Otherwise each emulator prints its version.
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)


def game_arguments(spec: EnvSpec) -> dict[str, Any]:
    """
    Read from a specification what :class:`Rules` needs to know of the emulator.

    :param spec: of the environment, with the keyword arguments that it was made with
    :return: ``game``, ``repeat_action_probability``, ``full_action_space`` and ``max_frames``
    :raises ValueError: if it asks for something that ``ale_py.AtariVectorEnv`` cannot do
    """
    kwargs = spec.kwargs
    if isinstance(kwargs["frameskip"], tuple):
        raise ValueError(f"{spec.id} skips a random number of frames, which is not supported: write {_EXAMPLES}")
    for name, value in kwargs.items():
        if name not in _FOLLOWED and value not in _NEUTRAL.get(name, (None, False)):
            raise ValueError(f"{name}={value!r} is not supported by the C++ environments: use SB3's make_atari_env")
    limits = (kwargs.get("max_num_frames_per_episode"), spec.max_episode_steps)
    frames = [limit for limit in limits if limit]
    return {
        "game": kwargs["game"],
        "repeat_action_probability": kwargs["repeat_action_probability"],
        "full_action_space": kwargs["full_action_space"],
        "max_frames": min(frames) if frames else 2**31 - 1,
    }
