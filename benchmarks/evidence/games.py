"""The games of both suites: their environments for training and evaluation, and what a score is worth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecTransposeImage

from sb3_resnet.envs import make_atari_vec_env

#: Environments of a run, which train together.
N_ENVS = 8

SCORES_SOURCE = (
    "random and human scores: DQN Zoo, dqn_zoo/atari_data.py "
    "(https://github.com/google-deepmind/dqn_zoo), games that begin with up to 30 no-ops"
)
#: Mean return of a random player and of a professional human tester, by game.
SCORES: dict[str, tuple[float, float]] = {
    "Alien": (227.8, 7127.7),
    "Amidar": (5.8, 1719.5),
    "Assault": (222.4, 742.0),
    "Asterix": (210.0, 8503.3),
    "BankHeist": (14.2, 753.1),
    "BattleZone": (2360.0, 37187.5),
    "Boxing": (0.1, 12.1),
    "Breakout": (1.7, 30.5),
    "ChopperCommand": (811.0, 7387.8),
    "CrazyClimber": (10780.5, 35829.4),
    "DemonAttack": (152.1, 1971.0),
    "Freeway": (0.0, 29.6),
    "Frostbite": (65.2, 4334.7),
    "Gopher": (257.6, 2412.5),
    "Hero": (1027.0, 30826.4),
    "Jamesbond": (29.0, 302.8),
    "Kangaroo": (52.0, 3035.0),
    "Krull": (1598.0, 2665.5),
    "KungFuMaster": (258.5, 22736.3),
    "MsPacman": (307.3, 6951.6),
    "Pong": (-20.7, 14.6),
    "PrivateEye": (24.9, 69571.3),
    "Qbert": (163.9, 13455.0),
    "RoadRunner": (11.5, 7845.0),
    "Seaquest": (68.4, 42054.7),
    "SpaceInvaders": (148.0, 1668.7),
    "UpNDown": (533.4, 11693.2),
}


@dataclass(frozen=True)
class Suite:
    """
    A domain.

    :param games: those that are reported, chosen before the first run
    :param tuning: those that learning rates and recipes are chosen on, which are never reported
    :param arms: those that run without ``--arms``
    :param env_id: id of gymnasium's registry of a game
    :param make: environments of a game id, their number, a seed, whether they are for evaluation, and threads
    :param normalised: what a return in a game is worth
    :param unit: of that
    """

    games: tuple[str, ...]
    tuning: tuple[str, ...]
    arms: tuple[str, ...]
    env_id: Callable[[str], str]
    make: Callable[[str, int, int, bool, int], VecEnv]
    normalised: Callable[[str, float], float]
    unit: str
    description: str


def _atari(env_id: str, n_envs: int, seed: int, evaluates: bool, threads: int) -> VecEnv:
    # As in RL-Zoo's evaluations, a lost life is followed by FIRE where the game waits for it: the agent has not learned
    # that. Monitor counts whole games.
    return make_atari_vec_env(env_id, n_envs, seed, n_threads=threads, clip_reward=not evaluates)


def minigrid_images(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    """
    What the arms see of MiniGrid; ``sb3-resnet watch`` takes it as ``--wrapper evidence.games.minigrid_images``.

    :param env: of MiniGrid
    :return: the same, with images of 84 x 84 pixels as an Atari frame has here, in colour
    """
    from minigrid.wrappers import ImgObsWrapper, RGBImgPartialObsWrapper

    return ImgObsWrapper(RGBImgPartialObsWrapper(env, tile_size=12))  # it sees 7 x 7 tiles


def _minigrid(env_id: str, n_envs: int, seed: int, evaluates: bool, threads: int) -> VecEnv:
    env = DummyVecEnv([lambda: Monitor(minigrid_images(gym.make(env_id)))] * n_envs)
    env.seed(seed)
    return env


def _human_normalised(game: str, score: float) -> float:
    low, high = SCORES[game]
    return (score - low) / (high - low)


SUITES = {
    "atari": Suite(
        games=("Assault", "Boxing", "Krull", "RoadRunner"),
        tuning=("Pong", "Breakout"),
        arms=(
            "nature",
            "nature_head",
            "random_frozen",
            "pretrained_frozen",
            "pretrained_phases",
            "scratch",
            "imagenet_frozen",
            "imagenet_phases",
        ),
        env_id=lambda game: f"{game}NoFrameskip-v4",
        make=_atari,
        normalised=_human_normalised,
        unit="human-normalised score (0: a random player, 1: a human)",
        description="84x84 grey frames in stacks of four, actions repeated for four frames; a lost life ends an "
        "episode; in training rewards are clipped to their sign",
    ),
    "minigrid": Suite(
        # Those whose goal is in the picture: the text of the mission is not seen.
        games=("DoorKey-5x5", "LavaGapS5", "SimpleCrossingS9N1"),
        tuning=("Empty-Random-5x5",),
        arms=("nature", "nature_head", "random_frozen"),
        env_id=lambda game: f"MiniGrid-{game}-v0",
        make=_minigrid,
        normalised=lambda game, score: score,
        unit="return (0: never solved, 1: solved at once)",
        description="84x84 RGB images of what the agent sees, one frame",
    ),
}


def suite_of(name: str) -> Suite:
    """
    :param name: of a suite
    :return: the suite
    :raises ValueError: if there is none of that name
    """
    if name not in SUITES:
        raise ValueError(f"--suite must be one of {', '.join(SUITES)}, got {name!r}")
    return SUITES[name]


def check_game(suite: str, game: str) -> None:
    """
    :param suite: name of a suite
    :param game: name of a game, as in ``--games``
    :raises ValueError: if the suite cannot score it, or gymnasium does not know it
    """
    if suite == "atari" and game not in SCORES:
        raise ValueError(f"{game!r} has no human score here: write one of {', '.join(SCORES)}, or add it to SCORES")
    register(suite)
    env_id = suite_of(suite).env_id(game)
    if env_id not in gym.registry:
        raise ValueError(f"{env_id} is not registered: write the game as in {', '.join(suite_of(suite).games)}")


def register(suite: str) -> None:
    """
    Make the games of a suite known to gymnasium.

    :param suite: its name
    :raises ImportError: with the extra that is missing
    """
    try:
        if suite == "minigrid":
            import minigrid  # noqa: F401  # registers its environments
        else:
            import ale_py

            gym.register_envs(ale_py)
            ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    except ImportError as error:
        raise ImportError(f"{error}: pip install 'sb3_resnet[atari,evidence]'") from error


def make_env(suite: str, game: str, n_envs: int, seed: int, evaluates: bool = False, threads: int = 1) -> VecEnv:
    """
    :param suite: name of the suite
    :param game: name of the game
    :param n_envs: number of environments
    :param seed: of the first one
    :param evaluates: whole games with raw rewards, instead of what training sees
    :param threads: emulators at work at the same time
    :return: the environments, images channels first
    """
    register(suite)
    domain = suite_of(suite)
    return VecTransposeImage(domain.make(domain.env_id(game), n_envs, seed, evaluates, threads))
