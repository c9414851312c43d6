"""Experiment trackers, offline: the whole log, the hyperparameters and the best model, beside SB3's own outputs."""

import csv
import json
import math
import sys
import warnings

import gymnasium as gym
import pytest
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.logger import KVWriter, configure

from sb3_resnet.callbacks import (
    BestCheckpointCallback,
    MLflowTrackerCallback,
    MonitorCallback,
    WandbTrackerCallback,
)
from sb3_resnet.callbacks._tracker import Tracker, TrackerCallback, best_model, hyperparameters
from tests.helpers import Rewards, TinyGame, make_model, start


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    for name in ("WANDB_SILENT", "MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        monkeypatch.setenv(name, "true")


def train(tmp_path, *callbacks, outputs=("csv", "tensorboard")):
    """A short run with evaluations, a best model and a log; returns the model and the lines of its CSV."""
    model = make_model(policy_kwargs={"dropout": 0.1, "net_arch": [16]})
    model.set_logger(configure(str(tmp_path / "log"), [*outputs]))
    evaluation = EvalCallback(TinyGame(), n_eval_episodes=1, eval_freq=20, verbose=0)
    best = BestCheckpointCallback(save_freq=0, save_path=tmp_path / "best")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.learn(60, callback=[MonitorCallback(every=2), *callbacks, evaluation, best], log_interval=1)
    with open(tmp_path / "log" / "progress.csv", newline="") as file:
        return model, [*csv.DictReader(file)]


class Memory(Tracker):
    """A tracker without a service."""

    def __init__(self):
        super().__init__("memory")
        self.params, self.numbers, self.files, self.closed = {}, [], [], 0

    def log_hyperparameters(self, values):
        self.params.update(values)

    def log_numbers(self, values, step):
        self.numbers.append((step, dict(values)))

    def log_file(self, path):
        self.files.append(path)

    def close(self):
        self.closed += 1


class MemoryCallback(TrackerCallback):
    def __init__(self, save_best=True):
        super().__init__(save_best, 0)
        self.trackers = []

    def _open(self, hyperparameters):
        self.trackers.append(Memory())
        self.trackers[-1].log_hyperparameters(hyperparameters)
        return self.trackers[-1]


def test_a_tracker_gets_every_number_that_the_csv_gets(tmp_path):
    callback = MemoryCallback()
    model, rows = train(tmp_path, callback)
    (tracker,) = callback.trackers
    assert tracker.closed == 1
    assert tracker.params["callbacks.MonitorCallback.every"] == 2
    assert tracker.params["callbacks.BestCheckpointCallback.save_path"].endswith("best')")
    assert tracker.params["callbacks.EvalCallback.eval_freq"] == 20
    assert tracker.files == [tmp_path / "best" / "best.zip"]
    lines = [{key: float(value) for key, value in row.items() if value} for row in rows]
    for line, (step, values) in zip(lines, tracker.numbers, strict=False):
        assert values == pytest.approx(line, nan_ok=True)
        assert step == line["time/total_timesteps"]
    step, rest = tracker.numbers[-1]
    assert step == 60
    assert "rollout/exploration_rate" in rest  # what was not yet dumped
    assert len(tracker.numbers) == len(lines) + 1
    assert not [output for output in model.logger.output_formats if isinstance(output, Tracker)]
    assert list((tmp_path / "log").glob("events.out.tfevents*"))


def test_the_best_model_is_kept_only_where_it_is_asked_for(tmp_path):
    callback = MemoryCallback(save_best=False)
    train(tmp_path, callback)
    assert (tmp_path / "best" / "best.zip").exists()
    assert callback.trackers[0].files == []


def test_hyperparameters_are_flat_and_say_what_was_given():
    values = hyperparameters(make_model(learning_rate=lambda progress: 1e-3, gamma=0.9))
    expected = {
        "algorithm": "DQN",
        "policy": "ResNetCnnPolicy",
        "batch_size": 4,
        "gamma": 0.9,
        "learning_rate": "function",
        "policy_kwargs.features_extractor_kwargs.backbone": "resnet_tiny",
        "seed": 0,
    }
    assert {key: values[key] for key in expected} == expected
    assert all(value is None or isinstance(value, (bool, int, float, str)) for value in values.values())
    assert not [key for key, value in values.items() if "0x" in str(value)]
    json.dumps(values, allow_nan=False)
    assert "env" not in values  # the tiny game is not registered
    gym.register("TinyGame-v0", TinyGame)
    values = hyperparameters(make_model(env="TinyGame-v0", max_grad_norm=math.inf))
    assert (values["env"], values["max_grad_norm"]) == ("TinyGame-v0", "inf")


def test_each_learn_is_a_run_and_a_second_end_changes_nothing(tmp_path):
    callback = MemoryCallback(save_best=False)
    model = make_model()
    for _ in range(2):
        model.learn(10, callback=callback)
        callback.on_training_end()
    assert [tracker.closed for tracker in callback.trackers] == [1, 1]
    start(model, callback)  # interrupted
    start(model, callback)
    assert [tracker.closed for tracker in callback.trackers] == [1, 1, 1, 0]
    assert sum(isinstance(output, Tracker) for output in model.logger.output_formats) == 1
    bare = MemoryCallback()
    start(make_model(), bare)  # no logger yet
    bare.on_training_end()
    assert bare.trackers[0].numbers == []


@pytest.mark.parametrize("method", ["log_numbers", "log_file", "close"])
def test_a_tracker_that_breaks_is_warned_of_once_and_training_goes_on(tmp_path, method, monkeypatch):
    calls = []

    def fail(*args):
        calls.append(args)
        raise OSError("the server\nis gone")

    monkeypatch.setattr(Memory, method, fail)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = make_model()
        model.set_logger(configure(str(tmp_path / "log"), ["csv"]))
        best = BestCheckpointCallback(save_freq=0, save_path=tmp_path / "best")
        evaluation = EvalCallback(TinyGame(), n_eval_episodes=1, eval_freq=20, verbose=0)
        model.learn(60, callback=[MemoryCallback(), evaluation, best], log_interval=1)
    (told,) = (str(warning.message) for warning in caught if "memory" in str(warning.message))
    assert told.endswith("(OSError: the server is gone): training goes on without it")
    assert model.num_timesteps == 60
    assert len(calls) == 1
    assert not [output for output in model.logger.output_formats if isinstance(output, Tracker)]


def test_a_tracker_that_cannot_be_opened_ends_training_at_its_start(monkeypatch):
    monkeypatch.setattr(MemoryCallback, "_open", lambda *args: 1 / 0)
    model = make_model()
    with pytest.raises(ZeroDivisionError):
        model.learn(60, callback=MemoryCallback())
    assert model.num_timesteps == 0


def test_values_can_be_kept_from_a_tracker_and_what_is_no_number_is():
    tracker = Memory()
    tracker.write({"a": 1, "b": 2.5, "c": "text", "d": True}, {"a": ("memory",), "b": ("tensorboard",)}, 7)
    tracker.write({"c": "text"}, {}, 8)
    assert tracker.numbers == [(7, {"b": 2.5})]
    assert isinstance(tracker, KVWriter)


def test_the_best_model_is_that_of_all_phases_wherever_its_file_is(tmp_path):
    model = make_model(extractor={"backbone": "resnet_mini"})
    keeper = BestCheckpointCallback(0, tmp_path / "old")
    model.learn(8, callback=[keeper, Rewards([1.0, 9.0])])
    model.policy.set_freeze_boundary("layer4")
    assert best_model(keeper) == tmp_path / "old" / "best.zip"  # though nothing of this phase was evaluated
    again = BestCheckpointCallback(0, tmp_path / "new")
    model.learn(4, callback=[again, Rewards([2.0])], reset_num_timesteps=False)
    assert (tmp_path / "new" / "best_layer4.zip").exists()
    assert best_model(again) == tmp_path / "old" / "best.zip"


def test_the_best_model_is_that_of_an_evaluation_where_nothing_else_keeps_one(tmp_path):
    evaluation = EvalCallback(TinyGame(), best_model_save_path=str(tmp_path), warn=False)
    assert best_model(evaluation) is None
    (tmp_path / "best_model.zip").touch()
    assert best_model(evaluation) == tmp_path / "best_model.zip"
    assert best_model(None) is None


@pytest.mark.parametrize(
    ("cls", "module", "extra"), [(WandbTrackerCallback, "wandb", "wandb"), (MLflowTrackerCallback, "mlflow", "mlflow")]
)
def test_a_tracker_that_is_not_installed_is_named_with_its_extra(cls, module, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"sb3_resnet\[{extra}\]"):
        cls()


@pytest.mark.parametrize(
    ("cls", "arguments", "error", "message"),
    [
        (WandbTrackerCallback, {"mode": "offlin"}, ValueError, "mode must be one of .*did you mean 'offline'"),
        (WandbTrackerCallback, {"project": 5}, TypeError, "project must be a string, got 5"),
        (WandbTrackerCallback, {"name": ["a"]}, TypeError, "name must be a string"),
        (WandbTrackerCallback, {"folder": 5}, TypeError, "folder must be a string"),
        (WandbTrackerCallback, {"init": ["a"]}, TypeError, "init must be a dict of arguments of wandb.init"),
        (MLflowTrackerCallback, {"experiment": ""}, ValueError, "experiment must not be empty"),
        (MLflowTrackerCallback, {"experiment": None}, TypeError, "experiment must be a string"),
        (MLflowTrackerCallback, {"name": 1}, TypeError, "name must be a string"),
        (MLflowTrackerCallback, {"tracking_uri": 5}, TypeError, "tracking_uri must be a string"),
        (MLflowTrackerCallback, {"artifact_location": 5}, TypeError, "artifact_location must be a string"),
        (MLflowTrackerCallback, {"tags": ["a"]}, TypeError, "tags must be a dict of strings"),
        (MLflowTrackerCallback, {"tags": {"seed": 0}}, TypeError, "tags: 'seed' must be a string, got 0"),
    ],
)
def test_arguments_that_cannot_work_are_refused_at_construction(cls, arguments, error, message):
    with pytest.raises(error, match=message):
        cls(**arguments)


@pytest.mark.slow
def test_mlflow_keeps_the_run_in_a_database(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    callback = MLflowTrackerCallback("pong", "first", uri, (tmp_path / "files").as_uri(), {"seed": "0"})
    _, rows = train(tmp_path, callback)
    import mlflow

    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("pong").experiment_id])
    assert (run.info.run_name, run.info.status, run.data.tags["seed"]) == ("first", "FINISHED", "0")
    assert run.data.params["policy_kwargs.net_arch"] == "[16]"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    rows = [row for row in rows if row["train/loss"]]
    assert [metric.step for metric in history[: len(rows)]] == [int(row["time/total_timesteps"]) for row in rows]
    assert [metric.value for metric in history[: len(rows)]] == pytest.approx([float(r["train/loss"]) for r in rows])
    assert "monitor/q_mean" in run.data.metrics
    (artifact,) = client.list_artifacts(run.info.run_id, "best_model")
    assert artifact.path == "best_model/best.zip"
    assert artifact.file_size == (tmp_path / "best" / "best.zip").stat().st_size
    assert mlflow.active_run() is None


@pytest.mark.slow
def test_wandb_keeps_the_run_offline(tmp_path):
    import wandb

    callback = WandbTrackerCallback("pong", "first", "offline", tmp_path, {"tags": ["tiny"]})
    seen = {}

    class Watch(MonitorCallback):
        def _on_rollout_end(self):
            super()._on_rollout_end()
            run = wandb.run
            seen.update(config=dict(run.config), summary=dict(run.summary), name=run.name, tags=run.tags)

    train(tmp_path, callback, Watch(every=5))
    assert wandb.run is None  # finished
    assert (seen["name"], seen["tags"]) == ("first", ("tiny",))
    assert seen["config"]["policy_kwargs.net_arch"] == "[16]"
    assert {"train/loss", "monitor/q_mean", "eval/mean_reward", "timesteps"} <= seen["summary"].keys()
    assert len([*(tmp_path / "wandb").glob("offline-run-*/run-*.wandb")]) == 1
    best = (tmp_path / "best" / "best.zip").read_bytes()
    assert best in [path.read_bytes() for path in (tmp_path / "WANDB_DATA_DIR").rglob("*") if path.is_file()]

    active = wandb.init(mode="offline", dir=tmp_path)
    model = make_model()
    start(model, callback)
    callback.on_training_end()
    assert wandb.run is active  # the user's own stays open
    assert active.config["algorithm"] == "DQN"
    active.finish()
