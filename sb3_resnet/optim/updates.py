"""Count gradient updates where the algorithm does not."""

from __future__ import annotations

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from torch.optim import Optimizer

from sb3_resnet.common import host
from sb3_resnet.common.step_hooks import after_step
from sb3_resnet.optim.groups import optimizer_of, recall, remember

_STATE = "updates"  # key of the count in the optimizer's groups, where it is saved with the model


def install_update_counter(optimizer: Optimizer, n: int = 0) -> None:
    """
    Count each step of an optimizer, from what its groups say on. May be called again: ``deepcopy`` loses hooks.

    :param optimizer: the optimizer of a policy
    :param n: updates done so far, where its groups do not say it
    """
    if not recall(optimizer, _STATE):
        remember(optimizer, _STATE, {"n": n})
    after_step(optimizer).add(_STATE, _count)


def gradient_updates(model: BaseAlgorithm) -> int:
    """
    Gradient updates done so far: never reset, and saved with the model.

    SB3's own counter counts them for off-policy algorithms, and epochs for PPO, of which each has many.

    :param model: an SB3 model
    :return: SB3's counter for off-policy algorithms, else the optimizer's steps since a counter was installed
    """
    if isinstance(model, OffPolicyAlgorithm):
        return host.updates_done(model)
    return int(recall(optimizer_of(model), _STATE).get("n", 0))


def _count(optimizer: Optimizer) -> None:
    remember(optimizer, _STATE, {"n": recall(optimizer, _STATE).get("n", 0) + 1})
