"""What ``sb3-resnet check`` finds wrong with a run, beside what can be seen from its model alone."""

from __future__ import annotations

from typing import Any

from gymnasium import spaces

from sb3_resnet.buffers import FrameNStepReplayBuffer, FrameReplayBuffer
from sb3_resnet.cache import sizes
from sb3_resnet.callbacks import BestCheckpointCallback, FeatureCacheCallback, UnfreezeCallback
from sb3_resnet.cli.setups import Setup
from sb3_resnet.cli.show import gigabytes
from sb3_resnet.common.memory import largest_array_bytes
from sb3_resnet.diagnosis import Finding, static_findings
from sb3_resnet.diagnosis.setup_rules import frame_buffer_arguments


def settings_findings(setup: Setup) -> list[Finding]:
    """
    :param setup: what would be trained
    :return: what is wrong with it and can be seen without training
    """
    unfreezer = setup.callback(UnfreezeCallback)
    found = static_findings(setup.model, setup.total_timesteps, unfreezer)
    restores = unfreezer is not None and any(phase.restore_best for phase in unfreezer.phases)
    if restores and setup.callback(BestCheckpointCallback) is None:
        seen = "A phase has restore_best, and no callback keeps the best model."
        change = "Add sb3_resnet.callbacks.BestCheckpointCallback, or leave restore_best out."
        found.append(Finding("restore_best", seen, "Training would end at its start.", change, "error"))
    # The buffer of the set-up has a few rows only; memory_findings judges the real one.
    return [finding for finding in found if finding.code != "buffer_memory"]


def memory_findings(setup: Setup, needed: dict[str, int]) -> list[Finding]:
    """
    :param setup: what would be trained
    :param needed: bytes that each buffer would take, and those that are available, as in ``Report.memory``
    :return: whether replay buffer and feature cache fit into memory
    """
    if "available" not in needed or setup.buffer_size is None:
        return []
    cached = setup.callback(FeatureCacheCallback) is not None
    is_frames = issubclass(setup.model.replay_buffer_class, (FrameReplayBuffer, FrameNStepReplayBuffer))
    available, frames = needed["available"], needed.get("FrameReplayBuffer")
    ours = cached or is_frames  # FeatureCacheCallback replaces SB3's buffer by one of these
    buffer = frames if ours and frames is not None else needed[stock_name(setup.model)]
    cache = needed.get("feature cache", 0)
    why = f"Only {gigabytes(available)} are left: the process will be killed when it is full, hours after the start."
    array = needed[stock_name(setup.model)] // sizes.observation_arrays(setup.model)
    largest = largest_array_bytes()
    if (
        cached
        and not is_frames
        and frames is not None
        and largest is not None
        and buffer <= available <= largest < array
    ):
        seen = f"SB3 allocates its own ReplayBuffer first, with arrays of {gigabytes(array)}."
        arguments = frame_buffer_arguments(setup.model.replay_buffer, setup.from_yaml)
        change = f"Write {arguments}, or a smaller buffer_size."
        why = f"This machine has {gigabytes(largest)}: the run ends with a MemoryError before the cache begins."
        return [Finding("buffer_memory", seen, why, change, "error")]
    if buffer > available:
        seen = f"The replay buffer of {setup.buffer_size:,} transitions takes {gigabytes(buffer)}."
        change = f"Write buffer_size={_round_down(int(setup.buffer_size * 0.9 * available / buffer))}"
        if not ours and frames is not None and frames < available:
            arguments = frame_buffer_arguments(setup.model.replay_buffer, setup.from_yaml)
            change += f", or {arguments}, which takes about {gigabytes(frames)}"
        return [Finding("buffer_memory", seen, why, f"{change}.", "error")]
    if cached and buffer + cache > available:
        seen = f"Replay buffer and feature cache grow to {gigabytes(buffer + cache)}."
        change = f"Write FeatureCacheCallback(max_bytes={_round_down(int(0.9 * (available - buffer)))})."
        why = f"Only {gigabytes(available)} are left: then training goes on without the cache, more slowly."
        return [Finding("cache_memory", seen, why, change)]
    return []


def stock_name(model: Any) -> str:
    """
    :param model: an off-policy model
    :return: name of the replay buffer that it has without this package
    """
    is_dict = isinstance(model.observation_space, spaces.Dict)
    return str(model.replay_buffer_class.__name__) if is_dict else "ReplayBuffer"


def gradient_findings(model: Any) -> list[Finding]:
    """
    :param model: a model after some updates
    :return: whether its gradients are finite, and whether each trainable parameter has one
    """
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


def _round_down(count: int) -> int:
    """:return: the number with two digits followed by zeros: 48,712 becomes 48,000"""
    unit = int(10 ** max(0, len(str(count)) - 2))
    return count // unit * unit
