"""Parts of the benchmarks that need neither Atari games nor a network."""

from __future__ import annotations

from typing import Any

import torch as th
import torchvision
from stable_baselines3 import DQN
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor


class Recipe(BaseFeaturesExtractor):
    """The features extractor of SB3's documentation with a ResNet in it."""

    def __init__(self, space: Any, frozen: bool = True) -> None:
        super().__init__(space, 512)
        trunk = torchvision.models.resnet18(weights=None)
        trunk.fc = th.nn.Identity()
        self.net = th.nn.Sequential(th.nn.Conv2d(space.shape[0], 3, 1), trunk)
        for parameter in self.net.parameters():
            parameter.requires_grad = not frozen

    def forward(self, observations: th.Tensor) -> th.Tensor:
        features: th.Tensor = self.net(observations)
        return features


def fill(model: DQN, steps: int) -> DQN:
    """
    :param model: a new model
    :param steps: environment steps without an update
    :return: the same, with transitions in its buffer
    """
    starts, model.learning_starts = model.learning_starts, steps + 1
    model.learn(steps)
    model.learning_starts = starts
    return model
