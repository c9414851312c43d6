"""Extend RL-Zoo's ``-optimize``, once RL-Zoo is imported."""

from __future__ import annotations

import copy
import os
import socket
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any

from sb3_resnet.common import host_zoo
from sb3_resnet.optim.search.experiment import ALGORITHMS, ATTRIBUTE, Sampler, experiment_of, trial_of
from sb3_resnet.optim.search.workers import search_with_others


def register_samplers() -> None:
    """
    Let ``rl_zoo3.train -optimize`` search our hyperparameters where the policy is ours; may run again.

    RL-Zoo is not imported: this waits until somebody does. Searches with other policies stay RL-Zoo's own.
    """
    host_zoo.when_imported(host_zoo.MANAGER, _extend)


def _extend(module: ModuleType) -> None:
    samplers = getattr(module, "HYPERPARAMS_SAMPLER", {})
    if any(isinstance(sampler, Sampler) for sampler in samplers.values()):
        return
    host_zoo.replace_samplers(module, ALGORITHMS, Sampler)
    host_zoo.wrap_method(module, "objective", _objective)
    host_zoo.wrap_method(module, "hyperparameters_optimization", _search)
    host_zoo.wrap_method(module, "load_trial", _load_trial)


def _search(plain: Callable[[Any], None], manager: Any) -> None:
    experiment = experiment_of(manager)
    if experiment is not None and manager.storage is not None:
        search_with_others(experiment, manager)
    plain(manager)


def _objective(plain: Callable[[Any, Any], float], manager: Any, trial: Any) -> float:
    experiment = experiment_of(manager)
    if experiment is None:
        return plain(manager, trial)
    import optuna

    trial.set_user_attr("worker", f"{socket.gethostname()}:{os.getpid()}")
    own = copy.copy(manager)  # the callbacks are this trial's, and another may run in another thread
    with trial_of(experiment, own):
        try:
            return plain(own, trial)
        except optuna.TrialPruned as pruned:
            if pruned.__cause__ is not None:  # RL-Zoo takes an error for bad luck with the values
                error = _described(pruned.__cause__)
                trial.set_user_attr("error", error)
                optuna.logging.get_logger("optuna.sb3_resnet").warning(f"Trial {trial.number} is pruned: {error}")
            raise


def _described(error: BaseException) -> str:
    """With the line, since an assertion often says no more."""
    text = "".join(traceback.format_exception_only(type(error), error)).strip()
    last = traceback.extract_tb(error.__traceback__)[-1:]
    return text + "".join(f" ({frame.filename}, line {frame.lineno})" for frame in last)


def _load_trial(plain: Callable[..., Any], manager: Any, storage: str, name: str, number: Any = None, **kw: Any) -> Any:
    """``--trial-id`` of RL-Zoo knows the values by the names of its own samplers."""
    from sb3_resnet.optim.search.results import find_trial

    _, trial = find_trial(storage, name, number)
    kept = trial.user_attrs.get(ATTRIBUTE)
    return plain(manager, storage, name, number, **kw) if kept is None else kept["section"]
