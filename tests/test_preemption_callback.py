"""A run that a signal ends, and that goes on at the next start, equals the run that is never stopped."""

import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium.utils import EzPickle
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import (
    BaseCallback,
    EvalCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
)
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize

from sb3_resnet.callbacks import (
    BestCheckpointCallback,
    DataParallelCallback,
    GradientClipCallback,
    LRScheduleCallback,
    NanGuardCallback,
    PreemptionCallback,
    UnfreezeCallback,
)
from sb3_resnet.common import signals
from sb3_resnet.common.checkpoints import checkpoints
from tests.helpers import PONG, ROOT, TinyGame, assert_same, make_actor_critic, make_model

TOTAL = 120
PHASES = [
    {"at_timestep": 40, "unfreeze_from": "layer4", "lr_backbone": 5e-4, "ramp": 8, "restore_best": True},
    {"on_plateau": {"patience": 1, "latest_timestep": 90}, "unfreeze_from": "layer3"},
]
SETTINGS = {
    "dqn": {},
    "qrdqn, 2 environments": {"algorithm": "qrdqn", "n_envs": 2, "gradient_steps": -1},
    "n-step returns": {"n_steps": 3, "train_freq": 5, "gradient_steps": 2},
    "episodes": {"train_freq": (1, "episode"), "gradient_steps": 4},
    "ppo": {"algorithm": "ppo"},
    "a2c, 2 environments": {"algorithm": "a2c", "n_envs": 2},
}


@pytest.fixture(autouse=True)
def _handlers():
    """Whatever a test does, the process has its handlers again."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def wrapped(n_envs=1, **options):
    """Environments that remember frames, a clock and the number of their episode; wrappers that count."""
    env = VecNormalize(VecMonitor(DummyVecEnv([TinyGame] * n_envs)), norm_obs=False, **options)
    env.seed(11)
    return env


def build(algorithm="dqn", n_envs=1, **settings):
    env = wrapped(n_envs)
    arguments = ({"dropout": 0.2}, {"backbone": "resnet_mini"})
    if algorithm in ("ppo", "a2c"):
        return make_actor_critic(algorithm, env, *arguments, learning_rate=1e-3, seed=3, **settings)
    return make_model(algorithm, env, *arguments, learning_rate=1e-3, seed=3, **settings)


def used(folder, *others, preemptible=True):
    return [
        *([PreemptionCallback(folder, verbose=0)] if preemptible else []),
        BestCheckpointCallback(save_freq=0, save_path=folder),
        UnfreezeCallback(PHASES, verbose=0),
        LRScheduleCallback(4, "cosine", decay_steps=60),
        GradientClipCallback(1.0),
        EvalCallback(wrapped(training=False), eval_freq=7, n_eval_episodes=1, verbose=0),
        *others,
    ]


class Send(BaseCallback):
    """Signals to this process at a step, or within an update."""

    def __init__(self, left, in_update=False, number=signal.SIGTERM):
        super().__init__()
        self.left, self.in_update, self.number = left, in_update, number

    def _on_training_start(self):
        self.model.policy.optimizer.register_step_post_hook(lambda *args: self._count(True))

    def _on_step(self):
        self._count(False)
        return True

    def _count(self, in_update):
        if in_update == self.in_update:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), self.number)


def everything(model):
    optimizer = model.policy.optimizer.state_dict()
    groups = [
        {key: value for key, value in group.items() if key != "best_checkpoint"} for group in optimizer["param_groups"]
    ]
    names = ("num_timesteps", "_n_updates", "_n_calls", "_episode_num", "exploration_rate")
    counters = {name: getattr(model, name) for name in names if hasattr(model, name)}
    episodes = [(info["r"], info["l"]) for info in model.ep_info_buffer]
    normalizer = model.get_vec_normalize_env()
    running = (float(normalizer.ret_rms.mean), float(normalizer.ret_rms.var), float(normalizer.returns.sum()))
    return (
        model.policy.state_dict(),
        optimizer["state"],
        groups,
        counters,
        episodes,
        running,
        np.random.random(),
        th.rand(1),
    )


def assert_equal(left, right):
    (weights, moments, *others), (weights_, moments_, *others_) = left, right
    assert others == others_
    assert_same(weights, weights_)
    assert moments.keys() == moments_.keys()
    for key, state in moments.items():
        assert_same(state, moments_[key])


def run(folder, moments, **settings):
    """Start again and again until training has come to its end; each start is the same."""
    for stops, moment in enumerate([*moments, None]):
        model = build(**settings)
        sends = [] if moment is None else [Send(*moment)]
        codes = []
        try:
            model.learn(TOTAL, callback=used(folder, *sends))
        except SystemExit as stop:
            codes.append(stop.code)
        if not codes:
            return model, stops
        assert codes == [75]
        assert len(checkpoints(folder)) == 1
    raise AssertionError("stopped each time")


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_that_signals_stop_at_random_moments_equals_the_run_that_is_never_stopped(tmp_path, name):
    stops = 7
    whole = build(**SETTINGS[name])
    whole.learn(TOTAL, callback=used(tmp_path / "whole", preemptible=False))
    whole = everything(whole)
    chance = random.Random(7)
    moments = [(chance.randint(1, 2 * TOTAL // (3 * stops)), chance.random() < 0.4) for _ in range(stops)]
    model, stopped = run(tmp_path / "stopped", moments, **SETTINGS[name])
    assert stopped >= min(stops, 5)  # the last moments may lie beyond the end
    assert_equal(whole, everything(model))
    assert not checkpoints(tmp_path / "stopped")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def simple(folder, *others, env=None, total=60, **arguments):
    """A short run without phases."""
    model = make_model(env=env or DummyVecEnv([TinyGame]), extractor={"backbone": "resnet_mini"})
    callback = PreemptionCallback(folder, **{"verbose": 0, **arguments})
    model.learn(total, callback=[callback, *others])
    return model


class Fixed(TinyGame, EzPickle):
    """Gymnasium makes it anew where it is unpickled."""

    def __init__(self):
        EzPickle.__init__(self)
        super().__init__()


class WithFile(TinyGame):
    def __init__(self):
        super().__init__()
        self.file = open(os.devnull)  # noqa: SIM115  # what cannot be pickled

    def close(self):
        self.file.close()


@pytest.mark.parametrize("game", [lambda: gym.wrappers.OrderEnforcing(Fixed()), WithFile])
def test_where_environments_cannot_be_saved_their_episodes_begin_anew_and_replay_ends_there(tmp_path, game, capsys):
    with pytest.raises(SystemExit):
        simple(tmp_path, Send(26), env=DummyVecEnv([game]))
    path = checkpoints(tmp_path)[-1]
    stored = pickle.loads(path.with_name(f"{path.stem}_replay_buffer.pkl").read_bytes())
    assert stored.dones[27, 0] == 0  # in the midst of an episode of 13 steps
    seen = {}

    class See(BaseCallback):
        def _on_rollout_start(self):
            seen.setdefault("first", (self.model.num_timesteps, self.training_env.envs[0].unwrapped.clock))
            seen.setdefault("buffer", [self.model.replay_buffer.dones[27, 0], self.model.replay_buffer.timeouts[27, 0]])

        def _on_step(self):
            return True

    model = simple(tmp_path, See(), env=DummyVecEnv([game]), verbose=1)
    assert seen == {"first": (28, 0), "buffer": [1, 1]}
    assert "at timestep 28; episodes begin anew" in capsys.readouterr().out
    assert model.num_timesteps == 60


def test_a_later_signal_changes_nothing_and_the_former_handler_has_its_turn_after_the_save(tmp_path):
    order = []

    def former(number, frame):
        order.append((number, bool(checkpoints(tmp_path))))

    signal.signal(signal.SIGUSR1, former)
    with pytest.raises(SystemExit) as stop:
        simple(tmp_path, Send(21, number=signal.SIGUSR1), Send(22, number=signal.SIGTERM), exit_code=3)
    assert stop.value.code == 3
    assert order == [(signal.SIGUSR1, True)]
    os.kill(os.getpid(), signal.SIGTERM)  # until Python has ended, the exit code is safe
    assert simple(tmp_path).num_timesteps == 60
    assert signal.getsignal(signal.SIGUSR1) is former


def test_other_signals_and_no_replay_buffer(tmp_path):
    arguments = {"signals": "SIGUSR2", "save_replay_buffer": False}
    former, seen = signal.getsignal(signal.SIGTERM), []

    class Look(BaseCallback):
        def _on_step(self):
            seen.append(signal.getsignal(signal.SIGTERM))
            return True

    with pytest.raises(SystemExit):
        simple(tmp_path, Look(), Send(21, number=signal.SIGUSR2), **arguments)
    assert {*seen} == {former}
    assert not [*tmp_path.rglob("*_replay_buffer.pkl")]
    with pytest.warns(UserWarning, match="replay begins empty"):
        model = simple(tmp_path, **arguments)
    assert (model.num_timesteps, model.replay_buffer.pos) == (60, 36)


def test_a_second_signal_long_after_the_first_changes_nothing_while_learn_runs(tmp_path, monkeypatch):
    """An evaluation or an update may take minutes, in which no hook is called."""

    class Twice(BaseCallback):
        def _on_step(self):
            if self.model.num_timesteps == 21:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGTERM)
            return True

    monkeypatch.setattr(signals, "PATIENCE", 0.0)
    with pytest.raises(SystemExit) as stop:
        simple(tmp_path, Twice())
    assert stop.value.code == 75
    assert [path.stem for path in checkpoints(tmp_path)] == ["rl_model_24_steps"]


def test_a_rank_begins_where_the_first_one_does(tmp_path, monkeypatch, capsys):
    """Also if its own checkpoint is an older one, of a time with more ranks or of a save that was cut short."""

    def as_rank(rank):
        monkeypatch.setattr(th.distributed, "is_initialized", lambda: rank > 0)
        monkeypatch.setattr(th.distributed, "get_rank", lambda: rank)
        monkeypatch.setattr(th.distributed, "get_backend", lambda: "gloo")
        monkeypatch.setattr(th.distributed, "all_reduce", lambda tensor: None)

    for rank, step in ((1, 21), (0, 41)):
        as_rank(rank)
        with pytest.raises(SystemExit):
            simple(tmp_path, Send(step))
    as_rank(1)
    assert [path.stem for path in checkpoints(tmp_path / "rank1")] == ["rl_model_24_steps"]
    with pytest.raises(SystemExit):
        simple(tmp_path, Send(5), verbose=1)
    text = capsys.readouterr().out
    assert f"Resumed {tmp_path / 'rl_model_44_steps.zip'} at timestep 44" in text
    simple(tmp_path, verbose=1)
    assert f"Resumed {tmp_path / 'rl_model_44_steps.zip'}" in capsys.readouterr().out  # not its own at 52


def test_after_a_learn_that_was_interrupted_a_signal_ends_the_process_again(tmp_path, monkeypatch):
    ended = []
    signal.signal(signal.SIGTERM, lambda number, frame: ended.append(number))

    class Fail(BaseCallback):
        def _on_step(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simple(tmp_path, Fail())
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)  # schedulers send it twice within a moment
    assert not ended
    monkeypatch.setattr(signals, "PATIENCE", 0.0)
    time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)
    assert ended == [signal.SIGTERM]


def test_the_next_learn_takes_the_handlers_of_an_interrupted_one(tmp_path):
    class Fail(BaseCallback):
        def _on_step(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simple(tmp_path, Fail())
    assert simple(tmp_path).num_timesteps == 60
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.slow
def test_a_crash_is_resumed_from_the_checkpoints_of_the_callback_beside_it(tmp_path, recwarn):
    class Fail(BaseCallback):
        def _on_step(self):
            if self.model.num_timesteps == 50:
                raise RuntimeError
            return True

    def saving():
        return BestCheckpointCallback(20, tmp_path, save_replay_buffer=True)

    whole = simple(tmp_path / "whole", BestCheckpointCallback(20, tmp_path / "whole"))
    with pytest.raises(RuntimeError):
        simple(tmp_path, saving(), Fail())
    assert [path.stem for path in checkpoints(tmp_path)] == ["rl_model_20_steps", "rl_model_40_steps"]
    model = simple(tmp_path, saving())
    assert model.num_timesteps == 60
    assert model._n_updates == whole._n_updates
    assert not [warning for warning in recwarn if "of another run" in str(warning.message)]


def test_a_model_that_is_not_new_goes_its_own_way(tmp_path):
    with pytest.raises(SystemExit):
        simple(tmp_path, Send(21))
    model = make_model(env=DummyVecEnv([TinyGame]), extractor={"backbone": "resnet_mini"})
    model.learn(16)
    model.learn(8, callback=PreemptionCallback(tmp_path), reset_num_timesteps=False)
    assert model.num_timesteps == 24
    assert checkpoints(tmp_path)


def two_calls(folder, *others):
    """A program with two ``learn()``."""
    model = make_model(env=DummyVecEnv([TinyGame]), extractor={"backbone": "resnet_mini"})
    callback = [PreemptionCallback(folder, verbose=0), *others]
    for _ in range(2):
        model.learn(24, callback=callback, reset_num_timesteps=False)
    return model


@pytest.mark.parametrize("moment", [14, 38])
def test_a_program_with_two_calls_that_is_stopped_in_either_ends_as_it_would_have(tmp_path, moment):
    whole = two_calls(tmp_path / "whole")
    with pytest.raises(SystemExit):
        two_calls(tmp_path, Send(moment))
    model = two_calls(tmp_path)
    assert (model.num_timesteps, model._n_updates) == (48, whole._n_updates)
    assert_same(whole.policy.state_dict(), model.policy.state_dict())
    assert not checkpoints(tmp_path)


def test_a_loaded_model_that_was_stopped_goes_on(tmp_path):
    make_model(env=DummyVecEnv([TinyGame]), extractor={"backbone": "resnet_mini"}).learn(16).save(tmp_path / "model")

    def program(folder, *others):
        model = DQN.load(tmp_path / "model", env=DummyVecEnv([TinyGame]), device="cpu")
        return model.learn(24, callback=[PreemptionCallback(folder, verbose=0), *others])

    whole = program(tmp_path / "whole")
    with pytest.raises(SystemExit):
        program(tmp_path / "stopped", Send(10))
    model = program(tmp_path / "stopped")
    assert (model.num_timesteps, model._n_updates) == (24, whole._n_updates)
    assert_same(whole.policy.state_dict(), model.policy.state_dict())


@pytest.mark.parametrize(
    "stop",
    [
        lambda: StopTrainingOnMaxEpisodes(6),
        lambda: EvalCallback(
            wrapped(training=False), eval_freq=8, callback_after_eval=StopTrainingOnNoModelImprovement(1), verbose=0
        ),
    ],
)
def test_rules_of_sb3_that_end_training_count_on(tmp_path, stop):
    whole = simple(tmp_path / "whole", stop(), total=400)
    assert 16 < whole.num_timesteps < 400
    with pytest.raises(SystemExit):
        simple(tmp_path, stop(), Send(15), total=400)
    assert simple(tmp_path, stop(), total=400).num_timesteps == whole.num_timesteps


def test_a_checkpoint_of_another_model_and_a_wrong_order_are_refused(tmp_path):
    with pytest.raises(SystemExit):
        simple(tmp_path, Send(21))
    other = make_model(env=DummyVecEnv([TinyGame]), extractor={"backbone": "resnet_mini", "features_dim": 8})
    with pytest.raises(ValueError, match=r"a model with other arguments .* write another folder; to go on"):
        other.learn(20, callback=PreemptionCallback(tmp_path))
    model = make_model(extractor={"backbone": "resnet_mini"})
    with pytest.raises(ValueError, match=r"must be the first callback, since NanGuardCallback"):
        model.learn(20, callback=[NanGuardCallback(), PreemptionCallback(tmp_path / "new")])
    with pytest.raises(ValueError, match=r"must be the first callback, since DataParallelCallback"):
        model.learn(20, callback=[DataParallelCallback(), PreemptionCallback(tmp_path / "new")])


def test_only_the_main_thread_can_learn_with_it(tmp_path):
    errors = []

    def learn():
        try:
            simple(tmp_path)
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=learn)
    thread.start()
    thread.join()
    assert "main thread" in errors[0]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"signals": ["SIGKILL"]}, ValueError, "SIGKILL ends a process at once"),
        ({"signals": "SIGFOO"}, ValueError, "'SIGFOO' is no signal of this system"),
        ({"signals": []}, ValueError, r"such as \['SIGTERM', 'SIGUSR1'\]"),
        ({"signals": 15}, ValueError, r"such as \['SIGTERM', 'SIGUSR1'\]"),
        ({"exit_code": 256}, ValueError, "at most 255"),
        ({"exit_code": -1}, ValueError, "exit_code"),
        ({"save_replay_buffer": "yes"}, TypeError, "save_replay_buffer"),
        ({"save_path": 3}, TypeError, "save_path"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        PreemptionCallback(**{"save_path": "logs", **arguments})


JOB = """
import sys
from pathlib import Path
from stable_baselines3.common.callbacks import ConvertCallback
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv
from sb3_resnet.callbacks import PreemptionCallback
from tests.helpers import TinyGame, make_model

if __name__ == "__main__":
    folder, kind, total = sys.argv[1:]
    env = (SubprocVecEnv if kind == "processes" else DummyVecEnv)([TinyGame] * 2)
    model = make_model(env=env, extractor={"backbone": "resnet_mini"}, train_freq=2, seed=1)
    began = []

    def tell(*args):
        if not began:
            print("begins", flush=True)
            began.append(True)
        return int(total) > 0 or 1 / (model.num_timesteps < 20)

    callback = [PreemptionCallback(folder), ConvertCallback(tell)]
    model.learn(int(total) if int(total) > 0 else 100, callback=callback)
    model.save(Path(folder) / "end")
    env.close()
"""


def start_job(folder, kind, total):
    script = folder / "job.py"
    script.write_text(textwrap.dedent(JOB))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), str(folder), kind, str(total)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, start_new_session=True, **pipes)


@pytest.mark.slow
def test_a_signal_to_all_processes_of_a_job_saves_it_and_the_same_command_goes_on(tmp_path):
    """As systemd, srun and timeout send it: the processes of environments get it too."""
    kind = "processes"
    job = start_job(tmp_path, kind, 10**6)
    assert any(line == "begins\n" for line in job.stdout)
    time.sleep(random.Random(1).random())
    for _ in range(2):
        os.killpg(job.pid, signal.SIGTERM)
        time.sleep(0.05)
    output, errors = job.communicate(timeout=600)
    assert job.returncode == 75, errors
    assert "because of a signal; exit with 75" in output
    steps = int(checkpoints(tmp_path)[-1].stem.split("_")[2])
    job = start_job(tmp_path, kind, steps + 20)
    output, errors = job.communicate(timeout=600)
    assert job.returncode == 0, errors
    assert f"at timestep {steps}; " in output
    assert not checkpoints(tmp_path)
    assert (tmp_path / "end.zip").exists()


LEAVING = """
import time
from sb3_resnet.common.signals import SignalNotes, signals_of
import torch  # Python takes a while to end with it

notes = SignalNotes(signals_of(["SIGTERM"]))
print("ready", flush=True)
while notes.received is None:
    time.sleep(0.001)
notes.ignore_at_exit()
print("leaving", flush=True)
raise SystemExit(75)
"""


@pytest.mark.slow
def test_signals_while_python_ends_change_no_exit_code():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    job = subprocess.Popen([sys.executable, "-c", LEAVING], env=environment, stdout=subprocess.PIPE, text=True)
    assert job.stdout.readline() == "ready\n"
    job.send_signal(signal.SIGTERM)
    assert job.stdout.readline() == "leaving\n"
    while job.poll() is None:
        job.send_signal(signal.SIGTERM)
        time.sleep(0.002)
    assert job.returncode == 75


@pytest.mark.slow
def test_processes_of_environments_end_with_a_program_that_fails(tmp_path):
    """They ignore the signal by which Python ends them, so it must not wait for that."""
    job = start_job(tmp_path, "processes", -1)
    _, errors = job.communicate(timeout=600)
    assert job.returncode == 1
    assert "ZeroDivisionError" in errors


ZOO = """
PongNoFrameskip-v4:
  env_wrapper: stable_baselines3.common.atari_wrappers.AtariWrapper
  frame_stack: 4
  policy: ResNetCnnPolicy
  n_timesteps: {total}
  buffer_size: 1000
  learning_starts: 20
  batch_size: 4
  policy_kwargs:
    features_extractor_kwargs: {{backbone: resnet_mini}}
  callback:
    - sb3_resnet.callbacks.PreemptionCallback:
        save_path: {folder}
    - sb3_resnet.callbacks.FeatureCacheCallback
"""


@pytest.mark.slow
def test_rl_zoo_goes_on_with_the_same_command(tmp_path):
    def start(total):
        (tmp_path / "dqn.yml").write_text(ZOO.format(total=total, folder=tmp_path / "run"))
        line = [sys.executable, "-m", "rl_zoo3.train", "--algo", "dqn", "--env", PONG, "-f", str(tmp_path / "logs")]
        line += ["--gym-packages", "sb3_resnet", "tests.helpers", "--conf-file", str(tmp_path / "dqn.yml")]
        line += ["--device", "cpu", "--eval-freq", "-1", "--seed", "3"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            line, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path
        )

    job = start(10**6)
    deadline = time.monotonic() + 600
    while not (tmp_path / "run").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(3)
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=600)
    assert job.returncode == 75, output
    steps = int(checkpoints(tmp_path / "run")[-1].stem.split("_")[2])
    job = start(steps + 40)
    output, _ = job.communicate(timeout=600)
    assert job.returncode == 0, output
    assert f"at timestep {steps}; episodes begin anew" in output
    assert not checkpoints(tmp_path / "run")
