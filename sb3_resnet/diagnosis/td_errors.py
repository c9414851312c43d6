"""TD errors and loss of an update, from what its networks returned and the batch that it sampled."""

from __future__ import annotations

import sys
from typing import Any

import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from torch.nn import functional as F

_RULES = {"dqn": ("stable_baselines3.dqn.dqn", "DQN"), "qrdqn": ("sb3_contrib.qrdqn.qrdqn", "QRDQN")}


def train_rule(model: BaseAlgorithm) -> str | None:
    """
    Which loss the model's ``train()`` computes.

    :param model: an SB3 model
    :return: ``"dqn"`` or ``"qrdqn"`` where the method is that of SB3 or sb3-contrib itself, else ``None``: a subclass
        that replaces it, such as Double DQN, may compute anything
    """
    for rule, (module, name) in _RULES.items():
        # Not imported here: a model whose class is not loaded cannot exist.
        host = getattr(sys.modules.get(module), name, None)
        if host is not None and getattr(type(model), "train", None) is host.train:
            return rule
    return None


@th.no_grad()
def predictions_and_targets(
    output: th.Tensor, following: th.Tensor, batch: Any, gamma: float
) -> tuple[th.Tensor, th.Tensor]:
    """
    What DQN and QR-DQN compare, by the same operations in the same order.

    :param output: of the online network for the batch's observations: Q-values ``(batch, actions)``, or quantiles
        ``(batch, quantiles, actions)``
    :param following: of the target network for the observations that followed, likewise
    :param batch: SB3's ``ReplayBufferSamples``
    :param gamma: discount factor, where the batch has none of its own
    :return: predictions of the actions that were taken, and targets by the greedy actions of the target network:
        ``(batch, 1)``, or ``(batch, quantiles)``
    """
    own = getattr(batch, "discounts", None)  # of n-step returns
    discounts = gamma if own is None else own
    actions = batch.actions.long()
    if output.ndim == 2:
        best = following.max(dim=1).values.reshape(-1, 1)
        taken = output.gather(1, actions)
    else:
        greedy = following.mean(dim=1, keepdim=True).argmax(dim=2, keepdim=True)
        best = following.gather(2, greedy.expand(*following.shape[:2], 1)).squeeze(dim=2)
        taken = output.gather(2, actions[..., None].expand(*output.shape[:2], 1)).squeeze(dim=2)
    return taken, batch.rewards + (1 - batch.dones) * discounts * best


@th.no_grad()
def loss_of(rule: str, predictions: th.Tensor, targets: th.Tensor) -> th.Tensor:
    """
    :param rule: of :func:`train_rule`
    :param predictions: of :func:`predictions_and_targets`
    :param targets: likewise
    :return: the loss that ``train()`` minimises
    """
    if rule == "dqn":
        return F.smooth_l1_loss(predictions, targets)
    from sb3_contrib.common.utils import quantile_huber_loss

    loss: th.Tensor = quantile_huber_loss(predictions, targets, sum_over_quantiles=True)
    return loss
