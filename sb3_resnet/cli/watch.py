"""``sb3-resnet watch``: plays a saved model, and writes what a player would see as a film."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from sb3_resnet.cache.frames import Array
from sb3_resnet.cli import envs, pictures
from sb3_resnet.cli.explain import default_layer, heat_maps
from sb3_resnet.cli.loading import load_model, model_file
from sb3_resnet.cli.options import Device, Model, Packages, Trust, Wrapper
from sb3_resnet.common.arguments import integer, number
from sb3_resnet.diagnosis.playing import lives_end_episodes

FORMATS = (".gif", ".mp4")


def command(
    context: typer.Context,
    model: Model,
    env: Annotated[
        str | None,
        typer.Option("--env", metavar="ID", help="environment; default: that in MODEL.json beside it"),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="the film: its name ends with .gif or .mp4")
    ] = Path("episode.gif"),
    steps: Annotated[int, typer.Option(metavar="N", help="steps to play, at most one episode")] = 3000,
    epsilon: Annotated[float, typer.Option(metavar="P", help="probability of an action at random")] = 0.0,
    gradcam: Annotated[
        bool, typer.Option("--gradcam", help="beside each frame, what raises the score of the action taken")
    ] = False,
    seed: Annotated[int, typer.Option(metavar="N", help="of the environment and the actions at random")] = 0,
    wrapper: Wrapper = None,
    gym_packages: Packages = None,
    device: Device = "auto",
    trust: Trust = False,
) -> None:
    """
    Play an episode with the greedy actions, write its frames as a film, and print the return.

    Any model of Stable-Baselines3's DQN, PPO, A2C, SAC and TD3, and of QR-DQN, will do; --gradcam needs a ResNet.
    """
    # An episode may take minutes, so wrong options are refused before it.
    steps, epsilon = integer("--steps", steps, 1), number("--epsilon", epsilon, 0.0, 1.0)
    if output.suffix.lower() not in FORMATS:
        raise ValueError(f"--output {output}: the name of the film must end with {' or '.join(FORMATS)}")
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder: write the name of a file in it")
    pictures.refuse_unwritable(output.parent)
    envs.import_packages(gym_packages or [])
    model = model_file(model)
    env = _env_beside(model) if env is None else env
    agent = load_model(model, device, trust, only_plays=not gradcam)
    # An agent of Atari has not learned to go on after a lost life: the wrappers of its training press FIRE for it.
    with contextlib.closing(envs.env_for(agent, env, seed, wrapper, serves=True)) as game:
        film = play(agent, game, steps, epsilon, seed, env)
    frames: Iterable[Array] = film.frames
    if gradcam:
        heat = heat_maps(agent, np.stack(film.observations), film.actions, layer=default_layer(agent))
        frames = (pictures.beside(frame, hot) for frame, hot in zip(film.frames, heat, strict=True))
    output.parent.mkdir(parents=True, exist_ok=True)
    pictures.write_film(output, frames)
    end = "" if film.is_over else f"; the episode was not over, --steps {2 * steps} plays on"
    said = f"{output}: return {film.rewards.sum():g} in {len(film.actions)} steps{end}"
    context.obj.print(said, highlight=False, soft_wrap=True)


def _env_beside(model: Path) -> str:
    """:return: the environment that the card of a model names, as those of ``benchmarks/results/agents`` do"""
    card = model.with_suffix(".json")
    try:
        found = json.loads(card.read_text(encoding="utf-8"))["environment"]
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    if not isinstance(found, str):
        raise ValueError(f"Which environment? Write --env ID: there is no {card} that names one")
    return found


class Film:
    """
    What was played.

    :param steps: each with the frame, the observation (array, or dict of them), the action and the reward
    :param is_over: whether the episode ended
    """

    def __init__(self, steps: list[tuple[Array, Any, Any, float]], is_over: bool) -> None:
        frames, observations, actions, rewards = zip(*steps, strict=True)
        self.frames: list[Array] = [*frames]
        self.observations: list[Any] = [*observations]
        self.actions: Array = np.array(actions)
        self.rewards: Array = np.array(rewards)
        self.is_over = is_over


def play(model: Any, env: Any, steps: int, epsilon: float = 0.0, seed: int = 0, name: str = "The environment") -> Film:
    """
    Play one episode; of an Atari game all lives.

    :param model: an SB3 model
    :param env: one environment that fits the model, with SB3's ``Monitor``
    :param steps: largest number of steps
    :param epsilon: probability of an action at random, else the greedy one is taken
    :param seed: of the actions at random
    :param name: of the environment, for the error
    :return: the episode
    :raises ValueError: if the environment has no picture of itself
    """
    random = np.random.default_rng(seed)
    env.action_space.seed(seed)
    has_lives = lives_end_episodes(env)
    observation = env.reset()
    played: list[tuple[Array, Any, Any, float]] = []
    done = False
    while not done and len(played) < steps:
        frame = _frame(env, name)
        greedy, _ = model.predict(observation, deterministic=True)
        action = env.action_space.sample() if random.random() < epsilon else greedy[0]
        seen = observation if isinstance(observation, dict) else observation[0]
        observation, rewards, dones, infos = env.step(np.array([action]))
        played.append((frame, seen, action, float(rewards[0])))
        done = bool(dones[0]) and ("episode" in infos[0] or not has_lives)  # Monitor's, of the whole game
    return Film(played, done)


def _frame(env: Any, name: str) -> Array:
    """The environment's own picture, not what the agent sees of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The render mode is")  # SB3's, of what the error says better
        frame = env.get_images()[0]
    if not isinstance(frame, np.ndarray) or frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
        raise ValueError(
            f"{name} draws no pictures of itself (render_mode='rgb_array'): sb3-resnet explain shows what the agent "
            "sees instead"
        )
    return frame
