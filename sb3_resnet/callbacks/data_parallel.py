"""Train one model with several processes: each has its own environments, and all make the same updates."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    ProgressBarCallback,
)

from sb3_resnet.callbacks._evaluations import is_trial, refusals_end_the_search, walk
from sb3_resnet.callbacks._updates import record
from sb3_resnet.common import host
from sb3_resnet.common.arguments import integer, number
from sb3_resnet.common.buckets import BUCKET_BYTES, GradientAverage, share_model
from sb3_resnet.common.in_step import (
    IntervalOfAll,
    JointNormalizer,
    refuse_differences,
    refuse_what_ranks_cannot_share,
    seed_apart,
    weigh,
)
from sb3_resnet.common.ranks import LostRankError, Place, Ranks, join, leave
from sb3_resnet.nn.heads import FeatureStandardizer
from sb3_resnet.optim.groups import optimizer_of

#: What the first rank alone runs, beside those callbacks of this package that log or save.
_OF_FIRST_RANK = (EvalCallback, CheckpointCallback, ProgressBarCallback)
_log = logging.getLogger("sb3_resnet")


class DataParallelCallback(CallbackList):
    """
    Train one model with several processes ("ranks"), on one machine or many: the script runs once per rank, as
    ``torchrun``, ``srun``, ``accelerate launch`` or Ray Train start it, and each rank calls ``learn()``. In a single
    process this does nothing, so the same script works there. Example::

        # torchrun --nproc-per-node 2 train.py
        model.learn(1_000_000, callback=[DataParallelCallback(), UnfreezeCallback(phases)])

    Each rank has its own environments, replay memory and seeds. At the start all ranks get parameters, buffers and
    optimizer state of rank 0. In each update gradients are averaged between ``backward()`` and SB3's clip, so that two
    ranks with batches of 32 learn as one process with a batch of 64; only parameters that train travel. All ranks are
    the same bit for bit after each update. For DQN, QR-DQN, PPO and A2C with any policy that has one optimizer.

    Timesteps are those of all ranks together: ``total_timesteps``, ``learning_starts``, exploration,
    ``target_update_interval``, learning rates, phases, and ``num_timesteps`` in logs and checkpoints. What SB3 counts
    in calls of ``env.step()`` (``eval_freq`` of ``EvalCallback``, ``save_freq`` of ``CheckpointCallback``) each rank
    counts for itself. ``batch_size``, ``train_freq``, ``gradient_steps`` and ``n_steps`` are those of one rank.

    * A stop, such as of ``StopTrainingOnRewardThreshold``, is one for all ranks, after the rollout and its updates.
    * An error in a callback of one rank ends all, and so does a rank that is gone, with a ``LostRankError``.
    * Rank 0 alone logs, evaluates and saves: the outputs of SB3's logger, ``EvalCallback``, ``CheckpointCallback``,
      progress bar, ``BestCheckpointCallback`` and trackers. All ranks learn the evaluated rewards. Other callbacks run
      on each rank.
    * Statistics of features, of live BatchNorm layers and of ``VecNormalize`` are those of all ranks.
    * A checkpoint is that of a single process, and can be resumed with any number of ranks: load it on each.

    :param timeout: seconds that a rank waits for the others, which must be longer than an evaluation takes
    :param bucket_bytes: largest message; gradients are sent in pieces of this size (default 25 MiB, as in PyTorch's
        ``DistributedDataParallel``)
    :param verbose: 1 to print how many ranks there are
    :raises ValueError: for values that cannot work, and at the start of ``learn()`` if the ranks differ, if they
        cannot train this model together, or if the launcher's variables are incomplete
    :raises TypeError: for wrong types
    """

    def __init__(self, timeout: float = 600.0, bucket_bytes: int = BUCKET_BYTES, verbose: int = 0) -> None:
        super().__init__([])
        self.verbose = verbose
        self.timeout = number("timeout", timeout, above=True)
        self.bucket_bytes = integer("bucket_bytes", bucket_bytes, 1024)
        self._ranks = Ranks()
        self._gradients: GradientAverage | None = None
        self._normalizer: JointNormalizer | None = None
        self._lent: list[Callable[[], None]] = []  # give back what was changed for the time of training, last first
        self._counted = 0  # timesteps of all ranks, up to the last look
        self._stops = self._stops_all = False

    def _init_callback(self) -> None:
        """Before any callback has read what the first rank is about to send."""
        self._give_back()  # of a learn() that was interrupted
        super()._init_callback()
        self._ranks = join(self.model, self.timeout)
        self._lent.append(lambda: leave(self.model))
        if self._ranks.size == 1:
            return
        optimizer_of(self.model)
        refuse_differences(self._ranks, self.model)
        refuse_what_ranks_cannot_share(self._ranks, self.model)
        seed_apart(self._ranks, self.model)
        share_model(self._ranks, self.model, self.bucket_bytes)

    @refusals_end_the_search
    def _on_training_start(self) -> None:
        super()._on_training_start()
        self._counted = self.model.num_timesteps
        self._stops = self._stops_all = False
        if self._ranks.size == 1:
            return
        begins = self._ranks.gather((self.model.num_timesteps, host.updates_done(self.model)))
        if len({*begins}) > 1:
            raise ValueError(
                f"The ranks begin at other timesteps and updates, {begins}: load the same checkpoint on each. Where "
                "PreemptionCallback has loaded them, delete the folders rank1, rank2 and so on beside those of rank 0"
            )
        root = host.root_callback(self)
        if is_trial(root):
            raise ValueError("a trial of a search trains in one process: leave DataParallelCallback out of the search")
        self._take_in(root)
        model: Any = self.model
        self._gradients = GradientAverage(self._ranks, optimizer_of(model), model.policy, self.bucket_bytes)
        self._gradients.follow()
        self._lent.append(self._gradients.release)
        for layer in model.policy.modules():
            if isinstance(layer, FeatureStandardizer):
                self._lend(layer, "join", self._joint_moments)
        self._normalizer = JointNormalizer(self._ranks, model)
        if hasattr(model, "exploration_rate"):  # of DQN and its kind; SAC's interval of that name counts updates
            self._lend(model, "target_update_interval", IntervalOfAll(model.target_update_interval, self._ranks.size))
        logger = host.logger_of(model)
        if logger is not None and not self._ranks.is_first:
            self._lend(logger, "output_formats", [])
        line = f"Data parallel: rank {self._ranks.rank} of {self._ranks.size}"
        _log.info(line)
        if self.verbose and self._ranks.is_first:
            print(line)

    def _on_rollout_start(self) -> None:
        self._set_updating(False)
        self._tell_errors(super()._on_rollout_start)

    def _on_step(self) -> bool:
        self._count()
        self._stops |= not self._tell_errors(self._step_all)
        # SB3 ends a rollout at once, and its updates would be missing on this rank alone: not before all know.
        return not (self._stops if self._ranks.size == 1 else self._stops_all)

    def _on_rollout_end(self) -> None:
        self._count()
        self._tell_errors(super()._on_rollout_end)
        if self._ranks.size == 1:
            return
        self._stops_all = self._ranks.meet(Place.ROLLOUT_END, self._stops)
        if self._normalizer is not None:
            self._normalizer.merge()
        if self._gradients is not None:
            self._gradients.follow()
            sent = self._gradients.latest_bytes
            record(self.model, {"parallel/ranks": self._ranks.size, "parallel/megabytes_per_update": sent / 1e6})
        self._set_updating(True)

    def _on_training_end(self) -> None:
        """From here on the model and the callbacks are as without this one."""
        self._set_updating(False)
        self._tell_errors(super()._on_training_end)
        if self._ranks.size > 1:
            self._ranks.meet(Place.TRAINING_END)
            weights = self._ranks.gather(weigh(self.model))
            different = [rank for rank, weight in enumerate(weights) if weight != weights[0]]
            self._give_back()
            if different:
                raise RuntimeError(
                    f"Model and optimizer of ranks {different} are not those of rank 0. Either something changes "
                    "parameters outside of optimizer steps, or the ranks' hardware rounds differently: use machines of "
                    "one kind"
                )
        self._give_back()

    def _count(self) -> None:
        """All ranks step together, so as many timesteps as here were made on each of the others."""
        here = self.model.num_timesteps - self._counted
        self.model.num_timesteps += here * (self._ranks.size - 1)
        self._counted = self.num_timesteps = self.model.num_timesteps

    def _step_all(self) -> bool:
        goes_on = True
        for callback in self.callbacks:  # each of them, whatever the others say
            goes_on = self._step(callback) and goes_on
        return goes_on

    def _step(self, callback: BaseCallback) -> bool:
        if self._ranks.is_first or not _is_of_first_rank(callback):
            before = _evaluations(callback)
            goes_on = callback.on_step()
            if isinstance(callback, ProgressBarCallback):  # it has counted this rank's steps alone
                callback.pbar.update(self.training_env.num_envs * (self._ranks.size - 1))
        else:
            before, goes_on = _evaluations(callback), True
            callback.n_calls, callback.num_timesteps = callback.n_calls + 1, self.num_timesteps
        if isinstance(callback, EvalCallback) and _evaluations(callback) != before and self._ranks.size > 1:
            self._ranks.meet(Place.EVALUATION)
            found = self._ranks.tell((callback.last_mean_reward, callback.best_mean_reward))
            callback.last_mean_reward, callback.best_mean_reward = found
        return goes_on

    def _take_in(self, root: BaseCallback | None) -> None:
        """Call the other callbacks from here, in their order, so that their stops and errors pass through here."""
        if root is None or root is self:
            return
        if self not in _leaves(root):
            raise ValueError("DataParallelCallback must stand in the list that learn() is given, not in a callback")
        taken = [callback for callback in _leaves(root) if callback is not self]
        for callback in taken:
            inner = [one for one in walk(callback) if isinstance(one, EvalCallback) and one is not callback]
            if inner:
                name = type(callback).__name__
                raise ValueError(f"With several ranks an EvalCallback must stand in the list itself, not in {name}")
        # New lists: the old ones are being gone through at this moment, and are the user's.
        self._lend(root, "callbacks", [self])
        self._lend(self, "callbacks", taken)

    def _joint_moments(self, mean: Any, variance: Any, rows: int) -> tuple[Any, Any, int]:
        """Of a batch that all ranks train on; a forward pass of one rank alone has its own."""
        if self._gradients is None or not self._gradients.active:
            return mean, variance, rows
        return self._ranks.joint_moments(mean, variance, rows)

    def _set_updating(self, updating: bool) -> None:
        if self._gradients is not None:
            self._gradients.active = updating

    def _tell_errors(self, act: Callable[[], Any]) -> Any:
        """An error on one rank would leave the others waiting."""
        try:
            return act()
        except LostRankError:
            raise
        except Exception as error:
            self._ranks.meet(Place.ROLLOUT_END, error=error)
            raise

    def _lend(self, owner: Any, name: str, value: Any) -> None:
        before = getattr(owner, name)
        self._lent.append(lambda: setattr(owner, name, before))
        setattr(owner, name, value)

    def _give_back(self) -> None:
        """May be called again: RL-Zoo ends training twice."""
        while self._lent:
            self._lent.pop()()
        self._ranks, self._gradients, self._normalizer = Ranks(), None, None


def _leaves(callback: BaseCallback) -> list[BaseCallback]:
    """:return: the callbacks of lists within lists; a DataParallelCallback is one of them, whatever it has taken in"""
    if isinstance(callback, CallbackList) and not isinstance(callback, DataParallelCallback):
        return [leaf for child in callback.callbacks for leaf in _leaves(child)]
    return [callback]


def _is_of_first_rank(callback: BaseCallback) -> bool:
    return any(isinstance(one, _OF_FIRST_RANK) for one in walk(callback))


def _evaluations(callback: BaseCallback) -> int:
    return host.evaluations_done(callback) if isinstance(callback, EvalCallback) else 0
