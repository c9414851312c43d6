"""Is a run set up right? Build it small, try it, and compute what it will need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch as th

from sb3_resnet.buffers import FrameReplayBuffer
from sb3_resnet.diagnosis import Finding
from sb3_resnet.frames import Array
from sb3_resnet.optim import is_part, param_group_summary
from sb3_resnet.pooling import pooled_features
from sb3_resnet.tools import memory, trial
from sb3_resnet.tools.loading import extractor_of, one_line
from sb3_resnet.tools.network import ScoreNetwork
from sb3_resnet.tools.setups import Setup

_PLAYED = 200  # steps at random: enough to see how frames are stacked, and over in a second


@dataclass
class Report:
    """
    What a check found.

    :param findings: what is wrong or doubtful
    :param model: name and value of what was built
    :param shapes: step of the forward pass, and the shape that leaves it
    :param memory: what takes memory, and how many bytes
    :param speed: what was measured, as text
    :param groups: rows of :func:`~sb3_resnet.optim.param_group_summary`
    """

    findings: list[Finding] = field(default_factory=list)
    model: list[tuple[str, str]] = field(default_factory=list)
    shapes: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    memory: list[tuple[str, int]] = field(default_factory=list)
    speed: list[tuple[str, str]] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether there is an error among the findings."""
        return any(finding.severity == "error" for finding in self.findings)


def check(build: Callable[[], Setup], available: int | None = None) -> Report:
    """
    Check a run before it starts. The full replay buffer is never allocated.

    :param build: builds what would be trained
    :param available: bytes of memory that the run may take; ``None``: what is free now
    :return: the report; what could not be built is a finding too
    """
    report = Report()
    try:
        setup = build()
    except Exception as error:  # of the environment, RL-Zoo, the policy or the algorithm: whatever stops a run
        report.findings.append(Finding("setup", one_line(error), "", "", "error"))
        return report
    available = memory.available_bytes() if available is None else available
    try:
        _inspect(report, setup, available)
    except Exception as error:  # of a forward or backward pass, such as a GPU without memory for the batch
        report.findings.append(Finding("trial", one_line(error), "a trial update failed", "", "error"))
    finally:
        setup.model.get_env().close()
    return report


def _inspect(report: Report, setup: Setup, available: int) -> None:
    model = setup.model
    extractor = extractor_of(model)
    report.model = _describe(setup, extractor)
    report.groups = param_group_summary(model, show=False)
    report.findings += settings_findings(setup)
    played, env_step = trial.play(model, max(2, _PLAYED // model.n_envs))
    if setup.buffer_size is not None:
        report.memory = _memory(setup, extractor, played, available)
        report.findings += memory_findings(setup, dict(report.memory))
    report.shapes = _shapes(model, extractor, played)
    speed = trial.measure(model, extractor, played, env_step)
    report.findings += gradient_findings(model)
    report.speed = _speed(speed, setup.total_timesteps)
    told = "frozen with random weights"  # a finding of its own
    report.findings += [Finding("warned", text, "", "") for text in setup.warnings if told not in text]


def settings_findings(setup: Setup) -> list[Finding]:
    """:return: what is wrong with the settings themselves"""
    model, extractor = setup.model, extractor_of(setup.model)
    found = []
    arguments = model.policy_kwargs.get("features_extractor_kwargs") or {}
    pretrained = arguments.get("pretrained") or arguments.get("weights")
    if extractor.freeze_boundary is None and not pretrained and "UnfreezeCallback" not in setup.callback_names:
        seen = "the backbone is frozen with random weights."
        why = "The head has little to learn from."
        change = "pretrained=True, weights=PATH, freeze_backbone=False or an UnfreezeCallback"
        found.append(Finding("frozen_random_backbone", seen, why, change))
    head, backbone = _rate(model, "head"), _rate(model, "backbone")
    if head is not None and backbone is not None and backbone > head:
        seen = f"lr_backbone={backbone:g} is above the head's {head:g}."
        why = "The backbone would change faster than the head can follow."
        change = f"lr_backbone={head / 10:g}, a tenth of the head's"
        found.append(Finding("lr_order", seen, why, change, "error"))
    micro, batch = getattr(extractor, "micro_batch_size", None), trial.batch_size_of(model)
    if micro is not None and batch < micro:
        seen = f"batch_size={batch} is smaller than micro_batch_size={micro}."
        why = "A batch that is never divided saves no memory."
        change = f"micro_batch_size={max(1, batch // 2)}, or leave it out"
        found.append(Finding("micro_batch", seen, why, change, "error"))
    return found


def memory_findings(setup: Setup, needed: dict[str, int]) -> list[Finding]:
    """:return: what of replay and cache does not fit; ``needed`` is ``Report.memory``"""
    ours = issubclass(setup.model.replay_buffer_class, FrameReplayBuffer)
    available = needed["available"]
    buffer, cache = needed["FrameReplayBuffer" if ours else "ReplayBuffer"], needed.get("feature cache", 0)
    assert setup.buffer_size is not None
    if buffer > available:
        fits = int(setup.buffer_size * 0.9 * available / buffer)
        seen = f"the replay buffer of {setup.buffer_size:,} transitions takes {gigabytes(buffer)}."
        why = f"Only {gigabytes(available)} are available."
        change = f"buffer_size={_round_down(fits)}"
        if not ours and needed["FrameReplayBuffer"] < available:
            change += (
                ", or replay_buffer_class=sb3_resnet.buffers.FrameReplayBuffer, which takes about "
                f"{gigabytes(needed['FrameReplayBuffer'])}"
            )
        return [Finding("buffer_memory", seen, why, change, "error")]
    if "FeatureCacheCallback" in setup.callback_names and buffer + cache > available:
        room = max(available - buffer, 0)
        seen = f"replay buffer and feature cache grow to {gigabytes(buffer + cache)}."
        why = f"Only {gigabytes(available)} are available."
        return [Finding("cache_memory", seen, why, f"FeatureCacheCallback(max_bytes={int(0.9 * room)})")]
    return []


def gradient_findings(model: Any) -> list[Finding]:
    """:return: whether the gradients of the trial updates are numbers, and reach all that trains"""
    trains = {name: parameter for name, parameter in model.policy.named_parameters() if parameter.requires_grad}
    online = {name: parameter for name, parameter in trains.items() if "_target" not in name}
    broken = [name for name, value in online.items() if value.grad is not None and not value.grad.isfinite().all()]
    if broken:
        seen = f"the gradient of {broken[0]} and {len(broken) - 1} others is not finite after some updates."
        return [Finding("gradients", seen, "The weights become NaN.", "a smaller learning_rate", "error")]
    silent = [name for name, parameter in online.items() if parameter.grad is None]
    if silent:
        seen = f"no gradient reaches {silent[0]} and {len(silent) - 1} other trainable parameters."
        return [Finding("gradients", seen, "They stay as they are.", "the freeze boundary, or the network", "error")]
    return []


def gigabytes(count: float) -> str:
    """:return: bytes as text"""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _describe(setup: Setup, extractor: Any) -> list[tuple[str, str]]:
    model = setup.model
    boundary = extractor.freeze_boundary
    trains = "nothing of it trains" if boundary is None else f"trains from {boundary} up"
    lines = [
        ("algorithm", f"{type(model).__name__} with {type(model.policy).__name__}"),
        ("observations", f"{model.n_envs} x {model.observation_space.dtype} {model.observation_space.shape}"),
        ("actions", str(model.action_space)),
        ("device", str(model.device)),
        ("backbone", f"{_name_of(model)}: {trains}"),
        ("batch size", str(trial.batch_size_of(model))),
        ("steps of the run", f"{setup.total_timesteps:,}"),
    ]
    names = sorted(setup.callback_names)
    return [*lines, ("callbacks", ", ".join(names))] if names else lines


def _memory(setup: Setup, extractor: Any, played: Array, available: int) -> list[tuple[str, int]]:
    model, size = setup.model, setup.buffer_size
    assert size is not None
    flat = played.reshape(-1, *played.shape[2:])
    rows = [
        ("ReplayBuffer", memory.stock_buffer_bytes(model, size)),
        ("FrameReplayBuffer", memory.frame_buffer_bytes(model, size, played)),
    ]
    entries = memory.cache_bytes(model, extractor, flat, min(size, setup.total_timesteps))
    if entries is not None:
        rows.append(("feature cache", entries))
    return [*rows, ("available", available)]


def _shapes(model: Any, extractor: Any, played: Array) -> list[tuple[str, tuple[int, ...]]]:
    """A random batch, stage by stage."""
    size = trial.batch_size_of(model)
    observations = played.reshape(-1, *played.shape[2:])
    batch = th.as_tensor(np.random.default_rng(0).choice(observations, size), device=model.device)
    rows = [("observations", tuple(batch.shape))]
    with th.no_grad():
        x = extractor.preprocess(extractor.scale_raw(batch))
        rows.append(("preprocessed", tuple(x.shape)))
        for stage in extractor.stages:
            x = extractor.run_stages(x, [stage])
            rows.append((stage, tuple(x.shape)))
        pooled = pooled_features(extractor.pooling, x).reshape(size, -1)
        rows.append((f"pooled ({extractor.pooling})", tuple(pooled.shape)))
        rows.append(("scores of actions", tuple(ScoreNetwork(model)(batch).shape)))
    return rows


def _speed(speed: trial.Speed, total_timesteps: int) -> list[tuple[str, str]]:
    rows = [
        ("environment step", _milliseconds(speed.env_step)),
        ("choosing actions", _milliseconds(speed.act)),
        ("gradient update", _milliseconds(speed.update)),
    ]
    if speed.cached_update is not None:
        rows.append(("gradient update, cached", _milliseconds(speed.cached_update)))
    if speed.encode is not None:
        rows.append(("frozen stages, fast encoder", f"{1 / speed.encode:,.0f} images/s"))
    for name, update in (("whole run", speed.update), ("whole run, cached", speed.cached_update)):
        rate = speed.steps_per_second(update)
        if rate is not None:
            rows.append((name, f"{rate:,.0f} steps/s, {_duration(total_timesteps / rate)}"))
    return rows


def _name_of(model: Any) -> str:
    return str((model.policy_kwargs.get("features_extractor_kwargs") or {}).get("backbone", "resnet18"))


def _rate(model: Any, part: str) -> float | None:
    """The highest learning rate of a part; without parts, as in PPO, there is none."""
    rates = [float(group["lr"]) for group in model.policy.optimizer.param_groups if is_part(group, part)]
    return max(rates, default=None)


def _round_down(count: int) -> int:
    """:return: the number with two digits and zeros: 48,712 becomes 48,000"""
    unit = int(10 ** max(0, len(str(count)) - 2))
    return count // unit * unit


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h"
