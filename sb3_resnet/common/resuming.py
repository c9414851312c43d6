"""Save a run that must stop, and go on from there within the ``learn()`` of a new process."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.save_util import load_from_zip_file

from sb3_resnet.common import host_progress
from sb3_resnet.common.checkpoints import buffer_of, state_of, write_checkpoint
from sb3_resnet.common.environments import environment_state, put_back
from sb3_resnet.common.seeding import random_states, restore_random_states

#: What SB3's own callbacks count and collect, and do not save: all documented.
_COUNTED = (
    "n_calls",
    "best_mean_reward",
    "last_mean_reward",
    "evaluations_results",
    "evaluations_timesteps",
    "evaluations_length",
    "evaluations_successes",
    "n_episodes",
    "no_improvement_evals",
    "last_best_mean_reward",
    "last_time_trigger",
)


def save_run(
    model: Any,
    path: Path,
    run: str,
    save_replay_buffer: bool,
    callbacks: Sequence[BaseCallback],
    start: tuple[int, int] = (0, 0),
) -> None:
    """
    Write a checkpoint that also holds what environments and SB3's callbacks are in the midst of.

    :param model: an SB3 model between two rollouts
    :param path: its file
    :param run: identifies the run
    :param save_replay_buffer: whether to save the replay buffer too
    :param callbacks: all of ``learn()``
    :param start: timesteps and updates with which this ``learn()`` began
    :raises OSError: if it cannot be written
    """
    evals = [env for env in (getattr(callback, "eval_env", None) for callback in callbacks) if env is not None]
    state = {
        "env": environment_state(model.env),
        "eval_envs": [environment_state(env) for env in evals],
        "callbacks": [(type(callback).__name__, _counted(callback)) for callback in callbacks],
        "start": start,
    }
    write_checkpoint(model, path, run, random_states(model), save_replay_buffer, pickle.dumps(state))


def start_of(path: Path) -> tuple[int, int]:
    """
    :param path: a checkpoint of this package's callbacks
    :return: timesteps and updates with which the ``learn()`` began that it belongs to; those of a new model where the
        file does not say it
    """
    content = state_of(path)
    state: dict[str, Any] = {} if content is None else pickle.loads(content)
    timesteps, updates = state.get("start", (0, 0))
    return int(timesteps), int(updates)


def resume_run(model: Any, path: Path, callbacks: Sequence[BaseCallback], is_own: bool = True) -> bool:
    """
    Put a new model, within its ``learn()``, where a checkpoint was written.

    :param model: an SB3 model of the same arguments
    :param path: a checkpoint of this package's callbacks
    :param callbacks: all of ``learn()``
    :param is_own: whether environments, replay buffer and random states are taken too; not where another process has
        them
    :return: whether the environments go on from where they were; else their episodes begin anew
    :raises ValueError: if the checkpoint is of another kind of model or environment, or no checkpoint
    """
    saved, tensors, variables = load_from_zip_file(path, device=model.device)
    if saved is None:
        raise ValueError(f"{str(path)!r} holds no model of Stable-Baselines3")
    try:
        model.set_parameters(tensors, exact_match=True, device=model.device)
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{path} was written by a model with other arguments ({shorten(str(error), 250)}). To start a new run, "
            "write another folder; to go on, write the arguments of the first start"
        ) from error
    for name, value in (variables or {}).items():
        if value is not None:
            attrgetter(name)(model).data.copy_(value.data)
    content = state_of(path) if is_own else None
    state = None if content is None else pickle.loads(content)
    goes_on = state is not None and put_back(model.env, state["env"])
    host_progress.take_over_progress(model, saved, goes_on)
    if is_own:
        _load_buffer(model, path, goes_on)
    if state is not None:
        _count_on(callbacks, state["callbacks"])
        evals = [env for env in (getattr(callback, "eval_env", None) for callback in callbacks) if env is not None]
        for env, kept in zip(evals, state["eval_envs"], strict=False):
            put_back(env, kept)
    if is_own:
        restore_random_states(path, model, with_statistics=state is None)
    return goes_on


def _load_buffer(model: Any, path: Path, goes_on: bool) -> None:
    if not isinstance(model, OffPolicyAlgorithm):
        return
    if not buffer_of(path).is_file():
        warnings.warn(f"{path} has no replay buffer beside it, so replay begins empty", stacklevel=4)
        return
    model.load_replay_buffer(buffer_of(path), truncate_last_traj=not goes_on)
    if not goes_on:
        _cut_episodes(model.replay_buffer)


def _cut_episodes(buffer: Any) -> None:
    """Episodes that begin anew do not follow the last stored step: n-step returns must not cross it."""
    if not (buffer.full or buffer.pos):
        return
    row = (buffer.pos - 1) % buffer.buffer_size
    if getattr(buffer, "handle_timeout_termination", False):  # cut off, so the value of what follows still counts
        buffer.timeouts[row] = np.logical_or(buffer.timeouts[row], np.logical_not(buffer.dones[row]))
    buffer.dones[row] = True


def _counted(callback: BaseCallback) -> dict[str, Any]:
    return {name: getattr(callback, name) for name in _COUNTED if hasattr(callback, name)}


def _count_on(callbacks: Sequence[BaseCallback], saved: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """By name and order of appearance, since the new start may have others."""
    left = [*saved]
    for callback in callbacks:
        found = next((entry for entry in left if entry[0] == type(callback).__name__), None)
        if found is not None:
            left.remove(found)
            vars(callback).update(found[1])
