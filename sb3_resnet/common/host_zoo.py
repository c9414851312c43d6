"""The one place that touches parts of RL-Zoo which its documentation does not promise; RL-Zoo itself is an extra."""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.abc
import importlib.util
import io
import runpy
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from sb3_resnet.common.host import HostPartMissingError

MANAGER = "rl_zoo3.exp_manager"


def when_imported(name: str, action: Callable[[ModuleType], None]) -> None:
    """
    Do something with a module as soon as somebody imports it, at once if that has been done.

    So an optional package need not be imported in order to be extended.

    :param name: of the module
    :param action: what to do with it
    """
    module = sys.modules.get(name)
    if getattr(getattr(module, "__spec__", None), "_initializing", False):
        warnings.warn(
            f"sb3_resnet is imported by what {name} imports, too early to extend it: call "
            "sb3_resnet.register_samplers() later",
            stacklevel=2,
        )
    elif module is not None:
        action(module)
    elif not any(isinstance(finder, _Finder) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(name, action))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module as Python does, with a loader that acts once the module is there."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        self.name, self.action = name, action
        self._asks = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name or self._asks:
            return None
        self._asks = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asks = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.action)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any, action: Callable[[ModuleType], None]) -> None:
        self._loader, self._action = loader, action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._action(module)


def replace_samplers(module: ModuleType, algorithms: Sequence[str], make: Callable[[Any], Any]) -> None:
    """
    :param module: ``rl_zoo3.exp_manager``
    :param algorithms: names of algorithms
    :param make: takes RL-Zoo's sampler and returns the one to use
    """
    samplers = getattr(module, "HYPERPARAMS_SAMPLER", {})
    samplers.update({name: make(samplers[name]) for name in algorithms if name in samplers})


def wrap_method(module: ModuleType, name: str, wrapper: Callable[..., Any]) -> None:
    """
    :param module: ``rl_zoo3.exp_manager``
    :param name: a public method of its ``ExperimentManager``
    :param wrapper: called in its place, with the method itself as first argument
    :raises HostPartMissingError: if there is no such method
    """
    plain = getattr(getattr(module, "ExperimentManager", None), name, None)
    if plain is None:
        raise HostPartMissingError("rl_zoo3", f"ExperimentManager.{name}")

    @wraps(plain)
    def method(*args: Any, **kwargs: Any) -> Any:
        return wrapper(plain, *args, **kwargs)

    setattr(module.ExperimentManager, name, method)


def section_of(manager: Any) -> dict[str, Any]:
    """
    :param manager: RL-Zoo's ``ExperimentManager``, after its ``setup_experiment``
    :return: its section as YAML holds it, with what the command line replaces in it
    """
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it reads, and has done so before
        section = dict(manager.read_hyperparameters()[0])
    section["n_timesteps"] = manager.n_timesteps
    if manager.env_kwargs:
        section["env_kwargs"] = manager.env_kwargs
    # As a text it is Python code, which RL-Zoo has evaluated.
    section["policy_kwargs"] = copy.deepcopy(dict(_hyperparameters(manager).get("policy_kwargs") or {}))
    return copy.deepcopy(section)


def beside_sections(manager: Any, name: str) -> Any:
    """
    :param manager: RL-Zoo's ``ExperimentManager``
    :param name: a key beside the sections of environments, which RL-Zoo passes over
    :return: its value in the configuration, read as RL-Zoo reads it; ``None`` if there is none
    """
    config = str(manager.config)
    if config.endswith((".yml", ".yaml")):
        with open(config) as file:
            found: Any = importlib.import_module("yaml").safe_load(file)
    elif config.endswith(".py"):
        found = runpy.run_path(config).get("hyperparams")
    else:
        found = importlib.import_module(config).hyperparams
    return found.get(name) if isinstance(found, Mapping) else None


def policy_of(manager: Any) -> Any:
    """
    :param manager: RL-Zoo's ``ExperimentManager``, after its ``setup_experiment``
    :return: the policy class of its section; ``None`` for an unknown name
    """
    policy = _hyperparameters(manager).get("policy")
    return algorithm_of(manager).policy_aliases.get(policy) if isinstance(policy, str) else policy


def algorithm_of(manager: Any) -> Any:
    """
    :param manager: RL-Zoo's ``ExperimentManager``
    :return: the class of its algorithm
    """
    return sys.modules[MANAGER].ALGOS[manager.algo]


def observation_space_of(manager: Any) -> Any:
    """
    :param manager: RL-Zoo's ``ExperimentManager``, after its ``setup_experiment``
    :return: what its models observe
    """
    with contextlib.redirect_stdout(io.StringIO()):
        env = manager.create_envs(1, no_log=True)
    try:
        return env.observation_space
    finally:
        env.close()


def schedules_of(manager: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """
    :param manager: RL-Zoo's ``ExperimentManager``
    :param values: schedules as YAML holds them, such as ``lin_1e-4``, by argument
    :return: the same as SB3 takes them
    """
    try:
        made: dict[str, Any] = manager._preprocess_schedules(dict(values))
    except AttributeError:
        raise HostPartMissingError("rl_zoo3", "_preprocess_schedules in ExperimentManager") from None
    return made


def sampler_and_pruner_of(manager: Any) -> tuple[Any, Any]:
    """
    :param manager: RL-Zoo's ``ExperimentManager``
    :return: what its command line asks for: where Optuna looks next, and when it gives up on a trial
    """
    try:
        return manager._create_sampler(manager.sampler), manager._create_pruner(manager.pruner)
    except AttributeError:
        raise HostPartMissingError("rl_zoo3", "_create_sampler in ExperimentManager") from None


def _hyperparameters(manager: Any) -> Mapping[str, Any]:
    try:
        found: Mapping[str, Any] = manager._hyperparams
    except AttributeError:
        raise HostPartMissingError("rl_zoo3", "_hyperparams in ExperimentManager") from None
    return found
