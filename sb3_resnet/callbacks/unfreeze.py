"""Train the head first, then unfreeze the backbone in steps."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from sb3_resnet.callbacks._evaluations import Evaluations, find_keeper, refusals_end_the_search, restore_best
from sb3_resnet.callbacks._updates import LendingCallback, UpdateHook, record
from sb3_resnet.common import host
from sb3_resnet.common.arguments import choice, flag, integer, no_unknown, number, shown
from sb3_resnet.nn.freezing import STAGES, refuse_absent
from sb3_resnet.nn.image_spaces import policy_for
from sb3_resnet.optim import schedules
from sb3_resnet.optim.groups import is_part, optimizer_of, recall, remember, set_lr_factor, set_lr_ratio
from sb3_resnet.optim.updates import gradient_updates

TRIGGERS = ("at_timestep", "at_update", "on_plateau")
_STATE = "unfreeze"  # key of our state in the optimizer's groups, where it is saved
_log = logging.getLogger("sb3_resnet")


@dataclass(frozen=True)
class Phase:
    """
    One phase; :class:`UnfreezeCallback` explains the values.

    :param trigger: ``"at_timestep"``, ``"at_update"`` or ``"on_plateau"``
    :param when: timestep or update at which it begins; with a plateau its latest timestep, ``None`` if there is none
    :param unfreeze_from: the lowest stage that trains from then on
    :param lr_backbone: learning rate of the backbone from then on; ``None``: unchanged
    :param ramp: gradient updates in which the backbone's rate rises from 0
    :param restore_best: whether it begins with the best weights of the phase before it
    :param patience: plateau: number of evaluations without improvement that are tolerated
    :param min_delta: plateau: smallest gain in reward that counts as an improvement
    """

    trigger: str
    when: int | None
    unfreeze_from: str
    lr_backbone: float | None
    ramp: int
    restore_best: bool
    patience: int = 0
    min_delta: float = 0.0

    def __str__(self) -> str:
        name = self.trigger.removeprefix("at_").removeprefix("on_")
        return f"unfreeze_from={self.unfreeze_from!r} at {name}{'' if self.when is None else f' {self.when}'}"


class UnfreezeCallback(LendingCallback):
    """
    Unfreeze the backbone in phases, from the top down. Works with ``ResNetCnnPolicy`` of every algorithm that has it.

    A phase begins between a rollout and the training on it. For PPO each minibatch is an update, not each epoch.

    The current phase is saved with the model. A resumed run, a second ``learn()`` and ``reset_num_timesteps=True``
    continue in that phase, and no phase begins twice. Example::

        UnfreezeCallback(phases=[
            {"at_timestep": 300_000, "unfreeze_from": "layer4", "ramp": 1000},
            {"on_plateau": {"patience": 5, "latest_timestep": 900_000}, "unfreeze_from": "stem", "restore_best": True},
        ])

    Each phase is a dict with one trigger, ``unfreeze_from``, and optional keys:

    * the trigger is ``at_timestep`` (environment steps since this callback was first used, or as ``num_timesteps``
      counts them), ``at_update`` (gradient updates) or ``on_plateau``, which needs an ``EvalCallback``: a dict of
      ``patience`` (number of evaluations without improvement that are tolerated; one of the same parameters as
      the one before does not count), ``min_delta`` (smallest gain in reward that counts, default 0) and
      ``latest_timestep`` (environment steps after which the phase begins in any case, default: never)
    * ``unfreeze_from``: this stage and all above it train from then on; it must be lower in each phase
    * ``lr_backbone``: the backbone's learning rate from then on, as in the policy; default: unchanged
    * ``ramp``: gradient updates in which the backbone's rate rises from 0 to its value; default 0
    * ``restore_best``: whether to begin with the best weights and optimizer moments of the phase before it, which needs
      a ``BestCheckpointCallback``; default false. Of equal rewards the first is the best: where the reward may not have
      moved at all, as in Pong at -21, this goes back to the beginning, so leave it out

    :param phases: the phases in order
    :param verbose: 1 to print a line when a phase begins; Python's logging gets it in any case
    :raises ValueError: for phases that cannot work
    :raises TypeError: for unknown keys and wrong types
    """

    def __init__(self, phases: Sequence[Mapping[str, Any]], verbose: int = 1) -> None:
        super().__init__(verbose)
        if isinstance(phases, (str, Mapping)) or not isinstance(phases, Sequence) or not phases:
            raise ValueError(f"phases must be a list of dicts, one per phase, got {shown(phases)}")
        self.phases = [_read_phase(index, phase) for index, phase in enumerate(phases)]
        _refuse_bad_order(self.phases)
        self._updates = UpdateHook(self._apply_ramp)
        self._evaluations = Evaluations(None)
        self._plateau = schedules.plateau_start()
        self._offset = 0
        self._missed: list[str] = []  # phases that were warned about, in this learn() or an earlier one
        self._ended = False

    @property
    def phase(self) -> int:
        """Number of phases that have begun, read from the model."""
        policy: Any = self.model.policy
        reached = policy.freeze_boundary
        if reached is None:
            return 0
        lowest = STAGES.index(reached)
        return sum(self._position(phase) >= lowest for phase in self.phases)

    @property
    def timesteps(self) -> int:
        """Environment steps of the whole training, which ``reset_num_timesteps`` does not reset."""
        return self._offset + self.model.num_timesteps

    def reached_by(self, total_timesteps: int | None) -> list[Phase]:
        """
        Which phases ``learn()`` will reach, if updates are made and plateaus occur.

        :param total_timesteps: environment steps at the end of ``learn()``; ``None``: no end
        :return: the phases that will have begun by then
        """
        end = math.inf if total_timesteps is None else self._offset + total_timesteps
        late = [phase.trigger == "at_timestep" and (phase.when or 0) > end for phase in self.phases]
        # When a phase is due, those before it begin too.
        return self.phases[: max((index for index, missed in enumerate(late, 1) if not missed), default=0)]

    @refusals_end_the_search
    def _on_training_start(self) -> None:
        policy: Any = self.model.policy
        if not hasattr(policy, "set_freeze_boundary"):
            needed = policy_for(self.model.observation_space)
            raise TypeError(f"UnfreezeCallback needs {needed}, which {type(policy).__name__} is not")
        stages = policy.trained.features_extractor.stages
        for phase in self.phases:
            refuse_absent(phase.unfreeze_from, stages)
        saved = recall(optimizer_of(self.model), _STATE)
        if self.phase > 0 and not saved:
            raise ValueError(
                f"The boundary only moves down, but the model already trains from {policy.freeze_boundary!r} and "
                f"phases[0] says {self.phases[0].unfreeze_from!r}. Write freeze_backbone=True, or name lower stages."
            )
        self._evaluations = Evaluations(host.root_callback(self))
        if any(phase.trigger == "on_plateau" for phase in self._ahead) and not self._evaluations.found:
            raise ValueError("on_plateau follows the evaluation reward: add an EvalCallback to learn()")
        if any(phase.restore_best for phase in self._ahead) and self._keeper is None:
            raise ValueError("restore_best needs a BestCheckpointCallback in the same learn()")
        self._offset = max(0, saved.get("timesteps", 0) - self.model.num_timesteps)
        self._plateau = saved.get("plateau", schedules.plateau_start())
        self._missed = [*saved.get("missed", ())]
        self._ended = False
        self._updates.attach(self.model)
        self._apply_ramp(self._updates.n)

    def _on_step(self) -> bool:
        reward = self._evaluations.poll_after_updates(self.model)
        if reward is not None and self._ahead and self._ahead[0].trigger == "on_plateau":
            phase = self._ahead[0]
            self._plateau = schedules.plateau(self._plateau, reward, phase.patience, phase.min_delta, gamma=0.0)
        self._remember()
        return True

    def _on_rollout_end(self) -> None:
        """Begin what is due: after all evaluations and before ``train()``, whatever the order of the callbacks."""
        self._on_step()
        self._updates.follow(self.model)
        ahead = self._ahead
        due = [index for index, phase in enumerate(ahead, 1) if self._is_due(phase)]
        if due and self._keeper is not None:
            self._keeper.best_of_phase()  # the latest evaluation belongs to the phase that ends
        for phase in ahead[: due[-1] if due else 0]:
            self._begin(phase)
        policy: Any = self.model.policy
        stage = policy.freeze_boundary
        position = len(STAGES) if stage is None else STAGES.index(stage)
        record(self.model, {"train/phase": self.phase, "train/freeze_boundary": position})

    def _on_training_end(self) -> None:
        self._updates.detach()
        if self._ended:  # RL-Zoo ends training twice
            return
        self._ended = True
        self._on_step()  # an evaluation may have stopped training, and then SB3 skips on_rollout_end
        # A run that is learnt in pieces ends many times: one warning for each phase is enough.
        for phase in [phase for phase in self._ahead if str(phase) not in self._missed]:
            self._missed.append(str(phase))
            warnings.warn(
                f"The phase with {phase} never began: training ended at timestep {self.timesteps}, update "
                f"{gradient_updates(self.model)}. Train longer, or let it begin earlier.",
                stacklevel=2,
            )
        self._remember()

    @property
    def _ahead(self) -> list[Phase]:
        return self.phases[self.phase :]

    @property
    def _keeper(self) -> Any:
        return find_keeper(host.root_callback(self))

    def _position(self, phase: Phase) -> int:
        policy: Any = self.model.policy
        lowest = policy.trained.features_extractor.stages[0]
        return STAGES.index(lowest if phase.unfreeze_from == "all" else phase.unfreeze_from)

    def _is_due(self, phase: Phase) -> bool:
        if phase.trigger == "at_update":
            return phase.when is not None and gradient_updates(self.model) >= phase.when
        if phase.when is not None and self.timesteps >= phase.when:
            return True
        return phase.trigger == "on_plateau" and phase is self._ahead[0] and self._plateau["factor"] == 0.0

    def _begin(self, phase: Phase) -> None:
        """Restore the best, then move the boundary, then set the learning rates."""
        policy: Any = self.model.policy
        before = policy.freeze_boundary
        restored = restore_best(self.model, self._keeper) if phase.restore_best else ""
        policy.set_freeze_boundary(phase.unfreeze_from, at_update=gradient_updates(self.model))
        optimizer = optimizer_of(self.model)
        if phase.lr_backbone is not None:
            initial = float(self.model.lr_schedule(1))
            if initial == 0:
                raise ValueError("lr_backbone is relative to learning_rate at the start of training, which is 0")
            set_lr_ratio(optimizer, "backbone", phase.lr_backbone / initial)
        self._plateau = schedules.plateau_start()
        self._apply_ramp(gradient_updates(self.model))
        self._remember()
        line = (
            f"Phase {self.phase} of {len(self.phases)} begins at timestep {self.timesteps}, update "
            f"{gradient_updates(self.model)}: trains from {policy.freeze_boundary} up (was {before}){restored}"
        )
        _log.info(line)
        if self.verbose:
            print(line)

    def _apply_ramp(self, n: int) -> None:
        """Set the ramp's factor of the update that follows ``n`` others."""
        policy: Any = self.model.policy
        reached = self.phase
        factor = 1.0
        if reached > 0:
            started = policy.trained.features_extractor.boundary.moved_at_update
            factor = schedules.ramp(n, started, self.phases[reached - 1].ramp)
        set_lr_factor(optimizer_of(self.model), "ramp", factor, lambda group: is_part(group, "backbone"))

    def _remember(self) -> None:
        state = {"timesteps": self.timesteps, "plateau": dict(self._plateau), "missed": [*self._missed]}
        remember(optimizer_of(self.model), _STATE, state)


def _read_phase(index: int, phase: Any) -> Phase:
    name = f"phases[{index}]"
    if not isinstance(phase, Mapping):
        example = "{'at_timestep': 300000, 'unfreeze_from': 'layer4'}"
        raise TypeError(f"{name} must be a dict such as {example}, got {shown(phase)}")
    no_unknown(name, phase, (*TRIGGERS, "unfreeze_from", "lr_backbone", "ramp", "restore_best"))
    triggers = [key for key in TRIGGERS if phase.get(key) is not None]
    if len(triggers) != 1:
        raise ValueError(f"{name} needs exactly one of {', '.join(TRIGGERS)}, got {triggers or 'none'}")
    if phase.get("unfreeze_from") is None:
        raise ValueError(f"{name} needs unfreeze_from, one of {', '.join(STAGES)}, all")
    trigger = triggers[0]
    plateau: Mapping[str, Any] = {}
    when = phase[trigger]
    if trigger == "on_plateau":
        if not isinstance(when, Mapping) or "patience" not in when:
            raise ValueError(f"{name}: on_plateau must be a dict with patience, got {shown(when)}")
        no_unknown(f"{name}: on_plateau", when, ("patience", "min_delta", "latest_timestep"))
        plateau, when = when, when.get("latest_timestep")
    lr = phase.get("lr_backbone")
    return Phase(
        trigger=trigger,
        when=None if when is None else integer(f"{name}: {trigger}", when),
        unfreeze_from=choice("unfreeze_from", phase["unfreeze_from"], [*STAGES, "all"]),
        lr_backbone=None if lr is None else number(f"{name}: lr_backbone", lr),
        ramp=integer(f"{name}: ramp", phase.get("ramp", 0)),
        restore_best=flag(f"{name}: restore_best", phase.get("restore_best", False)),
        patience=integer(f"{name}: patience", plateau.get("patience", 0)),
        min_delta=number(f"{name}: min_delta", plateau.get("min_delta", 0.0)),
    )


def _refuse_bad_order(phases: Sequence[Phase]) -> None:
    for earlier, later in pairwise(phases):
        # "all" is the lowest stage of the model, so no other can follow it.
        if earlier.unfreeze_from == "all" or (
            later.unfreeze_from != "all" and STAGES.index(later.unfreeze_from) >= STAGES.index(earlier.unfreeze_from)
        ):
            raise ValueError(
                f"The boundary only moves down, but {later.unfreeze_from!r} is not below {earlier.unfreeze_from!r}: "
                f"order the phases from layer4 to {STAGES[0]}"
            )
    for clock, triggers in {"update": ("at_update",), "timestep": ("at_timestep", "on_plateau")}.items():
        times = [phase.when for phase in phases if phase.when is not None and phase.trigger in triggers]
        if times != sorted({*times}):
            raise ValueError(f"Each phase must begin after the one before it, but their {clock}s are {times}")
