"""Save the newest models and the best ones, so that a crash costs nothing and a resume forgets nothing."""

from __future__ import annotations

import json
import math
import tempfile
import uuid
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from sb3_resnet.callbacks._evaluations import Evaluations, is_trial, refusals_end_the_search
from sb3_resnet.callbacks._updates import extractors_of
from sb3_resnet.common import host
from sb3_resnet.common.arguments import flag, integer, path_of
from sb3_resnet.common.checkpoints import (
    RUN_STATE,
    checkpoints,
    free_path,
    remove_checkpoint,
    run_of,
    save_model,
    write_checkpoint,
)
from sb3_resnet.common.files import prepare_folder, remove_left_overs, written_whole
from sb3_resnet.common.ranks import ranks_of
from sb3_resnet.common.seeding import random_states
from sb3_resnet.optim.groups import optimizer_of, recall, remember

RECORD = "best.json"
_ALL = "best"  # key of the best of all phases, and name of its file


class BestCheckpointCallback(BaseCallback):
    """
    Keep the newest checkpoints, the best model, and the best model of each phase.

    The best is decided by the rewards of the ``EvalCallback`` that runs beside (RL-Zoo adds one with
    ``--eval-freq``); nothing is evaluated twice. A reward is better if it is higher; NaN and infinity never are. In
    ``save_path``:

    * ``rl_model_<timesteps>_steps.zip``: checkpoints, as SB3 and ``rl_zoo3.enjoy --load-last-checkpoint`` name them;
      ``rl_model_2_<timesteps>_steps.zip`` where another run, or RL-Zoo's ``--save-freq``, has a file of that name
    * ``best.zip`` and ``best_<phase>.zip``: the best of all and of each phase, a phase being named after its freeze
      boundary (``best_frozen.zip``, ``best_layer4.zip``). Of equal rewards the first stays
    * ``best.json``: the record of their rewards. It is read when training goes on in the same folder; in another
      folder (RL-Zoo makes a new one) the copy in the resumed model is used. So, unlike with ``EvalCallback`` alone, a
      resumed run does not replace the best model by its first evaluated one.

    A checkpoint is taken between two rollouts, when all updates of the last one are made, and at the end of ``learn()``
    unless that was stopped within a rollout. It also holds the states of the random generators. So a resumed run can
    equal the one that was not stopped; :func:`~sb3_resnet.newest_checkpoint` finds the file and shows how.

    Each file is written under another name first and then renamed: a process killed while saving never leaves a
    broken one. A checkpoint that cannot be saved is warned of, and training goes on. Only checkpoints that this run
    wrote, before or after it was resumed, are removed. In the trials of RL-Zoo's search nothing is kept.

    :param save_freq: environment steps between two checkpoints; 0: steps are not counted
    :param save_path: folder; ``None``: where the ``EvalCallback`` saves its best model
    :param keep_last: how many checkpoints to keep
    :param save_replay_buffer: also save the replay buffer, as ``rl_model_<timesteps>_steps_replay_buffer.pkl``
    :param save_freq_episodes: episodes between two checkpoints, whichever comes first; 0: episodes are not counted.
        With neither the best models alone are kept
    :param verbose: 1 to print each save
    :raises ValueError: for values that cannot work, and at the start of training without a folder
    :raises TypeError: for wrong types
    :raises OSError: at the start of training if nothing can be saved in the folder, and where a best model cannot
    """

    def __init__(
        self,
        save_freq: int = 10_000,
        save_path: str | Path | None = None,
        keep_last: int = 3,
        save_replay_buffer: bool = False,
        save_freq_episodes: int = 0,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        self.save_freq = integer("save_freq", save_freq)
        self.save_path = None if save_path is None else path_of("save_path", save_path)
        self.keep_last = integer("keep_last", keep_last, 1)
        self.save_replay_buffer = flag("save_replay_buffer", save_replay_buffer)
        self.save_freq_episodes = integer("save_freq_episodes", save_freq_episodes)
        self._evaluations = Evaluations(None)
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._run = ""
        self._record: dict[str, dict[str, Any]] = {}
        self._last_save = 0
        self._episodes = 0
        self._rollout_is_whole = False

    def best_of_phase(self) -> tuple[Path, float] | None:
        """:return: file and mean reward of the best evaluated model of the current phase, up to this moment"""
        return self._best_of(self._phase_name)

    def best_of_all(self) -> tuple[Path, float] | None:
        """:return: file and mean reward of the best evaluated model, up to this moment"""
        return self._best_of(_ALL)

    def _best_of(self, key: str) -> tuple[Path, float] | None:
        if self._rests:
            return None
        self._poll()
        entry = self._record.get(key)
        return None if entry is None else (Path(entry["file"]), float(entry["reward"]))

    @refusals_end_the_search
    def _on_training_start(self) -> None:
        if self._rests:
            return
        root = host.root_callback(self)
        self._evaluations = Evaluations(root)
        # A trial's files would be another trial's, but the best model must be there for restore_best.
        self._scratch = tempfile.TemporaryDirectory(prefix="sb3_resnet_trial_") if is_trial(root) else None
        if not self._evaluations.found:
            warnings.warn(
                "BestCheckpointCallback keeps only the newest checkpoints: to keep the best too, add an EvalCallback "
                "(--eval-freq in RL-Zoo)",
                stacklevel=3,
            )
        optimizer = optimizer_of(self.model)
        prepare_folder(self._folder)
        remove_left_overs(self._folder)
        saved = recall(optimizer, RUN_STATE)
        self._run = saved.get("run") or uuid.uuid4().hex
        self._warn_of_other_runs()
        is_new = "run" not in saved
        self._record = self._read_record(saved if is_new else saved["record"], is_new)
        self._remember()
        self._last_save, self._episodes = self.model.num_timesteps, 0
        self._rollout_is_whole = False

    def _on_rollout_start(self) -> None:
        """The last rollout's updates are made, and nothing of the next one has happened."""
        self._rollout_is_whole = False
        if self._rests:
            return
        steps = self.model.num_timesteps - self._last_save
        if 0 < self.save_freq <= steps or 0 < self.save_freq_episodes <= self._episodes:
            self._save_checkpoint()

    def _on_step(self) -> bool:
        self._episodes += int(np.sum(self.locals.get("dones", 0)))
        if not self._rests:
            self._poll()
        return True

    def _on_rollout_end(self) -> None:
        self._rollout_is_whole = True
        if not self._rests:
            self._poll()

    def _on_training_end(self) -> None:
        if self._rests:
            return
        # Of an evaluation that stops training, after which SB3 calls no on_rollout_end; RL-Zoo ends training twice.
        self._poll()
        # Stopped within a rollout, the model lacks its updates: the run that was not stopped never was in that state.
        is_whole = self._rollout_is_whole and self.model.num_timesteps >= self.locals.get("total_timesteps", math.inf)
        if is_whole and self.model.num_timesteps > self._last_save and (self.save_freq or self.save_freq_episodes):
            self._save_checkpoint()
        if self._scratch is not None:
            self._scratch.cleanup()

    @property
    def _rests(self) -> bool:
        """Whether this is one of several processes that train the model, and another one saves it."""
        return not ranks_of(self.model).is_first

    @property
    def _folder(self) -> Path:
        if self._scratch is not None:
            return Path(self._scratch.name)
        folder = self.save_path or self._evaluations.folder
        if folder is None:
            raise ValueError("BestCheckpointCallback does not know where to save: write save_path=FOLDER")
        return Path(folder)

    @property
    def _phase_name(self) -> str:
        """The freeze boundary names the phase, so that a resumed run finds its own."""
        boundaries = [extractor.boundary for extractor in extractors_of(self.model)]
        if not boundaries:
            return _ALL
        # Of several images the lowest, which the policy calls its freeze boundary.
        return str(min(boundaries, key=lambda one: one.position).stage or "frozen")

    def _poll(self) -> None:
        reward = self._evaluations.poll()
        if reward is not None and math.isfinite(reward):
            self._keep_if_best(reward)

    def _remember(self) -> None:
        remember(optimizer_of(self.model), RUN_STATE, {"run": self._run, "record": self._record})

    def _warn_of_other_runs(self) -> None:
        others = [path.name for path in checkpoints(self._folder) if run_of(path) != self._run]
        if others:
            warnings.warn(
                f"{self._folder} holds checkpoints that this run has not written, so of another run ({others[-1]}"
                f"{f' and {len(others) - 1} more' if len(others) > 1 else ''}). They stay, and newest_checkpoint may "
                "return one of them: write another save_path to keep runs apart",
                stacklevel=4,
            )

    def _read_record(self, saved: dict[str, dict[str, Any]], is_new: bool) -> dict[str, dict[str, Any]]:
        """The record of the folder, else that of the model; a new run starts its own."""
        path = self._folder / RECORD
        record = saved
        if path.exists():
            try:
                record = {
                    key: {**entry, "reward": float(entry["reward"]), "file": self._found_here(entry["file"])}
                    for key, entry in json.loads(path.read_text()).items()
                }
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(
                    f"{str(path)!r} is no record of best models ({type(error).__name__}). Delete it: a resumed model "
                    "has a copy of the record up to its own step."
                ) from error
            is_fresh = is_new and host.updates_done(self.model) == 0 and self.model.num_timesteps == 0
            if is_fresh or any(entry.get("run", self._run) != self._run for entry in record.values()):
                warnings.warn(
                    f"{path} is the record of another run; this one starts its own and replaces it", stacklevel=4
                )
                record = saved
        kept = {key: entry for key, entry in record.items() if math.isfinite(entry["reward"])}
        if len(kept) < len(record):
            warnings.warn(f"{path}: a best reward that is NaN or infinite is left out", stacklevel=4)
        return kept

    def _found_here(self, file: str) -> str:
        """The folder may have been moved or copied since."""
        here = self._folder / Path(file).name
        return str(here.absolute()) if here.exists() else file

    def _keep_if_best(self, reward: float) -> None:
        phase = self._phase_name
        names = {_ALL: _ALL, **({} if phase == _ALL else {phase: f"best_{phase}"})}
        before = self._record
        better = {key: name for key, name in names.items() if key not in before or reward > before[key]["reward"]}
        if not better:
            return
        for key, name in better.items():
            path = (self._folder / f"{name}.zip").absolute()
            entry = {"reward": reward, "timesteps": self.model.num_timesteps, "file": str(path), "run": self._run}
            self._record = {**self._record, key: entry}
        self._remember()
        try:
            for name in better.values():
                with written_whole(self._folder / f"{name}.zip") as (temporary,):
                    save_model(self.model, temporary)
                self._tell(self._folder / f"{name}.zip")
            # After the models: a record must never promise a model that is not there.
            with written_whole(self._folder / RECORD) as (temporary,):
                temporary.write_text(json.dumps(self._record, indent=1))
        except BaseException:
            self._record = before
            self._remember()
            raise

    def _save_checkpoint(self) -> None:
        """Whatever fails here must not end training: the last checkpoint is still there."""
        self._last_save, self._episodes = self.model.num_timesteps, 0
        if self._scratch is not None:
            return
        path = free_path(self._folder, self.model.num_timesteps, self._run)
        try:
            write_checkpoint(self.model, path, self._run, random_states(self.model), self.save_replay_buffer)
            self._tell(path)
            self._prune(path)
        except Exception as error:  # a full disk, but also a buffer that cannot be pickled
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            warnings.warn(
                f"BestCheckpointCallback could not save {path} ({reason}). Training goes on; earlier checkpoints are "
                "still there.",
                stacklevel=2,
            )

    def _prune(self, newest: Path) -> None:
        """Only what this run wrote, and nothing beyond the newest: it may have been resumed from an earlier point."""
        own = [path for path in checkpoints(self._folder) if run_of(path) == self._run]
        for old in own[: own.index(newest) + 1][: -self.keep_last]:
            remove_checkpoint(old)

    def _tell(self, path: Path) -> None:
        if self.verbose:
            print(f"Saved {path}")
