"""One Atari game in a C++ thread of its own, played by the rules of SB3's ``AtariWrapper``."""

from __future__ import annotations

import time
from collections.abc import Generator
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from gymnasium import spaces

if TYPE_CHECKING:
    from gymnasium.envs.registration import EnvSpec
    from stable_baselines3.common.monitor import ResultsWriter

    from sb3_resnet.envs.rules import Rules

#: Actions that SB3's wrappers take by themselves, by their index.
NOOP, FIRE, SECOND = 0, 1, 2


class Seen(NamedTuple):
    """What the emulator answers to one action."""

    screen: np.ndarray  # RGB, uint8
    reward: int
    lives: int
    terminated: bool
    truncated: bool
    info: dict[str, int]

    @property
    def over(self) -> bool:
        """Whether the game has ended."""
        return self.terminated or self.truncated


class Outcome(NamedTuple):
    """What the agent gets for one action."""

    frame: np.ndarray  # grey, uint8, screen_size x screen_size
    reward: float
    info: dict[str, Any]
    following: np.ndarray | None  # the first frame of the next episode, where this one ends


class AtariGame:
    """
    ``ale_py.AtariVectorEnv`` of one environment. One of many environments steps all of them at once, so that none can
    take the extra steps of a lost life or a reset while the others wait.

    :meth:`start` and :meth:`step` are generators. They yield actions for :meth:`send`, and each wants the answer that
    :meth:`receive` gives. So one caller keeps many games at work.

    :param spec: the game in gymnasium's registry
    :param rules: how it is played
    :param writer: where a line is written for each finished game, as SB3's ``Monitor`` does
    :raises ValueError: for a game whose first action is not NOOP
    """

    render_mode = "rgb_array"

    def __init__(self, spec: EnvSpec, rules: Rules, writer: ResultsWriter | None = None) -> None:
        from ale_py.vector_env import AtariVectorEnv

        height, width = _screen_size(rules.game)
        # Screens come whole and in colour: SB3's wrappers turn them grey and shrink them in their own way, which
        # AtariVectorEnv's preprocessing misses by some grey levels.
        self._emulator = AtariVectorEnv(
            rules.game,
            1,
            num_threads=1,
            img_height=height,
            img_width=width,
            grayscale=False,
            stack_num=1,
            frameskip=rules.frame_skip,
            maxpool=rules.frame_skip > 1,
            # It draws from 0 to this number less one.
            noop_max=rules.noop_max + 1 if rules.noop_max else 0,
            max_num_frames_per_episode=rules.max_frames,
            repeat_action_probability=rules.repeat_action_probability,
            full_action_space=rules.full_action_space,
            # NEXT_STEP (the default) tells lives and frames as they are at the end of a game.
            reward_clipping=False,
            use_fire_reset=False,
        )
        meanings = self.get_action_meanings()
        if meanings[0] != "NOOP":  # only Backgammon
            raise ValueError(f"{spec.id} knows no NOOP but only {meanings}: write full_action_space=True")
        self.spec = spec
        self.rules = rules
        self.action_space = spaces.Discrete(len(meanings))
        size = rules.screen_size
        self.observation_space = spaces.Box(0, 255, (size, size, 1), np.uint8)
        self.screen: np.ndarray = np.zeros((height, width, 3), np.uint8)
        self._writer = writer
        self._has_fire = "FIRE" in meanings
        self._born = time.time()
        self._report: dict[str, float] | None = None
        self._lives = 0
        self._steps = 0
        self._return = 0.0

    @property
    def unwrapped(self) -> AtariGame:
        """The game itself: its wrappers are C++."""
        return self

    def get_action_meanings(self) -> list[str]:
        """:return: a name for each action, such as ``"NOOP"`` and ``"FIRE"``"""
        return [action.name for action in self._emulator.ale.get_action_set()]

    def render(self) -> np.ndarray:
        """:return: the screen in colour, the larger of its last two frames, uint8 of shape (height, width, 3)"""
        return np.array(self.screen)

    def send(self, action: int) -> None:
        """Let the thread work on an action. It must be a valid one: the thread would answer to no other."""
        self._emulator.send(np.array([action]))

    def receive(self) -> Seen:
        """Wait for the answer to the action that was sent."""
        screens, rewards, terminations, truncations, info = self._emulator.recv()
        return self._seen(screens, int(rewards[0]), bool(terminations[0]), bool(truncations[0]), info)

    def start(self, seed: int | None) -> Generator[int, Seen, Outcome]:
        """
        Begin a game.

        :param seed: of no-ops and sticky actions; ``None`` goes on with the random numbers of the last game
        :return: its first frame and info
        """
        seen = yield from self._press_fire(self._reset(seed))
        self._report = None
        return Outcome(self._grey(seen.screen), 0.0, {**seen.info}, None)

    def step(self, action: int) -> Generator[int, Seen, Outcome]:
        """
        Take a step, and go on to the next episode where this one ends.

        :param action: index of the agent's action
        :return: what the agent gets
        """
        seen, life_lost = yield from self._act(action)
        self._steps += 1
        at_limit = self._steps == self.rules.max_episode_steps and not seen.over
        terminated, truncated = seen.terminated or life_lost, seen.truncated or at_limit
        frame, reward = self._grey(seen.screen), float(seen.reward)
        info: dict[str, Any] = {**seen.info, "TimeLimit.truncated": truncated and not terminated}
        following = None
        if terminated or truncated:
            if at_limit:  # which the emulator does not know
                self._finish(seen)
                seen = self._reset(None)
            else:
                seen = yield from self._go_on(seen.over)
            seen = yield from self._press_fire(seen)
            following = self._grey(seen.screen)
            # Also of a game that ended in the steps since: SB3's wrappers lose that one.
            if self._report is not None:
                info["episode"], self._report = self._report, None
        reward = float(np.sign(reward)) if self.rules.clip_reward else reward
        return Outcome(frame, reward, info, following)

    def close(self) -> None:
        """End the thread and close the log."""
        del self._emulator
        if self._writer is not None:
            self._writer.close()

    def _act(self, action: int) -> Generator[int, Seen, tuple[Seen, bool]]:
        """Act, count rewards and lives, also in steps that the agent does not see, and tell whether a life was lost."""
        seen = yield action
        self._return += seen.reward
        # As in SB3's EpisodicLifeEnv: some games show 0 lives for some frames before they end.
        life_lost = self.rules.terminal_on_life_loss and 0 < seen.lives < self._lives
        self._lives = seen.lives
        if seen.over:
            self._finish(seen)
        return seen, life_lost

    def _go_on(self, over: bool) -> Generator[int, Seen, Seen]:
        """What SB3's ``EpisodicLifeEnv`` does at a reset: a no-op after a lost life, a new game after the last one."""
        if not over:
            seen, _ = yield from self._act(NOOP)
            over = seen.over
        if over:
            seen = yield NOOP  # the emulator begins a new game instead
            self._begin(seen.lives)
        return seen

    def _press_fire(self, seen: Seen) -> Generator[int, Seen, Seen]:
        """What SB3's ``FireResetEnv`` does after that, in games that have the action."""
        for action in (FIRE, SECOND) if self._has_fire else ():
            seen, life_lost = yield from self._act(action)
            if seen.over or life_lost:
                seen = yield from self._go_on(seen.over)
        return seen

    def _reset(self, seed: int | None) -> Seen:
        """Begin a new game at once, in the middle of another if need be."""
        # As ale_py.AtariEnv derives it, less the sign, since a negative seed means none here.
        words = None if seed is None else int(np.random.SeedSequence(seed).generate_state(2)[1]) & 0x7FFFFFFF
        screens, info = self._emulator.reset(seed=words)
        seen = self._seen(screens, 0, False, False, info)
        self._begin(seen.lives)
        return seen

    def _begin(self, lives: int) -> None:
        self._lives = lives
        self._steps = 0
        self._return = 0.0

    def _finish(self, seen: Seen) -> None:
        """Note return, length and time of a game, as SB3's ``Monitor`` counts them: all rewards, emulator frames."""
        seconds = round(time.time() - self._born, 6)
        self._report = {"r": round(self._return, 6), "l": seen.info["episode_frame_number"], "t": seconds}
        if self._writer is not None:
            self._writer.write_row(self._report)

    def _seen(self, screens: np.ndarray, reward: int, terminated: bool, truncated: bool, info: dict[str, Any]) -> Seen:
        self.screen = screens[0, 0]
        numbers = {name: int(info[name][0]) for name in ("lives", "episode_frame_number", "frame_number")}
        return Seen(self.screen, reward, numbers["lives"], terminated, truncated, numbers)

    def _grey(self, screen: np.ndarray) -> np.ndarray:
        """The same two calls as in SB3's ``WarpFrame``."""
        import cv2

        size = self.rules.screen_size
        grey = cv2.cvtColor(screen, cv2.COLOR_RGB2GRAY)
        resized: np.ndarray = cv2.resize(grey, (size, size), interpolation=cv2.INTER_AREA)
        return resized


@cache
def _screen_size(game: str) -> tuple[int, int]:
    """Height and width of a game's screen, which ``AtariVectorEnv`` wants to know but does not tell."""
    import ale_py

    emulator, rom = ale_py.ALEInterface(), ale_py.roms.get_rom_path(game)
    assert rom is not None  # the registry lists only games that ale-py brings along
    emulator.loadROM(rom)
    height, width = emulator.getScreenDims()
    return height, width
