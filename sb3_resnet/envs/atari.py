"""An SB3 ``VecEnv`` of Atari games in C++ threads."""

from __future__ import annotations

from sb3_resnet.envs.rules import Rules, atari_spec, game_arguments
from sb3_resnet.envs.vec_env import AtariVecEnv


def make_atari_vec_env(
    env_id: str,
    n_envs: int = 1,
    seed: int | None = None,
    monitor_dir: str | None = None,
    *,
    frame_stack: int = 4,
    n_threads: int | None = None,
    repeat_action_probability: float | None = None,
    full_action_space: bool | None = None,
    noop_max: int = 30,
    frame_skip: int = 4,
    screen_size: int = 84,
    terminal_on_life_loss: bool = True,
    clip_reward: bool = True,
    max_episode_steps: int | None = None,
) -> AtariVecEnv:
    """
    Make environments that behave as SB3's ``VecFrameStack(make_atari_env(env_id, n_envs), 4)`` in C++ threads::

        env = make_atari_vec_env("PongNoFrameskip-v4", n_envs=8, seed=0)
        model = DQN("ResNetCnnPolicy", env)

    :class:`AtariVecEnv` says what is equal, and the three things that differ.

    :param env_id: id in gymnasium's registry. ``"PongNoFrameskip-v4"`` takes each action as it comes; ``"ALE/Pong-v5"``
        repeats the last action with probability 0.25, and skips ``frame_skip`` frames in all, not its own 4 times that
    :param n_envs: number of environments
    :param seed: of the first environment; the others have the following numbers. ``None``: a random one
    :param monitor_dir: folder for SB3's ``<index>.monitor.csv``; ``None``: no files
    :param frame_stack: frames of an observation, the newest last; zeros stand for those before the episode's first
    :param n_threads: the most environments that work at the same time; ``None``, and at most: as many as there are CPUs
        that this process may use
    :param repeat_action_probability: probability with which the last action is repeated; ``None``: that of ``env_id``
    :param full_action_space: all 18 actions instead of those that the game knows; ``None``: as ``env_id`` has it
    :param noop_max: the most no-ops, one frame each, at the begin of a game
    :param frame_skip: frames for which an action is repeated; the last two are merged by their maximum
    :param screen_size: height and width of an observation in pixels
    :param terminal_on_life_loss: whether a lost life ends the episode
    :param clip_reward: whether rewards are replaced by their sign
    :param max_episode_steps: agent's steps after which a game is truncated, at most the 108,000 frames of ``env_id``
    :return: environments with observations of shape ``(screen_size, screen_size, frame_stack)``, uint8
    :raises ImportError: where ale-py or OpenCV is missing
    :raises ValueError: for arguments out of range, and ids that are not games of ale-py
    """
    spec = atari_spec(env_id)
    given = {"repeat_action_probability": repeat_action_probability, "full_action_space": full_action_space}
    rules = Rules(
        **{**game_arguments(spec), **{name: value for name, value in given.items() if value is not None}},
        noop_max=noop_max,
        frame_skip=frame_skip,
        screen_size=screen_size,
        terminal_on_life_loss=terminal_on_life_loss,
        clip_reward=clip_reward,
        max_episode_steps=max_episode_steps,
    )
    env = AtariVecEnv(spec, rules, n_envs, frame_stack=frame_stack, n_threads=n_threads, monitor_dir=monitor_dir)
    env.seed(seed)
    env.action_space.seed(seed)
    return env
