"""Say during training what is wrong with it, why it matters, and what to change."""

from __future__ import annotations

import warnings
from typing import Any

from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.utils import safe_mean

from sb3_resnet.callbacks._evaluations import Evaluations, refusals_end_the_search, walk
from sb3_resnet.callbacks._updates import LendingCallback, UpdateHook, record
from sb3_resnet.common import host
from sb3_resnet.common.arguments import choice, integer
from sb3_resnet.diagnosis import Finding, history_findings, static_findings
from sb3_resnet.diagnosis.episodes import EpisodeValues
from sb3_resnet.diagnosis.findings import THRESHOLDS
from sb3_resnet.diagnosis.probe import Probe
from sb3_resnet.nn.freezing import STAGES
from sb3_resnet.nn.image_spaces import policy_for

ACTIONS = ("warn", "stop")
#: Values that other callbacks and SB3 log, and rules read.
_LOGGED = ("train/amp_skipped", "train/amp_scale", "rollout/exploration_rate")


class DoctorCallback(LendingCallback):
    """
    Watch a run and report what is wrong with it: each finding once, and all of them in a summary at the end.

    Before the first step it examines the model (:func:`~sb3_resnet.diagnosis.static_findings`), and during training its
    measurements (:func:`~sb3_resnet.diagnosis.history_findings`). ``sb3_resnet.diagnosis.THRESHOLDS`` holds all limits
    with their sources. It works without a ``MonitorCallback``, and does not change training. Example::

        doctor = DoctorCallback()
        model.learn(1_000_000, callback=[FeatureCacheCallback(), doctor])
        print(doctor.findings)

    What it finds: ``frozen_random_backbone``, ``phase_never_begins``, ``lr_order``, ``lr_zero``,
    ``epsilon_never_ends``, ``never_trains``, ``buffer_memory``, ``micro_batch``, ``loss_explodes``, ``q_explodes``,
    ``loss_oscillates``, ``slow_curve``, ``overfitting`` (needs an ``EvalCallback``), ``q_overestimation``,
    ``dead_features``, ``dormant_units``, ``gradients_vanish``, ``gradients_explode``, ``batchnorm_drift``,
    ``amp_skips``. With PPO and A2C, whose losses follow the data of each rollout, those of the loss, of Q-values and of
    the replay buffer do not apply, and ``q_overestimation`` judges the critic.

    :param action: ``"warn"``, or ``"stop"`` to end training at the first finding
    :param every: gradient updates between two measurements; findings are looked for after each ten measurements
    :param slow_after: environment steps after which the reward must have risen
    :param verbose: 1 to print the summary; each finding is a Python warning in any case
    :raises ValueError: for values that cannot work
    :raises TypeError: for wrong types, and at the start of training for other policies
    """

    def __init__(
        self,
        action: str = "warn",
        every: int = 100,
        slow_after: int = int(THRESHOLDS["slow_after"].value),
        verbose: int = 1,
    ) -> None:
        super().__init__(verbose)
        self.action = choice("action", action, ACTIONS)
        self.every = integer("every", every, 1)
        self.slow_after = integer("slow_after", slow_after, 1)
        #: The findings so far.
        self.findings: list[Finding] = []
        self._probe = Probe(self.every, self._measured)
        self._updates = UpdateHook(self._before_update)
        self._episodes = EpisodeValues(min_gap=self.every)
        self._evaluations = Evaluations(None)
        self._columns: dict[str, list[float | None]] = {}
        self._rows = 0
        self._finished = 0  # episodes
        self._looked = False
        self._ended = False

    @refusals_end_the_search
    def _on_training_start(self) -> None:
        policy: Any = self.model.policy
        if not hasattr(policy, "set_freeze_boundary"):
            needed = policy_for(self.model.observation_space)
            raise TypeError(f"DoctorCallback needs {needed}, which {type(policy).__name__} is not")
        self._evaluations = Evaluations(host.root_callback(self))
        self._updates.attach(self.model)
        self._probe.start(self.model, self._updates.n)
        if self.lending is not None:
            self.lending.when_closed(self, self._probe.pause)
        self._episodes.start()
        self._finished = max(self._finished, len(self.model.ep_info_buffer or ()))
        self._looked = self._ended = False

    def _on_rollout_start(self) -> None:
        self._probe.pause()
        if not self._looked:  # only now, since other callbacks replace the buffer at the start of training
            self._looked = True
            self._report(self._before_training())

    def _on_step(self) -> bool:
        self._episodes.step(self.model, self.locals)
        self._finished += sum("episode" in info for info in self.locals.get("infos", ()))
        reward = self._evaluations.poll()
        if reward is not None:
            self._note({"eval/mean_reward": reward, **self._context()})
            self._examine()
        return not (self.action == "stop" and self.findings)

    def _on_rollout_end(self) -> None:
        self._updates.follow(self.model)
        self._probe.prepare(self._updates.n)

    def _on_training_end(self) -> None:
        self._probe.end()
        self._updates.detach()
        if self._ended:  # RL-Zoo ends training twice
            return
        self._ended = True
        self._examine()
        if self.verbose:
            print(f"Doctor: {len(self.findings) or 'no'} finding{'s' * (len(self.findings) != 1)}")
            for finding in self.findings:
                print(f"  {finding.severity} {finding}")

    def _before_update(self, n: int) -> None:
        self._probe.before_step(n)

    def _measured(self, values: dict[str, float]) -> None:
        self._note({**values, **self._episodes.measured(self.model), **self._context()})
        if self._rows % int(THRESHOLDS["values"].value) == 0:
            self._examine()

    def _before_training(self) -> list[Finding]:
        planned = host.planned_timesteps(self.model)
        callbacks = walk(host.root_callback(self))
        return static_findings(self.model, planned, next((cb for cb in callbacks if hasattr(cb, "reached_by")), None))

    def _context(self) -> dict[str, float]:
        """Values that rules need beside the measured ones."""
        model: Any = self.model
        stage = model.policy.freeze_boundary
        values = {
            "time/total_timesteps": float(model.num_timesteps),
            "train/n_updates": float(self._updates.n),
            "monitor/freeze_boundary": float(len(STAGES) if stage is None else STAGES.index(stage)),
        }
        episodes = [info["r"] for info in model.ep_info_buffer or ()]
        if episodes:
            # SB3's own count takes each lost life for an episode, of which this mean knows nothing.
            values.update({"rollout/ep_rew_mean": float(safe_mean(episodes)), "time/episodes": float(self._finished)})
        logger = host.logger_of(model)
        logged = {} if logger is None else logger.name_to_value
        # PPO's loss falls and rises with the advantages of each rollout.
        keys = (*_LOGGED, *(["train/loss"] if isinstance(model, OffPolicyAlgorithm) else []))
        return {**values, **{key: float(logged[key]) for key in keys if key in logged}}

    def _note(self, values: dict[str, float]) -> None:
        for key in (*self._columns, *values):
            column = self._columns.setdefault(key, [])
            column.extend([None] * (self._rows - len(column)))
        for key, column in self._columns.items():
            column.append(values.get(key))
        self._rows += 1

    def _examine(self) -> None:
        self._report(history_findings(self._columns, slow_after=self.slow_after, model=self.model))

    def _report(self, found: list[Finding]) -> None:
        known = {finding.code for finding in self.findings}
        for finding in found:
            if finding.code not in known:
                self.findings.append(finding)
                warnings.warn(str(finding), stacklevel=2)
        record(self.model, {"doctor/findings": float(len(self.findings))})
