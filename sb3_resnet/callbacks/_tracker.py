"""Common to the callbacks for experiment trackers: SB3's log, the hyperparameters, and the best model at the end."""

from __future__ import annotations

import inspect
import math
import warnings
import weakref
from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import stable_baselines3
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import CallbackList
from stable_baselines3.common.logger import KVWriter

from sb3_resnet.callbacks._evaluations import BestOfAllKeeper, Evaluations, find_keeper, refusals_end_the_search, walk
from sb3_resnet.callbacks._updates import LendingCallback
from sb3_resnet.common import host
from sb3_resnet.common.arguments import flag
from sb3_resnet.common.ranks import ranks_of


class Tracker(KVWriter):
    """
    One run of an experiment tracker, as an output of SB3's logger.

    An error of the tracker never ends training: it becomes a warning, and nothing more is logged.

    :param name: name of the output, by which ``logger.record(..., exclude=name)`` excludes a value from it
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.broken = False
        #: Says whether a line of the log is of this run, and not of a later ``learn()`` with the same logger.
        self.is_of_run: Callable[[], bool] = lambda: True

    def attempt(self, what: str, act: Callable[..., None], *args: Any) -> None:
        """
        Call a function, and turn its errors into a warning.

        :param what: what the function does, for the warning
        :param act: the function
        :param args: its arguments
        """
        try:
            act(*args)
        except Exception as error:  # such as of a server or a database, or about a full disk
            if not self.broken:
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                warnings.warn(f"{self.name} could not {what} ({reason}): training goes on without it", stacklevel=2)
            self.broken = True

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """
        Log the numbers of a line of SB3's log; texts, pictures and histograms are for TensorBoard alone.

        :param key_values: values by key
        :param key_excluded: by key, the outputs that the value is not for
        :param step: the timestep
        """
        numbers = {
            key: float(value)
            for key, value in key_values.items()
            if self.name not in (key_excluded.get(key) or ())
            and isinstance(value, (int, float, np.number))
            and not isinstance(value, bool)
        }
        if numbers and not self.broken and self.is_of_run():
            self.attempt("log values", self.log_numbers, numbers, step)

    @abstractmethod
    def log_hyperparameters(self, values: Mapping[str, Any]) -> None:
        """
        Log what describes the run.

        :param values: hyperparameters by name
        """

    @abstractmethod
    def log_numbers(self, values: Mapping[str, float], step: int) -> None:
        """
        Log values at a timestep.

        :param values: numbers by key
        :param step: the timestep
        """

    @abstractmethod
    def log_file(self, path: Path) -> None:
        """
        Store a file with the run.

        :param path: the file
        """

    def close(self) -> None:
        """End the run; may be called again."""


class TrackerCallback(LendingCallback):
    """
    Adds a tracker to the outputs of the model's logger while training lasts.

    :param save_best: whether to store the best model with the run
    :param verbose: SB3's verbosity
    """

    def __init__(self, save_best: bool, verbose: int) -> None:
        super().__init__(verbose)
        self.save_best = flag("save_best", save_best)
        self._tracker: Tracker | None = None
        self._root: Any = None
        self._at_exit: weakref.finalize[Any, Any] | None = None

    @abstractmethod
    def _open(self, hyperparameters: Mapping[str, Any]) -> Tracker:
        """:return: a new run"""

    @refusals_end_the_search
    def _on_training_start(self) -> None:
        self._close()  # of a learn() that was interrupted
        if not ranks_of(self.model).is_first:
            return
        self._root = host.root_callback(self)
        self._tracker = self._open({**hyperparameters(self.model), **arguments(self._root)})
        if self.lending is not None:
            lending = weakref.ref(self.lending)  # it leads to this callback, which the run must not outlive
            self._tracker.is_of_run = lambda: (found := lending()) is not None and found.is_current
        # Of a learn() that is interrupted, the run ends with the callback or with Python.
        self._at_exit = weakref.finalize(self, self._tracker.close)
        logger = host.logger_of(self.model)
        if logger is not None:
            logger.output_formats.append(self._tracker)

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        """Log the values after the last line of the log, store the best model, and end the run."""
        if self._tracker is None:  # RL-Zoo ends training twice
            return
        logger = host.logger_of(self.model)
        if logger is not None:
            self._tracker.write(logger.name_to_value, logger.name_to_excluded, self.model.num_timesteps)
        path = best_model(self._root) if self.save_best else None
        if path is not None and not self._tracker.broken:
            self._tracker.attempt("keep the best model", self._tracker.log_file, path)
        self._close()

    def _close(self) -> None:
        tracker, self._tracker = self._tracker, None
        if tracker is None:
            return
        logger = host.logger_of(self.model)
        if logger is not None and tracker in logger.output_formats:
            logger.output_formats.remove(tracker)
        if self._at_exit is not None:
            self._at_exit.detach()
        tracker.attempt("end the run", tracker.close)


def best_model(root: Any) -> Path | None:
    """
    :param root: the callback that ``learn()`` was given
    :return: file of the best model of a ``BestCheckpointCallback``, else of an ``EvalCallback``; ``None`` without one
    """
    keeper = find_keeper(root)
    best = keeper.best_of_all() if isinstance(keeper, BestOfAllKeeper) else None
    folder = Evaluations(root).folder
    candidates = [best[0]] if best is not None else []
    candidates += [Path(folder) / "best_model.zip"] if folder is not None else []
    return next((path for path in candidates if path.is_file()), None)


def hyperparameters(model: BaseAlgorithm) -> dict[str, Any]:
    """
    :param model: an SB3 model
    :return: arguments of its constructor, nested names joined by dots; numbers, strings and booleans as they are, all
        else as text
    """
    names = [name for cls in type(model).__mro__ for name in inspect.signature(cls).parameters]
    skipped = {"self", "args", "kwargs", "policy", "env", "device", "_init_setup_model", "replay_buffer_class"}
    values: dict[str, Any] = {
        "algorithm": type(model).__name__,
        "policy": type(model.policy).__name__,
        "device": str(model.device),
        "stable_baselines3": stable_baselines3.__version__,
        "torch": th.__version__,
    }
    spec = getattr(model.env.envs[0], "spec", None) if model.env is not None and hasattr(model.env, "envs") else None
    if spec is not None:
        values["env"] = spec.id
    for name in dict.fromkeys(names):
        if name not in skipped and hasattr(model, name):
            values.update(_flat(name, getattr(model, name)))
    return values


def arguments(root: Any) -> dict[str, Any]:
    """
    :param root: the callback that ``learn()`` was given
    :return: arguments of the callbacks, with names such as ``callbacks.UnfreezeCallback.phases``
    """
    values: dict[str, Any] = {}
    for callback in walk(root):
        if not isinstance(callback, (CallbackList, TrackerCallback)):
            cls = type(callback)
            for name in inspect.signature(cls).parameters:
                if name in vars(callback) and name != "verbose":
                    values.update(_flat(f"callbacks.{cls.__name__}.{name}", getattr(callback, name)))
    return values


def _flat(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {key: item for part, inner in value.items() for key, item in _flat(f"{name}.{part}", inner).items()}
    if isinstance(value, float) and not math.isfinite(value):
        return {name: str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {name: value}
    if isinstance(value, type):
        return {name: value.__name__}
    # The text of functions and schedules contains an address, which says nothing.
    return {name: type(value).__name__ if " at 0x" in repr(value) else repr(value)}
