"""One run: from its checkpoint, if there is one, to its result file."""

from __future__ import annotations

import contextlib
import fcntl
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import stable_baselines3
import torch as th
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

import sb3_resnet
from sb3_resnet.common.checkpoints import add_to_checkpoint
from sb3_resnet.common.files import remove_left_overs, written_whole
from sb3_resnet.common.seeding import random_states

from .arms import build, callbacks_of, resolved
from .budgets import Budget, budget_of
from .evaluation import evaluate
from .games import N_ENVS, make_env, suite_of

#: The trained model in the folder of a run's checkpoints, for `sb3-resnet watch`.
AGENT = "agent.zip"
Tell = Callable[[int], None]  # takes the environment steps done


@dataclass(frozen=True)
class Run:
    """
    What a result file is a function of.

    :param suite: name of the suite
    :param budget: name of the budget
    :param game: name of the game
    :param arm: name of the arm
    :param seed: of everything
    :param steps: environment steps
    :param learning_rate: of the head
    :param weights: file of the trunk's weights, or ``None``
    :param is_try: whether it serves to choose a learning rate
    """

    suite: str
    budget: str
    game: str
    arm: str
    seed: int
    steps: int
    learning_rate: float
    weights: str | None = None
    is_try: bool = False

    @property
    def folder(self) -> Path:
        """Of its files, within those of all runs."""
        return Path(self.suite, self.budget, *(["tuning"] if self.is_try else []))

    @property
    def name(self) -> str:
        """Of its files, without their endings."""
        rate = f"-lr{self.learning_rate:g}" if self.is_try else ""
        return f"{self.game}-{self.arm}-{self.steps}{rate}-s{self.seed}"

    @property
    def plan(self) -> Budget:
        """Its budget."""
        return budget_of(self.budget, self.steps)

    def options(self) -> list[str]:
        """:return: the command line of this run alone, after ``atari.py run``"""
        options = [f"--{name}" for name in ("suite", "budget", "game", "arm", "seed", "steps")]
        values = [self.suite, self.budget, self.game, self.arm, self.seed, self.steps]
        pairs = [*zip(options, map(str, values), strict=True), ("--learning-rate", f"{self.learning_rate:g}")]
        pairs += [] if self.weights is None else [("--weights", f"{self.game}={self.weights}")]
        return [word for pair in pairs for word in pair] + (["--try"] if self.is_try else [])

    @property
    def command(self) -> str:
        """What a result file names; a weights file by its name alone, since its hash says which it was."""
        named = self if self.weights is None else Run(**{**asdict(self), "weights": Path(self.weights).name})
        return f"python benchmarks/atari.py run {' '.join(named.options())}"


@dataclass
class Log:
    """
    What a run has found out so far.

    :param steps: environment steps done
    :param evaluations: each with its step and its returns
    :param episodes: step and raw return of each game of training
    :param seconds: step, seconds of the processor and of a clock at each evaluation; evaluations do not count
    :param spent: seconds of the processor and of a clock so far
    """

    steps: int = 0
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    episodes: list[list[float]] = field(default_factory=list)
    seconds: list[list[float]] = field(default_factory=list)
    spent: list[float] = field(default_factory=lambda: [0.0, 0.0])


class PieceOver(Exception):  # noqa: N818  # nothing is wrong
    """Ends ``learn()`` between two rollouts, which a callback's ``False`` does not: it drops the step."""


class Recorder(BaseCallback):
    """
    Writes down actions and games, evaluates, and ends the piece where a checkpoint is due.

    :param run: what is running
    :param log: of the run; goes on
    :param tell: is told the steps that are done
    """

    def __init__(self, run: Run, log: Log, tell: Tell) -> None:
        super().__init__()
        self.run, self.log, self.tell = run, log, tell
        self.actions: list[np.ndarray] = []
        self._clocks = (0.0, 0.0)

    def _on_training_start(self) -> None:
        self._clocks = _clocks()

    def _on_step(self) -> bool:
        self.actions.append(np.array(self.locals["actions"], np.uint8))
        for info in self.locals["infos"]:
            if "episode" in info:
                self.log.episodes.append([self.num_timesteps, float(info["episode"]["r"])])
        if self.n_calls % 25 == 0:
            self.tell(self.num_timesteps)
        return True

    def _on_rollout_start(self) -> None:
        """All updates up to here are made."""
        if self.num_timesteps > self.log.steps and self.is_whole():
            raise PieceOver

    def is_whole(self) -> bool:
        """
        Evaluate where that is due.

        :return: whether a checkpoint is due
        """
        steps, plan = self.num_timesteps, self.run.plan
        last = steps >= plan.steps
        if (last or steps % plan.eval_every == 0) and steps not in [entry["step"] for entry in self.log.evaluations]:
            self.stop_clocks()
            self.log.evaluations.append({"step": steps, "returns": self._evaluate(steps)})
            self.log.seconds.append([steps, *(round(value, 1) for value in self.log.spent)])
            self._clocks = _clocks()
        return last or steps % plan.save_every == 0

    def stop_clocks(self) -> None:
        """What was spent since they began is training."""
        pairs = zip(self.log.spent, _clocks(), self._clocks, strict=True)
        self.log.spent = [spent + now - then for spent, now, then in pairs]
        self._clocks = _clocks()

    def _evaluate(self, steps: int) -> list[float]:
        run, model = self.run, self.model
        assert isinstance(model, DQN)
        seed = int(np.random.SeedSequence([run.seed, steps]).generate_state(1)[0]) & 0x7FFFFFFF
        return evaluate(model, run.suite, run.game, run.arm, run.plan.episodes, seed)


def execute(run: Run, results: Path, checkpoints: Path, tell: Tell = lambda steps: None) -> Path:
    """
    Train a run to its end, or from its checkpoint on, and write its result.

    A run is a chain of pieces. Each begins from the files that the one before it wrote, whether or not the process is
    another one: so a run that was killed ends with the same result as one that was not.

    :param run: what to run
    :param results: folder of all results
    :param checkpoints: folder of all checkpoints
    :param tell: is told the environment steps done, from time to time
    :return: the result file; a run that has one is not run again
    :raises ValueError: if files of this name belong to other settings
    """
    result, folder = results / run.folder / f"{run.name}.json", checkpoints / run.folder / run.name
    if result.exists():
        refuse_other_settings(run, result)
        tell(run.steps)
        return result
    th.set_num_threads(run.plan.threads)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        remove_left_overs(folder)
        log, settings = _last(folder), None
        while log.steps < run.steps:
            log, settings = _piece(run, folder, log, tell)
            tell(log.steps)
        _write_result(run, result, log, settings or json.loads((folder / "settings.json").read_text()))
        (folder / f"model-{run.steps}.zip").replace(folder / AGENT)
        for name in ("log.json", "settings.json"):
            (folder / name).unlink()
    return result


def refuse_other_settings(run: Run, result: Path) -> None:
    """
    :param run: what would run
    :param result: a file with its name
    :raises ValueError: if another run wrote it
    """
    found = json.loads(result.read_text())["command"]
    if found != run.command:
        raise ValueError(f"{result} is of another run ({found}): delete it, or write another --results")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """
    :param folder: of a run
    :raises ValueError: if another process is at work there
    """
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"Another process runs {folder.name}: wait for it") from None
        yield


def _piece(run: Run, folder: Path, log: Log, tell: Tell) -> tuple[Log, dict[str, Any]]:
    """Train up to the next checkpoint, and write it."""
    sb3_resnet.seed_everything(run.seed)
    env = make_env(run.suite, run.game, N_ENVS, run.seed)
    begins = log.steps == 0
    if begins:
        played = np.zeros((0, N_ENVS), np.uint8)
        model = build(run.arm, env, run.plan, run.seed, run.learning_rate, run.weights)
        settings = resolved(model, run.arm, run.suite, run.plan, run.learning_rate, run.weights)
        (folder / "settings.json").write_text(json.dumps({"command": run.command, **settings}))
    else:
        settings = json.loads((folder / "settings.json").read_text())
        if settings["command"] != run.command:
            raise ValueError(f"{folder} is of another run ({settings['command']}): delete it")
        played = np.load(folder / f"actions-{log.steps}.npy")
        model = _load(run, folder / f"model-{log.steps}.zip", env, _replay(env, played))
    recorder = Recorder(run, log, tell)
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
        model.save(model_file)
        add_to_checkpoint(model_file, run.name, random_states(model))
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


def _write_result(run: Run, path: Path, log: Log, settings: dict[str, Any]) -> None:
    """Times are in a file of their own: they are never the same again."""
    returns = [np.mean(entry["returns"]) for entry in log.evaluations]
    result = {
        **{"command": run.command, "suite": run.suite, "budget": run.budget, "is_try": run.is_try},
        "game": suite_of(run.suite).env_id(run.game),
        **{name: getattr(run, name) for name in ("arm", "seed", "steps", "learning_rate")},
        "last evaluation": float(returns[-1]),
        "mean of all evaluations": float(np.mean(returns)),
        "evaluations": log.evaluations,
        "episodes of training (step, return)": log.episodes,
        "settings": {name: value for name, value in settings.items() if name != "command"},
        "versions": _versions(),
    }
    times = {
        "cpu": cpu_name(),
        "gpu": th.cuda.get_device_name() if run.plan.device == "cuda" else None,
        "threads": run.plan.threads,
        "seconds of training (step, processor, clock)": log.seconds,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path.with_suffix(".times.json"), path) as (times_file, result_file):
        times_file.write_text(json.dumps(times) + "\n")
        result_file.write_text(json.dumps(result) + "\n")


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = ("gymnasium", "ale-py", "minigrid")
    own = {"sb3_resnet": sb3_resnet.__version__, "torch": th.__version__, "numpy": np.__version__}
    found = {"python": platform.python_version(), "stable-baselines3": stable_baselines3.__version__, **own}
    for package in packages:
        with contextlib.suppress(ModuleNotFoundError):
            found[package] = version(package)
    return found


def cpu_name() -> str:
    """:return: what the system calls its processor"""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _clocks() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()
