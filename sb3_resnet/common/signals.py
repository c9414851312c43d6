"""Signals of a scheduler: noted in the process that learns, ignored in those of its environments."""

from __future__ import annotations

import atexit
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from sb3_resnet.common.arguments import shown

#: After so many seconds without a sign of life, a signal is no longer only noted.
PATIENCE = 30.0


def signals_of(names: Any) -> list[signal.Signals]:
    """
    :param names: such as ``["SIGTERM", "SIGUSR1"]``, or one name
    :return: the signals
    :raises ValueError: for a name that is no signal of this system, or of one that cannot be noted
    """
    given = [names] if isinstance(names, str) else list(names) if isinstance(names, Sequence) else None
    if not given or not all(isinstance(name, str) for name in given):
        raise ValueError(f"signals must be names such as ['SIGTERM', 'SIGUSR1'], got {shown(names)}")
    for name in given:
        if name in ("SIGKILL", "SIGSTOP"):
            raise ValueError(f"{name} ends a process at once and cannot be waited for: write SIGTERM or SIGUSR1")
        if name not in signal.Signals.__members__:
            raise ValueError(f"{shown(name)} is no signal of this system: write names such as SIGTERM, SIGUSR1")
    return [signal.Signals[name] for name in given]


class SignalNotes:
    """
    Notes that signals came, in place of their former handlers.

    :param numbers: the signals
    :raises ValueError: in another thread than the main one, where Python allows no handlers
    """

    def __init__(self, numbers: Sequence[signal.Signals]) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("Python lets only the main thread receive signals: call learn() there")
        #: The first signal that came.
        self.received: int | None = None
        self._received_at = 0.0
        self._alive_at = 0.0
        self._former: dict[int, Any] = {}
        for number in numbers:
            former = signal.getsignal(number)
            owner = getattr(former, "__self__", None)
            if isinstance(owner, SignalNotes):  # of a learn() that was interrupted
                owner.give_back()
                former = signal.getsignal(number)
            self._former[number] = former
            signal.signal(number, self._note)

    def is_alive(self) -> None:
        """Training has come to one of its hooks."""
        self._alive_at = time.monotonic()

    def former(self) -> Callable[[int, Any], Any] | None:
        """:return: the former handler of the signal that came, if it is a function"""
        found = self._former.get(self.received or 0)
        return found if callable(found) and found is not signal.default_int_handler else None

    def give_back(self) -> None:
        """Put the former handlers back, where nobody has put others since."""
        for number, former in self._former.items():
            if signal.getsignal(number) == self._note:
                signal.signal(number, signal.SIG_DFL if former is None else former)

    def ignore_at_exit(self) -> None:
        """Let no signal change the exit code: as Python ends, it puts default handlers in the place of its own."""
        for number in self._former:
            atexit.register(signal.signal, number, signal.SIG_IGN)

    def _note(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at = number, now
        elif now - self._received_at > PATIENCE and self._alive_at < self._received_at and not _learns(frame):
            # learn() ended by an exception, of which SB3 tells nobody: nothing will ever be saved.
            self.give_back()
            os.kill(os.getpid(), number)


def _learns(frame: Any) -> bool:
    """Whether a ``learn()`` runs: an evaluation or an update may take minutes, in which it comes to no hook."""
    return any(one.f_code.co_name == "learn" for one, _ in traceback.walk_stack(frame))


class _Told(str):
    """
    The name of an attribute. Where a process of environments unpickles it, that process ignores some signals.

    A scheduler often signals all processes of a job. Environments that die first would take the rollout with them,
    which must be finished before anything can be saved.
    """

    numbers: tuple[int, ...]
    ignores: bool

    def __reduce__(self) -> Any:
        return _obey, (str(self), self.numbers, self.ignores)


def _obey(attribute: str, numbers: tuple[int, ...], ignores: bool) -> str:
    for number in numbers:
        signal.signal(number, signal.SIG_IGN if ignores else signal.SIG_DFL)
    return attribute


class Shield:
    """
    Lets the processes of environments ignore signals.

    At its exit Python ends such processes by SIGTERM and waits for them, so they are closed before that.

    :param envs: SB3 environments; those without processes are left alone
    :param numbers: the signals
    """

    def __init__(self, envs: Sequence[VecEnv], numbers: Sequence[int]) -> None:
        self._envs = [env for env in envs if isinstance(getattr(env, "unwrapped", env), SubprocVecEnv)]
        self._numbers = tuple(map(int, numbers))
        self._tell(ignores=True)
        if self._envs:
            atexit.register(self.close)

    def lift(self) -> None:
        """End it."""
        with suppress(EOFError, OSError):  # they are closed, or gone
            self._tell(ignores=False)
        atexit.unregister(self.close)

    def close(self) -> None:
        """Close the environments, whatever state their processes are in."""
        for env in self._envs:
            close(env)

    def _tell(self, ignores: bool) -> None:
        name = _Told("render_mode")  # any attribute that all environments have
        name.numbers, name.ignores = self._numbers, ignores
        for env in self._envs:
            env.get_attr(name)


def close(env: VecEnv) -> None:
    """
    Close environments, and end their processes where they do not answer.

    :param env: an SB3 environment
    """
    try:
        env.close()
    except (EOFError, OSError):
        base: Any = getattr(env, "unwrapped", env)
        for process in getattr(base, "processes", ()):
            process.kill()
