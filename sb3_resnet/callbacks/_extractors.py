"""The ResNets of a model, whatever its policy."""

from __future__ import annotations

from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_resnet.extractor import ResNetExtractor


def extractors_of(model: BaseAlgorithm) -> list[ResNetExtractor]:
    """:return: the online and the target network's; PPO's may be shared or two"""
    return [module for module in model.policy.modules() if isinstance(module, ResNetExtractor)]
