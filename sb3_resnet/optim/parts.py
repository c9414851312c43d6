"""Which parameters of a backbone learn at which rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from sb3_resnet.nn.freezing import stages_of

Parts = tuple[dict[str, list[nn.Parameter]], dict[str, float]]


def parts_of(extractors: Sequence[Any], decay_per_stage: float) -> Parts:
    """
    :param extractors: all :class:`~sb3_resnet.extractor.ResNetExtractor` that learn: one, an actor's and a critic's, or
        those of several images
    :param decay_per_stage: factor of a stage's rate to that of the stage above it; 1: all have the same
    :return: their parameters by part, by stage where stages learn at rates of their own, and the scales of these
        rates, counted from the highest stage of all
    """
    if decay_per_stage == 1.0:
        stages = [(extractor, stage) for extractor in extractors for stage in extractor.stages]
        return {"backbone": [p for extractor, stage in stages for p in _parameters(extractor, stage)]}, {}
    names = stages_of(extractors)
    scales = {f"backbone.{stage}": decay_per_stage**depth for depth, stage in enumerate(reversed(names))}
    parts = {
        f"backbone.{stage}": [p for one in extractors if stage in one.stages for p in _parameters(one, stage)]
        for stage in names
    }
    return parts, scales


def _parameters(extractor: Any, stage: str) -> list[nn.Parameter]:
    return [parameter for module in extractor.stage_modules(stage) for parameter in module.parameters()]
