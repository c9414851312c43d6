"""Which combinations of weights, adapter, stages and poolings a probe looks at, and the extractor of each."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch as th

from sb3_resnet.common.arguments import choice, listed
from sb3_resnet.extractor import ResNetExtractor
from sb3_resnet.nn.adapters import ADAPTERS, read_frame_channels
from sb3_resnet.nn.backbones import STAGES, available
from sb3_resnet.nn.cards import extractor_arguments, read_card
from sb3_resnet.nn.pooling import POOLINGS
from sb3_resnet.nn.preprocessing import check_size, read_image_size

#: Name of random weights.
RANDOM = "random"
_PRETRAINED = "pretrained"


@dataclass(frozen=True)
class Combination:
    """
    What passes the trunk at once.

    :param source: ``"random"``, ``"pretrained"``, or a file
    :param adapter: how channels reach the trunk
    :param ends: where to cut the trunk, and how to pool the map there
    :param options: of the extractor that has them all
    """

    source: str
    adapter: str
    ends: Sequence[tuple[str, str]]
    options: Mapping[str, Any]

    def extractor(self, space: Any, seed: int) -> ResNetExtractor:
        """
        :param space: observation space
        :param seed: of random weights
        :return: the extractor, in eval mode
        """
        with th.random.fork_rng(devices=[]), warnings.catch_warnings():
            # Whether they are good enough is the question.
            warnings.filterwarnings("ignore", message="The backbone is frozen with random weights")
            th.manual_seed(seed)
            return ResNetExtractor(space, **self.options).eval()


def combinations(
    space: Any,
    weights: Sequence[str],
    adapters: Sequence[str] | None,
    stages: Sequence[str],
    poolings: Sequence[str],
    backbone: str,
    frame_channels: int | None,
    image_size: int | Sequence[int] | None,
) -> list[Combination]:
    """
    :param space: observation space
    :param weights: ``"random"``, ``"pretrained"``, or files
    :param adapters: how channels reach the trunk; ``None``: those that make sense
    :param stages: to cut the trunk at
    :param poolings: of the last map
    :param backbone: a torchvision ResNet, for weights without a card
    :param frame_channels: channels of one frame, likewise
    :param image_size: to which images are resized, likewise
    :return: all that fit; ends of which images of this size leave nothing do not
    :raises ValueError: if none does, and for names that there are not
    :raises TypeError: for wrong types
    """
    stages = _names("last_stage", stages, STAGES)
    poolings = _names("pooling", poolings, POOLINGS)
    channels = space.shape[0]
    is_one_frame = channels == read_frame_channels(frame_channels, channels)
    usual = ["conv1x1"] if is_one_frame else ["conv1x1", "per_frame"]
    wanted = None if adapters is None else _names("adapter", adapters, ADAPTERS)
    size = read_image_size(image_size)
    common: dict[str, Any] = {"backbone": choice("backbone", backbone, available()), "image_size": size}
    common |= {"frame_channels": frame_channels}
    found = []
    for source in map(str, listed("weights", weights)):
        is_file = source not in (_PRETRAINED, RANDOM)
        card = _card(source) if is_file else None
        if card is None:
            own, kinds, below = {}, wanted or usual, stages
        else:
            # Used as it was trained, whatever was chosen for others.
            own = {"frame_channels": None, "image_size": None, "adapter": "conv1x1", **extractor_arguments(card, space)}
            kinds = [own["adapter"]] if wanted is None or own["adapter"] in wanted else []
            below = [stage for stage in stages if STAGES.index(stage) <= STAGES.index(card["last_stage"])]
        if not (kinds and below):
            continue
        ends = _ends(tuple(own.get("image_size", size) or space.shape[1:]), below, poolings)
        read = {"weights": str(Path(source).expanduser())} if is_file else {"pretrained": source == _PRETRAINED}
        last = max((stage for stage, _ in ends), key=STAGES.index)
        for kind in kinds:
            found.append(
                Combination(source, kind, ends, {**common, "adapter": kind, **own, **read, "last_stage": last})
            )
    if not found:
        raise ValueError("Nothing to probe: these weights were pretrained with another adapter, or up to a lower stage")
    return found


def _names(argument: str, values: Any, allowed: Sequence[str]) -> list[str]:
    names = [choice(argument, value, allowed) for value in listed(argument, values)]
    if not names:
        raise ValueError(f"{argument} names none: write one of {', '.join(allowed)}, or leave it out")
    return names


def _ends(size: tuple[int, ...], stages: Sequence[str], poolings: Sequence[str]) -> list[tuple[str, str]]:
    """:return: stages and poolings that make features of images of this size"""
    ends, errors = [], []
    for stage, pooling in product(stages, poolings):
        try:
            check_size((size[0], size[1]), pooling, stage)
            ends.append((stage, pooling))
        except ValueError as error:
            errors.append(error)
    if not ends:
        raise errors[0]
    return ends


def _card(source: str) -> dict[str, Any] | None:
    path = Path(source).expanduser()
    return read_card(path) if path.is_file() else None
