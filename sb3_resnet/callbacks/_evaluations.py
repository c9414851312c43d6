"""The rewards of an ``EvalCallback`` that runs beside ours, and the best models kept by them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback, EventCallback
from stable_baselines3.common.save_util import load_from_zip_file

from sb3_resnet.common import host
from sb3_resnet.common.buckets import share_model
from sb3_resnet.common.ranks import ranks_of
from sb3_resnet.common.vec_normalize import check_stored_layout
from sb3_resnet.optim.groups import optimizer_of
from sb3_resnet.optim.updates import gradient_updates

SelfCallback = TypeVar("SelfCallback", bound=BaseCallback)


def walk(callback: Any) -> Iterator[BaseCallback]:
    """:return: a callback and all inside it"""
    if isinstance(callback, BaseCallback):
        yield callback
    if isinstance(callback, CallbackList):
        for child in callback.callbacks:
            yield from walk(child)
    elif isinstance(callback, EventCallback):
        yield from walk(callback.callback)


class RefusedSetUpError(RuntimeError):
    """A wrong set-up in a trial of RL-Zoo's search, which takes each ``ValueError`` for bad hyperparameters."""


def is_trial(root: Any) -> bool:
    """
    :param root: the callback that ``learn()`` was given
    :return: whether ``learn()`` is a trial of RL-Zoo's search, which adds an ``EvalCallback`` with a ``trial``
    """
    return any(hasattr(child, "trial") and hasattr(child, "is_pruned") for child in walk(root))


def refusals_end_the_search(start: Callable[[SelfCallback], None]) -> Callable[[SelfCallback], None]:
    """
    Decorate a ``_on_training_start``: a wrong set-up must not count as a trial with bad hyperparameters.

    An environment whose images no replay buffer can take is refused here for all callbacks. SB3's own buffers notice
    at the first step, in NumPy's words.

    RL-Zoo prunes a trial that raises ``ValueError`` or ``AssertionError``, so a search would go through all its trials
    and find nothing.
    """

    @wraps(start)
    def wrapper(callback: SelfCallback) -> None:
        try:
            check_stored_layout(callback.model)
            start(callback)
        except (AssertionError, ValueError) as error:
            if is_trial(callback.locals.get("callback")):
                raise RefusedSetUpError(f"{type(callback).__name__} ends the search: {error}") from error
            raise

    return wrapper


class Evaluations:
    """
    Watches the first ``EvalCallback`` of a ``learn()`` call.

    :param root: the callback that ``learn()`` was given, as :func:`~sb3_resnet.common.host.root_callback` finds it
    """

    def __init__(self, root: Any) -> None:
        self._source = next((child for child in walk(root) if isinstance(child, EvalCallback)), None)
        self._seen = self._count()
        self._updates = -1

    @property
    def folder(self) -> str | None:
        """Where the ``EvalCallback`` saves its best model."""
        return None if self._source is None else self._source.best_model_save_path

    @property
    def found(self) -> bool:
        """Whether there is an ``EvalCallback`` that evaluates at all."""
        return self._source is not None and self._source.eval_freq > 0

    def poll(self) -> float | None:
        """:return: the mean reward of the latest evaluation, if there has been one since the last call"""
        count = self._count()
        if self._source is None or count == self._seen:
            return None
        self._seen = count
        return float(self._source.last_mean_reward)

    def poll_after_updates(self, model: BaseAlgorithm) -> float | None:
        """
        The evaluations that say whether learning helps: not a second one of the same parameters, as before the first
        update and within a rollout of PPO.

        :param model: an SB3 model
        :return: as :meth:`poll`, if the model has made updates since the last one that was returned here
        """
        reward = self.poll()
        if reward is None:
            return None
        before, self._updates = self._updates, gradient_updates(model)
        return None if self._updates == before else reward

    def _count(self) -> int:
        return 0 if self._source is None else host.evaluations_done(self._source)


@runtime_checkable
class BestKeeper(Protocol):
    """A callback that keeps the best model of each phase."""

    def best_of_phase(self) -> tuple[Path, float] | None:
        """:return: file and mean reward of the best evaluated model of the current phase, up to this moment"""


@runtime_checkable
class BestOfAllKeeper(Protocol):
    """A callback that keeps the best model of all phases."""

    def best_of_all(self) -> tuple[Path, float] | None:
        """:return: file and mean reward of the best evaluated model, up to this moment"""


def find_keeper(root: Any) -> BestKeeper | None:
    """:return: the callback of a ``learn()`` call that keeps the best models"""
    return next((callback for callback in walk(root) if isinstance(callback, BestKeeper)), None)


def restore_best(model: BaseAlgorithm, keeper: BestKeeper) -> str:
    """
    Return to the best weights and moments of the current phase.

    Weights, BatchNorm statistics and optimizer moments alone: learning rates, counters, exploration, the replay
    buffer and the freeze boundary go on as they are.

    Of several ranks the first one has the file, and sends the others what it reads.

    :param model: an SB3 model with a ResNet policy
    :param keeper: who has the best model
    :return: what was done, for the log
    """
    ranks = ranks_of(model)
    done = _restore_best(model, keeper) if ranks.is_first else ""
    share_model(ranks, model)
    return str(ranks.tell(done))


def _restore_best(model: BaseAlgorithm, keeper: BestKeeper) -> str:
    best = keeper.best_of_phase()
    if best is None:
        return "; nothing restored, there was no evaluation in the phase that ends"
    path, reward = best
    if not path.is_file():
        warnings.warn(f"restore_best: {path} is gone, so the current weights stay", stacklevel=2)
        return "; nothing restored, the file is gone"
    policy: Any = model.policy
    boundary = policy.trained.features_extractor.boundary
    stage, moved_at = boundary.stage, boundary.moved_at_update
    _, params, _ = load_from_zip_file(path, device=model.device, load_data=False)
    policy.load_state_dict(params["policy"])
    policy.set_freeze_boundary(stage, at_update=moved_at)
    optimizer = optimizer_of(model)
    moments: Any = params["policy.optimizer"]
    optimizer.load_state_dict({"state": moments["state"], "param_groups": optimizer.state_dict()["param_groups"]})
    return f"; restored the best weights, mean reward {reward:g}"
