"""Golden resume through ``learn()``: a run that is cut and resumed from its checkpoints equals the run that is not."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

import sb3_resnet
from sb3_resnet.callbacks import (
    BestCheckpointCallback,
)
from sb3_resnet.common.checkpoints import checkpoints
from tests.helpers import (
    ALGORITHMS,
    CutError,
    ForgetfulGame,
    Fuse,
    assert_same,
    make_model,
    resuming_callbacks,
)

TOTAL = 150
SETTINGS = {
    "every 4 steps": {},
    "20 updates per 20 steps": {"train_freq": 20, "gradient_steps": 20},
    "4 updates per 4 steps": {"gradient_steps": 4},
    "as many updates as steps": {"train_freq": 5, "gradient_steps": -1},
    "episodes": {"train_freq": (1, "episode"), "gradient_steps": -1},
    "2 episodes, saved by episodes": {"train_freq": (2, "episode"), "gradient_steps": 3, "save_freq_episodes": 3},
    "3 environments": {"n_envs": 3, "train_freq": 2, "gradient_steps": -1},
    "n-step returns, tau": {"n_steps": 3, "tau": 0.5},
    "qrdqn": {"algorithm": "qrdqn", "gradient_steps": 2},
    "memory of one frame": {
        "optimize_memory_usage": True,
        "replay_buffer_kwargs": {"handle_timeout_termination": False},
    },
    "cache": {"cached": True, "gradient_steps": 4},
    "cache, 2 environments": {"cached": True, "n_envs": 2, "gradient_steps": -1},
}


def begin_or_resume(folder, algorithm="dqn", n_envs=1, **settings):
    """A model at its beginning, or at its newest checkpoint with all that SB3 leaves to the user."""
    env = DummyVecEnv([lambda: Monitor(ForgetfulGame())] * n_envs)
    if not folder.exists() or not checkpoints(folder):
        policy_kwargs = {"dropout": 0.2}
        extractor = {"backbone": "resnet_mini"}
        return make_model(algorithm, env, policy_kwargs, extractor, learning_rate=1e-3, seed=3, **settings)
    path = sb3_resnet.newest_checkpoint(folder)
    env.reset()
    model = ALGORITHMS[algorithm].load(path, env=env, device="cpu", force_reset=False)
    model.load_replay_buffer(path.with_name(f"{path.stem}_replay_buffer.pkl"))
    sb3_resnet.restore_random_states(path, model)
    return model


def run(folder, cuts=(), cached=False, save_freq_episodes=0, **settings):
    """Train to the end, through the cuts."""
    saving = {"save_freq": 0, "save_freq_episodes": save_freq_episodes} if save_freq_episodes else {}
    for left in [*cuts, 10**9]:
        model = begin_or_resume(folder, **settings)
        used = [*resuming_callbacks(folder, cached, **saving), Fuse(left)]
        try:
            model.learn(TOTAL - model.num_timesteps, callback=used, reset_num_timesteps=False)
        except CutError:
            continue
        return model
    raise AssertionError("cut each time")


def everything(model):
    """Parameters, moments, rates and counters; the rates without callbacks' records, which name files."""
    optimizer = model.policy.optimizer.state_dict()
    groups = [{k: v for k, v in group.items() if k != "best_checkpoint"} for group in optimizer["param_groups"]]
    counters = {name: getattr(model, name) for name in ("num_timesteps", "_n_updates", "_n_calls", "exploration_rate")}
    return model.policy.state_dict(), optimizer["state"], groups, counters


def assert_equal(whole, resumed):
    """Bit for bit."""
    (weights, moments, *others), (weights_, moments_, *others_) = whole, resumed
    assert others == others_
    assert_same(weights, weights_)
    assert moments.keys() == moments_.keys()
    for key, state in moments.items():
        assert_same(state, moments_[key])


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_that_is_cut_and_resumed_equals_the_run_that_is_not(tmp_path, name):
    whole = run(tmp_path / "whole", **SETTINGS[name])
    assert whole.policy.freeze_boundary == "layer3"
    generator = random.Random(name)
    cuts = [generator.randrange(25, 70) for _ in range(10)]
    resumed = run(tmp_path / "cut", cuts, **SETTINGS[name])
    assert_equal(everything(whole), everything(resumed))


TRAINER = """
import os, pathlib, sys, warnings
warnings.simplefilter("ignore")
import torch as th
from tests.test_resume_of_learn import SETTINGS, everything, run
folder = pathlib.Path(sys.argv[1])
for _ in sys.stdin:  # a process a line: forking spares each one the imports
    child = os.fork()
    if child == 0:
        th.save(everything(run(folder / "saved", **SETTINGS["as many updates as steps"])), folder / "result.pth")
        os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("gone", flush=True)
"""


@pytest.mark.slow
def test_a_run_that_is_killed_at_ten_moments_equals_the_run_that_is_not(tmp_path):
    whole = run(tmp_path / "whole", **SETTINGS["as many updates as steps"])
    generator = random.Random(0)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    command = [sys.executable, "-c", TRAINER, str(tmp_path)]
    kills, starts, resumed = 0, 0, 0
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes) as trainer:
        while not (tmp_path / "result.pth").exists():
            resumed += bool([*(tmp_path / "saved").glob("*.zip")])
            trainer.stdin.write("\n")
            child, starts = int(trainer.stdout.readline()), starts + 1
            if kills < 10:
                time.sleep(generator.uniform(0.1, 0.5))
                with contextlib.suppress(ProcessLookupError):  # it was faster
                    os.kill(child, signal.SIGKILL)
                    kills += 1
            assert trainer.stdout.readline() == "gone\n"
        trainer.stdin.close()
    assert kills == 10 or starts <= kills + 1  # fewer if the run was faster than that
    assert resumed > 0
    assert_equal(everything(whole), th.load(tmp_path / "result.pth", weights_only=True))
    assert not [path for path in (tmp_path / "saved").iterdir() if path.name.startswith(".writing")]


def test_random_states_survive_the_way_through_a_file(tmp_path):
    """Python's, NumPy's, PyTorch's, the action space's and each environment's."""

    def draw(model):
        model.env.reset()
        images = [env.unwrapped.np_random.integers(1000) for env in model.env.envs]
        return [random.random(), np.random.rand(), float(th.rand(1)), model.action_space.sample(), *images]

    env = DummyVecEnv([ForgetfulGame] * 2)
    model = make_model(env=env, extractor={"backbone": "resnet_mini"})
    model.learn(8, callback=BestCheckpointCallback(8, tmp_path))
    expected = draw(model)
    path = sb3_resnet.newest_checkpoint(tmp_path)
    loaded = ALGORITHMS["dqn"].load(path, env=DummyVecEnv([ForgetfulGame] * 2), device="cpu")
    assert draw(loaded) != expected
    loaded = ALGORITHMS["dqn"].load(path, env=DummyVecEnv([ForgetfulGame] * 2), device="cpu")
    sb3_resnet.restore_random_states(str(path), loaded)
    assert draw(loaded) == expected
    other = ALGORITHMS["dqn"].load(path, env=DummyVecEnv([ForgetfulGame]), device="cpu")
    with pytest.raises(ValueError, match="2 environments, the model has 1"):
        sb3_resnet.restore_random_states(path, other)


def test_files_without_random_states_are_named(tmp_path):
    model = make_model(extractor={"backbone": "resnet_mini"})
    model.save(tmp_path / "plain.zip")
    with pytest.raises(ValueError, match=r"plain\.zip' holds no random states"):
        sb3_resnet.restore_random_states(tmp_path / "plain.zip", model)
    with pytest.raises(FileNotFoundError, match=r"newest_checkpoint\(FOLDER\)"):
        sb3_resnet.restore_random_states(tmp_path / "none.zip", model)
