"""torchvision's ResNets by name, as ordered stages, with a norm layer chosen at construction."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch as th
import torchvision.models as tvm
from torch import distributed as dist
from torch import nn

from sb3_resnet.common.arguments import choice, nearest, shown
from sb3_resnet.nn.adapters import InflatedConv2d
from sb3_resnet.nn.small_maps import for_small_maps
from sb3_resnet.nn.sync_norm import synchronized_batch_norm

#: Stages of the trunk from the input up; ``stem`` is conv1 + bn1 + relu + maxpool.
STAGES = ("stem", "layer1", "layer2", "layer3", "layer4")
#: Norm layers of the trunk. ``frozen``: BatchNorm that always uses its stored statistics.
NORMS = ("frozen", "batch", "group", "sync", "layer")
#: Those that keep no statistics, in the place of BatchNorm: torchvision has no weights for them.
FROM_SCRATCH = ("group", "layer")
#: Residual blocks of all of them.
BLOCKS: tuple[type[nn.Module], ...] = (tvm.resnet.BasicBlock, tvm.resnet.Bottleneck)
_HALVINGS = {
    "stem": 2,
    "layer1": 2,
    "layer2": 3,
    "layer3": 4,
    "layer4": 5,
}  # of height and width, up to a stage's output


class FreezableNorm(nn.Module):
    """Stays in eval mode until it is made live: SB3 calls ``train()`` before each update."""

    live: bool = False
    num_batches_tracked: th.Tensor | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # A float, as all that SB3's own policies save. PyTorch counts and never reads it, having a fixed momentum.
        self.num_batches_tracked = th.tensor(0.0)

    def train(self, mode: bool = True) -> Any:
        return super().train(mode and self.live)


class FreezableBatchNorm2d(FreezableNorm, nn.BatchNorm2d):
    """BatchNorm that uses its stored statistics until ``live`` is set."""


class FreezableSyncBatchNorm(FreezableNorm, nn.SyncBatchNorm):
    """SyncBatchNorm that uses its stored statistics until ``live`` is set; plain BatchNorm in a single process."""

    def forward(self, x: th.Tensor) -> th.Tensor:
        # PyTorch's own refuses a CPU before it asks how many processes there are.
        processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if not self.training or processes == 1:
            return nn.BatchNorm2d.forward(self, x)
        return synchronized_batch_norm(x, self) if x.device.type == "cpu" else super().forward(x)


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels)  # 32 groups: the default of the paper, arXiv 1803.08494


def _layer_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(1, channels)  # over channels, rows and columns of an image: arXiv 1803.08494, section 3.1


_NORM_LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "frozen": FreezableBatchNorm2d,
    "batch": FreezableBatchNorm2d,
    "group": _group_norm,
    "sync": FreezableSyncBatchNorm,
    "layer": _layer_norm,
}


def available() -> list[str]:
    """:return: the names of all ResNets of the installed torchvision, ResNeXt and Wide ResNet included"""
    return sorted(
        name
        for name, value in vars(tvm.resnet).items()
        if callable(value) and name.startswith(("resnet", "resnext", "wide_resnet"))
    )


def build(
    name: str, norm: str = "frozen", last_stage: str = "layer4", channels: int = 3, keeps_colours: bool = False
) -> tvm.ResNet:
    """
    Build a randomly initialised trunk in eval mode; its ``state_dict`` keys are torchvision's, without ``fc``.

    ``fc`` and the stages above the last are replaced by ``Identity``, which has no parameters, no state and no cost.

    :param name: a torchvision ResNet such as ``"resnet18"``
    :param norm: one of :data:`NORMS`
    :param last_stage: the highest stage, one of :data:`STAGES`
    :param channels: that the first convolution takes
    :param keeps_colours: how weights for three channels become weights for more, see
        :class:`~sb3_resnet.nn.adapters.InflatedConv2d`
    :return: the ResNet; its ``out_channels`` are those of the last stage
    :raises ValueError: for an unknown name, norm or stage
    """
    choice("backbone", name, available())
    choice("norm", norm, NORMS)
    kept = stages_up_to(last_stage)
    resnet: tvm.ResNet = getattr(tvm, name)(norm_layer=_NORM_LAYERS[norm])
    for part in (*STAGES[len(kept) :], "fc"):
        setattr(resnet, part, nn.Identity())
    last = resnet if last_stage == "stem" else getattr(resnet, last_stage)[-1]
    # A block ends with conv3 (Bottleneck) or conv2 (BasicBlock), the stem has conv1 alone.
    convs = [getattr(last, name) for name in ("conv1", "conv2", "conv3") if hasattr(last, name)]
    resnet.out_channels = convs[-1].out_channels
    for stage in kept[1:]:
        for_small_maps(getattr(resnet, stage))
    if channels != 3:
        resnet.conv1 = InflatedConv2d(resnet.conv1, channels, keeps_colours)
    return resnet.eval()


def stages_up_to(last_stage: str) -> tuple[str, ...]:
    """
    :param last_stage: the highest stage
    :return: it and those below it, from the input up
    :raises ValueError: for an unknown stage
    """
    return STAGES[: STAGES.index(choice("last_stage", last_stage, STAGES)) + 1]


def stage_modules(resnet: tvm.ResNet, stage: str) -> tuple[nn.Module, ...]:
    """:return: the modules of one stage in the order in which they run"""
    if stage == "stem":
        return (resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool)
    return (getattr(resnet, stage),)


def map_size(height: int, width: int, stage: str = "layer4") -> tuple[int, int]:
    """:return: height and width of a stage's feature map: halved by the stem twice, by each of layer2 to layer4 once"""
    factor = 1 << _HALVINGS[stage]
    return math.ceil(height / factor), math.ceil(width / factor)


def smallest_size(last_stage: str, needs_map: bool) -> int:
    """
    :param last_stage: the highest stage
    :param needs_map: whether its map must be larger than a pixel
    :return: smallest height and width in pixels: else the last stage gets one pixel and padding, or returns one
    """
    factor = 1 << _HALVINGS[last_stage]
    return factor + 1 if needs_map else max(factor // 2, 4) + 1


def pretrained_source(name: str, weights: str | None = None) -> str | None:
    """
    Where torchvision's weights for this trunk are.

    :param name: a torchvision ResNet
    :param weights: a name of the weights enum, with or without its class (``"IMAGENET1K_V2"``,
        ``"ResNet50_Weights.IMAGENET1K_V2"``); ``None`` means the enum's ``DEFAULT``
    :return: the URL, or ``None`` where torchvision is so old that it knows only ``pretrained=True``
    :raises ValueError: for a name that the enum does not have
    """
    if not hasattr(tvm, "get_model_weights"):
        if weights is not None:
            raise ValueError(
                f"weights={shown(weights)} needs torchvision >= 0.14; write pretrained=True or weights=PATH"
            )
        return None
    enum = tvm.get_model_weights(name)
    owner, _, member = ("" if weights is None else f".{weights}").rpartition(".")
    owner, member = owner.removeprefix("."), member or "DEFAULT"
    if owner not in ("", enum.__name__) or member not in enum.__members__:
        known = [*enum.__members__]
        what = f"is neither a file nor one of {enum.__name__}"
        if owner.endswith("_Weights") and owner != enum.__name__:
            what = f"is of another network: backbone={name!r} has {enum.__name__}"
        raise ValueError(
            f"weights={shown(weights)} {what}: {', '.join(known)}{nearest(member, known)}. Write one of these names, "
            "or the path of a .pth, .pt or .safetensors file."
        )
    return str(enum[member].url)


def legacy_pretrained_state(name: str) -> dict[str, th.Tensor]:
    """:return: the ImageNet weights through ``pretrained=True``, for torchvision without the ``weights=`` API"""
    try:
        return dict(getattr(tvm, name)(pretrained=True).state_dict())
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"Could not get torchvision's weights for {name} ({error}). Name a file with weights=PATH, or write "
            "pretrained=False."
        ) from error
