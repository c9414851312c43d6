"""Stop when a scheduler asks for it, without losing anything, and go on at the next start."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch as th
from stable_baselines3.common.callbacks import BaseCallback

from sb3_resnet.callbacks._evaluations import is_trial, refusals_end_the_search, walk
from sb3_resnet.common import host
from sb3_resnet.common.arguments import flag, integer, path_of
from sb3_resnet.common.checkpoints import RUN_STATE, checkpoints, progress_of, remove_checkpoint, run_of, state_of
from sb3_resnet.common.files import prepare_folder, remove_left_overs
from sb3_resnet.common.resuming import resume_run, save_run, start_of
from sb3_resnet.common.signals import Shield, SignalNotes, close, signals_of
from sb3_resnet.optim.groups import recall

_log = logging.getLogger("sb3_resnet")


class PreemptionCallback(BaseCallback):
    """
    Save and exit when a scheduler sends a signal; the next start of the same command goes on from there.

    The signal is noted. At the next safe point, between two rollouts, model, replay buffer, random states and what the
    environments are in the midst of are saved, the environments are closed, and Python exits with ``exit_code``. A
    later signal changes nothing. When the same program starts again, the new model takes over all of it at the start
    of its ``learn()``, and training goes on to the same number of timesteps. Works with every SB3 algorithm, and in
    RL-Zoo's YAML. Example::

        model = DQN("ResNetCnnPolicy", env, seed=0)
        model.learn(1_000_000, callback=[PreemptionCallback("logs/run1"), FeatureCacheCallback()])

    A checkpoint belongs to the ``learn()`` that wrote it, and is taken by one that begins with as many timesteps and
    updates. So a model that was loaded goes on too, and a program with two ``learn()`` that was stopped in the second
    makes the first again. The newest of these in the folder is taken, so a
    :class:`~sb3_resnet.callbacks.BestCheckpointCallback` with the same ``save_path`` and ``save_replay_buffer=True``
    also covers crashes. What this callback has saved is removed when training has come to its end. With several
    processes (``torch.distributed``) all stop together, and the others than the first save into subfolders.

    Environments go on within their episodes if they are in a ``DummyVecEnv`` and can be pickled with their state.
    Elsewhere their episodes begin anew.

    :param save_path: folder of this run, which must be the same at each start, and another for another run
    :param signals: names of the signals: SIGTERM, which Kubernetes, systemd and cloud machines send, and SIGUSR1 for
        SLURM's ``--signal``
    :param exit_code: 0 to 255; 75 is ``EX_TEMPFAIL`` of ``sysexits.h``: try again later
    :param save_replay_buffer: whether to save the replay buffer; without it a resumed run begins with an empty one
    :param verbose: 1 to print when a run is saved and resumed; Python's logging gets it in any case
    :raises ValueError: for values that cannot work; at the start of training if it is not the first of this package's
        callbacks, if the checkpoint is of another model, and outside of the main thread
    :raises TypeError: for wrong types
    :raises OSError: if nothing can be saved in the folder
    :raises SystemExit: when the run is saved
    """

    def __init__(
        self,
        save_path: str | Path,
        signals: Sequence[str] | str = ("SIGTERM", "SIGUSR1"),
        exit_code: int = 75,
        save_replay_buffer: bool = True,
        verbose: int = 1,
    ) -> None:
        super().__init__(verbose)
        self.save_path = path_of("save_path", save_path)
        self.signals = [number.name for number in signals_of(signals)]
        self.exit_code = integer("exit_code", exit_code)
        if self.exit_code > 255:
            raise ValueError(f"exit_code must be at most 255, the largest that a process can have, got {exit_code}")
        self.save_replay_buffer = flag("save_replay_buffer", save_replay_buffer)
        self._notes: SignalNotes | None = None
        self._shield: Shield | None = None
        self._is_trial = False
        self._run = ""
        self._start = (0, 0)
        self._has_saved = False

    @refusals_end_the_search
    def _on_training_start(self) -> None:
        self._is_trial = is_trial(host.root_callback(self))
        self._refuse_another_order()
        self._has_saved = False
        if not self._is_trial:  # a trial's model is another one each time, and a search goes on by its storage
            prepare_folder(self._folder)
            remove_left_overs(self._folder)
            self._resume()
        self._notes = SignalNotes(signals_of(self.signals))
        self._shield = Shield([self.training_env, *self._evaluation_envs], signals_of(self.signals))

    def _on_rollout_start(self) -> None:
        """All updates of the last rollout are made, and nothing of the next one has happened."""
        self._is_alive()
        if self._notes is None or not _of_any_rank(self._notes.received is not None, self.model.device):
            return
        if not self._is_trial:
            self._save()
        former = self._notes.former()
        for env in [self.training_env, *self._evaluation_envs]:
            close(env)
        if former is not None:  # its turn was delayed, and it may have to tell somebody
            former(self._notes.received or 0, None)
        self._notes.ignore_at_exit()
        raise SystemExit(self.exit_code)  # signals stay noted until then: the exit code is what counts

    def _on_step(self) -> bool:
        self._is_alive()
        return True

    def _on_rollout_end(self) -> None:
        self._is_alive()

    def _on_training_end(self) -> None:
        if self._has_saved:  # RL-Zoo ends training even then
            return
        if self._notes is not None:
            self._notes.give_back()
        if self._shield is not None:
            self._shield.lift()
        self._notes = self._shield = None
        planned = host.planned_timesteps(self.model)
        if not self._is_trial and self._run and planned is not None and self.model.num_timesteps >= planned:
            self._remove_own()

    @property
    def _folder(self) -> Path:
        rank = _rank()
        return self.save_path if rank == 0 else self.save_path / f"rank{rank}"

    @property
    def _evaluation_envs(self) -> list[Any]:
        found = [getattr(callback, "eval_env", None) for callback in walk(host.root_callback(self))]
        return [env for env in found if env is not None]

    def _is_alive(self) -> None:
        if self._notes is not None:
            self._notes.is_alive()

    def _refuse_another_order(self) -> None:
        """Those before it would begin with a model that is not resumed yet."""
        for callback in walk(host.root_callback(self)):
            if callback is self:
                return
            if type(callback).__module__.startswith("sb3_resnet."):
                raise ValueError(
                    f"PreemptionCallback must be the first callback, since {type(callback).__name__} before it would "
                    "begin with a model that is not resumed yet: write callback=[PreemptionCallback(...), ...]"
                )

    def _resume(self) -> None:
        self._start = (self.model.num_timesteps, host.updates_done(self.model))
        own, first = (self._of_this_learn(folder) for folder in (self._folder, self.save_path))
        # All ranks begin where the first one does: there may be more than there were, or one was killed while saving.
        if own and first and progress_of(own[-1]) != progress_of(first[-1]):
            own = []
        found = own or first
        self._run = uuid.uuid4().hex
        if not found:
            return
        path = found[-1]
        if own:
            self._run = run_of(path) or self._run
        goes_on = resume_run(self.model, path, [*walk(host.root_callback(self))], is_own=bool(own))
        self.num_timesteps = self.model.num_timesteps
        episodes = "environments go on where they were" if goes_on else "episodes begin anew"
        self._tell(f"Resumed {path} at timestep {self.model.num_timesteps}; {episodes}")

    def _of_this_learn(self, folder: Path) -> list[Path]:
        return [path for path in checkpoints(folder) if start_of(path) == self._start]

    def _save(self) -> None:
        # Of a BestCheckpointCallback beside this one, which knows its own checkpoints by it.
        optimizer = getattr(self.model.policy, "optimizer", None)
        if isinstance(optimizer, th.optim.Optimizer):
            self._run = recall(optimizer, RUN_STATE).get("run", self._run)
        path = self._folder / f"rl_model_{self.model.num_timesteps}_steps.zip"
        callbacks = [*walk(host.root_callback(self))]
        save_run(self.model, path, self._run, self.save_replay_buffer, callbacks, self._start)
        self._has_saved = True
        self._remove_own(but=path)
        self._tell(f"Saved {path} because of a signal; exit with {self.exit_code}")

    def _remove_own(self, but: Path | None = None) -> None:
        for path in checkpoints(self._folder):
            if path != but and run_of(path) == self._run and state_of(path) is not None:
                remove_checkpoint(path)

    def _tell(self, line: str) -> None:
        _log.info(line)
        if self.verbose:
            print(line, flush=True)


def _rank() -> int:
    """Number of this process among those that learn together."""
    together = th.distributed.is_available() and th.distributed.is_initialized()
    return th.distributed.get_rank() if together else 0


def _of_any_rank(asked: bool, device: th.device) -> bool:
    """Whether any process was asked to stop: one that stopped alone would leave the others waiting for it."""
    if not (th.distributed.is_available() and th.distributed.is_initialized()):
        return asked
    somebody = th.tensor(float(asked), device=device if th.distributed.get_backend() == "nccl" else "cpu")
    th.distributed.all_reduce(somebody)
    return bool(somebody > 0)
