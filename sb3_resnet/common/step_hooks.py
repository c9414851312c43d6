"""
What runs before and after each step of an optimizer: added, replaced and removed by a key.

PyTorch lets anybody register a hook but shows nobody which ones there are. Here each optimizer has one hook of
PyTorch's for each moment, and that one calls ours in order. So a hook can be found, put first, and replaced: a
``learn()`` that was interrupted leaves its hooks behind, and those of the next one take their places. Hooks are in no
state dict and are lost by ``deepcopy``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

Act = Callable[[Optimizer], None]


class StepHooks:
    """
    The hooks of one optimizer at one moment, in the order in which they run.

    :param register: the optimizer's method that registers a hook for this moment
    """

    def __init__(self, register: Callable[[Any], RemovableHandle]) -> None:
        # Not the method itself: the optimizer holds this object, and each would keep the other alive.
        self._register = weakref.WeakMethod(register)
        self._acts: dict[Hashable, Act] = {}
        self._handle: RemovableHandle | None = None

    def add(self, key: Hashable, act: Act, first: bool = False) -> None:
        """
        Let ``act`` run at each step.

        :param key: takes the place of the hook that has the same key
        :param act: called with the optimizer; an error of it prevents the step
        :param first: run before all others
        """
        if first:
            self._acts = {key: act, **{other: old for other, old in self._acts.items() if other != key}}
        else:
            self._acts[key] = act
        register = self._register()
        if self._handle is None and register is not None:
            self._handle = register(self._run)

    def remove(self, key: Hashable, act: Act | None = None) -> None:
        """
        Remove a hook, if it is there. Not to be called from within one.

        :param key: of the hook
        :param act: leave the hook alone if it does anything else
        """
        if key in self._acts and act in (None, self._acts[key]):
            del self._acts[key]
        if not self._acts and self._handle is not None:
            self._handle.remove()
            self._handle = None

    def get(self, key: Hashable) -> Act | None:
        """
        :param key: as given to :meth:`add`
        :return: the hook, or ``None``
        """
        return self._acts.get(key)

    @property
    def keys(self) -> list[Hashable]:
        """Keys of all hooks, in the order in which they run."""
        return [*self._acts]

    def _run(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for act in [*self._acts.values()]:
            act(optimizer)


# The optimizer holds its hooks through PyTorch. Held from here, they would keep the optimizer alive for ever, since
# they lead to callbacks and from there to the model.
_Known = weakref.WeakKeyDictionary[Optimizer, "weakref.ref[StepHooks]"]
_before: _Known = weakref.WeakKeyDictionary()
_after: _Known = weakref.WeakKeyDictionary()


def before_step(optimizer: Optimizer) -> StepHooks:
    """
    :param optimizer: any optimizer
    :return: its hooks before each step, when gradients are clipped already
    """
    return _find(_before, optimizer, optimizer.register_step_pre_hook)


def after_step(optimizer: Optimizer) -> StepHooks:
    """
    :param optimizer: any optimizer
    :return: its hooks after each step
    """
    return _find(_after, optimizer, optimizer.register_step_post_hook)


def _find(known: _Known, optimizer: Optimizer, register: Callable[[Any], RemovableHandle]) -> StepHooks:
    reference = known.get(optimizer)
    hooks = None if reference is None else reference()
    if hooks is None:
        hooks = StepHooks(register)
        known[optimizer] = weakref.ref(hooks)
    return hooks
