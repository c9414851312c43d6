"""Which combinations of weights, adapter and stages a probe looks at, and the extractor of each."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch as th

from sb3_resnet.extractor import ResNetExtractor
from sb3_resnet.nn.adapters import read_frame_channels
from sb3_resnet.nn.backbones import STAGES
from sb3_resnet.nn.cards import extractor_arguments, read_card

#: Name of random weights.
RANDOM = "random"


@dataclass(frozen=True)
class Combination:
    """
    What passes the trunk at once.

    :param source: ``"random"``, ``"pretrained"``, or a file
    :param adapter: how channels reach the trunk
    :param stages: stages to cut the trunk at
    :param options: of the extractor that has them all
    """

    source: str
    adapter: str
    stages: Sequence[str]
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
    backbone: str,
    frame_channels: int | None,
) -> list[Combination]:
    """
    :param space: observation space
    :param weights: ``"random"``, ``"pretrained"``, or files
    :param adapters: how channels reach the trunk; ``None``: those that make sense
    :param stages: to cut the trunk at
    :param backbone: a torchvision ResNet, for weights without a card
    :param frame_channels: channels of one frame, likewise
    :return: all that fit
    :raises ValueError: if none does
    """
    channels = space.shape[0]
    one_image = (channels, read_frame_channels(frame_channels, channels)) == (3, 3)
    common = {"backbone": backbone, "last_stage": max(stages, key=STAGES.index), "frame_channels": frame_channels}
    found = []
    for source in weights:
        card = None if source in ("pretrained", RANDOM) else _card(source)
        # Used as it was trained, whatever was chosen for others.
        own = {} if card is None else {"frame_channels": None, "adapter": "conv1x1", **extractor_arguments(card)}
        usual = [own["adapter"]] if own else ["conv1x1"] if one_image else ["conv1x1", "per_frame"]
        for kind in usual if adapters is None else adapters:
            options = {**common, "adapter": kind, **own}
            if source in ("pretrained", RANDOM):
                options["pretrained"] = source == "pretrained"
            else:
                options["weights"] = str(Path(source).expanduser())
            last = STAGES.index(options["last_stage"])
            fitting = [stage for stage in stages if STAGES.index(stage) <= last]
            if options["adapter"] == kind and fitting:
                found.append(Combination(source, kind, fitting, options))
    if not found:
        raise ValueError("Nothing to probe: these weights were pretrained with another adapter, or up to a lower stage")
    return found


def _card(source: str) -> dict[str, Any] | None:
    path = Path(source).expanduser()
    return read_card(path) if path.is_file() else None
