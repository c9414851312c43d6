"""Is a run set up right? Build it small, try it, and compute what it will need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch as th

from sb3_resnet.buffers import FrameNStepReplayBuffer, FrameReplayBuffer
from sb3_resnet.cache.frames import Array
from sb3_resnet.callbacks import BestCheckpointCallback, FeatureCacheCallback, UnfreezeCallback
from sb3_resnet.cli import sizes, trial
from sb3_resnet.cli.extras import missing_extra
from sb3_resnet.cli.loading import extractor_of, one_line
from sb3_resnet.cli.network import ScoreNetwork
from sb3_resnet.cli.setups import Setup
from sb3_resnet.common.memory import available_bytes
from sb3_resnet.diagnosis.findings import Finding
from sb3_resnet.diagnosis.setup_rules import frame_buffer_arguments, static_findings
from sb3_resnet.nn.encoder import rounding_error
from sb3_resnet.optim.groups import param_group_summary

_COMPARED = 64  # observations on which precisions are compared
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
    :param groups: rows of :func:`~sb3_resnet.optim.groups.param_group_summary`
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
        extractor_of(setup.model)
    except Exception as error:  # of the environment, RL-Zoo, the policy or the algorithm: whatever stops a run
        report.findings.append(Finding("setup", one_line(error), "", missing_extra(error), "error"))
        return report
    available = available_bytes() if available is None else available
    try:
        _inspect(report, setup, available)
    except Exception as error:  # of a forward or backward pass, such as a GPU without memory for the batch
        report.findings.append(Finding("trial", f"A trial update failed: {one_line(error)}", "", "", "error"))
    finally:
        setup.model.get_env().close()
    return report


def _inspect(report: Report, setup: Setup, available: int | None) -> None:
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
    report.model += _precision(model, extractor, played)
    cache = setup.callback(FeatureCacheCallback)
    speed = trial.measure(model, extractor, played, env_step, cache)
    if cache is not None and speed.cache_refusal is not None:
        seen = f"FeatureCacheCallback: {speed.cache_refusal}."
        report.findings.append(Finding("feature_cache", seen, "Training would end at its start.", "", "error"))
    report.findings += gradient_findings(model)
    report.speed = _speed(speed, setup.total_timesteps)
    told = "frozen with random weights"  # a finding of its own
    report.findings += [Finding("warned", text, "", "") for text in setup.warnings if told not in text]


def settings_findings(setup: Setup) -> list[Finding]:
    """:return: what can be seen without training; of the model's small buffer nothing can be said"""
    unfreezer = setup.callback(UnfreezeCallback)
    found = static_findings(setup.model, setup.total_timesteps, unfreezer)
    restores = unfreezer is not None and any(phase.restore_best for phase in unfreezer.phases)
    if restores and setup.callback(BestCheckpointCallback) is None:
        seen = "A phase has restore_best, and no callback keeps the best model."
        change = "Add sb3_resnet.callbacks.BestCheckpointCallback, or leave restore_best out."
        found.append(Finding("restore_best", seen, "Training would end at its start.", change, "error"))
    return [finding for finding in found if finding.code != "buffer_memory"]


def memory_findings(setup: Setup, needed: dict[str, int]) -> list[Finding]:
    """:return: what of replay and cache does not fit; ``needed`` is ``Report.memory``"""
    if "available" not in needed or setup.buffer_size is None:
        return []
    cached = setup.callback(FeatureCacheCallback) is not None
    # The cache puts such a buffer into the place of SB3's.
    ours = cached or issubclass(setup.model.replay_buffer_class, (FrameReplayBuffer, FrameNStepReplayBuffer))
    available, frames = needed["available"], needed["FrameReplayBuffer"]
    buffer, cache = frames if ours else needed["ReplayBuffer"], needed.get("feature cache", 0)
    why = f"Only {gigabytes(available)} are left: the process will be killed when it is full, hours after the start."
    if buffer > available:
        seen = f"The replay buffer of {setup.buffer_size:,} transitions takes {gigabytes(buffer)}."
        change = f"Write buffer_size={_round_down(int(setup.buffer_size * 0.9 * available / buffer))}"
        if not ours and frames < available:
            arguments = frame_buffer_arguments(setup.model.replay_buffer, setup.from_yaml)
            change += f", or {arguments}, which takes about {gigabytes(frames)}"
        return [Finding("buffer_memory", seen, why, f"{change}.", "error")]
    if cached and buffer + cache > available:
        seen = f"Replay buffer and feature cache grow to {gigabytes(buffer + cache)}."
        change = f"Write FeatureCacheCallback(max_bytes={_round_down(int(0.9 * (available - buffer)))})."
        return [Finding("cache_memory", seen, why, change)]
    return []


def gradient_findings(model: Any) -> list[Finding]:
    """:return: whether the gradients of the trial updates are numbers, and reach all that trains"""
    trains = {name: parameter for name, parameter in model.policy.named_parameters() if parameter.requires_grad}
    online = {name: parameter for name, parameter in trains.items() if "_target" not in name}
    broken = [name for name, value in online.items() if value.grad is not None and not value.grad.isfinite().all()]
    if broken:
        seen = f"The gradient of {broken[0]} and {len(broken) - 1} others is not finite after some updates."
        return [Finding("gradients", seen, "The weights become NaN.", "Write a smaller learning_rate.", "error")]
    silent = [name for name, parameter in online.items() if parameter.grad is None]
    if silent:
        seen = f"No gradient reaches {silent[0]} and {len(silent) - 1} other trainable parameters."
        return [Finding("gradients", seen, "They stay as they are.", "Freeze them, or look at the network.", "error")]
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
    names = sorted({type(callback).__name__ for callback in setup.all_callbacks})
    return [*lines, ("callbacks", ", ".join(names))] if names else lines


def _memory(setup: Setup, extractor: Any, played: Array, available: int | None) -> list[tuple[str, int]]:
    model, size = setup.model, setup.buffer_size
    assert size is not None
    flat = played.reshape(-1, *played.shape[2:])
    rows = [
        ("ReplayBuffer", sizes.stock_buffer_bytes(model, size)),
        ("FrameReplayBuffer", sizes.frame_buffer_bytes(model, size, played)),
    ]
    entries = sizes.cache_bytes(model, extractor, flat, min(size, setup.total_timesteps))
    if entries is not None:
        rows.append(("feature cache", entries))
    return rows if available is None else [*rows, ("available", available)]


def _precision(model: Any, extractor: Any, played: Array) -> list[tuple[str, str]]:
    """The precision of the frozen stages, and by how much it blurs what distinguishes observations."""
    if not extractor.encoder.can_gain:
        return []
    observations = th.as_tensor(played.reshape(-1, *played.shape[2:])[:_COMPARED], device=model.device)
    share = rounding_error(extractor.encoder, observations)
    text = f"{extractor.frozen_dtype}, off by {share:.2%} of the spread over {len(observations)} observations"
    return [("frozen stages", text)]


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
        pooled = extractor.trunk.pool(x, size)
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
        rows.append(("frozen stages, fast encoder", f"{_three_digits(1 / speed.encode)} images/s"))
    for name, update in (("whole run", speed.update), ("whole run, cached", speed.cached_update)):
        rate = speed.steps_per_second(update)
        if rate is not None:
            rows.append((name, f"{_three_digits(rate)} steps/s, {_duration(total_timesteps / rate)}"))
    return rows


def _name_of(model: Any) -> str:
    return str((model.policy_kwargs.get("features_extractor_kwargs") or {}).get("backbone", "resnet18"))


def _round_down(count: int) -> int:
    """:return: the number with two digits and zeros: 48,712 becomes 48,000"""
    unit = int(10 ** max(0, len(str(count)) - 2))
    return count // unit * unit


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _milliseconds(seconds: float) -> str:
    return f"{_three_digits(1000 * seconds)} ms"


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h"
