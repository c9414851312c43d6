"""What a search changes, and in which ranges."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

from sb3_resnet.common.arguments import choice, integer, nearest, number, shown
from sb3_resnet.nn.freezing import STAGES
from sb3_resnet.nn.pooling import POOLINGS
from sb3_resnet.optim.search import sections
from sb3_resnet.optim.search.ranges import Choices, Fixed, Range, Reader, Values, any_value, as_whole, read_values

_READERS: dict[str, Reader] = {
    "lr_head": partial(number, above=True),
    "lr_ratio": number,
    "weight_decay": number,
    "batch_size": partial(integer, minimum=1),
    "warmup_steps": integer,
    "dropout": partial(number, maximum=0.99),
    "last_stage": partial(choice, allowed=STAGES[1:]),
    "pooling": partial(choice, allowed=POOLINGS),
    "unfreeze_from": partial(choice, allowed=[*STAGES, "all"]),
    "unfreeze_at": partial(number, maximum=1.0, above=True),
}
# Arguments of an algorithm that this search sets by other names, or that are no hyperparameters.
_NOT_SEARCHED = {
    "self", "policy", "env", "policy_kwargs", "learning_rate", "verbose", "device", "seed", "tensorboard_log",
    "_init_setup_model", "replay_buffer_class", "replay_buffer_kwargs", "rollout_buffer_class",
    "rollout_buffer_kwargs", "monitor_wrapper", "supported_action_spaces",
}  # fmt: skip


class SearchSpace:
    """
    What a search changes. In the YAML of RL-Zoo it is the mapping ``search``, beside the sections of environments.

    Each argument is a range (``{low: 1e-5, high: 1e-3, log: true}``, ``{low: 0, high: 2000, step: 500}``), a list of
    choices, one value, which each trial then gets, or ``null``: the section's own value stays. What the ``search``
    mapping does not name has the range given here.

    :param lr_head: the head's learning rate: ``learning_rate`` of the section, or ``lr_head`` of its ``policy_kwargs``
        where that is written
    :param lr_ratio: the backbone's learning rate as a part of the head's; sets ``lr_backbone``. Where all of the
        backbone stays frozen it changes nothing: write ``null``
    :param weight_decay: of weights
    :param batch_size: observations per gradient update; not for A2C
    :param warmup_steps: of the ``LRScheduleCallback``, in gradient updates. Without a range of your own it is searched
        only where the section has that callback
    :param dropout: dropout probability in the head
    :param last_stage: the highest stage of the trunk. Without choices of your own it is searched only where the section
        does not say it
    :param pooling: as in the extractor; searched by the same rule. Without choices of your own those are left out for
        which the images are too small
    :param unfreeze_from: the lowest stage that trains from the first phase on, of the ``UnfreezeCallback``. Without
        choices of your own it is searched only where the section has that callback, from ``last_stage`` to two stages
        below. A stage above ``last_stage`` counts as that one
    :param unfreeze_at: when the first phase begins, as a part of ``n_timesteps``; searched by the same rule, and only
        if the phase has ``at_timestep``
    :param only: names of what is searched, in place of all; what has one value keeps it
    :param heartbeat_seconds: seconds between two signs of life of a running trial, whole. A trial without one for five
        times as long is taken for dead and run again
    :param others: arguments of the algorithm, such as ``gamma``; not searched unless they are named
    :raises ValueError: for values that cannot work
    :raises TypeError: for unknown names and wrong types
    """

    def __init__(
        self,
        *,
        lr_head: Any = Range(1e-5, 1e-3, log=True),
        lr_ratio: Any = Range(0.01, 1.0, log=True),
        weight_decay: Any = Range(1e-6, 1e-2, log=True),
        batch_size: Any = Choices((32, 64, 128)),
        warmup_steps: Any = Range(0, 2000, step=500),
        dropout: Any = Range(0.0, 0.5),
        last_stage: Any = Choices(("layer2", "layer3", "layer4")),
        pooling: Any = Choices(POOLINGS),
        unfreeze_from: Any = Choices(("layer2", "layer3", "layer4")),
        unfreeze_at: Any = Range(0.1, 0.9),
        only: Collection[str] | None = None,
        heartbeat_seconds: int = 30,
        **others: Any,
    ) -> None:
        given = locals()
        written = {name: given[name] for name in _READERS} | others
        #: Values by hyperparameter.
        self.values: dict[str, Values] = {
            name: read_values(name, value, _READERS.get(name, any_value))
            for name, value in written.items()
            if value is not None
        }
        self.heartbeat_seconds = integer("search: heartbeat_seconds", heartbeat_seconds, 1)
        if only is not None:
            if isinstance(only, (str, Mapping)) or not all(isinstance(name, str) for name in only) or not only:
                raise TypeError(f"search: only must be a list of names, got {shown(only)}")
            for name in only:
                choice("search: only", name, [*written])
            self.keep({*only} | {name for name, values in self.values.items() if isinstance(values, Fixed)})

    def keep(self, names: Collection[str]) -> None:
        """
        Search nothing but these.

        :param names: of hyperparameters
        """
        self.values = {name: values for name, values in self.values.items() if name in names}

    def suggest(self, trial: Any) -> dict[str, Any]:
        """
        :param trial: an Optuna trial
        :return: its values by hyperparameter
        """
        return {name: values.suggest(trial, name) for name, values in self.values.items()}


def read_space(
    given: Any, section: Mapping[str, Any], arguments: Collection[str], whole: Collection[str] = ()
) -> SearchSpace:
    """
    :param given: what the configuration says under ``search``; ``None`` if it says nothing
    :param section: the section of the environment
    :param arguments: names of the algorithm's arguments
    :param whole: those that take whole numbers, which YAML may write as ``1e4``
    :return: what is searched in this section
    :raises ValueError: for values that cannot work, and for those that this section has no place for
    :raises TypeError: for unknown names and wrong types
    """
    given = {} if given is None else given
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise TypeError(f"search must be a mapping of names to ranges, got {shown(given)}")
    missing = {"batch_size"} - {*arguments}  # A2C learns from each rollout as a whole
    known = sorted({*_READERS} - missing)
    others = {*arguments} - _NOT_SEARCHED - {*known}
    for name in {*given} - others - {*known} - {"only", "heartbeat_seconds"}:
        raise TypeError(
            f"search knows no {shown(name)}{nearest(name, [*known, *others])}. It takes {', '.join(known)}, and "
            "arguments of the algorithm"
        )
    space = SearchSpace(**{name: as_whole(value) if name in whole else value for name, value in given.items()})
    named = {name for name, value in given.items() if value is not None} | {*(given.get("only") or ())}
    for name in named:
        sections.refuse(name, section)
    phase = {"unfreeze_from", "unfreeze_at"}
    if named & phase and not sections.has_callback(section, "UnfreezeCallback"):
        named |= phase  # the search adds the phase, which needs both
    left_out = ({*sections.not_searched(section)} - named) | missing
    space.keep({*space.values} - left_out)
    if "unfreeze_from" in space.values and "unfreeze_from" not in given:
        stages = _all_of(space.values.get("last_stage"), sections.last_stage(section))
        top = max(map(STAGES.index, stages))
        space.values["unfreeze_from"] = Choices(STAGES[max(top - 2, 1) : top + 1])
    return space


def leave_out_refused(
    space: SearchSpace, given: Any, section: Mapping[str, Any], refusal: Callable[[str, str], str | None]
) -> None:
    """
    Leave out depths and poolings that the extractor would refuse, such as for small images.

    :param space: what is searched; changed in place
    :param given: what the configuration says under ``search``: that is not left out, but refused
    :param section: the section of the environment
    :param refusal: takes depth and pooling, returns why they do not work together, or ``None``
    :raises ValueError: if choices of the user's own cannot work
    """
    given = given or {}
    last_stage = sections.last_stage(section)
    stages = _all_of(space.values.get("last_stage"), last_stage)
    if "last_stage" in space.values and "last_stage" not in given:
        stages = tuple(stage for stage in stages if refusal(stage, "avg") is None) or (last_stage,)
        space.values["last_stage"] = Choices(stages)
    if "pooling" not in space.values:
        return
    poolings = _all_of(space.values["pooling"], None)
    refusals = {name: [why for why in (refusal(stage, name) for stage in stages) if why] for name in poolings}
    if "pooling" not in given:
        space.values["pooling"] = Choices(tuple(name for name in poolings if not refusals[name]) or ("avg",))
    elif any(refusals.values()):
        raise ValueError(f"search: pooling: {next(whys[0] for whys in refusals.values() if whys)}")


def _all_of(values: Values | None, default: Any) -> tuple[Any, ...]:
    if isinstance(values, Choices):
        return values.values
    return (values.value if isinstance(values, Fixed) else default,)
