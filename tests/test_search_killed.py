"""Four workers of ``rl_zoo3.train -optimize``, one of them killed; then training with what the best trial was."""

import collections
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import optuna
import pytest
import yaml

from sb3_resnet.common.host_optuna import is_retry, read_storage
from sb3_resnet.optim.search.experiment import ATTRIBUTE
from tests.helpers import ROOT, run_command

pytestmark = pytest.mark.slow

WORKERS, TRIALS = 4, 7
ENV = "SearchGame-v0"
REGISTER = f"""
import gymnasium
import tests.helpers  # the tiny ResNet

gymnasium.register({ENV!r}, "tests.helpers:TinyGame")
"""
EXTRACTOR = {"backbone": "resnet_tiny", "last_stage": "layer2", "pooling": "flatten"}
CONFIG = {
    "search": {"batch_size": [4, 8], "warmup_steps": [0, 2, 4], "heartbeat_seconds": 2},
    "default": {
        "policy": "ResNetCnnPolicy",
        "env_wrapper": ["gymnasium.wrappers.OrderEnforcing"],
        "n_timesteps": 60,
        "buffer_size": 100,
        "learning_starts": 8,
        "policy_kwargs": {"net_arch": [8], "features_extractor_kwargs": EXTRACTOR},
        "callback": [
            "sb3_resnet.callbacks.FeatureCacheCallback",
            {"sb3_resnet.callbacks.LRScheduleCallback": {"warmup_steps": 1}},
            {"sb3_resnet.callbacks.UnfreezeCallback": {"phases": [{"at_timestep": 30, "unfreeze_from": "layer2"}]}},
        ],
    },
}


def binary(name):
    """Of PostgreSQL, which Debian keeps out of the path."""
    found = shutil.which(name) or next(map(str, sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))), None)
    if found is None:
        raise FileNotFoundError(f"no {name}: apt-get install postgresql")
    return found


@contextlib.contextmanager
def database():
    """A server of our own, without a network; it refuses to run as root."""
    import psycopg  # noqa: F401  # only whether it is installed

    # Not pytest's folder, which other users may not enter and whose path is too long for a socket.
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    as_user = {"cwd": folder, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    if os.getuid() == 0:
        as_user |= {"user": "postgres", "group": "postgres", "extra_groups": []}
        shutil.chown(folder, "postgres", "postgres")
    options = f"-k {folder} -c listen_addresses= -c fsync=off"
    control = [binary("pg_ctl"), "-D", folder / "data", "-w", "-t", "60"]
    try:
        for line in (
            [binary("initdb"), "-D", folder / "data", "-U", "zoo", "-A", "trust", "--no-sync"],
            [*control, "-l", folder / "log", "-o", options, "start"],
        ):
            done = subprocess.run(line, **as_user)
            if done.returncode != 0:
                raise OSError(f"{line[0]}: {done.stdout}")
        yield f"postgresql+psycopg://zoo@/postgres?host={folder}"
    finally:
        with contextlib.suppress(FileNotFoundError):
            subprocess.run([*control, "-m", "immediate", "stop"], **as_user)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["journal", "postgres"])
def storage(request, tmp_path):
    """:return: what --storage gets"""
    if request.param == "journal":
        yield str(tmp_path / "study.log")
        return
    with contextlib.ExitStack() as stack:
        try:
            url = stack.enter_context(database())
        except (ImportError, LookupError, OSError) as error:
            if os.environ.get("CI") or os.environ.get("SB3_RESNET_REQUIRE_POSTGRES"):
                raise
            pytest.skip(f"no PostgreSQL can be started: {error}")
        yield url


@pytest.fixture
def train(tmp_path):
    """:return: a function that starts RL-Zoo's training command"""
    (tmp_path / "search_game.py").write_text(REGISTER)
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    started = []

    def start(config, *arguments):
        line = [sys.executable, "-m", "rl_zoo3.train", "--algo", "dqn", "--env", ENV, "--conf-file", config]
        line += ["--gym-packages", "sb3_resnet", "search_game", "-f", tmp_path / "logs", "--device", "cpu", *arguments]
        output = (tmp_path / f"output{len(started)}.txt").open("w")
        started.append(
            subprocess.Popen([*map(str, line)], cwd=tmp_path, env=environment, stdout=output, stderr=subprocess.STDOUT)
        )
        return started[-1]

    def texts():
        return "\n".join(path.read_text() for path in sorted(tmp_path.glob("output*.txt")))

    start.texts = texts
    yield start
    for process in started:
        process.kill()
        process.wait()


def trials_in(storage):
    try:
        study = optuna.load_study(study_name="tiny", storage=read_storage(storage))
    except Exception:  # the workers have not made it yet
        return []
    return study.get_trials(deepcopy=False)


def kill_one_in_the_midst_of_a_trial(storage, workers, texts, seconds=600):
    """:return: the trial; a stopped worker cannot finish it between a look and the kill"""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(worker.poll() is None for worker in workers):
        for trial in trials_in(storage):
            if trial.state.name != "RUNNING" or ATTRIBUTE not in trial.user_attrs:
                continue
            pid = int(trial.user_attrs["worker"].rpartition(":")[2])
            os.kill(pid, signal.SIGSTOP)
            (same,) = (one for one in trials_in(storage) if one.number == trial.number)
            if same.state.name == "RUNNING":
                os.kill(pid, signal.SIGKILL)
                return same
            os.kill(pid, signal.SIGCONT)
        time.sleep(0.05)
    raise AssertionError(f"no trial was running:\n{texts()}")


def test_a_killed_workers_trial_is_run_again_and_the_best_one_trains(storage, train, tmp_path):
    config = tmp_path / "config.yml"
    config.write_text(yaml.safe_dump(CONFIG))
    search = ["-optimize", "--storage", storage, "--study-name", "tiny", "--max-total-trials", TRIALS, "--seed", 0]
    search += [
        "--n-evaluations",
        1,
        "--eval-episodes",
        1,
        "--pruner",
        "none",
        "--no-optim-plots",
        "--n-startup-trials",
        4,
    ]
    workers = [train(config, *search) for _ in range(WORKERS)]
    killed = kill_one_in_the_midst_of_a_trial(storage, workers, train.texts)
    codes = sorted(worker.wait(timeout=600) for worker in workers)
    assert codes == [-signal.SIGKILL, 0, 0, 0], train.texts()

    trials = trials_in(storage)
    by_state = collections.defaultdict(list)
    for trial in trials:
        by_state[trial.state.name].append(trial)
    # Those without values were begun when others had begun the last one, and not run.
    assert [trial.number for trial in by_state["FAIL"] if trial.params] == [killed.number]
    assert {*by_state} <= {"COMPLETE", "FAIL"}
    # One more if a trial begins between the moments at which the killed one is marked and its values are queued.
    assert len(by_state["COMPLETE"]) in (TRIALS, TRIALS + 1)
    (retry,) = (trial for trial in trials if is_retry(trial))
    assert retry.system_attrs["retry_history"] == [killed.number]
    assert retry.params == killed.params
    # Although all workers have the same seed, none repeats another's values.
    values = [tuple(sorted(trial.params.items())) for trial in by_state["COMPLETE"]]
    assert len({*values}) == len(values)

    best = tmp_path / "best.yml"
    assert run_command("best", storage, "-o", best)[0] == 0
    (section,) = yaml.safe_load(best.read_text()).values()
    winner = max(by_state["COMPLETE"], key=lambda trial: trial.value)
    assert {**section["policy_kwargs"]["features_extractor_kwargs"]} == EXTRACTOR
    assert section["policy_kwargs"]["net_arch"] == [8]
    assert section["policy_kwargs"]["dropout"] == pytest.approx(winner.params["dropout"])
    assert (
        section["callback"][1]["sb3_resnet.callbacks.LRScheduleCallback"]["warmup_steps"]
        == (winner.params["warmup_steps"])
    )
    assert section["env_wrapper"] == CONFIG["default"]["env_wrapper"]
    trained = train(best, "--eval-freq", -1)
    assert trained.wait(timeout=600) == 0, train.texts()
    assert (tmp_path / "logs" / "dqn" / f"{ENV}_{len([*(tmp_path / 'logs' / 'dqn').glob(ENV + '_*')])}").is_dir()
