"""
When what a callback has lent to a model may act: in the parts of ``learn()`` for which it was lent, and nowhere else.

SB3 tells callbacks nothing if ``learn()`` ends by an exception, so nothing here waits for an end. SB3's hooks open each
part of ``learn()``, acting or updating. The next part closes it, and so does whatever else is done with the model:
another ``predict()``, ``train()`` or ``learn()``. What was lent asks before it acts, and so does nothing any more.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from torch import nn

from sb3_resnet.common import host

_ACTING, _UPDATING = "acting", "updating"


class Lending:
    """
    Which part of ``learn()`` is going on, as far as SB3's hooks and the network's mode tell.

    ``train()`` runs from ``on_rollout_end`` until the network leaves training mode. An algorithm without replay acts
    between ``on_rollout_start`` and ``on_rollout_end``; the others act where ``predict()`` is asked about the very
    observations that the loop got last.

    :param model: the model that learns
    :param scope: what ``learn()`` gave to ``on_training_start``; the callbacks of one call share it
    :param always: whether all may act until :meth:`end`, since somebody else than ``learn()`` calls the hooks
    """

    def __init__(self, model: BaseAlgorithm, scope: dict[str, Any], always: bool) -> None:
        self.scope = scope
        self._model = weakref.ref(model)
        self._has_replay = isinstance(model, OffPolicyAlgorithm)
        self._always = always
        self._part = ""
        self._seen = model.num_timesteps  # at the last hook
        self._began_at: int | None = None  # updates done when train() began
        self._is_in_doubt = False  # somebody asked for actions where train() was to begin
        self._acts = False
        self._latest: Any = None  # observations that the loop got last
        self._is_asked_about_latest = False
        self._when_closed: dict[Any, Callable[[], None]] = {}
        #: Whether an update was made in which nothing may act.
        self.was_passed_over = False

    @property
    def acting(self) -> bool:
        """Whether the loop chooses actions."""
        return self._always or (self._part == _ACTING and self._acts)

    @property
    def updating(self) -> bool:
        """Whether the loop's ``train()`` runs."""
        return self._always or (self._part == _UPDATING and not self._is_in_doubt and not self._is_left_behind)

    @property
    def is_current(self) -> bool:
        """Whether no other ``learn()`` has made steps since."""
        model = self._model()
        return self._always or (model is not None and 0 <= model.num_timesteps - self._seen <= model.n_envs)

    def hear_modes_of(self, module: nn.Module) -> None:
        """
        Let a module tell when its mode is set.

        :param module: part of the network that is trained; it calls :func:`mode_was_set`
        """
        _by_module[module] = weakref.ref(self)

    def when_closed(self, key: Any, act: Callable[[], None]) -> None:
        """
        Call a function whenever ``train()`` has ended.

        :param key: takes the place of the function with the same key
        :param act: the function
        """
        self._when_closed[key] = act

    def act(self, latest: Any) -> None:
        """
        At SB3's ``on_rollout_start`` and ``on_step``.

        :param latest: observations on which the loop acts next
        """
        self._see()
        if self.was_passed_over:  # and learn() goes on, so it was another callback
            self.was_passed_over = False
            warnings.warn(
                "An update was made before on_rollout_end or after train(), by another callback: it was not scheduled, "
                "clipped or checked by the callbacks of sb3_resnet, which take part in learn()'s own updates alone",
                stacklevel=3,
            )
        self._part, self._latest, self._acts = _ACTING, latest, not self._has_replay

    def update(self) -> None:
        """At SB3's ``on_rollout_end``."""
        self._see()
        self._part, self._latest, self._began_at, self._is_in_doubt = _UPDATING, None, None, False

    def end(self) -> None:
        """Nothing may act any more."""
        self._always = False
        self._close()

    def set_mode(self, training: bool) -> None:
        """
        The network's mode was set: ``train()`` begins or somebody asks for actions.

        :param training: the mode
        """
        if self._part == _ACTING:
            self._acts = not training and self._is_asked_about_latest
        elif self._part == _UPDATING and training:
            self._train_begins()
        elif self._part == _UPDATING and self._began_at is not None:
            self._close()
        else:  # in on_rollout_end, where another callback may evaluate
            self._is_in_doubt = True

    @contextmanager
    def asked_about(self, observation: Any) -> Iterator[None]:
        """
        While ``predict()`` is asked.

        :param observation: what it was given
        """
        self._is_asked_about_latest = self._part == _ACTING and observation is self._latest
        try:
            yield
        finally:
            self._acts = self._acts and not self._has_replay
            self._is_asked_about_latest = False

    def _train_begins(self) -> None:
        model = self._model()
        updates = 0 if model is None else host.updates_done(model)
        # A train() that did not come to its end has counted no updates. A subclass may call several in a row.
        was_cut = self._began_at is not None and not (self._has_replay and updates > self._began_at)
        if was_cut or self._is_left_behind:
            self._close()
        else:
            self._began_at, self._is_in_doubt = updates, False

    @property
    def _is_left_behind(self) -> bool:
        """Whether somebody has made steps since the last hook."""
        model = self._model()
        return model is None or model.num_timesteps != self._seen

    def _see(self) -> None:
        model = self._model()
        self._seen = self._seen if model is None else model.num_timesteps

    def _close(self) -> None:
        self._part, self._latest, self._began_at = "", None, None
        for act in [*self._when_closed.values()]:
            act()


# Held by the callbacks and by what they lent; held from here, these would live as long as the model.
_by_model: weakref.WeakKeyDictionary[BaseAlgorithm, weakref.ref[Lending]] = weakref.WeakKeyDictionary()
_by_module: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Lending]] = weakref.WeakKeyDictionary()


def begin_lending(model: BaseAlgorithm, scope: dict[str, Any], always: bool = False) -> Lending:
    """
    End what an earlier ``learn()`` has left, and find or make the state of this one.

    :param model: the model that learns
    :param scope: what ``on_training_start`` was given
    :param always: as in :class:`Lending`
    :return: the state that all callbacks of this ``learn()`` share
    """
    reference = _by_model.get(model)
    earlier = None if reference is None else reference()
    if always:
        return Lending(model, scope, always)
    if earlier is not None and earlier.scope is scope:
        return earlier
    if earlier is not None:
        earlier.end()
    lending = Lending(model, scope, always)
    _by_model[model] = weakref.ref(lending)
    return lending


def lending_of(module: nn.Module) -> Lending | None:
    """
    :param module: of :meth:`Lending.hear_modes_of`
    :return: what was begun with it, if anything
    """
    reference = _by_module.get(module)
    return None if reference is None else reference()


def mode_was_set(module: nn.Module, training: bool) -> None:
    """
    Called by a module when its mode is set.

    :param module: the module
    :param training: the mode
    """
    lending = lending_of(module)
    if lending is not None:
        lending.set_mode(training)
