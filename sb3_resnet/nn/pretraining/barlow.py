"""Barlow Twins with inverse dynamics (Zhang et al. 2022, arXiv 2208.12345; Zbontar et al. 2021, arXiv 2103.03230)."""

from __future__ import annotations

import copy
from typing import Any

import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_resnet.nn.pretraining.objective import Objective, Pairs

_CODE = 512
_OFF_DIAGONAL = 0.005


class BarlowInverse(Objective):
    """
    Predict what a frozen random copy of the trunk makes of the next observation, and which action led there.

    The prediction is from features and action. Its correlation with the target, by number of the code over the batch,
    is drawn to the identity. The action is read from the features of both observations.

    :param trunk: what is pretrained; its random weights are the target's
    :param n_actions: number of actions
    """

    gap = 1
    needs_actions = True

    def __init__(self, trunk: Any, n_actions: int | None) -> None:
        super().__init__(trunk, n_actions)
        assert n_actions is not None
        self._n_actions = n_actions
        self.predictor = _mlp(trunk.features + n_actions, _CODE)
        self.inverse = _mlp(2 * trunk.features, n_actions)
        self.target = nn.ModuleList([copy.deepcopy(trunk), nn.Linear(trunk.features, _CODE)]).requires_grad_(False)

    def loss(self, trunk: Any, pairs: Pairs) -> th.Tensor:
        now, after = trunk(th.cat([pairs.first, pairs.second])).chunk(2)
        actions = F.one_hot(pairs.actions, self._n_actions).to(now)
        with th.no_grad():
            encoder, code = self.target
            target = code(encoder(pairs.second)).float()
        predicted = self.predictor(th.cat([now, actions], dim=1)).float()
        with th.autocast(predicted.device.type, enabled=False):
            decorrelation = barlow_loss(predicted, target)
        return decorrelation + F.cross_entropy(self.inverse(th.cat([now, after], dim=1)).float(), pairs.actions)


def barlow_loss(left: th.Tensor, right: th.Tensor) -> th.Tensor:
    """
    :param left: codes ``(n, d)``
    :param right: likewise
    :return: mean over d of ``(1 - c_ii)²`` plus 0.005 times the sums of ``c_ij²``, c being their correlations over n
    """
    correlation = _standardised(left).T @ _standardised(right) / len(left)
    on = th.diagonal(correlation)
    off = correlation.square().sum() - on.square().sum()
    return ((1.0 - on).square().sum() + _OFF_DIAGONAL * off) / len(correlation)


def _standardised(codes: th.Tensor) -> th.Tensor:
    centred = codes - codes.mean(dim=0)
    return centred / (centred.square().mean(dim=0) + 1e-5).sqrt()


def _mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, _CODE), nn.BatchNorm1d(_CODE), nn.ReLU(), nn.Linear(_CODE, outputs))
