"""Parameter groups of a saved model, from its tensors alone: nothing is unpickled but tensors and numbers."""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch as th

from sb3_resnet.cli.loading import algorithm_class, algorithm_name, model_file
from sb3_resnet.cli.texts import one_line, printable
from sb3_resnet.extractor_combined import module_name
from sb3_resnet.nn.freezing import STAGES
from sb3_resnet.optim.groups import is_part

# The network that learns; PPO's and A2C's policy is one itself.
_ONLINE = {"dqn": "q_net.", "qrdqn": "quantile_net."}
# With a Dict the modules of each image are under its name.
_IN_EXTRACTOR = re.compile(
    r"((?:.*\.)?(?:pi_|vf_)?features_extractor\.(?:extractors\.([^.]+)\.)?)(adapter|backbone)\.(\w+)"
)
_STEM = {"conv1", "bn1"}

Parameters = dict[str, th.Tensor]


def saved_groups(path: str | Path) -> list[dict[str, Any]]:
    """
    What :func:`~sb3_resnet.optim.groups.param_group_summary` says of a model, read from its file.

    :param path: a ``.zip`` of DQN, QRDQN, PPO or A2C
    :return: a row a group
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if it is no such model, or has no ResNet
    """
    path = model_file(path)
    name = algorithm_name(path)
    try:
        with zipfile.ZipFile(path) as archive:
            state, optimizer = (_tensors(archive, file) for file in ("policy.pth", "policy.optimizer.pth"))
            data = json.loads(archive.read("data"))
        online = {key: value for key, value in state.items() if key.startswith(_ONLINE.get(name, ""))}
        _check_is_resnet(online, path)
        return [_row(index, group, online, data) for index, group in enumerate(optimizer["param_groups"])]
    except _NoResNetError:
        raise
    except Exception as error:  # damaged archives and foreign tensors raise almost anything
        raise ValueError(
            f"{path} cannot be loaded as a {algorithm_class(name).__name__} model ({one_line(error)})"
        ) from error


class _NoResNetError(ValueError):
    """The model sees with something else."""


def _tensors(archive: zipfile.ZipFile, name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = th.load(io.BytesIO(archive.read(name)), map_location="cpu", weights_only=True)
    return loaded


def _check_is_resnet(state: Mapping[str, th.Tensor], path: Path) -> None:
    if any(_IN_EXTRACTOR.match(key) for key in state):
        return
    nature = any("features_extractor.cnn.0.weight" in key for key in state)
    other = "NatureCNN" if nature else "another features extractor"
    raise _NoResNetError(
        f"{path} sees with {other}, not with ResNetExtractor: give a model trained with "
        "ResNetCnnPolicy, or with features_extractor_class=ResNetExtractor"
    )


def _row(
    index: int, group: Mapping[str, Any], state: Mapping[str, th.Tensor], data: Mapping[str, Any]
) -> dict[str, Any]:
    name = group.get("name")
    members = {key: value for key, value in _parameters(state).items() if name is None or _belongs(key, value, group)}
    if len(members) != len(group["params"]):
        raise ValueError(
            f"its optimizer holds {len(group['params'])} parameters in group {name or index}, its policy {len(members)}"
        )
    return {
        "name": f"group {index}" if name is None else printable(str(name)),
        "lr": float(group["lr"]),
        "weight_decay": float(group.get("weight_decay", 0.0)),
        "parameters": sum(value.numel() for value in members.values()),
        "trainable_parameters": sum(value.numel() for key, value in members.items() if _trains(key, state, data)),
    }


def _parameters(state: Mapping[str, th.Tensor]) -> Parameters:
    """Without buffers, and each once: what two names share in memory is one parameter."""
    found: dict[Any, tuple[str, th.Tensor]] = {}
    for key, value in state.items():
        if key.rpartition(".")[2] in ("weight", "bias", "log_std"):
            found.setdefault((value.data_ptr(), value.shape), (key, value))
    return dict(found.values())


def _belongs(key: str, value: th.Tensor, group: Mapping[str, Any]) -> bool:
    """As the policy made its groups: by part and stage, norm weights and biases apart."""
    name = str(group["name"])
    if name.endswith("_no_decay") != (value.ndim <= 1):
        return False
    stage = _stage_of(key)
    if stage is None or is_part(dict(group), "head"):
        return (stage is None) == is_part(dict(group), "head")
    return name.removesuffix("_no_decay") in ("backbone", f"backbone.{stage}")


def _stage_of(key: str) -> str | None:
    match = _IN_EXTRACTOR.match(key)
    if match is None:
        return None
    if match[3] == "adapter":
        return "adapter"
    return "stem" if match[4] in _STEM else match[4]


def _trains(key: str, state: Mapping[str, th.Tensor], data: Mapping[str, Any]) -> bool:
    match, stage = _IN_EXTRACTOR.match(key), _stage_of(key)
    if match is None or stage is None:
        return True
    if stage == "adapter" and _trains_adapter(data, match[2]):
        return True
    return STAGES.index(stage) >= int(state[f"{match[1]}boundary.index"])


def _trains_adapter(data: Mapping[str, Any], image: str | None) -> bool:
    """``train_adapter`` is in no tensor; SB3 writes the arguments as JSON, or as text beside what it pickles."""
    given = (data.get("policy_kwargs") or {}).get("features_extractor_kwargs") or {}
    if isinstance(given, str):
        try:
            given = ast.literal_eval(given)
        except (ValueError, SyntaxError):  # a callable among the arguments
            return "'train_adapter': True" in given
    by_key: Mapping[str, Any] = given.get("by_key") or {}
    own = [some for key, some in by_key.items() if module_name(key) == image]
    return {**given, **(own[0] if own else {})}.get("train_adapter") is True
