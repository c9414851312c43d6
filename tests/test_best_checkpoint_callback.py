"""BestCheckpointCallback: newest and best models, whole whatever happens."""

import errno
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from types import SimpleNamespace

import pytest
from rl_zoo3.callbacks import TrialEvalCallback
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback
from stable_baselines3.common.vec_env import DummyVecEnv

import sb3_resnet
from sb3_resnet import newest_checkpoint
from sb3_resnet.callbacks import BestCheckpointCallback, UnfreezeCallback
from sb3_resnet.callbacks.best_checkpoint import RECORD, checkpoints
from sb3_resnet.optim.groups import recall
from tests.helpers import Rewards, TinyGame, assert_same, make_model, slowly, snapshot

MINI = {"backbone": "resnet_mini"}


def learn(model, folder, steps, rewards=(), save_freq=0, **kwargs):
    evaluations = Rewards(rewards, eval_freq=4 if rewards else 10**9)
    model.learn(steps, callback=[BestCheckpointCallback(save_freq, folder, **kwargs), evaluations])
    return model


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_checkpoints_are_kept_and_load(tmp_path):
    model = learn(make_model(), tmp_path, 40, save_freq=8, keep_last=2)
    assert names(tmp_path) == ["rl_model_32_steps.zip", "rl_model_40_steps.zip"]
    assert newest_checkpoint(tmp_path).name == "rl_model_40_steps.zip"
    assert DQN.load(newest_checkpoint(tmp_path), device="cpu").num_timesteps == 40
    assert model.num_timesteps == 40


def test_numbers_that_start_anew_do_not_make_old_checkpoints_new(tmp_path):
    model = learn(make_model(extractor=MINI), tmp_path, 32, save_freq=16)
    assert newest_checkpoint(tmp_path).name == "rl_model_32_steps.zip"
    learn(model, tmp_path, 20, save_freq=16)
    assert newest_checkpoint(tmp_path).name == "rl_model_20_steps.zip"
    assert [path.name for path in checkpoints(tmp_path)] == [f"rl_model_{n}_steps.zip" for n in (32, 16, 20)]


def test_the_replay_buffer_travels_with_its_checkpoint(tmp_path):
    model = learn(make_model(), tmp_path, 24, save_freq=8, keep_last=1, save_replay_buffer=True)
    assert names(tmp_path) == ["rl_model_24_steps.zip", "rl_model_24_steps_replay_buffer.pkl"]
    loaded = DQN.load(newest_checkpoint(tmp_path), env=TinyGame(), device="cpu")
    loaded.load_replay_buffer(tmp_path / "rl_model_24_steps_replay_buffer.pkl")
    assert (loaded.replay_buffer.observations == model.replay_buffer.observations).all()


def test_a_replay_buffer_that_this_run_did_not_write_stays(tmp_path):
    foreign = ["rl_model_replay_buffer_4_steps.pkl", "rl_model_4_steps_replay_buffer.pkl"]
    for name in foreign:
        (tmp_path / name).write_bytes(b"a buffer")
    learn(make_model(extractor=MINI), tmp_path, 24, save_freq=12, keep_last=1, save_replay_buffer=True)
    assert names(tmp_path) == sorted(["rl_model_24_steps.zip", "rl_model_24_steps_replay_buffer.pkl", *foreign])


class Spy(BaseCallback):
    """Weights at each fourth step, when the evaluation takes place."""

    def __init__(self):
        super().__init__()
        self.weights = []

    def _on_step(self):
        if self.n_calls % 4 == 0:
            self.weights.append(snapshot(self.model.policy))
        return True


@pytest.mark.parametrize(
    ("rewards", "best"),
    [([1.0, 3.0, 2.0], 1), ([2.0, 2.0, 2.0], 0), ([math.nan, -7.0, math.nan], 1), ([-3.0, -2.0, -1.0], 2)],
)
@pytest.mark.parametrize("first", [True, *slowly(False)])
def test_the_best_model_is_the_one_that_was_evaluated(tmp_path, rewards, best, first):
    model, spy = make_model(learning_starts=0), Spy()
    callbacks = [BestCheckpointCallback(0, tmp_path), Rewards(rewards)]
    model.learn(12, callback=[spy, *callbacks[:: 1 if first else -1]])
    for name in ("best.zip", "best_frozen.zip"):
        assert_same(DQN.load(tmp_path / name, device="cpu").policy.state_dict(), spy.weights[best])
    record = json.loads((tmp_path / RECORD).read_text())
    assert {key: entry["reward"] for key, entry in record.items()} == {"best": rewards[best], "frozen": rewards[best]}
    assert record["best"]["timesteps"] == 4 * (best + 1)


def test_nothing_is_best_where_every_reward_is_nan(tmp_path):
    learn(make_model(), tmp_path, 8, [math.nan, math.nan])
    assert names(tmp_path) == []


@pytest.mark.parametrize("first", [True, False])
def test_the_best_model_may_be_the_one_whose_evaluation_stops_training(tmp_path, first):
    model, spy = make_model(learning_starts=0), Spy()
    evaluations = Rewards([1.0, 2.0, 99.0], stop_at=99.0)
    callback = BestCheckpointCallback(0, tmp_path)
    model.learn(40, callback=[spy, callback, evaluations] if first else [spy, evaluations, callback])
    assert model.num_timesteps == 12
    assert json.loads((tmp_path / RECORD).read_text())["best"]["reward"] == 99.0
    assert_same(DQN.load(tmp_path / "best.zip", device="cpu").policy.state_dict(), spy.weights[-1])
    saved = (tmp_path / "best.zip").stat().st_mtime_ns
    callback.on_training_end()  # RL-Zoo calls it again
    assert (tmp_path / "best.zip").stat().st_mtime_ns == saved


def test_each_phase_has_its_own_best(tmp_path):
    model = make_model()
    learn(model, tmp_path, 8, [5.0, 1.0])
    model.policy.set_freeze_boundary("layer4")
    learn(model, tmp_path, 8, [2.0, 3.0])
    record = json.loads((tmp_path / RECORD).read_text())
    assert {key: entry["reward"] for key, entry in record.items()} == {"best": 5.0, "frozen": 5.0, "layer4": 3.0}
    assert DQN.load(tmp_path / "best_layer4.zip", device="cpu").policy.freeze_boundary == "layer4"


@pytest.mark.parametrize("same_folder", [True, False])
def test_the_record_survives_a_resume(tmp_path, same_folder):
    model = learn(make_model(), tmp_path / "one", 8, [5.0, 1.0])
    model.save(tmp_path / "model")
    best = (tmp_path / "one" / "best.zip").read_bytes()
    resumed = DQN.load(tmp_path / "model", env=TinyGame(), device="cpu")
    folder = tmp_path / ("one" if same_folder else "two")
    learn(resumed, folder, 4, [4.0])  # SB3's EvalCallback would call this first reward the best
    assert (tmp_path / "one" / "best.zip").read_bytes() == best
    assert not (tmp_path / "two" / "best.zip").exists()
    learn(resumed, folder, 4, [6.0])
    assert json.loads((folder / RECORD).read_text())["best"]["reward"] == 6.0


@pytest.mark.parametrize("content", ["", '{"best": {"rew', "[1]", '{"best": 3}', '{"best": {"reward": 1.0}}', "\xff"])
def test_a_broken_record_is_named_and_can_be_deleted(tmp_path, content):
    model = learn(make_model(extractor={"backbone": "resnet_mini"}), tmp_path, 8, [5.0, 1.0])
    (tmp_path / RECORD).write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"best\.json' is no record of best models .*Delete it"):
        learn(model, tmp_path, 4, [4.0])
    (tmp_path / RECORD).unlink()
    learn(model, tmp_path, 4, [4.0])
    assert not (tmp_path / RECORD).exists()  # 5.0 is still the best


def test_a_new_run_does_not_take_over_the_record_of_another(tmp_path):
    learn(make_model(), tmp_path, 4, [5.0])
    with pytest.warns(UserWarning, match="record of another run"):
        learn(make_model(), tmp_path, 4, [1.0])
    assert json.loads((tmp_path / RECORD).read_text())["best"]["reward"] == 1.0


def test_the_folder_is_the_evaluations_where_none_is_given(tmp_path):
    evaluations = Rewards([1.0], best_model_save_path=str(tmp_path / "eval"))
    make_model().learn(4, callback=[BestCheckpointCallback(), evaluations])
    assert "best.zip" in names(tmp_path / "eval")
    with pytest.raises(ValueError, match="write save_path=FOLDER"):
        make_model().learn(4, callback=[BestCheckpointCallback(), Rewards([1.0])])


def test_without_an_evaluation_it_says_what_it_cannot_do(tmp_path):
    with pytest.warns(UserWarning, match="add an EvalCallback"):
        make_model().learn(8, callback=BestCheckpointCallback(4, tmp_path))
    assert names(tmp_path) == ["rl_model_4_steps.zip", "rl_model_8_steps.zip"]


@pytest.mark.parametrize("writer", ["gone", "this", "other", "no number", "99999999999999999999"])
def test_left_overs_of_a_killed_process_go_and_those_of_others_stay(tmp_path, writer):
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    pid = {"gone": process.pid, "this": os.getpid(), "other": os.getppid()}.get(writer, writer)
    left_over = tmp_path / f".writing-{pid}-rl_model_4_steps.zip"
    left_over.write_bytes(b"half a file")
    learn(make_model(extractor={"backbone": "resnet_mini"}), tmp_path, 4)
    assert left_over.exists() == (writer == "other")


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    model = learn(make_model(), tmp_path, 4, [1.0])
    before = (tmp_path / "best.zip").read_bytes()
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        learn(model, tmp_path, 4, [2.0])
    assert (tmp_path / "best.zip").read_bytes() == before
    assert json.loads((tmp_path / RECORD).read_text())["best"]["reward"] == 1.0


def test_a_record_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch):
    model = learn(make_model(extractor=MINI), tmp_path, 4, [1.0])
    before, replace = (tmp_path / RECORD).read_bytes(), os.replace

    def refuse(source, destination):
        if str(destination).endswith(RECORD):
            raise OSError("disk full")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match=r"disk full: not saved: .*best\.json"):
        learn(model, tmp_path, 4, [2.0])
    assert (tmp_path / RECORD).read_bytes() == before


def test_no_checkpoint_says_where_it_looked(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        newest_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"save_freq": -1}, ValueError, "save_freq must be finite and >= 0"),
        ({"keep_last": 0}, ValueError, "keep_last must be finite and >= 1"),
        ({"save_replay_buffer": 1}, TypeError, "save_replay_buffer must be true or false"),
        ({"save_frequency": 1}, TypeError, "unexpected keyword argument 'save_frequency'"),
        ({"save_path": 1}, TypeError, "save_path must be a string or a path, got 1"),
        ({"save_freq_episodes": -1}, ValueError, "save_freq_episodes must be finite and >= 0"),
    ],
)
def test_bad_arguments_are_refused_at_construction(arguments, error, message):
    with pytest.raises(error, match=message):
        BestCheckpointCallback(**arguments)


@pytest.mark.slow
def test_a_checkpoint_has_all_updates_of_the_steps_before_it(tmp_path):
    model = make_model(extractor=MINI, learning_starts=0, train_freq=20, gradient_steps=20)
    learn(model, tmp_path, 120, save_freq=20, keep_last=10)
    updates = {path.name: DQN.load(path, device="cpu")._n_updates for path in checkpoints(tmp_path)}
    assert updates == {f"rl_model_{steps}_steps.zip": steps for steps in range(20, 121, 20)}


def test_a_run_that_is_stopped_within_a_rollout_leaves_the_last_whole_state(tmp_path):
    class Stop(BaseCallback):
        def _on_step(self):
            return self.num_timesteps < 14

    model = make_model(extractor=MINI)
    callback = BestCheckpointCallback(4, tmp_path)
    with pytest.warns(UserWarning, match="add an EvalCallback"):
        model.learn(40, callback=[Stop(), callback])
    callback.on_training_end()  # RL-Zoo calls it again
    assert newest_checkpoint(tmp_path).name == "rl_model_12_steps.zip"


def test_checkpoints_are_taken_by_episodes(tmp_path):
    model = make_model(extractor=MINI, env=TinyGame(length=10), train_freq=5)
    learn(model, tmp_path, 70, save_freq_episodes=3, keep_last=9)
    assert [path.name for path in checkpoints(tmp_path)] == [f"rl_model_{n}_steps.zip" for n in (30, 60, 70)]


@pytest.mark.parametrize("readable", [True, False])
def test_the_newest_checkpoint_is_that_of_the_counters_whatever_the_file_times(tmp_path, readable):
    model = make_model(extractor=MINI)
    for index, steps in enumerate((1000, 900, 1100)):
        path = tmp_path / f"rl_model_{steps}_steps.zip"
        model.num_timesteps = steps
        model.save(path)
        if not readable:
            path.write_bytes(b"")
        os.utime(path, (1000 - index, 1000 - index))
    assert [path.name.split("_")[2] for path in checkpoints(tmp_path)] == ["900", "1000", "1100"]


def test_the_time_of_a_file_decides_between_equal_counters(tmp_path):
    model = make_model(extractor=MINI)
    for name, moment in {"rl_model_5_steps.zip": 2, "rl_model_2_5_steps.zip": 1}.items():
        model.save(tmp_path / name)
        os.utime(tmp_path / name, (moment, moment))
    assert newest_checkpoint(tmp_path).name == "rl_model_5_steps.zip"


def test_a_copied_folder_is_resumed_from_its_newest_checkpoint_and_pruned_in_order(tmp_path):
    learn(make_model(extractor=MINI), tmp_path / "one", 24, save_freq=8, keep_last=3)
    shutil.copytree(tmp_path / "one", tmp_path / "two", copy_function=shutil.copy)
    for index, steps in enumerate((24, 16, 8)):
        os.utime(tmp_path / "two" / f"rl_model_{steps}_steps.zip", (index, index))
    assert newest_checkpoint(tmp_path / "two").name == "rl_model_24_steps.zip"
    resumed = DQN.load(newest_checkpoint(tmp_path / "two"), env=TinyGame(), device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluations = Rewards([], eval_freq=10**9)
        callbacks = [BestCheckpointCallback(8, tmp_path / "two", keep_last=2), evaluations]
        resumed.learn(8, callback=callbacks, reset_num_timesteps=False)
    assert names(tmp_path / "two") == ["rl_model_24_steps.zip", "rl_model_32_steps.zip"]
    assert len(names(tmp_path / "one")) == 3


def test_going_back_removes_no_checkpoint_that_lies_ahead(tmp_path):
    learn(make_model(extractor=MINI), tmp_path, 40, save_freq=8, keep_last=9)
    resumed = DQN.load(tmp_path / "rl_model_16_steps.zip", env=TinyGame(), device="cpu")
    callbacks = [BestCheckpointCallback(8, tmp_path, keep_last=1), Rewards([], eval_freq=10**9)]
    resumed.learn(8, callback=callbacks, reset_num_timesteps=False)
    assert names(tmp_path) == [f"rl_model_{n}_steps.zip" for n in (24, 32, 40)]


def test_files_of_another_run_stay_as_they_are(tmp_path):
    learn(make_model(extractor=MINI), tmp_path, 24, save_freq=8, keep_last=2, save_replay_buffer=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.warns(UserWarning, match=r"of another run \(rl_model_24_steps\.zip and 1 more\).*another save_path"):
        learn(make_model(extractor=MINI), tmp_path, 32, save_freq=8, keep_last=1, save_replay_buffer=True)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert {*names(tmp_path)} - {*before} == {"rl_model_32_steps.zip", "rl_model_32_steps_replay_buffer.pkl"}


def test_checkpoints_of_the_hosts_own_callback_stay(tmp_path):
    """RL-Zoo's ``--save-freq`` puts them under the same names into the same folder."""
    own = BestCheckpointCallback(8, tmp_path, keep_last=1)
    hosts = CheckpointCallback(4, str(tmp_path))
    make_model(extractor=MINI).learn(24, callback=[hosts, own, Rewards([], eval_freq=10**9)])
    assert {path.name for path in checkpoints(tmp_path)} == {
        "rl_model_2_24_steps.zip", *(f"rl_model_{n}_steps.zip" for n in range(4, 25, 4))
    }  # fmt: skip
    found = [path for path in checkpoints(tmp_path) if "random_states.json" in zipfile.ZipFile(path).namelist()]
    assert [path.name for path in found] == ["rl_model_2_24_steps.zip"]
    assert newest_checkpoint(tmp_path) == found[0]


@pytest.mark.parametrize("reward", ["NaN", "Infinity", "-Infinity"])
def test_a_best_reward_that_is_no_number_blocks_nothing(tmp_path, reward):
    model = learn(make_model(extractor=MINI), tmp_path, 8, [math.inf, 5.0])
    assert json.loads((tmp_path / RECORD).read_text())["best"]["reward"] == 5.0
    (tmp_path / RECORD).write_text((tmp_path / RECORD).read_text().replace("5.0", reward))
    with pytest.warns(UserWarning, match=r"best\.json: a best reward that is NaN or infinite is left out"):
        learn(model, tmp_path, 4, [4.0])
    assert json.loads((tmp_path / RECORD).read_text())["best"]["reward"] == 4.0


def test_a_checkpoint_that_cannot_be_saved_is_warned_of_and_training_goes_on(tmp_path, monkeypatch):
    model = make_model(extractor=MINI)
    save = model.save

    def full(path, *args, **kwargs):
        save(path)
        if 8 < model.num_timesteps < 24:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(model, "save", full)
    with pytest.warns(UserWarning, match=r"could not save .*rl_model_16_steps\.zip .*No space left.*Training goes on"):
        learn(model, tmp_path, 24, save_freq=8, save_replay_buffer=True)
    assert model.num_timesteps == 24
    saved = [f"rl_model_{step}_steps{end}" for step in (24, 8) for end in (".zip", "_replay_buffer.pkl")]
    assert names(tmp_path) == saved


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), TypeError()])
def test_nothing_half_written_stays_whatever_ends_the_saving(tmp_path, error, monkeypatch):
    model = learn(make_model(extractor=MINI), tmp_path, 4, [1.0])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def broken(path, *args, **kwargs):
        path.write_bytes(b"half a model")
        raise error

    monkeypatch.setattr(model, "save", broken)
    with pytest.raises(type(error)) as caught:
        learn(model, tmp_path, 4, [2.0])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    if isinstance(error, OSError):
        assert caught.value.errno == errno.ENOSPC
        assert str(tmp_path / "best.zip") in str(caught.value)
    assert recall(model.policy.optimizer, "best_checkpoint")["record"]["best"]["reward"] == 1.0


@pytest.mark.parametrize("place", ["file", "file/inside"])
def test_the_folder_is_tried_before_training(tmp_path, place):
    (tmp_path / "file").write_text("not a folder")
    model = make_model(extractor=MINI)
    with pytest.raises(OSError, match=r"nothing can be saved there, write another folder: .*file"):
        learn(model, tmp_path / place, 8)
    assert model.num_timesteps == 0


def test_every_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    synced, renamed = [], []
    fsync, replace = os.fsync, os.replace

    def watch_fsync(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def watch_replace(source, destination):
        assert synced[-1] == str(source) or str(source) in synced
        renamed.append((str(source), str(destination)))
        replace(source, destination)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "replace", watch_replace)
    learn(make_model(extractor=MINI), tmp_path, 8, [1.0, 2.0], save_freq=8, save_replay_buffer=True)
    assert {destination for _, destination in renamed} == {str(path) for path in tmp_path.iterdir()}
    assert all(os.path.basename(source).startswith(".writing-") for source, _ in renamed)
    assert synced[-1] == str(tmp_path)  # the new name too


def test_the_home_folder_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    learn(make_model(extractor=MINI), "~/saved", 8, save_freq=8)
    assert newest_checkpoint("~/saved") == tmp_path / "saved" / "rl_model_8_steps.zip"


@pytest.mark.parametrize(
    ("policy", "frozen", "expected"),
    [
        ("resnet", True, ["best.json", "best.zip", "best_frozen.zip"]),
        ("resnet", False, ["best.json", "best.zip", "best_adapter.zip"]),
        ("nature", False, ["best.json", "best.zip"]),
    ],
)
def test_ppos_phase_is_named_after_the_boundary_of_its_extractor(tmp_path, policy, frozen, expected):
    extractor = {"backbone": "resnet_mini", "freeze_backbone": not (policy == "resnet" and not frozen)}
    kwargs = {"features_extractor_class": sb3_resnet.ResNetExtractor, "features_extractor_kwargs": extractor}
    shape = (4, 36, 36) if policy == "nature" else (4, 32, 32)
    model = PPO("CnnPolicy", TinyGame(shape), n_steps=8, batch_size=4, n_epochs=1, device="cpu",
                policy_kwargs=kwargs if policy == "resnet" else None)  # fmt: skip
    evaluations = Rewards([1.0, 2.0])
    evaluations.eval_env = DummyVecEnv([lambda: TinyGame(shape)])
    model.learn(8, callback=[BestCheckpointCallback(0, tmp_path), evaluations])
    assert names(tmp_path) == expected


class Trial(Rewards):
    """As RL-Zoo's TrialEvalCallback."""

    def __init__(self, rewards, **kwargs):
        super().__init__(rewards, **kwargs)
        self.trial, self.is_pruned = object(), False


def test_rl_zoos_trials_are_known_by_its_callback():
    trial = SimpleNamespace(report=lambda *args: None, should_prune=lambda: False)
    evaluations = TrialEvalCallback(DummyVecEnv([TinyGame]), trial, eval_freq=10**9)
    phases = [{"at_timestep": 1, "unfreeze_from": "layer4", "restore_best": True}]
    with pytest.raises(RuntimeError, match="ends the search"):
        make_model(extractor=MINI).learn(4, callback=[UnfreezeCallback(phases), evaluations])


def test_a_trial_of_a_search_keeps_nothing_and_still_restores_the_best(tmp_path, capsys):
    phases = [{"at_timestep": 12, "unfreeze_from": "layer4", "restore_best": True}]
    keeper = BestCheckpointCallback(4, tmp_path / "saved")
    model = make_model(extractor=MINI)
    model.learn(16, callback=[UnfreezeCallback(phases), keeper, Trial([1.0, 3.0, 2.0, 0.0])])
    assert "restored the best weights, mean reward 3" in capsys.readouterr().out
    assert names(tmp_path) == []
    assert not keeper.best_of_phase()[0].parent.exists()
    without_folder = BestCheckpointCallback()
    make_model(extractor=MINI).learn(4, callback=[without_folder, Trial([1.0])])


def test_a_refusal_in_a_trial_ends_the_search_in_its_own_words():
    """RL-Zoo takes a ValueError for bad hyperparameters, prunes the trial, and goes on to the next."""
    refused = UnfreezeCallback([{"at_timestep": 1, "unfreeze_from": "layer4", "restore_best": True}])
    with pytest.raises(RuntimeError, match="UnfreezeCallback ends the search: restore_best needs a Best") as caught:
        make_model(extractor=MINI).learn(4, callback=[refused, Trial([1.0])])
    assert not isinstance(caught.value, (ValueError, AssertionError))


SAVER = """
import os, sys, warnings
warnings.simplefilter("ignore")
from stable_baselines3 import DQN
from tests.helpers import TinyGame, make_model
from sb3_resnet.callbacks import BestCheckpointCallback
from sb3_resnet.callbacks.best_checkpoint import checkpoints
for _ in sys.stdin:  # a process a line: forking spares each one the imports
    child = os.fork()
    if child == 0:
        found = checkpoints(sys.argv[1])
        model = DQN.load(found[-1], env=TinyGame(), device="cpu") if found else make_model(learning_starts=10**9)
        model.learn(10**6, callback=BestCheckpointCallback(4, sys.argv[1], keep_last=2), reset_num_timesteps=False)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("gone", flush=True)
"""


@pytest.mark.slow
def test_a_process_killed_at_any_moment_leaves_only_whole_checkpoints(tmp_path):
    """20 kills of a process that does little but save; each time the newest checkpoint loads."""
    rng = random.Random(0)
    command = [sys.executable, "-c", SAVER, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    left_over = 0
    with subprocess.Popen(command, env=environment, **pipes) as saver:
        for _ in range(20):
            before = checkpoints(tmp_path)
            saver.stdin.write("\n")
            child = int(saver.stdout.readline())
            while checkpoints(tmp_path) == before:
                time.sleep(0.001)
            time.sleep(rng.uniform(0.0, 0.05))
            os.kill(child, signal.SIGKILL)
            assert saver.stdout.readline() == "gone\n"
            left_over += any(path.name.startswith(".writing") for path in tmp_path.iterdir())
            newest = newest_checkpoint(tmp_path)
            resumed = DQN.load(newest, env=TinyGame(), device="cpu")
            assert resumed.num_timesteps == int(newest.name.split("_")[2])
            assert len(checkpoints(tmp_path)) <= 3
            for path in checkpoints(tmp_path):
                DQN.load(path, device="cpu")
        saver.stdin.close()
    assert left_over > 0  # some kills did hit a save


def test_the_folder_may_lie_in_the_home_folder_and_must_be_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert BestCheckpointCallback(save_path="~/runs").save_path == tmp_path / "runs"
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "rl_model_8_steps.zip").touch()
    assert newest_checkpoint("~/runs") == tmp_path / "runs" / "rl_model_8_steps.zip"
    with pytest.raises(TypeError, match="save_path must be a string or a path, got 1"):
        BestCheckpointCallback(save_path=1)
