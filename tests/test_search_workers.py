"""Several workers on one study: no trial is lost, and none is run twice. And what is written of the best one."""

import argparse
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import optuna
import pytest
import yaml
from optuna.trial import TrialState, create_trial
from sqlalchemy.exc import OperationalError, ProgrammingError

from sb3_resnet.common import host_optuna
from sb3_resnet.optim.search.experiment import ATTRIBUTE
from sb3_resnet.optim.search.workers import SurplusTrialError, Worker
from tests.helpers import run_command

BEAT = 0.05  # seconds between signs of life, where no other worker is alive
SAFE = 1.0  # where one is, which may be held up
UNFREEZE = "sb3_resnet.callbacks.UnfreezeCallback"
SECTION = {
    "policy": "ResNetCnnPolicy",
    "n_timesteps": 1000,
    "learning_rate": 1e-05,
    "env_wrapper": ["stable_baselines3.common.atari_wrappers.AtariWrapper"],
    "policy_kwargs": {"features_extractor_kwargs": {"last_stage": "layer2", "weights": "a.pth"}},
    "callback": [{UNFREEZE: {"phases": [{"at_timestep": 300, "unfreeze_from": "layer2"}]}}],
}


@pytest.fixture(params=["journal", pytest.param("sqlite", marks=pytest.mark.slow)])
def storage(request, tmp_path):
    """:return: a function that opens the storage as another worker does"""
    written = str(tmp_path / "study.log") if request.param == "journal" else f"sqlite:///{tmp_path / 'study.db'}"
    return lambda beat=BEAT: host_optuna.open_storage(written, beat)


def study_in(storage, beat=BEAT):
    return optuna.create_study(storage=storage(beat), study_name="s", load_if_exists=True)


class Objective:
    """Counts how often each value was tried."""

    def __init__(self, seconds=0.0):
        self.seconds, self.lock, self.tried = seconds, threading.Lock(), []

    def __call__(self, trial):
        x = trial.suggest_float("x", 0, 1)
        with self.lock:
            self.tried.append(x)
        time.sleep(self.seconds)
        return x


def run_workers(storage, objective, count, total, beat):
    """Each in a thread, with a storage of its own."""
    studies = [study_in(storage, beat) for _ in range(count)]
    with ThreadPoolExecutor(count) as pool:
        for done in [pool.submit(Worker(study, objective, total, BEAT).run, 100) for study in studies]:
            done.result()
    return studies[0].get_trials()


def states(trials):
    return [trial.state.name for trial in trials]


@pytest.mark.slow
def test_workers_run_so_many_trials_in_all(storage):
    objective = Objective()
    trials = run_workers(storage, objective, 3, 8, 60)
    assert len(objective.tried) == len({*objective.tried}) == 8
    assert states(trials).count("COMPLETE") == 8
    assert {*states(trials)} <= {"COMPLETE", "FAIL"}  # FAIL: others had begun the last one


# SQLite holds up several writers for seconds; test_search_killed.py does this with PostgreSQL.
@pytest.mark.slow
@pytest.mark.parametrize("storage", ["journal"], indirect=True)
def test_the_trial_of_a_dead_worker_is_run_again_with_its_values_and_once(storage):
    dead = study_in(storage).ask()
    x = dead.suggest_float("x", 0, 1)
    objective = Objective()
    trials = run_workers(storage, objective, 3, 6, SAFE)
    assert states(trials)[dead.number] == "FAIL"
    (retry,) = (trial for trial in trials if host_optuna.is_retry(trial))
    assert retry.system_attrs["retry_history"] == [dead.number]
    assert (retry.params, retry.state) == ({"x": x}, TrialState.COMPLETE)
    assert objective.tried.count(x) == 1
    assert len(objective.tried) == len({*objective.tried}) == states(trials).count("COMPLETE")
    assert len(objective.tried) in (6, 7)  # one more where a worker begins while the dead one's values are queued
    assert "RUNNING" not in states(trials)
    assert "WAITING" not in states(trials)


def test_a_trial_that_dies_before_its_first_value_is_run_too(storage):
    """It is the only one there may be, so that the worker has nothing to do but wait for it."""
    study_in(storage).ask()
    objective = Objective()
    trials = run_workers(storage, objective, 1, 1, BEAT)
    assert states(trials) == ["FAIL", "COMPLETE"]
    assert len(objective.tried) == 1


@pytest.mark.slow
def test_a_slow_worker_that_gives_signs_of_life_is_waited_for(storage):
    """Its trial takes three times as long as a dead one is waited for."""
    slow = Objective(15 * SAFE)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(Worker(study_in(storage, SAFE), slow, 1, BEAT).run, 1)
        while not slow.tried:
            time.sleep(0.01)
        fast = Objective()
        Worker(study_in(storage, SAFE), fast, 1, BEAT).run(1)
        assert states(study_in(storage).trials) == ["COMPLETE"]
        running.result()
    assert (len(slow.tried), fast.tried) == (1, [])


def test_a_worker_with_its_own_number_of_trials_waits_for_those_that_run(storage):
    dead = study_in(storage).ask()
    x = dead.suggest_float("x", 0, 1)
    objective = Objective()
    Worker(study_in(storage), objective, None, BEAT).run(2)
    assert len({*objective.tried}) == len(objective.tried) >= 2
    assert objective.tried.count(x) == 1


@pytest.mark.parametrize("total", [None, 1])
def test_a_trial_that_is_begun_too_many_is_not_run(total, tmp_path):
    """As when two workers see the same trial to be run again, or the same last one to be begun."""
    study, objective = optuna.create_study(storage=host_optuna.open_storage(str(tmp_path / "s.log"), 1)), Objective()
    worker = Worker(study, objective, total, BEAT)
    worker.run(1)
    late = worker if total is None else Worker(study, objective, total, BEAT)
    with pytest.raises(SurplusTrialError):
        study.optimize(late, n_trials=1)
    assert (len(objective.tried), states(study.trials)) == (1, ["COMPLETE", "FAIL"])
    assert study.trials[1].params == {}


def test_values_that_bring_down_every_worker_are_given_up(storage):
    study = study_in(storage)
    for retries in range(3):
        trial = study.ask()
        assert trial.suggest_float("x", 0, 1) is not None
        system = study.get_trials()[trial.number].system_attrs
        assert len(system.get("retry_history", [])) == retries
        study = study_in(storage)
        deadline = time.monotonic() + 60
        while states(study.get_trials())[trial.number] == "RUNNING" and time.monotonic() < deadline:
            host_optuna.fail_the_dead(study)
            time.sleep(BEAT)
    assert states(study.get_trials()) == ["FAIL"] * 3


def failing(errors):
    def make(url, **options):
        if errors:
            raise errors.pop(0)
        return argparse.Namespace(url=url)

    return make


def test_a_worker_that_makes_the_tables_when_others_do_tries_again(monkeypatch):
    table = ProgrammingError("create table", {}, Exception('relation "studies" already exists'))
    internal = optuna.exceptions.StorageInternalError("An exception is raised during the commit.")
    internal.__cause__ = Exception("duplicate key value violates unique constraint")
    monkeypatch.setattr(host_optuna, "DatabaseHeartbeatStorage", failing([table, internal]))
    opened = host_optuna.open_storage("postgresql://host", 3)
    assert (opened.url, opened.seconds) == ("postgresql://host", 3)
    monkeypatch.setattr(host_optuna, "DatabaseHeartbeatStorage", failing([table] * 20))
    monkeypatch.setattr(host_optuna.time, "sleep", lambda seconds: None)
    with pytest.raises(ProgrammingError):
        host_optuna.open_storage("postgresql://host", 3)


def test_another_error_of_a_database_is_raised_at_once(monkeypatch):
    errors = [OperationalError("connect", {}, Exception("connection refused"))] * 2
    monkeypatch.setattr(host_optuna, "DatabaseHeartbeatStorage", failing(errors))
    with pytest.raises(OperationalError):
        host_optuna.open_storage("postgresql://host", 3)
    assert len(errors) == 1


def test_a_watch_counts_from_its_own_first_look_and_from_each_change():
    now = [0.0]
    watch = host_optuna.Watch(10, lambda: now[0])
    for second, values, expected in [
        (0, {"a": 1, "b": None}, []),
        (10, {"a": 2, "b": None}, []),
        (11, {"a": 2, "b": None}, ["b"]),
        (20, {"a": 2}, []),
        (21, {"a": 2, "b": None}, ["a"]),
    ]:
        now[0] = second
        assert watch.unchanged(values.items()) == expected


def write_study(path, trials, name="pong"):
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    study = optuna.create_study(storage=storage, study_name=name, direction="maximize")
    for trial in trials:
        study.add_trial(trial)


def kept(at=0.3, **section):
    values = {"unfreeze_at": at}
    return {ATTRIBUTE: {"algo": "qrdqn", "env": "Pong-v4", "section": {**SECTION, **section}, "values": values}}


def test_best_prints_the_section_of_the_best_trial(tmp_path):
    path = tmp_path / "study.log"
    write_study(path, [create_trial(value=v, user_attrs=kept(batch_size=b)) for v, b in ((1.0, 8), (3.5, 16), (2, 32))])
    status, text, _ = run_command("best", path)
    assert status == 0
    assert yaml.safe_load(text) == {"Pong-v4": {**SECTION, "batch_size": 16}}
    assert "Trial 1 of study pong: mean reward 3.5" in text
    assert "--algo qrdqn --env Pong-v4 --gym-packages sb3_resnet --conf-file best.yml" in text
    assert yaml.safe_load(run_command("best", path, "--trial", 2)[1])["Pong-v4"]["batch_size"] == 32


def test_a_searched_phase_keeps_its_part_of_a_longer_run(tmp_path):
    write_study(tmp_path / "study.log", [create_trial(value=1.0, user_attrs=kept(batch_size=8))])
    section = yaml.safe_load(run_command("best", tmp_path / "study.log", "-n", 5000)[1])["Pong-v4"]
    assert section["n_timesteps"] == 5000
    assert section["callback"] == [{UNFREEZE: {"phases": [{"at_timestep": 1500, "unfreeze_from": "layer2"}]}}]


def test_best_writes_a_new_file_only(tmp_path):
    write_study(tmp_path / "study.log", [create_trial(value=1.0, user_attrs=kept())])
    output = tmp_path / "found.yml"
    assert run_command("best", tmp_path / "study.log", "-o", output)[0] == 0
    assert yaml.safe_load(output.read_text()) == {"Pong-v4": SECTION}
    assert f"--conf-file {output}" in output.read_text()
    status, _, error = run_command("best", tmp_path / "study.log", "-o", output)
    assert (status, "is not overwritten" in error) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.log"], "missing.log is no file"),
        (["sqlite:///missing.db"], "missing.db is no file"),
        (["study.log", "--study-name", "breakout"], "has no study 'breakout', only pong"),
        (["study.log", "--trial", 7], "has no trial 7: it has 2, counted from 0"),
        (["study.log"], "no trial that was completed (1 FAIL, 1 PRUNED). The last error of a trial: ValueError: bad"),
        (["study.log", "--trial", 0], "Trial 0 holds no section"),
        (["study.log", "-n", 0, "--trial", 1], "--n-timesteps must be"),
    ],
)
def test_best_says_what_is_missing(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pruned = create_trial(state=TrialState.PRUNED, user_attrs={**kept(), "error": "ValueError: bad"})
    write_study("study.log", [create_trial(state=TrialState.FAIL), pruned])
    status, text, error = run_command("best", *arguments)
    assert (status, text) == (1, "")
    assert message in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["study.log"]


def test_best_asks_which_of_several_studies(tmp_path):
    for name in ("a", "b"):
        write_study(tmp_path / "study.log", [create_trial(value=1.0, user_attrs=kept())], name)
    assert "write --study-name with one of a, b" in run_command("best", tmp_path / "study.log")[2]
    assert run_command("best", tmp_path / "study.log", "--study-name", "b")[0] == 0
