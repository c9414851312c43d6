"""What is wrong with a set-up, as far as the model shows it before training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any

from gymnasium import spaces
from stable_baselines3.common.buffers import NStepReplayBuffer
from torch import nn

from sb3_resnet.cache.sizes import growth_bytes
from sb3_resnet.common.memory import available_bytes
from sb3_resnet.diagnosis.findings import THRESHOLDS, Finding
from sb3_resnet.extractor import extractors_in
from sb3_resnet.optim.combined import CombinedOptimizer


def static_findings(model: Any, total_timesteps: int | None = None, unfreezer: Any = None) -> list[Finding]:
    """
    Find what is wrong with a model before it trains.

    :param model: an SB3 model with ResNet features; what it does not have (PPO has no replay buffer) is not judged
    :param total_timesteps: planned environment steps, if known
    :param unfreezer: the ``UnfreezeCallback`` of the run, if it has one
    :return: the findings
    """
    sees = eyes_of(model)
    extractors = extractors_in(sees) if isinstance(sees, nn.Module) else []
    optimizer = getattr(model.policy, "optimizer", None)  # SAC has several, and none here
    reached = [] if unfreezer is None else unfreezer.reached_by(total_timesteps)
    found = [
        _first(_frozen_random(one, reached[-1].unfreeze_from if reached else None) for one in extractors),
        None if unfreezer is None else _phase_never_begins(unfreezer.phases[len(reached) :], total_timesteps),
        _lr_order(optimizer),
        _lr_zero(model, optimizer),
        _epsilon(model),
        _never_trains(model, total_timesteps),
        _buffer(model),
        _first(_micro_batch(model, one) for one in extractors),
    ]
    return [finding for finding in found if finding is not None]


def eyes_of(model: Any) -> Any:
    """
    :param model: an SB3 model
    :return: the features extractor of the network that acts, of whatever class; ``None`` if it has none
    """
    name = value_network_of(model.policy)
    network = model.policy if name is None else getattr(model.policy, name)
    return getattr(network, "features_extractor", None)


def value_network_of(policy: Any) -> str | None:
    """
    :param policy: of an SB3 model
    :return: name of the network of Q-values that acts, in this package's policies and in SB3's; ``None`` for others
    """
    return next((name for name in ("q_net", "quantile_net") if hasattr(policy, name)), None)


def has_random_weights(extractor: Any, stages: Sequence[str]) -> bool:
    """
    Whether stages of the trunk still have their initial weights.

    Norm layers begin with exactly mean 0, variance 1, weight 1 and bias 0, and no trained network keeps all of them.
    This also works for a loaded model, which does not say where its weights came from.

    :param extractor: a :class:`~sb3_resnet.extractor.ResNetExtractor`
    :param stages: some of its stages
    :return: whether they have norm layers, and all of these are as initialised
    """
    layers = [layer for name in stages for module in extractor.stage_modules(name) for layer in module.modules()]
    initial = {"running_mean": 0.0, "running_var": 1.0, "weight": 1.0, "bias": 0.0}
    norms = [layer for layer in layers if "Norm" in type(layer).__name__]
    return bool(norms) and all(
        bool((getattr(layer, name) == value).all())
        for layer in norms
        for name, value in initial.items()
        if getattr(layer, name, None) is not None
    )


def frame_buffer_arguments(buffer: Any, yaml: bool = False) -> str:
    """
    :param buffer: a buffer of SB3
    :param yaml: write them for RL-Zoo's YAML, whose strings RL-Zoo evaluates in a module of its own
    :return: the arguments that make the model store each frame once, as the user writes them
    """
    n_step = isinstance(buffer, NStepReplayBuffer)
    name = "FrameNStepReplayBuffer" if n_step else "FrameReplayBuffer"
    path = f"\"importlib.import_module('sb3_resnet.buffers').{name}\"" if yaml else f"sb3_resnet.buffers.{name}"
    equals = ": " if yaml else "="
    text = f"replay_buffer_class{equals}{path}"
    if n_step:  # SB3 passes n_steps to its own class only
        kwargs = {"n_steps": buffer.n_steps, "gamma": buffer.gamma}
        text += f" with replay_buffer_kwargs{equals}{kwargs} instead of n_steps"
    return text


def _first(findings: Iterable[Finding | None]) -> Finding | None:
    """Of a rule that judges each image: one finding is enough, since the same is to be changed for all."""
    return next((finding for finding in findings if finding is not None), None)


def _frozen_random(extractor: Any, unfrozen_from: str | None) -> Finding | None:
    """Judge the stages that will never train."""
    if unfrozen_from == "all":
        return None
    lowest = extractor.boundary.nearest(unfrozen_from)
    below = takewhile(lambda name: name != lowest, extractor.boundary.frozen_stages)
    frozen = [name for name in below if name != "adapter"]
    if not has_random_weights(extractor, frozen):
        return None
    return Finding(
        "frozen_random_backbone",
        f"The stages {', '.join(frozen)} are frozen and their weights random.",
        "They stay random, so the agent sees little of the image and learns little.",
        "Write pretrained=True or weights=PATH in features_extractor_kwargs (sb3-resnet pretrain makes such a file "
        "from frames of your environment), or unfreeze: freeze_backbone=False, or an UnfreezeCallback down to "
        "unfreeze_from='all'.",
    )


def _phase_never_begins(missed: Sequence[Any], total_timesteps: int | None) -> Finding | None:
    if not missed:
        return None
    return Finding(
        "phase_never_begins",
        f"Training ends at step {total_timesteps}, before the phase with {missed[0]}.",
        "The stages that it names stay frozen to the end.",
        "Write a smaller at_timestep, or train longer.",
    )


def _lr_order(optimizer: Any) -> Finding | None:
    if isinstance(optimizer, CombinedOptimizer):  # rates of different kinds, such as AdamW and SGD, do not compare
        return None
    rates: dict[str, list[float]] = {"head": [], "backbone": []}
    for group in getattr(optimizer, "param_groups", ()):
        part = str(group.get("name", "")).removesuffix("_no_decay").split(".")[0]
        rates.setdefault(part, []).append(float(group.get("lr_ratio", group["lr"])))
    if not rates["head"] or not rates["backbone"]:
        return None
    head, backbone = min(rates["head"]), max(rates["backbone"])
    if head == 0 or backbone <= THRESHOLDS["lr_order"].value * head:
        return None
    return Finding(
        "lr_order",
        f"The backbone's learning rate is {backbone / head:.3g} times the head's.",
        "The head begins with random weights, so it must learn faster than the backbone.",
        "Write lr_backbone=None, which is a tenth of the head's.",
        "error",
    )


def _lr_zero(model: Any, optimizer: Any) -> Finding | None:
    schedule = model.lr_schedule
    top = max(float(schedule(progress)) for progress in (1.0, 0.75, 0.5, 0.25))
    groups = [
        group for group in getattr(optimizer, "param_groups", ()) if any(p.requires_grad for p in group["params"])
    ]
    limit = THRESHOLDS["lr_zero"].value
    still = [group for group in groups if top * group.get("lr_ratio", 1.0) < limit]
    if not still:
        return None
    names = ", ".join(str(group.get("name", index)) for index, group in enumerate(still))
    return Finding(
        "lr_zero",
        f"The learning rate of {names} never exceeds {top * max(g.get('lr_ratio', 1.0) for g in still):.1e}.",
        "These parameters are to be trained, but will stay as they are.",
        "Write learning_rate=1e-4 (and lr_backbone=1e-5), or freeze what must not change.",
        "error",
    )


def _epsilon(model: Any) -> Finding | None:
    final, fraction = (getattr(model, f"exploration_{name}", None) for name in ("final_eps", "fraction"))
    if final is None or fraction is None:
        return None
    too_high = final > THRESHOLDS["final_epsilon"].value
    if not too_high and fraction <= THRESHOLDS["exploration_fraction"].value:
        return None
    return Finding(
        "epsilon_never_ends",
        f"Epsilon falls from {model.exploration_initial_eps:g} to {final:g} in {fraction:.0%} of training.",
        "The agent seldom acts by what it has learned, so it sees little of the states that its policy leads to.",
        f"Write {'exploration_final_eps=0.05' if too_high else 'exploration_fraction=0.1'}.",
    )


def _never_trains(model: Any, total_timesteps: int | None) -> Finding | None:
    why = "There will be no gradient update at all."
    if getattr(model, "gradient_steps", None) == 0:
        change = "Write gradient_steps=1, or -1 for one each step."
        return Finding("never_trains", "gradient_steps is 0.", why, change, "error")
    starts = getattr(model, "learning_starts", None)
    if total_timesteps is None or starts is None or starts < total_timesteps:
        return None
    return Finding(
        "never_trains",
        f"learning_starts is {starts}, and training ends at step {total_timesteps}.",
        why,
        f"Write learning_starts={max(1, total_timesteps // 100)}, or train longer.",
        "error",
    )


def _buffer(model: Any) -> Finding | None:
    room = available_bytes()
    if getattr(model, "replay_buffer", None) is None or room is None:
        return None
    needed = growth_bytes(model)
    limit = THRESHOLDS["buffer_memory"].value * room
    if needed <= limit:
        return None
    size = int(model.buffer_size * limit / needed * 0.9)
    # Ours keep one image, and one of them may be at work already.
    no_other = hasattr(model.replay_buffer, "shared") or isinstance(model.observation_space, spaces.Dict)
    smaller = "" if no_other else f", or {frame_buffer_arguments(model.replay_buffer)}, which keeps each frame once"
    return Finding(
        "buffer_memory",
        f"The replay buffer will take {needed / 1e9:.1f} GB more, and {room / 1e9:.1f} GB are left.",
        "The process will be killed, or swap, when the buffer fills, hours after the start.",
        f"Write buffer_size={size}{smaller}.",
        "error",
    )


def _micro_batch(model: Any, extractor: Any) -> Finding | None:
    micro, batch = extractor.micro_batch_size, getattr(model, "batch_size", None)
    if not micro or not batch or batch >= micro:
        return None
    return Finding(
        "micro_batch",
        f"batch_size is {batch} and micro_batch_size {micro}.",
        "A batch is cut into micro-batches, so micro-batches that are larger than it save nothing.",
        f"Write micro_batch_size={max(1, batch // 4)}, or batch_size={4 * micro}.",
        "error",
    )
