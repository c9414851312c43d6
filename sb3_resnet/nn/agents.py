"""What a saved agent's file holds beside its trunk: how images were normalised for it, and its adapter."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch as th
from torch import nn

from sb3_resnet.common.arguments import path_of
from sb3_resnet.nn.adapters import make_adapter
from sb3_resnet.nn.preprocessing import Preprocessing, statistics
from sb3_resnet.nn.state_dicts import resnets
from sb3_resnet.nn.weights import read_file

_ADAPTER = "adapter."
Numbers = tuple[float, ...] | None


@dataclass(frozen=True)
class Eyes:
    """
    What came before the trunk of an agent.

    :param mean: by which its images were normalised, on the scale of 0..1; ``None``: they were not
    :param std: likewise
    :param adapter: tensors of its adapter by name; empty if it had none
    """

    mean: Numbers
    std: Numbers
    adapter: Mapping[str, th.Tensor]


def read_eyes(weights: Any, prefix: str | None) -> Eyes | None:
    """
    :param weights: as the extractor takes it
    :param prefix: its ``weights_prefix``
    :return: what stands beside the trunk in the file of an agent of this package; ``None`` for other files, and for
        several ResNets of which none is named
    """
    if not _is_agent(weights):
        return None
    state = read_file(weights)
    names = [name for name in resnets(state) if prefix is None or name.rstrip(".") == prefix.rstrip(".")]
    parent = names[0].removesuffix("backbone.") if len(names) == 1 else ""
    if not {f"{parent}input_mean", f"{parent}input_std"} <= {*state}:
        return None
    mean, std = (tuple(state[f"{parent}{name}"].flatten().tolist()) for name in ("input_mean", "input_std"))
    start = f"{parent}{_ADAPTER}"
    adapter = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
    plain = not any(mean) and {*std} == {1.0}
    return Eyes(None if plain else mean, None if plain else std, adapter)


def normalisation(
    eyes: Eyes | None, has_weights: bool, use_imagenet_norm: bool | None, mean: Any, std: Any, images: Preprocessing
) -> tuple[Numbers, Numbers]:
    """
    The statistics of images, but those of an agent's file where the arguments say nothing.

    :param eyes: of :func:`read_eyes`
    :param has_weights: as in :func:`~sb3_resnet.nn.preprocessing.statistics`
    :param use_imagenet_norm: likewise
    :param mean: likewise
    :param std: likewise
    :param images: likewise
    :return: mean and standard deviation by which images are normalised, or ``None``
    :raises ValueError: as there
    """
    found = statistics(has_weights, use_imagenet_norm, mean, std, images)
    if eyes is None or use_imagenet_norm is not None or mean is not None:
        return found
    fits = eyes.mean is None or len(eyes.mean) in (3, images.trunk_channels)
    return (eyes.mean, eyes.std) if fits else found


def adapter_for(images: Preprocessing, eyes: Eyes | None) -> nn.Conv2d | None:
    """
    :param images: how observations become images
    :param eyes: of :func:`read_eyes`
    :return: the adapter of a new network, if it needs one: the agent's where that has the same shape
    """
    if not images.has_adapter:
        return None
    adapter = make_adapter(images.channels, images.frame_channels)
    shapes = {key: value.shape for key, value in adapter.state_dict().items()}
    if eyes is not None and shapes == {key: value.shape for key, value in eyes.adapter.items()}:
        adapter.load_state_dict(dict(eyes.adapter))
    return adapter


def _is_agent(weights: Any) -> bool:
    """Whether it is the file of a model that SB3 saved; what it is else, or what is wrong with it, others say."""
    if weights is None or isinstance(weights, Enum):
        return False
    try:
        with zipfile.ZipFile(path_of("weights", weights)) as archive:
            return "policy.pth" in archive.namelist()
    except (OSError, TypeError, ValueError, zipfile.BadZipFile):
        return False
