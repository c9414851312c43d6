"""Frames to train on and episodes that are held out, as one file: whoever was stopped need not play again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch as th

from sb3_resnet.common.files import written_whole
from sb3_resnet.common.recording import Recording
from sb3_resnet.nn.pretraining.frames import Frames
from sb3_resnet.nn.pretraining.run import differing

_IDENTITY, _IS_WHOLE = "arguments", "is_whole"  # keys of the file's metadata
_HELD_OUT, _LABEL = "held_out.", "label."  # begin the names of tensors


def store(path: Path, collected: tuple[Frames, bool], held_out: Recording, identity: Mapping[str, Any]) -> None:
    """
    :param path: of the file
    :param collected: frames, and whether these are all that were asked for, time not counted
    :param held_out: episodes for the probe
    :param identity: what both come from
    """
    from safetensors.torch import save_file

    arrays = {"observations": held_out.observations, "episodes": held_out.episodes, "actions": held_out.actions}
    arrays |= {} if held_out.parts is None else {"parts": held_out.parts}
    arrays |= {f"{_LABEL}{name}": values for name, values in held_out.labels.items()}
    tensors = {f"{_HELD_OUT}{name}": th.from_numpy(values) for name, values in arrays.items()}
    frames, is_whole = collected
    metadata = {_IDENTITY: json.dumps(identity), _IS_WHOLE: json.dumps(is_whole)}
    with written_whole(path) as (temporary,):
        save_file({**frames.tensors(), **tensors}, temporary, metadata=metadata)


def is_stored(path: Path, identity: Mapping[str, Any], has_checkpoint: bool) -> bool:
    """
    :param path: of the file
    :param identity: what it must come from
    :param has_checkpoint: whether something was trained on it already
    :return: whether it can be used
    """
    from safetensors import safe_open

    if not path.exists():
        return False
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    # Frames for which there was no time are for the checkpoint that was trained on them: another attempt may have more.
    is_whole = json.loads(metadata.get(_IS_WHOLE, "true")) or has_checkpoint
    return bool(is_whole and not differing(json.loads(metadata[_IDENTITY]), identity))


def stored(path: Path, space: Any) -> tuple[Frames, Recording]:
    """
    :param path: of the file
    :param space: of the observations
    :return: frames, and episodes for the probe
    """
    from safetensors.torch import load_file

    tensors = load_file(path)
    held = {
        name.removeprefix(_HELD_OUT): value.numpy() for name, value in tensors.items() if name.startswith(_HELD_OUT)
    }
    labels = {name.removeprefix(_LABEL): held[name] for name in sorted(held) if name.startswith(_LABEL)}
    arrays = (held["observations"], held["episodes"], held["actions"])
    return Frames.of(tensors), Recording(*arrays, labels, space, held.get("parts"))
