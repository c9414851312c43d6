"""Numbers that tell whether training is healthy, in SB3's own log."""

from __future__ import annotations

import time
from typing import Any

from sb3_resnet.callbacks._evaluations import refusals_end_the_search
from sb3_resnet.callbacks._updates import LendingCallback, UpdateHook, record
from sb3_resnet.common import host
from sb3_resnet.common.arguments import integer
from sb3_resnet.common.memory import device_bytes, process_bytes
from sb3_resnet.diagnosis.episodes import EpisodeValues
from sb3_resnet.diagnosis.probe import Probe
from sb3_resnet.nn.freezing import STAGES
from sb3_resnet.nn.image_spaces import policy_for

#: Keys that are what they are at the moment; all others are averaged over the measured updates of a line of the log.
GAUGES = ("train/lr_", "param_norm/")


class MonitorCallback(LendingCallback):
    """
    Log what training does: gradients, updates, Q-values, TD errors, the phase, memory and speed.

    Goes through SB3's logger, so TensorBoard, CSV and every other output get it. Training with and without it is the
    same bit for bit: values are read from the batch of the update itself, nothing is sampled. Works with
    ``ResNetCnnPolicy`` of every algorithm that has it, any number of environments, any replay buffer, with and without
    the feature cache. Example::

        model.learn(1_000_000, callback=[FeatureCacheCallback(), MonitorCallback()])

    With PPO and A2C, whose losses SB3 logs itself, ``loss``, ``td_*``, ``target_lag``, ``q_mean``, ``q_max`` and
    ``q_min`` are left out, ``q_start`` is the critic's value, and a gradient update is one minibatch.

    TD errors and loss are computed from what the two networks returned and the batch that the buffer gave, by the
    formulas of SB3's DQN and sb3-contrib's QR-DQN, so they are those of the update. A subclass with a ``train()`` of
    its own, such as Double DQN, may use other targets, which cannot be seen from outside: then there is a warning, and
    in the place of ``loss`` and ``td_*`` the log has ``monitor/greedy_td_*``, the errors against the greedy value of
    the target network. They are left out too where ``train()`` samples no batch or does not ask the target network.

    By optimizer group (``head``, ``head_no_decay``, ``backbone``, ...), for those that train:

    * ``train/lr_<group>``: learning rate that the update used; ``LRScheduleCallback`` logs it too
    * ``grad_norm/<group>``, ``grad_norm_clipped/<group>``: gradient norm before and after all clipping; ``all``: of
      all groups together, which is what SB3 clips
    * ``param_norm/<group>``, ``update_ratio/<group>``: norm of the parameters, and that of the update relative to it

    Under ``monitor/``:

    * ``loss``; ``clip_share``: share of updates that were clipped
    * ``q_mean``, ``q_max``: mean and largest greedy Q-value of the batch; ``q_min``: smallest of all; ``q_bound``:
      largest possible one, ``reward_max`` (the largest reward seen, whatever its sign) / (1 - gamma)
    * ``td_p50``, ``td_p90``, ``td_max``: quantiles of the TD errors' size; ``td_mean``: their mean, with sign
    * ``target_lag``: distance between online and target network relative to the former's norm, of what trains
    * ``q_start``, ``return_start``: greedy Q-value at the start of an episode and the discounted return that followed
      (time-limited episodes left out), mean over up to 20 episodes
    * ``dead_features``: share of image features that hardly vary over the batch; ``dormant_units``: share of hidden
      units with nearly no activation (arXiv 2302.12902); ``batchnorm_drift``: largest distance of a layer's batch mean
      from its running mean, in standard deviations (only where BatchNorm is live)
    * ``freeze_boundary``: number of the lowest stage that trains (0 adapter, 1 stem, 2 to 5 ``layer1`` to ``layer4``,
      6 none); ``phase``: 0 while it is 6, 1 from then on. An adapter that trains below a frozen trunk, with
      ``train_adapter=True``, moves neither. ``trained_share``: share of the parameters that train
    * ``cache_hits``: share of sampled observations (frames, with ``adapter="per_frame"``) that the feature cache had,
      since the last measurement; ``cache_mb``: its memory
    * ``process_mb``, ``device_mb``: memory of the process (elsewhere than on Linux with psutil only, the ``monitor``
      extra), and of tensors on the GPU, in megabytes
    * ``steps_per_second``, ``updates_per_second``: environment steps and gradient updates per second of whole rollouts
      and the updates that follow them, since the last such line

    :param every: gradient updates between two measurements; 100 and 10 cost below 1 % of a step in
        phase A, 1 costs 5 % (``benchmarks/results/monitor.json``)
    :param verbose: SB3's verbosity
    :raises ValueError: if ``every`` is not a whole number above 0
    :raises TypeError: if ``every`` is not a number, and at the start of training for other policies
    """

    def __init__(self, every: int = 100, verbose: int = 0) -> None:
        super().__init__(verbose)
        self.every = integer("every", every, 1)
        self._probe = Probe(self.every, self._log)
        self._updates = UpdateHook(self._before_update)
        self._episodes = EpisodeValues(min_gap=self.every)
        self._window = (0.0, 0, 0)  # clock, timesteps and updates where the speed was measured last
        self._measured = False  # an update, since then
        self._cache = (0, 0)  # hits and misses at the last measurement

    @refusals_end_the_search
    def _on_training_start(self) -> None:
        policy: Any = self.model.policy
        if not hasattr(policy, "set_freeze_boundary"):
            needed = policy_for(self.model.observation_space)
            raise TypeError(f"MonitorCallback needs {needed}, which {type(policy).__name__} is not")
        self._updates.attach(self.model)
        self._probe.start(self.model, self._updates.n)
        if self.lending is not None:
            self.lending.when_closed(self, self._probe.pause)
        self._episodes.start()
        self._window, self._measured = self._now(), False
        cache = self._feature_cache
        self._cache = (0, 0) if cache is None else (cache.hits, cache.misses)

    def _on_step(self) -> bool:
        self._episodes.step(self.model, self.locals)
        return True

    def _on_rollout_start(self) -> None:
        self._probe.pause()  # acting is none of its business
        self._log_speed()

    def _on_rollout_end(self) -> None:
        self._updates.follow(self.model)
        self._probe.prepare(self._updates.n)

    def _on_training_end(self) -> None:
        self._log_speed()
        self._probe.end()
        self._updates.detach()

    def _before_update(self, n: int) -> None:
        self._probe.before_step(n)

    def _log(self, values: dict[str, float]) -> None:
        record(self.model, {key: value for key, value in values.items() if key.startswith(GAUGES)})
        logger = host.logger_of(self.model)
        if logger is not None:
            for key, value in values.items():
                if not key.startswith(GAUGES):
                    logger.record_mean(key, value)
        record(self.model, {**self._episodes.measured(self.model), **self._phase(), **self._costs()})
        self._measured = True

    def _now(self) -> tuple[float, int, int]:
        return time.perf_counter(), self.model.num_timesteps, self._updates.n

    def _log_speed(self) -> None:
        """Only between ``train()`` and a rollout: a window that ends inside one of them lacks steps or updates."""
        if self._measured:
            before, self._window, self._measured = self._window, self._now(), False
            seconds, steps, updates = (now - then for now, then in zip(self._window, before, strict=True))
            speed = {"steps": steps, "updates": updates}
            record(self.model, {f"monitor/{name}_per_second": n / max(seconds, 1e-9) for name, n in speed.items()})

    def _phase(self) -> dict[str, float]:
        policy: Any = self.model.policy
        stage = policy.freeze_boundary
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in policy.trained.parameters()]
        return {
            "monitor/freeze_boundary": float(len(STAGES) if stage is None else STAGES.index(stage)),
            "monitor/phase": float(stage is not None),
            "monitor/trained_share": sum(size for size, trains in sizes if trains) / sum(size for size, _ in sizes),
        }

    @property
    def _feature_cache(self) -> Any:
        model: Any = self.model
        buffer = getattr(model, "replay_buffer", getattr(model, "rollout_buffer", None))
        return getattr(getattr(buffer, "shared", None), "cache", None)

    def _costs(self) -> dict[str, float]:
        """Memory, and the cache since the last measurement."""
        values: dict[str, float] = {}
        for name, size in {"process": process_bytes(), "device": device_bytes(self.model.device)}.items():
            if size is not None:
                values[f"monitor/{name}_mb"] = size / 1e6
        cache = self._feature_cache
        if cache is not None:
            hits, misses = cache.hits - self._cache[0], cache.misses - self._cache[1]
            self._cache = (cache.hits, cache.misses)
            if hits + misses > 0:
                values["monitor/cache_hits"] = hits / (hits + misses)
            values["monitor/cache_mb"] = cache.nbytes / 1e6
        return values
