"""Save the newest models and the best ones, so that a crash costs nothing and a resume forgets nothing."""

from __future__ import annotations

import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback

from sb3_resnet.callbacks._evaluations import Evaluations
from sb3_resnet.common.arguments import flag, integer, no_unknown, path_of
from sb3_resnet.optim.groups import optimizer_of, recall, remember

_STATE = "best_checkpoint"  # key of our record in the optimizer's groups, where it is saved with the model
_TEMPORARY = ".writing-"
_BUFFER = "_replay_buffer.pkl"
RECORD = "best.json"


class BestCheckpointCallback(BaseCallback):
    """
    Keep the newest checkpoints, the best model, and the best model of each phase.

    The best is decided by the rewards of the ``EvalCallback`` that runs beside (RL-Zoo adds one with
    ``--eval-freq``); nothing is evaluated twice. A reward is better if it is higher; NaN never is. In ``save_path``:

    * ``rl_model_<timesteps>_steps.zip``: checkpoints, as SB3 and ``rl_zoo3.enjoy --load-last-checkpoint`` name them
    * ``best.zip`` and ``best_<phase>.zip``: the best of all and of each phase, a phase being named after its freeze
      boundary (``best_frozen.zip``, ``best_layer4.zip``)
    * ``best.json``: the record of their rewards. It is read when training goes on in the same folder; in another
      folder (RL-Zoo makes a new one) the copy in the resumed model is used. So, unlike with ``EvalCallback`` alone, a
      resumed run does not replace the best model by its first evaluated one.

    Each file is written under another name first and then renamed: a process killed while saving never leaves a
    broken one. :func:`newest_checkpoint` finds the file to resume from.

    :param save_freq: environment steps between two checkpoints; 0 keeps the best models only
    :param save_path: folder; ``None``: where the ``EvalCallback`` saves its best model
    :param keep_last: how many checkpoints to keep
    :param save_replay_buffer: also save the replay buffer, as ``rl_model_<timesteps>_steps_replay_buffer.pkl``
    :param verbose: 1 to print each save
    :raises ValueError: for values that cannot work
    :raises TypeError: for unknown arguments
    """

    def __init__(
        self,
        save_freq: int = 10_000,
        save_path: str | Path | None = None,
        keep_last: int = 3,
        save_replay_buffer: bool = False,
        verbose: int = 0,
        **unknown: Any,
    ) -> None:
        super().__init__(verbose)
        allowed = ("save_freq", "save_path", "keep_last", "save_replay_buffer", "verbose")
        no_unknown("BestCheckpointCallback", unknown, allowed)
        self.save_freq = integer("save_freq", save_freq)
        self.save_path = None if save_path is None else path_of("save_path", save_path)
        self.keep_last = integer("keep_last", keep_last, 1)
        self.save_replay_buffer = flag("save_replay_buffer", save_replay_buffer)
        self._evaluations = Evaluations(None)
        self._record: dict[str, dict[str, Any]] = {}
        self._last_save = 0

    def best_of_phase(self) -> tuple[Path, float] | None:
        """:return: file and mean reward of the best evaluated model of the current phase, up to this moment"""
        self._on_step()
        entry = self._record.get(self._phase_name)
        return None if entry is None else (Path(entry["file"]), float(entry["reward"]))

    def _on_training_start(self) -> None:
        self._evaluations = Evaluations(self.locals.get("callback"))
        if not self._evaluations.found:
            warnings.warn(
                "BestCheckpointCallback keeps only the newest checkpoints: to keep the best too, add an EvalCallback "
                "(--eval-freq in RL-Zoo)",
                stacklevel=2,
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        for left_over in self._folder.glob(f"{_TEMPORARY}*"):
            writer = left_over.name.removeprefix(_TEMPORARY).split("-")[0]
            if not (writer.isdecimal() and _is_at_work(int(writer))):
                left_over.unlink(missing_ok=True)
        self._record = self._read_record()
        self._last_save = self.model.num_timesteps

    def _on_step(self) -> bool:
        reward = self._evaluations.poll()
        if reward is not None and not math.isnan(reward):
            self._keep_if_best(reward)
        return True

    def _on_rollout_end(self) -> None:
        self._on_step()
        if self.save_freq and self.model.num_timesteps - self._last_save >= self.save_freq:
            self._last_save = self.model.num_timesteps
            self._save_checkpoint()

    def _on_training_end(self) -> None:
        # Of an evaluation that stops training, after which SB3 calls no on_rollout_end; RL-Zoo ends training twice.
        self._on_step()

    @property
    def _folder(self) -> Path:
        folder = self.save_path or self._evaluations.folder
        if folder is None:
            raise ValueError("BestCheckpointCallback does not know where to save: write save_path=FOLDER")
        return Path(folder)

    @property
    def _phase_name(self) -> str:
        """The freeze boundary names the phase, so that a resumed run finds its own."""
        return str(getattr(self.model.policy, "freeze_boundary", None) or "frozen")

    def _read_record(self) -> dict[str, dict[str, Any]]:
        saved: dict[str, dict[str, Any]] = recall(optimizer_of(self.model), _STATE)
        path = self._folder / RECORD
        if not path.exists():
            return saved
        if not saved and self.model._n_updates == 0 and self.model.num_timesteps == 0:
            warnings.warn(f"{path} is the record of another run; this one starts its own and replaces it", stacklevel=2)
            return {}
        try:
            record = json.loads(path.read_text())
            return {key: {**entry, "reward": float(entry["reward"])} for key, entry in record.items() if entry["file"]}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{str(path)!r} is no record of best models ({type(error).__name__}). Delete it: a resumed model has a "
                "copy of the record up to its own step."
            ) from error

    def _keep_if_best(self, reward: float) -> None:
        names = {"best": "best", self._phase_name: f"best_{self._phase_name}"}
        better = {
            key: name for key, name in names.items() if reward > self._record.get(key, {"reward": -math.inf})["reward"]
        }
        for key, name in better.items():
            path = (self._folder / f"{name}.zip").absolute()
            entry = {"reward": reward, "timesteps": self.model.num_timesteps, "file": str(path)}
            self._record = {**self._record, key: entry}
        if not better:
            return
        remember(optimizer_of(self.model), _STATE, self._record)
        for name in better.values():
            self._save(self._folder / f"{name}.zip")
        # After the models: a record must never promise a model that is not there.
        temporary = self._temporary(RECORD)
        temporary.write_text(json.dumps(self._record, indent=1))
        _replace(temporary, self._folder / RECORD)

    def _save_checkpoint(self) -> None:
        name = f"rl_model_{self.model.num_timesteps}_steps"
        model: Any = self.model
        if self.save_replay_buffer and getattr(model, "replay_buffer", None) is not None:
            # Before the model: whoever finds the model finds its buffer.
            temporary = self._temporary(f"{name}{_BUFFER}")
            model.save_replay_buffer(temporary)
            _replace(temporary, self._folder / f"{name}{_BUFFER}")
        self._save(self._folder / f"{name}.zip")
        for old in checkpoints(self._folder)[: -self.keep_last]:
            old.unlink()
        # Also those of a process that was killed before its model was there.
        for buffer in self._folder.glob(f"rl_model_*_steps{_BUFFER}"):
            if not buffer.with_name(f"{buffer.name.removesuffix(_BUFFER)}.zip").exists():
                buffer.unlink(missing_ok=True)

    def _save(self, path: Path) -> None:
        temporary = self._temporary(path.name)
        self.model.save(temporary)
        _replace(temporary, path)
        if self.verbose:
            print(f"Saved {path}")

    def _temporary(self, name: str) -> Path:
        return self._folder / f"{_TEMPORARY}{os.getpid()}-{name}"


def checkpoints(folder: str | Path) -> list[Path]:
    """
    :param folder: a folder of :class:`BestCheckpointCallback`, or of SB3's ``CheckpointCallback``
    :return: its complete checkpoints, oldest first
    """
    # By time and not by the number in the name: reset_num_timesteps=True starts the numbers anew.
    return sorted(
        path_of("folder", folder).glob("rl_model_*_steps.zip"), key=lambda path: (path.stat().st_mtime_ns, path.name)
    )


def newest_checkpoint(folder: str | Path) -> Path:
    """
    :param folder: a folder of :class:`BestCheckpointCallback`
    :return: the checkpoint to resume from
    :raises FileNotFoundError: if there is none
    """
    found = checkpoints(folder)
    if not found:
        raise FileNotFoundError(f"{str(folder)!r} holds no checkpoint (rl_model_<timesteps>_steps.zip)")
    return found[-1]


def _is_at_work(pid: int) -> bool:
    """Whether a process other than this one lives, as far as the system tells."""
    if pid == os.getpid():
        return False
    if os.name == "nt":  # os.kill would end it; a file left over does no harm
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _replace(temporary: Path, path: Path) -> None:
    """Put a finished file in place, its content on the disk before its name."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
