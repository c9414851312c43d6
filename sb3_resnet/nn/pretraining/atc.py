"""Augmented temporal contrast (ATC, Stooke et al. 2021, arXiv 2009.08319)."""

from __future__ import annotations

import copy
from typing import Any

import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_resnet.nn.pretraining.objective import Objective, Pairs

_CODE = 256  # as the paper's code for Atari
_HIDDEN = 512  # likewise
_MOMENTUM = 0.99


class TemporalContrast(Objective):
    """
    Tell which observation followed three steps later, among those of the whole batch.

    Features become a code of 256 numbers. The code of the first observation passes a residual MLP; bilinear products
    with the codes of all second observations, from a momentum encoder, are the logits.

    :param trunk: what is pretrained
    :param n_actions: not needed
    """

    gap = 3

    def __init__(self, trunk: Any, n_actions: int | None = None) -> None:
        super().__init__(trunk, n_actions)
        self.code = nn.Linear(trunk.features, _CODE)
        self.anchor = nn.Sequential(nn.Linear(_CODE, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, _CODE))
        self.bilinear = nn.Linear(_CODE, _CODE, bias=False)
        self.momentum = nn.ModuleList([copy.deepcopy(trunk), copy.deepcopy(self.code)]).requires_grad_(False)

    def loss(self, trunk: Any, pairs: Pairs) -> th.Tensor:
        with th.no_grad():
            encoder, code = self.momentum
            positives = code(encoder(pairs.second)).float()
        codes = self.code(trunk(pairs.first))
        anchors = self.bilinear(codes + self.anchor(codes)).float()
        with th.autocast(anchors.device.type, enabled=False):  # a product of lengths 256 rounds too much in bfloat16
            logits = anchors @ positives.T
        return F.cross_entropy(logits, th.arange(len(logits), device=logits.device))

    @th.no_grad()
    def follow(self, trunk: Any) -> None:
        for slow, fast in zip(self.momentum, (trunk, self.code), strict=True):
            for old, new in zip(slow.parameters(), fast.parameters(), strict=True):
                old.lerp_(new, 1.0 - _MOMENTUM)
