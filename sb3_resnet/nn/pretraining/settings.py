"""What can be chosen about a pretraining, with the values of the papers as defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch as th

from sb3_resnet.common.arguments import choice, flag, integer, no_unknown, number, read_device, shown
from sb3_resnet.nn.adapters import ADAPTERS, read_frame_channels
from sb3_resnet.nn.backbones import STAGES, available
from sb3_resnet.nn.pooling import POOLINGS, Pooling
from sb3_resnet.nn.preprocessing import Preprocessing, check_size, read_image_size, statistics
from sb3_resnet.nn.pretraining.atc import TemporalContrast
from sb3_resnet.nn.pretraining.barlow import BarlowInverse
from sb3_resnet.nn.pretraining.objective import Objective

#: By name.
OBJECTIVES: dict[str, type[Objective]] = {"atc": TemporalContrast, "barlow": BarlowInverse}
_MINUTES = 30.0
#: What the collected frames depend on; with the rest unchanged too, a checkpoint is gone on from.
_COLLECTING = ("adapter", "frame_channels", "frames", "held_out", "epsilon", "seed")


@dataclass(frozen=True)
class Settings:
    """
    Keyword arguments of :func:`~sb3_resnet.pretraining.pretrain`.

    :param updates: gradient updates; the run ends before, where the budget of minutes is spent
    :param minutes: budget of time, playing and probing included, all attempts together; 30 where neither is given.
        Collecting frames ends where half of what an attempt begins with is spent
    :param objective: ``"atc"``: temporal contrast (arXiv 2009.08319); ``"barlow"``: Barlow Twins with inverse dynamics
        (arXiv 2208.12345), for environments with a choice among actions
    :param backbone: a torchvision ResNet
    :param last_stage: the highest stage; weights of lower stages are in the file too
    :param adapter: how frames reach the trunk; ``None``: ``"per_frame"``, and none for RGB images
    :param pooling: of the last map; the objective's heads and the probe stand on it
    :param image_size: as :class:`~sb3_resnet.ResNetExtractor` takes it, and so the next four
    :param frame_channels: channels of one frame
    :param use_imagenet_norm: ``None``: normalise with the ImageNet statistics, as ``weights=`` does
    :param input_mean: own mean in place of ImageNet's
    :param input_std: own standard deviation, likewise
    :param frames: frames to train on, each kept once as uint8: 7 kB each at 84x84
    :param held_out: observations of other episodes, on which the features are probed
    :param epsilon: share of random actions beside those of a model
    :param batch_size: pairs of observations per update (the paper's; on a CPU write 128, and ``warmup=100``)
    :param neighbours: how many pairs of a batch follow each other in time. 1: all are from places of their own. More:
        they differ in little but what moves, so that this must be told apart
    :param shift_probability: that an image is shifted by up to 4 pixels. The default is that of the code of arXiv
        2009.08319; with 1, features need not tell where a small object is
    :param learning_rate: of Adam
    :param warmup: updates in which the learning rate rises to it
    :param max_grad_norm: gradients are clipped at this norm
    :param probe_every: updates between two probes
    :param patience: probes without a better score after which the run ends; where no label tells the state, only the
        budget ends it, and the last weights are kept
    :param seed: of everything
    :param device: where to train: ``"cpu"``, ``"cuda"``, or ``"auto"`` for a GPU where there is one
    :param dtype: of activations: ``"float32"``, ``"bfloat16"``, or ``"auto"``: bfloat16 where the hardware has it
    """

    updates: int | None = None
    minutes: float | None = None
    objective: str = "atc"
    backbone: str = "resnet18"
    last_stage: str = "layer2"
    adapter: str | None = None
    pooling: str = "spatial_softmax"
    image_size: int | Sequence[int] | None = None
    frame_channels: int | None = None
    use_imagenet_norm: bool | None = None
    input_mean: Sequence[float] | None = None
    input_std: Sequence[float] | None = None
    frames: int = 50_000
    held_out: int = 2_400
    epsilon: float = 0.1
    batch_size: int = 512
    neighbours: int = 1
    shift_probability: float = 0.1
    learning_rate: float = 1e-3
    warmup: int = 1_000
    max_grad_norm: float = 10.0
    probe_every: int = 100
    patience: int = 10
    seed: int = 0
    device: str = "cpu"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        smallest = {"seed": 0, "warmup": 0, "batch_size": 2}
        for name in ("frames", "held_out", "batch_size", "neighbours", "warmup", "probe_every", "patience", "seed"):
            self._set(name, integer(name, getattr(self, name), smallest.get(name, 1)))
        for name in ("learning_rate", "max_grad_norm"):
            self._set(name, number(name, getattr(self, name), above=True))
        for name in ("epsilon", "shift_probability"):
            self._set(name, number(name, getattr(self, name), 0.0, 1.0))
        if self.updates is not None:
            self._set("updates", integer("updates", self.updates, 1))
        if self.minutes is not None or self.updates is None:
            self._set("minutes", number("minutes", _MINUTES if self.minutes is None else self.minutes, above=True))
        choice("objective", self.objective, [*OBJECTIVES])
        choice("backbone", self.backbone, available())
        choice("last_stage", self.last_stage, STAGES)
        choice("pooling", self.pooling, POOLINGS)
        choice("dtype", self.dtype, ("auto", "float32", "bfloat16"))
        device = read_device(self.device)
        self._set("device", ("cuda" if th.cuda.is_available() else "cpu") if device == "auto" else device)
        if self.frame_channels is not None:
            self._set("frame_channels", integer("frame_channels", self.frame_channels, 1))
        if self.use_imagenet_norm is not None:
            self._set("use_imagenet_norm", flag("use_imagenet_norm", self.use_imagenet_norm))
        if self.adapter is not None:
            choice("adapter", self.adapter, ADAPTERS)
        self._set("image_size", read_image_size(self.image_size))
        for name in ("input_mean", "input_std"):
            if getattr(self, name) is not None:
                self._set(name, _numbers(name, getattr(self, name)))

    @classmethod
    def read(cls, given: dict[str, Any]) -> Settings:
        """
        :param given: by name
        :return: the settings
        :raises TypeError: for a name that there is not
        """
        no_unknown("pretrain", given, [field.name for field in fields(cls)])
        return cls(**given)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def extractor(self, space: Any) -> dict[str, Any]:
        """
        :param space: observation space
        :return: arguments, without weights, of a :class:`~sb3_resnet.ResNetExtractor` that sees what the trunk is
            trained on
        """
        one_image = (space.shape[0], read_frame_channels(self.frame_channels, space.shape[0])) == (3, 3)
        adapter = self.adapter or ("conv1x1" if one_image else "per_frame")
        mean, std = self.normalisation(Preprocessing(space, adapter, self.image_size, self.frame_channels))
        norm = {"use_imagenet_norm": False} if mean is None else {"input_mean": mean, "input_std": std}
        return {
            "backbone": self.backbone,
            "last_stage": self.last_stage,
            "adapter": adapter,
            "pooling": self.pooling,
            "image_size": self.image_size,
            "frame_channels": self.frame_channels,
            **norm,
        }

    def images(self, space: Any) -> Preprocessing:
        """
        :param space: observation space
        :return: how observations become images
        :raises ValueError: for other than uint8 images, and for images of which the trunk leaves nothing
        """
        chosen = Preprocessing(space, ADAPTERS[0], None)
        if not chosen.is_uint8:
            raise ValueError(
                f"Pretraining keeps frames as uint8, and the observations are {space.dtype}: declare "
                "Box(0, 255, shape, np.uint8), and give such images"
            )
        options = self.extractor(space)
        chosen = Preprocessing(space, options["adapter"], self.image_size, self.frame_channels)
        check_size(chosen.size, self.pooling, self.last_stage)
        return chosen

    def normalisation(self, images: Preprocessing) -> tuple[Any, Any]:
        """:return: mean and standard deviation of the trunk's input, or ``None``, as ``weights=`` takes them"""
        return statistics(True, self.use_imagenet_norm, self.input_mean, self.input_std, images)

    def pool(self) -> Pooling:
        """:return: the pooling of the last map"""
        return Pooling(self.pooling)

    def frame_bytes(self, images: Preprocessing) -> int:
        """:return: memory that all frames take, those held out included, as whole observations"""
        pixels = int(np.prod(images.observed_size))
        return pixels * (self.frames * images.frame_channels + self.held_out * images.channels)

    def plain(self, only_collecting: bool = False) -> dict[str, Any]:
        """:return: by name, as numbers, strings and lists; the budget is not among them, so that it can be changed"""
        values = {name: [*value] if isinstance(value, (tuple, list)) else value for name, value in asdict(self).items()}
        names = _COLLECTING if only_collecting else {*values} - {"updates", "minutes", "device"}
        return {name: values[name] for name in sorted(names)}


def _numbers(name: str, values: Any) -> list[float]:
    """Plain numbers, which a card can hold; NumPy's are none."""
    if isinstance(values, str) or not hasattr(values, "__iter__"):
        raise ValueError(f"{name} must be numbers, one per channel of the trunk, got {shown(values)}")
    return [number(name, value, -np.inf) for value in values]
