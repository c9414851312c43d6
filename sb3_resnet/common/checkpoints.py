"""The checkpoints of a folder: their order, and which run wrote them."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sb3_resnet.common.files import written_whole
from sb3_resnet.common.normalizer_state import add_statistics

#: Key of a run's id in the optimizer's groups, where it is saved with the model.
RUN_STATE = "best_checkpoint"
_MODELS = "rl_model_*_steps.zip"
_RUN = "sb3_resnet_run.txt"  # further members of SB3's archive, which SB3 does not read
_RANDOM_STATES = "random_states.json"
_STATE = "sb3_resnet_state.pkl"


def checkpoints(folder: str | Path) -> list[Path]:
    """
    The order is that of the counters that a model saves: gradient updates, then environment steps (which
    ``reset_num_timesteps=True`` starts anew), or of the number in the name where a file tells no counters. The time of
    a file decides between equals only: copying a folder changes it.

    :param folder: a folder of :class:`~sb3_resnet.callbacks.BestCheckpointCallback`, or of SB3's ``CheckpointCallback``
    :return: its complete checkpoints, oldest first
    """
    found = []
    for path in Path(folder).expanduser().glob(_MODELS):
        try:
            found.append((*progress_of(path), path.stat().st_mtime_ns, path))
        except FileNotFoundError:  # the run that wrote it has removed it since
            continue
    return [path for *_, path in sorted(found)]


def newest_checkpoint(folder: str | Path) -> Path:
    """
    The checkpoint to resume from. To go on as if training had never stopped::

        path = sb3_resnet.newest_checkpoint("logs")
        model = DQN.load(path, env=env)
        model.load_replay_buffer(path.with_name(f"{path.stem}_replay_buffer.pkl"))
        sb3_resnet.restore_random_states(path, model)
        model.learn(total - model.num_timesteps, reset_num_timesteps=False, callback=...)

    :param folder: a folder of :class:`~sb3_resnet.callbacks.BestCheckpointCallback`
    :return: the newest by its counters, as in :func:`checkpoints`
    :raises FileNotFoundError: if there is none
    """
    found = checkpoints(folder)
    if not found:
        raise FileNotFoundError(f"{str(folder)!r} holds no checkpoint (rl_model_<timesteps>_steps.zip)")
    return found[-1]


def free_path(folder: Path, steps: int, run: str) -> Path:
    """
    :param folder: of the checkpoints
    :param steps: environment steps
    :param run: id of the run
    :return: a file for a checkpoint that is not another run's
    """
    path, number = folder / f"rl_model_{steps}_steps.zip", 1
    while path.exists() and run_of(path) != run:
        number += 1
        path = folder / f"rl_model_{number}_{steps}_steps.zip"
    return path


def progress_of(path: Path) -> tuple[int, int]:
    """
    :param path: file of a checkpoint
    :return: its gradient updates and environment steps, from what SB3 saves as plain JSON: nothing is unpickled
    """
    try:
        data = json.loads(_read(path, "data") or b"")
        return int(data["_n_updates"]), int(data["num_timesteps"])
    except (KeyError, TypeError, ValueError):
        number = re.search(r"(\d+)_steps$", path.stem)
        return -1, int(number[1]) if number else -1


def buffer_of(checkpoint: Path) -> Path:
    """
    :param checkpoint: file of a checkpoint
    :return: where its replay buffer is, if that was saved
    """
    return checkpoint.with_name(f"{checkpoint.stem}_replay_buffer.pkl")


def write_checkpoint(
    model: Any,
    path: Path,
    run: str,
    random_states: Mapping[str, Any],
    save_replay_buffer: bool,
    state: bytes | None = None,
) -> None:
    """
    Write a model and what belongs to it; old files stay until all is on the disk.

    :param model: an SB3 model
    :param path: its file
    :param run: identifies the run that writes it
    :param random_states: plain lists, numbers and strings
    :param save_replay_buffer: whether to save the replay buffer too, where there is one
    :param state: what only a :class:`~sb3_resnet.callbacks.PreemptionCallback` saves
    :raises OSError: if it cannot be written
    """
    has_buffer = save_replay_buffer and getattr(model, "replay_buffer", None) is not None
    # The buffer first: whoever finds the model finds its buffer.
    with written_whole(*([buffer_of(path)] if has_buffer else []), path) as temporaries:
        if has_buffer:
            model.save_replay_buffer(temporaries[0])
        save_model(model, temporaries[-1])
        with zipfile.ZipFile(temporaries[-1], "a") as archive:
            archive.writestr(_RUN, run)
            archive.writestr(_RANDOM_STATES, json.dumps(random_states))
            if state is not None:
                archive.writestr(_STATE, state)


def save_model(model: Any, path: Path) -> None:
    """
    Save a model as SB3 does, and with it what ``VecNormalize`` has learnt.

    :param model: an SB3 model
    :param path: its file
    """
    model.save(path)
    add_statistics(path, model.env)


def run_of(path: Path) -> str | None:
    """
    :param path: file of a checkpoint
    :return: id of the run that wrote it; ``None`` for files of SB3's and RL-Zoo's own callbacks
    """
    run = _read(path, _RUN)
    return None if run is None else run.decode()


def state_of(path: Path) -> bytes | None:
    """
    :param path: file of a checkpoint
    :return: the ``state`` of :func:`write_checkpoint`; ``None`` if it has none
    """
    return _read(path, _STATE)


def remove_checkpoint(path: Path) -> None:
    """
    :param path: file of a checkpoint, which goes together with its replay buffer
    """
    buffer_of(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def random_states_of(path: Path) -> dict[str, Any]:
    """
    :param path: a checkpoint of :class:`~sb3_resnet.callbacks.BestCheckpointCallback`
    :return: what was given to :func:`write_checkpoint`
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if the file holds no random states
    """
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} is no file: newest_checkpoint(FOLDER) finds one")
    content = _read(path, _RANDOM_STATES)
    if content is None:
        raise ValueError(f"{str(path)!r} holds no random states: only checkpoints of this package's callbacks do")
    states: dict[str, Any] = json.loads(content)
    return states


def _read(path: Path, member: str) -> bytes | None:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(member)
    except (OSError, KeyError, zipfile.BadZipFile):
        return None
