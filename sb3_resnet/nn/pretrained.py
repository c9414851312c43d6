"""Pretrained weights for a trunk: torchvision's by name, or a file's."""

from __future__ import annotations

import warnings
from pathlib import Path

from torch import nn

from sb3_resnet.nn import backbones
from sb3_resnet.nn import weights as weight_files


def read_weights(trunk: nn.Module, backbone: str, weights: str | Path | None) -> None:
    """
    Copy weights into a trunk.

    :param trunk: of :func:`~sb3_resnet.nn.backbones.build`
    :param backbone: its name
    :param weights: a name of torchvision's enum, or the path of a file; ``None``: the enum's default
    :raises ValueError: if they do not fit
    :raises FileNotFoundError: if they are not there
    """
    if weights is not None and _is_path(weights):
        weight_files.load_into(trunk, weight_files.read_file(weights), str(weights))
        return
    url = backbones.pretrained_source(backbone, None if weights is None else str(weights))
    state = backbones.legacy_pretrained_state(backbone) if url is None else weight_files.read_url(url)
    weight_files.load_into(trunk, state, f"{backbone} weights {url or ''}".strip())


def warn_that_it_learns_little() -> None:
    """Say how to get a trunk that has learnt something, or does."""
    warnings.warn(
        "The backbone is frozen with random weights and learns little. Write pretrained=True (or weights=PATH), or "
        "unfreeze it: freeze_backbone=False, or with ResNetCnnPolicy an UnfreezeCallback.",
        stacklevel=3,
    )


def _is_path(weights: str | Path) -> bool:
    if not isinstance(weights, (str, Path)):
        raise TypeError(f"weights must be a path or a name of torchvision's enum such as 'DEFAULT', got {weights!r}")
    path = Path(weights).expanduser()
    return path.suffix in (".pth", ".pt", ".safetensors") or len(path.parts) > 1 or path.exists()
