"""BestCheckpointCallback: newest and best models, whole whatever happens."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback

from sb3_resnet import newest_checkpoint
from sb3_resnet.callbacks import BestCheckpointCallback
from sb3_resnet.callbacks.best_checkpoint import RECORD, checkpoints
from tests.helpers import TinyGame, assert_same, make_model, snapshot
from tests.test_unfreeze_callback import Rewards


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
    model = learn(make_model(), tmp_path, 40, save_freq=16)
    assert newest_checkpoint(tmp_path).name == "rl_model_32_steps.zip"
    learn(model, tmp_path, 20, save_freq=16)
    assert newest_checkpoint(tmp_path).name == "rl_model_16_steps.zip"
    assert [path.name for path in checkpoints(tmp_path)] == ["rl_model_32_steps.zip", "rl_model_16_steps.zip"]


def test_the_replay_buffer_travels_with_its_checkpoint(tmp_path):
    model = learn(make_model(), tmp_path, 24, save_freq=8, keep_last=1, save_replay_buffer=True)
    assert names(tmp_path) == ["rl_model_24_steps.zip", "rl_model_24_steps_replay_buffer.pkl"]
    loaded = DQN.load(newest_checkpoint(tmp_path), env=TinyGame(), device="cpu")
    loaded.load_replay_buffer(tmp_path / "rl_model_24_steps_replay_buffer.pkl")
    assert (loaded.replay_buffer.observations == model.replay_buffer.observations).all()


def test_a_replay_buffer_whose_model_was_never_saved_goes_with_the_next_checkpoint(tmp_path):
    foreign = tmp_path / "rl_model_replay_buffer_4_steps.pkl"  # as SB3's CheckpointCallback names them
    for path in (foreign, tmp_path / "rl_model_4_steps_replay_buffer.pkl"):
        path.write_bytes(b"a buffer")
    learn(make_model(extractor={"backbone": "resnet_mini"}), tmp_path, 24, save_freq=12, save_replay_buffer=True)
    saved = [f"rl_model_{step}_steps{end}" for step in (12, 24) for end in (".zip", "_replay_buffer.pkl")]
    assert names(tmp_path) == [*saved, foreign.name]


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
@pytest.mark.parametrize("first", [True, False])
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


def test_no_checkpoint_says_where_it_looked(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        newest_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"save_freq": -1}, ValueError, "save_freq must be finite and >= 0"),
        ({"keep_last": 0}, ValueError, "keep_last must be finite and >= 1"),
        ({"save_replay_buffer": 1}, TypeError, "save_replay_buffer must be true or false"),
        ({"save_frequency": 1}, TypeError, "did you mean 'save_freq'"),
    ],
)
def test_bad_arguments_are_refused_at_construction(arguments, error, message):
    with pytest.raises(error, match=message):
        BestCheckpointCallback(**arguments)


SAVER = """
import os, sys, warnings
warnings.simplefilter("ignore")
from tests.helpers import make_model
from sb3_resnet.callbacks import BestCheckpointCallback
model = make_model(learning_starts=10**9)
for _ in sys.stdin:  # a process a line: forking spares each one the imports
    child = os.fork()
    if child == 0:
        model.learn(10**6, callback=BestCheckpointCallback(4, sys.argv[1], keep_last=2))
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
