"""The base of callbacks that lend something to the model, which is given back however ``learn()`` ends."""

from __future__ import annotations

from typing import Any

from stable_baselines3.common.callbacks import BaseCallback

from sb3_resnet.callbacks._updates import extractors_of
from sb3_resnet.common import host_progress
from sb3_resnet.common.lending import Lending, begin_lending


class LendingCallback(BaseCallback):
    """
    Follows the parts of ``learn()``, so that what this callback lends to the model acts in them alone.

    What is lent asks :attr:`lending` each time whether it may act. Subclasses override SB3's methods with an
    underscore, as every callback does.
    """

    #: From the start of training on.
    lending: Lending | None = None

    def on_training_start(self, locals_: dict[str, Any], globals_: dict[str, Any]) -> None:
        """As SB3's. Where somebody else than ``learn()`` calls it, or an ``EventCallback``, hooks tell no parts."""
        driven = locals_.get("self") is not self.model or self.parent is not None
        self.lending = begin_lending(self.model, locals_, always=driven)
        extractors = extractors_of(self.model)
        if extractors:
            self.lending.hear_modes_of(extractors[0])  # the online network's; all are switched together
        super().on_training_start(locals_, globals_)

    def on_rollout_start(self) -> None:
        """As SB3's."""
        if self.lending is not None:
            self.lending.act(host_progress.last_observation(self.model))
        super().on_rollout_start()

    def on_step(self) -> bool:
        """As SB3's."""
        if self.lending is not None:
            self.lending.act(self.locals.get("new_obs"))
        return super().on_step()

    def on_rollout_end(self) -> None:
        """As SB3's."""
        if self.lending is not None:
            self.lending.update()
        super().on_rollout_end()

    def on_training_end(self) -> None:
        """As SB3's."""
        if self.lending is not None:
            self.lending.end()
        super().on_training_end()
