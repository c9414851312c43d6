"""What the callbacks that keep and restore the best model agree on."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.save_util import load_from_zip_file

from sb3_resnet.callbacks._evaluations import walk
from sb3_resnet.callbacks._updates import optimizer_of


@runtime_checkable
class BestKeeper(Protocol):
    """A callback that keeps the best model of each phase."""

    def best_of_phase(self) -> tuple[Path, float] | None:
        """:return: file and mean reward of the best evaluated model of the current phase, up to this moment"""


def find_keeper(root: Any) -> BestKeeper | None:
    """:return: the callback of a ``learn()`` call that keeps the best models"""
    return next((callback for callback in walk(root) if isinstance(callback, BestKeeper)), None)


def restore_best(model: BaseAlgorithm, keeper: BestKeeper) -> str:
    """
    Return to the best weights and moments of the current phase.

    Weights, BatchNorm statistics and optimizer moments alone: learning rates, counters, exploration, the replay
    buffer and the freeze boundary go on as they are.

    :param model: an SB3 model with a ResNet policy
    :param keeper: who has the best model
    :return: what was done, for the log
    """
    best = keeper.best_of_phase()
    if best is None:
        return "; nothing restored, there was no evaluation in the phase that ends"
    path, reward = best
    if not path.is_file():
        warnings.warn(f"restore_best: {path} is gone, so the current weights stay", stacklevel=2)
        return "; nothing restored, the file is gone"
    policy: Any = model.policy
    boundary = policy.online.features_extractor.boundary
    stage, moved_at = boundary.stage, boundary.moved_at_update
    _, params, _ = load_from_zip_file(path, device=model.device, load_data=False)
    policy.load_state_dict(params["policy"])
    policy.set_freeze_boundary(stage, at_update=moved_at)
    optimizer = optimizer_of(model)
    moments: Any = params["policy.optimizer"]
    optimizer.load_state_dict({"state": moments["state"], "param_groups": optimizer.state_dict()["param_groups"]})
    return f"; restored the best weights, mean reward {reward:g}"
