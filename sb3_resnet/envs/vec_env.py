"""Atari games in C++ threads as one SB3 ``VecEnv``."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common import atari_wrappers
from stable_baselines3.common.monitor import Monitor, ResultsWriter
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvIndices, VecEnvStepReturn

from sb3_resnet.common.arguments import integer
from sb3_resnet.envs.game import AtariGame, Outcome, Seen
from sb3_resnet.envs.rules import Rules

if TYPE_CHECKING:
    from gymnasium.envs.registration import EnvSpec


class AtariVecEnv(VecEnv):
    """
    Atari games in C++ threads; made by :func:`make_atari_vec_env`.

    Spaces, pixels, rewards, ends of episodes and ``infos`` are those of SB3's environments: a lost life ends the
    episode while the game goes on, FIRE is pressed where a game has it, training rewards are clipped, and
    ``info["episode"]`` has the unclipped return, the length in emulator frames and the time of each finished game. So
    a model may be trained here and evaluated there. Three things differ:

    * ``reset()`` always begins new games. SB3's goes on with the present one after a lost life.
    * 0 to ``noop_max`` no-ops begin a game, not 1 to ``noop_max``, and other ones for the same seed.
    * The last frame of a ``terminal_observation`` at the very end of a game may be an older one.

    ``get_attr``, ``set_attr`` and ``env_method`` reach the attributes and methods of
    :class:`~sb3_resnet.envs.game.AtariGame`, one per environment: ``spec``, ``action_space``, ``observation_space``
    (of one frame), ``render_mode``, ``unwrapped``, ``get_action_meanings()``, ``render()``. The emulator itself
    (``ale``), its memory and its saved states cannot be reached. The render mode is ``"rgb_array"``, so SB3's
    ``VecVideoRecorder`` works; ``render("human")`` opens a window where OpenCV can.

    Each environment has a C++ thread, which sleeps while it has nothing to do. In memory the frames of an observation
    come one after the other, so what SB3's ``VecTransposeImage`` gives is contiguous.

    :param spec: the game in gymnasium's registry
    :param rules: how it is played
    :param n_envs: number of environments
    :param frame_stack: frames of an observation
    :param n_threads: the most environments that work at the same time
    :param monitor_dir: folder for SB3's ``<index>.monitor.csv``
    """

    def __init__(
        self,
        spec: EnvSpec,
        rules: Rules,
        n_envs: int,
        *,
        frame_stack: int = 4,
        n_threads: int | None = None,
        monitor_dir: str | None = None,
    ) -> None:
        n_envs, frame_stack = integer("n_envs", n_envs, 1), integer("frame_stack", frame_stack, 1)
        cpus = _usable_cpus()
        n_threads = cpus if n_threads is None else integer("n_threads", n_threads, 1)
        # With no fewer threads than CPUs the operating system does the rest, and no CPU waits for this thread.
        self._most_at_work = n_threads if n_threads < cpus else n_envs
        writers = [_log_file(monitor_dir, spec, index) for index in range(n_envs)]
        self.games = [AtariGame(spec, rules, writer) for writer in writers]
        size = rules.screen_size
        observations = spaces.Box(0, 255, (size, size, frame_stack), np.uint8)
        super().__init__(n_envs, observations, self.games[0].action_space)
        self._stacks = np.zeros((n_envs, frame_stack, size, size), np.uint8)
        self._at_work: deque[int] = deque()
        self._actions: list[int] | None = None
        self._was_reset = False

    def seed_each(self, seeds: Sequence[int | None]) -> None:
        """
        Give each environment a seed of its own for the next reset.

        :param seeds: one per environment; ``None``: a random one
        """
        self._seeds = [*seeds]

    def reset(self) -> np.ndarray:
        """
        Begin new games, with the seeds of the last call of ``seed()``, if there was one since the last reset.

        :return: their first observations
        """
        self._check_open()
        while self._at_work:  # something interrupted a step
            self.games[self._at_work.popleft()].receive()
        self._actions = None
        starts = self._play([game.start(seed) for game, seed in zip(self.games, self._seeds, strict=True)])
        self._stacks = np.zeros_like(self._stacks)
        for index, outcome in enumerate(starts):
            self._stacks[index, -1] = outcome.frame
            self.reset_infos[index] = outcome.info
        self._reset_seeds()
        self._reset_options()
        self._was_reset = True
        return self._channels_last(self._stacks)

    def step_async(self, actions: np.ndarray) -> None:
        """
        Take note of the actions.

        :param actions: one index per environment
        :raises RuntimeError: before the first ``reset()``
        :raises ValueError: if they do not belong to the action space
        """
        self._check_open()
        if not self._was_reset or self._at_work:
            raise RuntimeError("Call reset() before step()" + " after one that was interrupted" * bool(self._at_work))
        self._actions = self._checked(actions)

    def step_wait(self) -> VecEnvStepReturn:
        """
        Play the actions.

        :return: observations, rewards (float32), ends of episodes, and infos
        :raises RuntimeError: without ``step_async()`` before it
        """
        if self._actions is None:
            raise RuntimeError("Call step_async() before step_wait(), or step()")
        actions, self._actions = self._actions, None
        outcomes = self._play([game.step(action) for game, action in zip(self.games, actions, strict=True)])
        stacks = np.empty_like(self._stacks)  # the old ones are the caller's
        stacks[:, :-1] = self._stacks[:, 1:]
        for index, outcome in enumerate(outcomes):
            stacks[index, -1] = outcome.frame
            if outcome.following is not None:
                outcome.info["terminal_observation"] = self._channels_last(stacks[index].copy())
                stacks[index] = 0
                stacks[index, -1] = outcome.following
        self._stacks = stacks
        rewards = np.array([outcome.reward for outcome in outcomes], np.float32)
        dones = np.array([outcome.following is not None for outcome in outcomes])
        return self._channels_last(stacks), rewards, dones, [outcome.info for outcome in outcomes]

    def close(self) -> None:
        """End the threads and close the logs. May be called twice."""
        for game in self.games:
            game.close()
        self.games = []

    def get_images(self) -> Sequence[np.ndarray]:
        """:return: the screen of each environment in colour"""
        return [game.render() for game in self.games]

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """
        Read an attribute of the games.

        :raises AttributeError: for what only SB3's Python environments have
        """
        self._check_open()
        try:
            return [getattr(game, attr_name) for game in self._chosen(indices)]
        except AttributeError:
            raise AttributeError(
                f"Atari games in C++ have no attribute {attr_name!r}. For the emulator's own (ale, its RAM and saved "
                "states) use stable_baselines3.common.env_util.make_atari_env"
            ) from None

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of the games; how they are played does not change by it."""
        for game in self._chosen(indices):
            setattr(game, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        """
        Call a method of the games, such as ``get_action_meanings``.

        :raises AttributeError: for what only SB3's Python environments have
        """
        return [method(*args, **kwargs) for method in self.get_attr(method_name, indices)]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """
        Tell whether the work of a wrapper is done here: SB3's ``Monitor``, ``AtariWrapper`` and its parts.
        """
        return [any(issubclass(done, wrapper_class) for done in _wrappers(game)) for game in self._chosen(indices)]

    def _play(self, plays: Sequence[Generator[int, Seen, Outcome]]) -> list[Outcome]:
        """Go through one play per environment, of which several are at work at each time."""
        outcomes: dict[int, Outcome] = {}

        def go_on(index: int, seen: Seen | None) -> None:
            try:
                # A generator's first value must be None.
                action = plays[index].send(seen)  # type: ignore[arg-type]
            except StopIteration as end:
                outcomes[index] = end.value
                return
            self.games[index].send(action)
            self._at_work.append(index)

        def answer() -> None:
            index = self._at_work[0]
            seen = self.games[index].receive()
            self._at_work.popleft()  # not before, or reset() would not wait for it after an interruption
            go_on(index, seen)

        for index in range(len(plays)):
            while len(self._at_work) >= self._most_at_work:
                answer()
            go_on(index, None)
        while self._at_work:
            answer()
        return [outcomes[index] for index in range(len(plays))]

    def _checked(self, actions: Any) -> list[int]:
        """The actions as numbers: a wrong one would end a C++ thread, and waiting for it would never end."""
        array = np.asarray(actions)
        space = self.games[0].action_space
        if array.shape != (self.num_envs,):
            problem = f"an array of shape {array.shape}"
        elif not np.issubdtype(array.dtype, np.integer):
            problem = f"values of type {array.dtype}"
        elif array.min() < 0 or array.max() >= space.n:
            problem = f"{array.tolist()}"
        else:
            return [int(action) for action in array]
        raise ValueError(
            f"Actions must be {self.num_envs} whole numbers of the action space {space}, one per environment, "
            f"got {problem}"
        )

    def _check_open(self) -> None:
        if not self.games:
            raise RuntimeError("These environments are closed: make others")

    def _chosen(self, indices: VecEnvIndices) -> list[AtariGame]:
        numbers: Iterable[int] = self._get_indices(indices)
        return [self.games[index] for index in numbers]

    @staticmethod
    def _channels_last(stacks: np.ndarray) -> np.ndarray:
        return np.moveaxis(stacks, -3, -1)


def _usable_cpus() -> int:
    """Number of CPUs that this process may use, which in a container or under a job queue are not all there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _log_file(folder: str | None, spec: EnvSpec, index: int) -> ResultsWriter | None:
    if folder is None:
        return None
    return ResultsWriter(os.path.join(folder, str(index)), header={"t_start": time.time(), "env_id": spec.id})


def _wrappers(game: AtariGame) -> list[type[gym.Wrapper]]:
    """SB3's wrappers whose work is done in a game."""
    rules = game.rules
    done: list[tuple[type[gym.Wrapper], bool]] = [
        (Monitor, True),
        (atari_wrappers.AtariWrapper, True),
        (atari_wrappers.WarpFrame, True),
        (atari_wrappers.NoopResetEnv, rules.noop_max > 0),
        (atari_wrappers.MaxAndSkipEnv, rules.frame_skip > 1),
        (atari_wrappers.EpisodicLifeEnv, rules.terminal_on_life_loss),
        (atari_wrappers.FireResetEnv, "FIRE" in game.get_action_meanings()),
        (atari_wrappers.ClipRewardEnv, rules.clip_reward),
    ]
    return [wrapper for wrapper, here in done if here]
