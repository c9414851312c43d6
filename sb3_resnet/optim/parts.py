"""Which parameters of a backbone learn at which rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

Parts = tuple[dict[str, list[nn.Parameter]], dict[str, float]]


def parts_of(extractors: Sequence[Any], decay_per_stage: float) -> Parts:
    """
    :param extractors: all that learn, equal in their stages: one, or an actor's and a critic's
    :param decay_per_stage: as in :func:`backbone_parts`
    :return: the same for all of them together, each parameter in the part that its stage has in each
    """
    each = [backbone_parts(extractor, decay_per_stage) for extractor in extractors]
    parts, scales = each[0]
    return {name: [parameter for some, _ in each for parameter in some[name]] for name in parts}, scales


def backbone_parts(extractor: Any, decay_per_stage: float) -> Parts:
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
