"""Clip head and backbone apart, so that unfreezing does not shrink the head's step."""

from __future__ import annotations

import warnings

import torch as th

from sb3_resnet.callbacks._evaluations import refusals_end_the_search
from sb3_resnet.callbacks._updates import LendingCallback, UpdateHook, extractors_of
from sb3_resnet.common.arguments import number
from sb3_resnet.optim.groups import optimizer_of


class GradientClipCallback(LendingCallback):
    """
    Clip the gradient norm of head and backbone each by itself.

    SB3 clips one joint norm (``max_grad_norm``, 10 for DQN and 0.5 for PPO), in which a freshly unfrozen trunk
    outweighs the head. This clips after it, so write ``max_grad_norm=1000`` to make this the only one. The backbone is
    all stages of the policy's :class:`~sb3_resnet.extractor.ResNetExtractor`, adapter included, and the head every
    other parameter; PPO and A2C with that extractor have both as well. Example::

        GradientClipCallback(max_norm=2.0)

    :param max_norm: largest norm of each part; 1 to 5 is usual
    :param verbose: SB3's verbosity
    :raises ValueError: if it is not above 0
    :raises TypeError: for a wrong type, and before training for a policy without a ResNetExtractor
    """

    def __init__(self, max_norm: float = 2.0, verbose: int = 0) -> None:
        super().__init__(verbose)
        self.max_norm = number("max_norm", max_norm, above=True)
        self._parts: list[list[th.nn.Parameter]] = []
        self._updates = UpdateHook(self._clip)

    def _init_callback(self) -> None:
        """Before any callback has changed anything."""
        extractors = extractors_of(self.model)
        if not extractors:
            raise TypeError(
                f"GradientClipCallback tells head and backbone apart, but {type(self.model.policy).__name__} has no "
                "ResNetExtractor: leave it out, and write max_grad_norm in the algorithm's arguments"
            )
        modules = [module for one in extractors for stage in one.stages for module in one.stage_modules(stage)]
        backbone = {id(parameter) for module in modules for parameter in module.parameters()}
        held = [parameter for group in optimizer_of(self.model).param_groups for parameter in group["params"]]
        self._parts = [[p for p in held if (id(p) in backbone) is inside] for inside in (False, True)]

    @refusals_end_the_search
    def _on_training_start(self) -> None:
        joint = getattr(self.model, "max_grad_norm", None)
        if joint is not None and joint <= self.max_norm:
            warnings.warn(
                f"GradientClipCallback(max_norm={self.max_norm:g}) has nothing to do, since "
                f"{type(self.model).__name__} clips the joint norm at max_grad_norm={joint:g} before it: write "
                "max_grad_norm=1000 in the algorithm's arguments",
                stacklevel=3,
            )
        self._updates.attach(self.model)

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self._updates.detach()

    def _clip(self, n: int) -> None:
        for part in self._parts:
            th.nn.utils.clip_grad_norm_(part, self.max_norm)
