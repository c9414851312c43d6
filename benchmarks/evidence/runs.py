"""One run: from its checkpoint, if there is one, to its result file."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3 import DQN
from stable_baselines3.common.vec_env import VecEnv

import sb3_resnet
from sb3_resnet.common.checkpoints import write_checkpoint
from sb3_resnet.common.files import remove_left_overs, written_whole
from sb3_resnet.common.seeding import random_states

from .arms import build, callbacks_of, resolved, sha256
from .games import N_ENVS, make_env
from .recording import Ends, Log, PieceOver, Recorder, Tell
from .results import CODE, write_result
from .spec import Run

#: The trained model in the folder of a run's checkpoints, for `sb3-resnet watch`.
AGENT = "agent.zip"


def execute(
    run: Run, results: Path, checkpoints: Path, tell: Tell = lambda steps: None, ends: Ends = lambda log: False
) -> Path:
    """
    Train a run to its end, or from its checkpoint on, and write its result.

    A run is a chain of pieces. Each begins from the files that the one before it wrote, whether or not the process is
    another one: so a run that was killed ends with the same result as one that was not.

    :param run: what to run
    :param results: folder of all results
    :param checkpoints: folder of all checkpoints
    :param tell: is told the environment steps done, from time to time
    :param ends: whether the run ends before its steps are done, asked after each evaluation
    :return: the result file; a run that has one is not run again
    :raises ValueError: if files of this name belong to other settings
    """
    result, folder = results / run.folder / f"{run.name}.json", checkpoints / run.folder / run.name
    th.set_num_threads(run.plan.threads)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if result.exists():
            refuse_other_settings(run, result)
            # Another folder of results may have a run of this name, whose checkpoints these are.
            log = _last(folder)
            if log.steps and (log.steps >= run.steps or ends(log)):
                refuse_other_settings(run, folder / "settings.json")
                keep_the_agent(folder)
            tell(run.steps)
            return result
        remove_left_overs(folder)
        remove_left_overs(result.parent)
        log, settings = _last(folder), None
        if log.steps:
            refuse_other_settings(run, folder / "settings.json")
        while log.steps < run.steps and not ends(log):
            log, settings = _piece(run, folder, log, tell, ends)
            tell(log.steps)
        write_result(run, result, log, settings or json.loads((folder / "settings.json").read_text()))
        keep_the_agent(folder)
    return result


def keep_the_agent(folder: Path) -> None:
    """
    Keep nothing but the last model of a finished run, also of one that was killed right after its result.

    :param folder: of its checkpoints, if it has one here
    """
    # One that was killed while it cleaned up may have an older one too.
    models = sorted(folder.glob("model-*.zip"), key=lambda file: int(file.stem.removeprefix("model-")))
    for older in models[:-1]:
        older.unlink()
    for last in models[-1:]:
        last.replace(folder / AGENT)
    for file in folder.glob("*"):
        if file.name not in (AGENT, "lock"):
            file.unlink(missing_ok=True)


def refuse_other_settings(run: Run, file: Path) -> None:
    """
    :param run: what would run
    :param file: a result or the settings of a checkpoint, with its name
    :raises ValueError: if another run wrote it
    """
    found = json.loads(file.read_text())
    if found["command"] != run.command:
        raise ValueError(f"{file} is of another run ({found['command']}): delete it, or write another --results")
    if run.weights is not None:
        trunk = found.get("settings", found)["trunk"]
        if trunk["weights"]["sha256"] != sha256(run.weights):
            raise ValueError(f"{file} was trained with another {Path(run.weights).name}: delete it")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """
    Wait until no other process is at work on a run.

    :param folder: of the run
    """
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _piece(run: Run, folder: Path, log: Log, tell: Tell, ends: Ends) -> tuple[Log, dict[str, Any]]:
    """Train up to the next checkpoint, and write it."""
    sb3_resnet.seed_everything(run.seed)
    # No two seeds have an environment in common, as they would with SB3's numbers: seed, seed + 1, ...
    first_env = N_ENVS * run.seed
    env = make_env(run.suite, run.game, N_ENVS, first_env, threads=run.plan.threads)
    begins = log.steps == 0
    if begins:
        played = np.zeros((0, N_ENVS), np.uint8)
        model = build(run.arm, env, run.plan, run.seed, run.learning_rate, run.weights)
        env.seed(first_env)  # DQN has given them SB3's numbers
        settings = resolved(model, run.arm, run.suite, run.plan, run.learning_rate, run.weights)
        settings = {"command": run.command, "code": [CODE], **settings}
        (folder / "settings.json").write_text(json.dumps(settings))
    else:
        played = np.load(folder / f"actions-{log.steps}.npy")
        model = _load(run, folder / f"model-{log.steps}.zip", env, _replay(env, played))
        settings = _same_settings(run, model, folder / "settings.json")
    recorder = Recorder(run, log, tell, ends)
    with contextlib.suppress(PieceOver):
        # Always the steps of the whole run: exploration and phases depend on them.
        model.learn(
            run.steps - log.steps,
            callback=[recorder, *callbacks_of(run.arm, run.plan)],
            reset_num_timesteps=begins,
            log_interval=None,
        )
        recorder.is_whole()
    recorder.stop_clocks()
    log.steps = model.num_timesteps
    _save(run, model, folder, log, np.concatenate([played, np.array(recorder.actions)]))
    env.close()
    return log, settings


def _same_settings(run: Run, model: DQN, file: Path) -> dict[str, Any]:
    """:return: those with which the run began, if they are still what the code makes of its command"""
    found: dict[str, Any] = json.loads(file.read_text())
    now = resolved(model, run.arm, run.suite, run.plan, run.learning_rate, run.weights)
    if found["shared"] != json.loads(json.dumps(now["shared"])):
        raise ValueError(f"{file} is of a run with other settings, though with the same command: delete {file.parent}")
    if CODE not in found["code"]:
        found["code"].append(CODE)
        with written_whole(file) as (temporary,):
            temporary.write_text(json.dumps(found))
    return found


def _replay(env: VecEnv, actions: np.ndarray) -> np.ndarray:
    """
    Bring environments back to where they were: no emulator in C++ tells its state, but all play the same again.

    :return: the last observations
    """
    observations = env.reset()
    for action in actions:
        observations, *_ = env.step(action)
    assert isinstance(observations, np.ndarray)
    return observations


def _load(run: Run, file: Path, env: VecEnv, observations: np.ndarray) -> DQN:
    model = DQN.load(file, env=env, device=run.plan.device, force_reset=False)
    if not np.array_equal(model._last_obs, observations):
        raise RuntimeError(f"{run.game} does not play the same again, so {file.parent} cannot go on: delete it")
    model.load_replay_buffer(file.with_name(file.name.replace("model", "buffer").replace(".zip", ".pkl")))
    sb3_resnet.restore_random_states(file, model)
    return model


def _save(run: Run, model: DQN, folder: Path, log: Log, actions: np.ndarray) -> None:
    """A checkpoint is there when its log is, which is written last. Nothing goes on from the last one."""
    goes_on = log.steps < run.steps
    names = [f"model-{log.steps}.zip", *([f"buffer-{log.steps}.pkl", f"actions-{log.steps}.npy"] if goes_on else [])]
    with written_whole(*(folder / name for name in (*names, "log.json"))) as (model_file, *others, log_file):
        write_checkpoint(model, model_file, run.name, random_states(model), save_replay_buffer=False)
        if goes_on:
            model.save_replay_buffer(others[0])
            with others[1].open("wb") as file:
                np.save(file, actions)
        log_file.write_text(json.dumps(asdict(log)))
    for file in folder.glob("[a-z]*-*.*"):
        if file.name not in names:
            file.unlink()


def _last(folder: Path) -> Log:
    file = folder / "log.json"
    return Log(**json.loads(file.read_text())) if file.exists() else Log()
