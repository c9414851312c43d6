"""A section of RL-Zoo's YAML, and the same with the values of a trial."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from sb3_resnet.common.arguments import number, shown
from sb3_resnet.nn.freezing import STAGES

_SCHEDULE = "sb3_resnet.callbacks.LRScheduleCallback"
_UNFREEZE = "sb3_resnet.callbacks.UnfreezeCallback"
_RECIPE = "fine_tuning_callbacks"
_TOP = "layer4"  # the extractor's last_stage
_IN_BUFFER = ("gamma", "n_steps")
_LINEAR = "lin_"  # what RL-Zoo's YAML has before a learning rate that falls to 0
Callback = tuple[str, dict[str, Any]]  # path and arguments


def has_callback(section: Mapping[str, Any], name: str) -> bool:
    """
    :param section: of RL-Zoo's YAML
    :param name: a class or function of this package
    :return: whether the section has such a callback
    """
    return _arguments(_callbacks(section), name) is not None


def last_stage(section: Mapping[str, Any]) -> str:
    """
    :param section: of RL-Zoo's YAML
    :return: the highest stage of its trunk
    """
    extractor = (section.get("policy_kwargs") or {}).get("features_extractor_kwargs") or {}
    return str(extractor.get("last_stage", _TOP))


def not_searched(section: Mapping[str, Any]) -> list[str]:
    """
    :param section: of RL-Zoo's YAML
    :return: hyperparameters that are not searched in it unless somebody asks for them by name
    """
    extractor = (section.get("policy_kwargs") or {}).get("features_extractor_kwargs") or {}
    found = []
    # What depends on the trunk costs time and memory, so a section that says it means it.
    if "last_stage" in extractor or has_callback(section, _RECIPE):
        found.append("last_stage")
    if "pooling" in extractor or "grid_size" in extractor:
        found.append("pooling")
    if not has_callback(section, "LRScheduleCallback") and not has_callback(section, _RECIPE):
        found.append("warmup_steps")
    first = _first_phase(section)
    if first is None:
        found += ["unfreeze_from", "unfreeze_at"]
    elif first.get("at_timestep") is None:
        found.append("unfreeze_at")
    return found


def refuse(name: str, section: Mapping[str, Any]) -> None:
    """
    :param name: a hyperparameter that somebody asks for
    :param section: of RL-Zoo's YAML
    :raises ValueError: if it cannot be searched in this section
    """
    if name in ("last_stage", "unfreeze_from", "unfreeze_at") and has_callback(section, _RECIPE):
        raise ValueError(
            f"search: {name} would change the phases of {_RECIPE}, which are its own: write the callbacks that it "
            "makes, as zoo_configs/dqn_fine_tuning.yml does"
        )
    first = _first_phase(section)
    if name == "unfreeze_at" and first is not None and first.get("at_timestep") is None:
        raise ValueError("search: unfreeze_at is a timestep: write at_timestep in the first phase of UnfreezeCallback")


def with_values(section: Mapping[str, Any], values: Mapping[str, Any], learning_rate: Any = None) -> dict[str, Any]:
    """
    :param section: of RL-Zoo's YAML, with ``policy_kwargs`` as a mapping and with ``n_timesteps``
    :param values: of a trial, by hyperparameter
    :param learning_rate: the algorithm's default
    :return: a copy of the section with these values; all else is as it was
    """
    changed = copy.deepcopy(dict(section))
    policy = changed["policy_kwargs"] = dict(changed.get("policy_kwargs") or {})
    extractor = dict(policy.get("features_extractor_kwargs") or {})
    values = dict(values)
    _set_rates(changed, policy, values, learning_rate)
    policy |= {name: values.pop(name) for name in ("weight_decay", "dropout") if name in values}
    if values.get("pooling", "grid") != "grid":
        extractor.pop("grid_size", None)  # refused beside other poolings
    moves = {*values} & {"last_stage", "unfreeze_from", "unfreeze_at"}
    extractor |= {name: values.pop(name) for name in ("last_stage", "pooling") if name in values}
    if extractor:
        policy["features_extractor_kwargs"] = extractor
    in_buffer = changed.get("replay_buffer_kwargs")
    if isinstance(in_buffer, Mapping):  # FrameNStepReplayBuffer has a gamma of its own, which counts
        own = {name: values[name] for name in _IN_BUFFER if name in values and name in in_buffer}
        changed["replay_buffer_kwargs"] = {**in_buffer, **own}
        if "n_steps" in own:
            del values["n_steps"]  # SB3's argument of that name is for its own buffer
    callbacks = _callbacks(changed)
    if "warmup_steps" in values:
        arguments = _arguments(callbacks, "LRScheduleCallback", _RECIPE)
        arguments = _added(callbacks, _SCHEDULE) if arguments is None else arguments
        arguments["warmup_steps"] = values.pop("warmup_steps")
    if moves:
        _set_phases(changed, callbacks, values, last_stage(changed))
    if callbacks:
        changed["callback"] = [{path: arguments} if arguments else path for path, arguments in callbacks]
    return changed | values


def _set_rates(section: dict[str, Any], policy: dict[str, Any], values: dict[str, Any], default: Any) -> None:
    in_policy = policy.get("lr_head") is not None
    written = policy["lr_head"] if in_policy else section.get("learning_rate", default)
    linear = isinstance(written, str) and written.startswith(_LINEAR)
    if "lr_head" in values:
        head = values.pop("lr_head")
        if in_policy:
            policy["lr_head"] = head
        else:
            section["learning_rate"] = f"{_LINEAR}{head}" if linear else head
    elif "lr_ratio" in values:
        head = number("learning_rate", written.removeprefix(_LINEAR) if linear else written)
    if "lr_ratio" in values:
        policy["lr_backbone"] = head * values.pop("lr_ratio")


def _set_phases(section: dict[str, Any], callbacks: list[Callback], values: dict[str, Any], top: str) -> None:
    stage, at = values.pop("unfreeze_from", None), values.pop("unfreeze_at", None)
    arguments = _arguments(callbacks, "UnfreezeCallback")
    if arguments is None:
        if stage is None and at is None:
            return
        arguments = _added(callbacks, _UNFREEZE)
    phases = arguments.get("phases", [{}])
    if not (isinstance(phases, list) and phases and all(isinstance(phase, Mapping) for phase in phases)):
        return  # the callback says what is wrong with them
    first, *others = map(dict, phases)
    if stage is not None:
        first["unfreeze_from"] = stage
    if at is not None:
        first["at_timestep"] = round(at * section["n_timesteps"])
    arguments["phases"] = _in_order([first, *others], top)


def _in_order(phases: list[dict[str, Any]], top: str) -> list[dict[str, Any]]:
    """The boundary moves down only, and time goes on: leave out the phases that those before them have overtaken."""
    kept: list[dict[str, Any]] = []
    for phase in phases:
        stage = phase.get("unfreeze_from")
        if stage in STAGES and STAGES.index(stage) > STAGES.index(top):
            phase["unfreeze_from"] = top
        times = [time for time in map(_time, [*kept, phase]) if time is not None]
        lower = not kept or _depth(phase) < _depth(kept[-1])
        if lower and (_time(phase) is None or max(times[:-1], default=-1.0) < times[-1]):
            kept.append(phase)
    return kept


def _depth(phase: Mapping[str, Any]) -> int:
    stage = phase.get("unfreeze_from")
    return STAGES.index(stage) if stage in STAGES else -1  # "all" is the lowest


def _time(phase: Mapping[str, Any]) -> float | None:
    plateau = phase.get("on_plateau")
    at = plateau.get("latest_timestep") if isinstance(plateau, Mapping) else phase.get("at_timestep")
    return None if at is None else float(at)


def phases_of(section: Mapping[str, Any]) -> list[Any]:
    """
    :param section: of RL-Zoo's YAML
    :return: the phases of its ``UnfreezeCallback``; empty without one, or where they are no list
    """
    phases = (_arguments(_callbacks(section), "UnfreezeCallback") or {}).get("phases")
    return phases if isinstance(phases, list) else []


def _first_phase(section: Mapping[str, Any]) -> Mapping[str, Any] | None:
    phases = phases_of(section)
    return phases[0] if phases and isinstance(phases[0], Mapping) else None


def _callbacks(section: Mapping[str, Any]) -> list[Callback]:
    """:return: path and arguments of each callback; RL-Zoo takes one or a list, each a path or a mapping"""
    written = section.get("callback") or []
    entries = written if isinstance(written, list) else [written]
    pairs = [next(iter(entry.items())) if isinstance(entry, Mapping) else (entry, None) for entry in entries]
    return [(path, dict(arguments or {})) for path, arguments in pairs]


def _arguments(callbacks: list[Callback], *names: str) -> dict[str, Any] | None:
    """:return: the arguments of the first callback of this package with one of these names, to be changed in place"""
    ours = [(path.split("."), arguments) for path, arguments in callbacks]
    return next((found for parts, found in ours if parts[0] == "sb3_resnet" and parts[-1] in names), None)


def _added(callbacks: list[Callback], path: str) -> dict[str, Any]:
    """:return: the arguments of a callback that the section gets, to be changed in place"""
    callbacks.append((path, {}))
    return callbacks[-1][1]


def refuse_objects(value: Any, where: str) -> None:
    """
    :param value: a section, or a part of it
    :param where: its name, for the error
    :raises ValueError: if it holds what YAML cannot: the best trial could not be written down
    """
    if isinstance(value, Mapping):
        for key, part in value.items():
            refuse_objects(part, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            refuse_objects(part, f"{where}[{index}]")
    elif not isinstance(value, (bool, int, float, str, type(None))):
        raise ValueError(
            f"The search writes its best trial as YAML, which cannot hold {shown(value)} of {where}: write a name or a "
            "number, such as activation_fn: ReLU"
        )
