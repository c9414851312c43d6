"""Which parameters of a backbone learn at which rate."""

from __future__ import annotations

from typing import Any

from torch import nn


def backbone_parts(extractor: Any, decay_per_stage: float) -> tuple[dict[str, list[nn.Parameter]], dict[str, float]]:
    """
    :param extractor: a :class:`~sb3_resnet.extractor.ResNetExtractor`
    :param decay_per_stage: factor of a stage's rate to that of the stage above it; 1: all have the same
    :return: the backbone's parameters by part, by stage where stages learn at rates of their own, and the scales of
        these rates
    """
    stages = {
        stage: [parameter for module in extractor.stage_modules(stage) for parameter in module.parameters()]
        for stage in extractor.stages
    }
    if decay_per_stage == 1.0:
        return {"backbone": [parameter for parameters in stages.values() for parameter in parameters]}, {}
    scales = {f"backbone.{stage}": decay_per_stage**depth for depth, stage in enumerate(reversed(extractor.stages))}
    return {f"backbone.{stage}": parameters for stage, parameters in stages.items()}, scales
