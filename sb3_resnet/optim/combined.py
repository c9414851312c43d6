"""Several torch optimizers as one, for parts of a network that learn by different rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch as th


class CombinedOptimizer(th.optim.Optimizer):
    """
    One optimizer towards Stable-Baselines3 and its callbacks, several inside.

    Its ``param_groups`` are the groups of all parts, in order, and ``state`` holds what all parts keep: the parts use
    the same dicts. So a rate that is written into a group is the one that its part steps with, and there is one state
    dict, which loads as that of any other optimizer. Hooks and ``zero_grad`` are those of this object. Example::

        CombinedOptimizer([AdamW(head, lr=1e-4), SGD(backbone, lr=1e-5, momentum=0.9)])

    :param parts: optimizers without a parameter in common; they step in this order
    :raises ValueError: for parameters that two parts hold, and for a group that is added later
    """

    def __init__(self, parts: Sequence[th.optim.Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        # Later than torch's: it would write them into the groups of all parts. Weight decay only where all know it.
        shared = {"lr", "weight_decay"}.intersection(*(part.defaults for part in parts))
        self.defaults = {name: parts[0].defaults[name] for name in sorted(shared)}
        #: The optimizers inside.
        self.parts = [*parts]
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """
        Let each part make its step.

        :param closure: computes the loss again; called once
        :return: its loss
        """
        loss = None
        if closure is not None:
            with th.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's while this object is built; a later group would belong to no part, so it is refused."""
        if hasattr(self, "parts"):
            raise ValueError("A CombinedOptimizer takes no further groups: build it from parts that hold them all")
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "parts": self.parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For copies and pickles, and for ``load_state_dict``, which puts new groups and a new state in place."""
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        """Give each part its share of the groups, and the whole state: parameters are its keys."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.__setstate__({"state": self.state, "param_groups": [next(groups) for _ in part.param_groups]})
