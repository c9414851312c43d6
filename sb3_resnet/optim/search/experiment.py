"""RL-Zoo's search for models with a ResNet policy: its section of the YAML, the values of a trial, and what is kept."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space

from sb3_resnet.common import host_zoo
from sb3_resnet.nn.preprocessing import Preprocessing, check_size
from sb3_resnet.optim.policy import ResNetPolicyMixin
from sb3_resnet.optim.search import sections
from sb3_resnet.optim.search.space import SearchSpace, leave_out_refused, read_space

#: Algorithms of RL-Zoo that search by :class:`SearchSpace` where the policy is ours.
ALGORITHMS = ("dqn", "qrdqn", "ppo", "a2c")
#: The trial's own attribute with its section, from which ``sb3-resnet best`` writes the YAML.
ATTRIBUTE = "sb3_resnet"
_SCHEDULED = ("learning_rate", "clip_range", "clip_range_vf")
_running: ContextVar[tuple[Experiment, Any] | None] = ContextVar("running", default=None)
_experiments: WeakKeyDictionary[Any, Experiment | None] = WeakKeyDictionary()


class Experiment:
    """
    What RL-Zoo searches in, read once.

    :param manager: RL-Zoo's ``ExperimentManager``, after its ``setup_experiment``
    :raises ValueError: for a ``search`` mapping or a section that cannot work
    """

    def __init__(self, manager: Any) -> None:
        self.algo, self.env_id = manager.algo, manager.env_name.gym_id
        self.section = host_zoo.section_of(manager)
        sections.refuse_objects(self.section, f"the section of {self.env_id}")
        given = host_zoo.beside_sections(manager, "search")
        parameters = inspect.signature(host_zoo.algorithm_of(manager)).parameters
        self._learning_rate = parameters["learning_rate"].default
        #: Hyperparameters and their ranges.
        whole = [name for name, one in parameters.items() if type(one.default) is int]
        self.space: SearchSpace = read_space(given, self.section, parameters, whole)
        if {"last_stage", "pooling"} & {*self.space.values}:
            extractor = self.section["policy_kwargs"].get("features_extractor_kwargs") or {}
            refusal = _refusal(host_zoo.observation_space_of(manager), extractor)
            leave_out_refused(self.space, given, self.section, refusal)

    def sample(self, trial: Any, manager: Any) -> dict[str, Any]:
        """
        Draw the values of a trial, and keep its section with it.

        :param trial: an Optuna trial
        :param manager: RL-Zoo's, of this trial alone: gets the trial's callbacks
        :return: what replaces the section's arguments of the algorithm
        """
        values = self.space.suggest(trial)
        section = sections.with_values(self.section, values, self._learning_rate)
        trial.set_user_attr(ATTRIBUTE, {"algo": self.algo, "env": self.env_id, "section": section, "values": values})
        if section.get("callback"):
            manager.specified_callbacks = section["callback"]
        beside = ("policy_kwargs", "replay_buffer_kwargs")
        changed = {key: value for key, value in section.items() if key in values or key in beside}
        if "learning_rate" in section:
            changed["learning_rate"] = section["learning_rate"]
        schedules = {key: changed.pop(key) for key in _SCHEDULED if key in changed}
        return changed | host_zoo.schedules_of(manager, schedules)


class Sampler:
    """
    In the place of RL-Zoo's sampler of an algorithm: searches by :class:`SearchSpace` where the policy is ours.

    :param plain: RL-Zoo's sampler, for all other policies
    """

    def __init__(self, plain: Callable[..., dict[str, Any]]) -> None:
        self.plain = plain

    def __call__(self, trial: Any, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
        """As RL-Zoo calls its samplers."""
        running = _running.get()
        if running is None:
            return self.plain(trial, n_actions, n_envs, additional_args)
        experiment, manager = running
        return experiment.sample(trial, manager)


def experiment_of(manager: Any) -> Experiment | None:
    """
    :param manager: RL-Zoo's ``ExperimentManager``, after its ``setup_experiment``
    :return: what it searches in; ``None`` if the policy is not ours, or the algorithm has no search of ours
    """
    if manager not in _experiments:
        policy = host_zoo.policy_of(manager)
        ours = isinstance(policy, type) and issubclass(policy, ResNetPolicyMixin) and manager.algo in ALGORITHMS
        _experiments[manager] = Experiment(manager) if ours else None
    return _experiments[manager]


@contextmanager
def trial_of(experiment: Experiment, manager: Any) -> Iterator[None]:
    """
    Let RL-Zoo's call of a :class:`Sampler` find its experiment; trials may run in threads of their own.

    :param experiment: what is searched in
    :param manager: RL-Zoo's, of this trial alone
    """
    token = _running.set((experiment, manager))
    try:
        yield
    finally:
        _running.reset(token)


def _refusal(space: Any, extractor: Mapping[str, Any]) -> Callable[[str, str], str | None]:
    """:return: a function of depth and pooling that says why the extractor refuses both, or ``None``"""
    parts = [*space.spaces.values()] if isinstance(space, spaces.Dict) else [space]
    arguments = (extractor.get("adapter", "conv1x1"), extractor.get("image_size"), extractor.get("frame_channels"))
    sizes = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the trials' own models warn
        for part in parts:
            if isinstance(part, spaces.Box) and (is_image_space(part) or len(part.shape) == 3):
                sizes.append(Preprocessing(part, *arguments).size)

    def refusal(last_stage: str, pooling: str) -> str | None:
        try:
            for size in sizes:
                check_size(size, pooling, last_stage)
        except ValueError as error:
            return str(error)
        return None

    return refusal
