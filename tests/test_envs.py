"""Atari games in C++ threads against Stable-Baselines3's own environments, on real games."""

import csv
import os
import sys
import warnings

import gymnasium as gym
import numpy as np
import pytest
import yaml
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3 import DQN
from stable_baselines3.common import atari_wrappers
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    SubprocVecEnv,
    VecCheckNan,
    VecFrameStack,
    VecTransposeImage,
    is_vecenv_wrapped,
)

from sb3_resnet.envs import AtariVecEnv, make_atari_vec_env, to_atari_vec_env
from sb3_resnet.envs import vec_env as atari_module
from sb3_resnet.envs.game import AtariGame
from tests.helpers import CONFIGS, PONG, SHORT_RUN, zoo

BREAKOUT = "BreakoutNoFrameskip-v4"
FREEWAY = "FreewayNoFrameskip-v4"  # neither lives nor FIRE
#: Lives and FIRE, neither, only FIRE (twice), only lives, and one that shows 0 lives for some frames before it ends.
GAMES = ("Breakout", "Freeway", "Pong", "Boxing", "MsPacman", "Qbert")


def sb3(env_id=BREAKOUT, n_envs=2, seed=0, env_kwargs=None, **wrapper_kwargs):
    env = make_atari_env(env_id, n_envs, seed=seed, env_kwargs=env_kwargs, wrapper_kwargs=wrapper_kwargs)
    return VecFrameStack(env, 4)


@pytest.fixture
def make():
    made = []

    def build(env_id=BREAKOUT, n_envs=2, seed=0, **kwargs):
        made.append(make_atari_vec_env(env_id, n_envs, seed, **kwargs))
        return made[-1]

    yield build
    for env in made:
        env.close()


def actions(env, steps, seed=0):
    return np.random.default_rng(seed).integers(0, env.action_space.n, (steps, env.num_envs))


def compare(theirs, ours, steps):
    """Step both by the same actions and assert that all is equal; return the numbers of episodes and of games."""
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    assert np.array_equal(ours.reset(), theirs.reset())
    episodes = games = 0
    for chosen in actions(ours, steps):
        expected, got = theirs.step(chosen), ours.step(chosen)
        for a, b in zip(expected[:3], got[:3], strict=True):
            assert a.dtype == b.dtype
            assert np.array_equal(a, b)
        for a, b in zip(expected[3], got[3], strict=True):
            assert a.keys() == b.keys()
            if "terminal_observation" in a:
                episodes += 1
                last, mine = a.pop("terminal_observation"), b.pop("terminal_observation")
                assert last.dtype == mine.dtype
                assert np.array_equal(last[..., :-1], mine[..., :-1])
                # SB3: "the observation on the done=True frame doesn't matter"; after a lost life it does.
                assert "episode" in a or np.array_equal(last, mine)
            if "episode" in a:
                games += 1
                assert a["episode"].pop("t") >= 0
                assert b["episode"].pop("t") >= 0
            assert a == b
    return episodes, games


@pytest.mark.parametrize(
    ("env_id", "steps", "seed", "env_kwargs", "settings"),
    [
        (BREAKOUT, 250, 0, {}, {}),
        (FREEWAY, 40, 1, {}, {"frame_skip": 1}),
        (BREAKOUT, 200, 1, {}, {"terminal_on_life_loss": False, "clip_reward": False, "screen_size": 42}),
        ("MsPacmanNoFrameskip-v4", 100, 1, {}, {"frame_skip": 7}),
        # From this seed ale-py derives one that both can take, so that sticky actions stick alike.
        ("ALE/Breakout-v5", 120, 1, {"frameskip": 1}, {}),
    ],
)
def test_the_same_actions_give_the_same_play_as_in_sb3(make, env_id, steps, seed, env_kwargs, settings):
    n_envs = 1 if seed else 2
    settings = {"noop_max": 0, **settings}
    theirs = sb3(env_id, n_envs, seed, env_kwargs, **settings)
    episodes, games = compare(theirs, make(env_id, n_envs, seed, **settings), steps)
    if steps == 250:
        assert episodes > games > 1


@pytest.mark.slow
@pytest.mark.parametrize("game", GAMES)
def test_twenty_thousand_random_steps_are_those_of_sb3(make, game):
    env_id = f"{game}NoFrameskip-v4"
    ours = make(env_id, 8, noop_max=0)
    episodes, games = compare(sb3(env_id, 8, noop_max=0), ours, 2500)
    assert games >= 8
    assert (episodes > games) == (game in ("Breakout", "MsPacman", "Qbert"))


@pytest.mark.slow
@pytest.mark.parametrize("env_id", [BREAKOUT, "MsPacmanNoFrameskip-v4"])
def test_random_noops_change_returns_and_lengths_by_chance_alone(make, env_id):
    found = []
    for env in (sb3(env_id, 8), make(env_id, 8)):
        env.reset()
        infos = [info for chosen in actions(env, 1250) for info in env.step(chosen)[3]]
        found.append(np.array([[info["episode"][key] for key in "rl"] for info in infos if "episode" in info]))
        lives = sum("terminal_observation" in info and "episode" not in info for info in infos)
        assert 0.5 < lives / len(found[-1]) / (4 if env_id == BREAKOUT else 2) < 2
    theirs, ours = found
    spread = np.sqrt(theirs.var(0) / len(theirs) + ours.var(0) / len(ours))
    assert np.all(np.abs(theirs.mean(0) - ours.mean(0)) < 4 * spread)


def test_games_begin_with_up_to_noop_max_noops(make):
    fire = 8  # frames: FIRE and another action, each for 4

    def frames(env, games):
        return [int(env.reset_infos[0]["episode_frame_number"]) - fire for _ in range(games) if env.reset() is not None]

    found = frames(make(n_envs=1), 60)
    assert min(found) in (0, 1, 2)
    assert max(found) in (28, 29, 30)
    assert len({*found}) > 15
    assert {*frames(make(n_envs=1, noop_max=1), 12)} == {0, 1}


def test_seeds_repeat_games_also_from_the_middle_of_one(make):
    def play(env):
        first = env.reset()
        return [first, *(env.step(chosen)[0] for chosen in actions(env, 60, seed=3))]

    env = make("ALE/Breakout-v5", seed=5)
    first, unseeded = play(env), play(env)
    env.seed(5)
    assert np.array_equal(first, play(env))
    assert not np.array_equal(first, unseeded)
    assert np.array_equal(first, play(make("ALE/Breakout-v5", seed=5)))
    assert not np.array_equal(first, play(make("ALE/Breakout-v5", seed=6)))
    assert env.seed(9) == [9, 10]
    env.seed()  # a random one, of 32 bits
    env.reset()


def test_stacks_begin_with_zeros_and_shift(make):
    env = make()
    last = env.reset()
    assert not last[..., :3].any()
    ends = 0
    for chosen in actions(env, 200):
        observations, _, dones, infos = env.step(chosen)
        for before, after, done, info in zip(last, observations, dones, infos, strict=True):
            reached = info["terminal_observation"] if done else after
            assert np.array_equal(reached[..., :3], before[..., 1:])
            assert not done or not after[..., :3].any()
            assert after[..., 3].any()
            assert reached[..., 3].any()
            ends += done
        last = observations
    assert ends > 5


def test_transposed_observations_are_contiguous_and_the_callers_own(make):
    env = VecTransposeImage(make())
    first = env.reset()
    copy = first.copy()
    assert first.flags.c_contiguous
    env.step([0, 0])
    assert np.array_equal(first, copy)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([0, 4], r"Discrete\(4\).*\[0, 4\]"),
        ([-1, 0], r"Discrete\(4\).*\[-1, 0\]"),
        ([0], r"2 whole numbers.*shape \(1,\)"),
        ([[0], [0]], r"shape \(2, 1\)"),
        ([0.0, 1.0], "float64"),
        ([True, False], "bool"),
        (0, r"shape \(\)"),
        (["0", "1"], "<U1"),
    ],
)
def test_wrong_actions_are_refused_and_harm_nothing(make, wrong, message):
    env = make()
    env.reset()
    with pytest.raises(ValueError, match=message):
        env.step(wrong if isinstance(wrong, int) else np.array(wrong))
    for right in (np.array([3, 0]), np.array([3, 0], np.uint8), [3, 0]):
        assert env.step(right)[0].shape == (2, 84, 84, 4)


def test_calls_out_of_order_are_errors_and_not_waits(make):
    env = make()
    with pytest.raises(RuntimeError, match="reset"):
        env.step([0, 0])
    env.reset()
    with pytest.raises(RuntimeError, match="step_async"):
        env.step_wait()
    env.step_async([0, 0])
    env.reset()
    with pytest.raises(RuntimeError, match="step_async"):
        env.step_wait()
    env.close()
    env.close()
    for call in (env.reset, lambda: env.step([0, 0]), lambda: env.get_attr("spec")):
        with pytest.raises(RuntimeError, match="closed"):
            call()


def test_an_interrupted_step_is_made_good_by_a_reset(make, monkeypatch):
    env, plain = make(), make()
    env.reset()
    receive = AtariGame.receive

    def interrupted(game):
        if game is env.games[1]:
            raise KeyboardInterrupt
        return receive(game)

    monkeypatch.setattr(AtariGame, "receive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        env.step([1, 1])
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="interrupted"):
        env.step([1, 1])
    env.seed(0)
    assert np.array_equal(env.reset(), plain.reset())
    for chosen in actions(env, 20):
        assert np.array_equal(env.step(chosen)[0], plain.step(chosen)[0])


@pytest.mark.parametrize(("cpus", "n_threads", "most"), [(8, 2, 2), (2, None, 3), (2, 9, 3), (8, 1, 1)])
def test_no_more_threads_work_than_asked_for(make, monkeypatch, cpus, n_threads, most):
    """Where as many are asked for as there are CPUs, the operating system keeps them on those."""
    monkeypatch.setattr(atari_module, "_usable_cpus", lambda: cpus)
    env = make(n_envs=3, n_threads=n_threads)
    at_work, peak = set(), 0
    send, receive = AtariGame.send, AtariGame.receive

    def sending(game, action):
        nonlocal peak
        at_work.add(game)
        peak = max(peak, len(at_work))
        send(game, action)

    def receiving(game):
        at_work.discard(game)
        return receive(game)

    monkeypatch.setattr(AtariGame, "send", sending)
    monkeypatch.setattr(AtariGame, "receive", receiving)
    env.reset()
    rewards = [env.step(chosen)[1] for chosen in actions(env, 40)]
    assert peak == most
    assert np.sum(rewards) >= 0


def test_threads_keep_to_the_cpus_of_the_process(make):
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("no CPU affinity on this system")
    before, tasks = os.sched_getaffinity(0), {*os.listdir("/proc/self/task")}
    one = {min(before)}
    try:
        os.sched_setaffinity(0, one)
        assert atari_module._usable_cpus() == 1
        make()
        for task in {*os.listdir("/proc/self/task")} - tasks:
            assert os.sched_getaffinity(int(task)) == one
    finally:
        os.sched_setaffinity(0, before)


def test_training_rewards_are_clipped_and_returns_are_not(make):
    pacman = "MsPacmanNoFrameskip-v4"
    clipped, raw = make(pacman, 1), make(pacman, 1, clip_reward=False)
    clipped.reset(), raw.reset()
    seen, total, returns = set(), 0.0, []
    for chosen in actions(raw, 500):
        _, (reward,), _, (info,) = raw.step(chosen)
        _, (sign,), _, (other,) = clipped.step(chosen)
        assert sign == np.sign(reward)
        total += reward
        seen.add(float(reward))
        if "episode" in info:
            assert info["episode"]["r"] == other["episode"]["r"]
            returns.append((info["episode"]["r"], total))
            total = 0.0
    assert max(seen) > 1
    (first, counted), *_ = returns
    assert first == counted > 50


def test_max_episode_steps_counts_the_agents_steps_of_a_game(make):
    env = make(FREEWAY, 1, max_episode_steps=7, noop_max=0)
    env.reset()
    for step, chosen in enumerate(actions(env, 21), 1):
        observations, _, dones, infos = env.step(chosen)
        assert [*dones] == [step % 7 == 0]
        for info in infos:
            assert info["TimeLimit.truncated"] == (step % 7 == 0)
            assert info.get("episode", {}).get("l") == (28 if step % 7 == 0 else None)
    assert not observations[..., :3].any()
    # A lost life does not begin the count anew, and a game that it cuts off is begun anew.
    env = make(BREAKOUT, 1, max_episode_steps=60, noop_max=0)
    env.reset()
    ends = [info for chosen in actions(env, 60) for info in env.step(chosen)[3] if "terminal_observation" in info]
    assert [info["TimeLimit.truncated"] for info in ends] == [False] * (len(ends) - 1) + [True]
    assert len(ends) > 1
    assert ends[-1]["lives"] < 5
    assert env.step([0])[3][0]["lives"] == 5


def test_games_are_logged_as_by_monitor(make, tmp_path):
    env = make(monitor_dir=str(tmp_path / "logs"), max_episode_steps=10)
    env.reset()
    infos = [env.step(chosen)[3] for chosen in actions(env, 25)]
    env.close()
    for index in range(2):
        with open(tmp_path / "logs" / f"{index}.monitor.csv") as file:
            assert '"env_id": "BreakoutNoFrameskip-v4"' in file.readline()
            rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
        assert rows == [step[index]["episode"] for step in infos if "episode" in step[index]]
        assert len(rows) == 2


def test_attributes_methods_and_wrappers_are_those_that_sb3_users_ask_for(make):
    theirs, env = sb3(), make()
    for name in ("render_mode", "spec"):
        assert str(env.get_attr(name)) != ""
        assert type(env.get_attr(name)[1]) is type(theirs.get_attr(name)[1])
    assert env.get_attr("spec")[0].id == BREAKOUT
    assert env.render_mode == theirs.render_mode == "rgb_array"
    assert env.get_attr("action_space", 1) == theirs.get_attr("action_space", 1)
    assert env.get_attr("observation_space", [0]) == theirs.get_attr("observation_space", [0])
    assert env.env_method("get_action_meanings") == theirs.env_method("get_action_meanings")
    assert env.get_attr("unwrapped") == env.games
    env.set_attr("note", "mine", indices=1)
    assert env.get_attr("note", 1) == ["mine"]
    assert not env.has_attr("note")
    with pytest.raises(AttributeError, match=r"'ale'.*make_atari_env"):
        env.get_attr("ale")
    with pytest.raises(AttributeError, match="no attribute 'seed_game'"):
        env.env_method("seed_game")
    parts = ("AtariWrapper", "WarpFrame", "NoopResetEnv", "MaxAndSkipEnv", "EpisodicLifeEnv", "FireResetEnv")
    wrappers = [
        Monitor,
        gym.Wrapper,
        gym.wrappers.TimeLimit,
        atari_wrappers.ClipRewardEnv,
        atari_wrappers.StickyActionEnv,
    ]
    for wrapper in [*wrappers, *(getattr(atari_wrappers, part) for part in parts)]:
        assert env.env_is_wrapped(wrapper) == theirs.env_is_wrapped(wrapper)
    assert make(FREEWAY, 1).env_is_wrapped(atari_wrappers.FireResetEnv, 0) == [False]


def test_rendered_screens_are_those_of_the_games(make):
    env, theirs = make(noop_max=0), sb3(noop_max=0)
    for each in (env, theirs):
        each.reset()
        for chosen in actions(env, 30):
            each.step(chosen)
    assert env.render().shape == theirs.render().shape
    assert np.mean(env.render() != theirs.render()) < 0.01  # the larger of two frames against the last one
    assert env.render().max() > 100


def test_sb3_takes_it_for_an_environment_of_its_own(make):
    env = VecCheckNan(make(n_envs=2), raise_exception=True)
    options = {"buffer_size": 200, "learning_starts": 32, "train_freq": 8, "batch_size": 4, "device": "cpu", "seed": 0}
    extractor = {"backbone": "resnet_mini", "image_size": 32}
    model = DQN("ResNetCnnPolicy", env, policy_kwargs={"features_extractor_kwargs": extractor}, **options)
    assert is_vecenv_wrapped(model.env, VecTransposeImage)
    model.learn(64)
    assert model._n_updates == 2
    assert model.replay_buffer.observations.shape[2:] == (4, 84, 84)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that returns may be wrong without a Monitor
        returns, lengths = evaluate_policy(
            model, make(n_envs=2, max_episode_steps=40), n_eval_episodes=2, return_episode_rewards=True
        )
    assert len(returns) == 2
    assert all(length >= 160 for length in lengths)  # emulator frames, as in SB3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"env_id": "PongNoFrameskp-v4"}, ValueError, "did you mean 'PongNoFrameskip-v4'"),
        ({"env_id": "CartPole-v1"}, ValueError, "not an Atari game.*ALE/Pong-v5"),
        ({"env_id": "Pong-v4"}, ValueError, "random number of frames.*NoFrameskip-v4"),
        ({"env_id": lambda: None}, TypeError, "must be a string"),
        ({"env_id": "ALE/Backgammon-v5"}, ValueError, "full_action_space=True"),
        ({"n_envs": 0}, ValueError, "n_envs"),
        ({"frame_stack": 0}, ValueError, "frame_stack"),
        ({"n_threads": 0}, ValueError, "n_threads"),
        ({"noop_max": -1}, ValueError, "noop_max"),
        ({"frame_skip": 0}, ValueError, "frame_skip"),
        ({"screen_size": 0}, ValueError, "screen_size"),
        ({"max_episode_steps": 0}, ValueError, "max_episode_steps"),
        ({"repeat_action_probability": 1.5}, ValueError, "repeat_action_probability"),
        ({"clip_reward": "False"}, TypeError, "clip_reward"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        make_atari_vec_env(**{"env_id": BREAKOUT, **arguments})


def test_the_id_says_how_actions_stick_and_the_arguments_may_say_otherwise(make):
    def rules(*args, **kwargs):
        return make(*args, n_envs=1, **kwargs).games[0].rules

    assert rules("PongNoFrameskip-v4").repeat_action_probability == 0
    assert rules("PongNoFrameskip-v0").repeat_action_probability == 0.25
    assert rules("ALE/Pong-v5").repeat_action_probability == 0.25
    assert rules("ALE/Pong-v5", repeat_action_probability=0.5).repeat_action_probability == 0.5
    assert rules("ALE/Pong-v5").frame_skip == 4
    assert rules("ALE/Pong-v5", frame_skip=2.0, repeat_action_probability="5e-1").frame_skip == 2
    assert rules("ALE/Pong-v5").max_frames == 108_000
    assert make("ALE/Backgammon-v5", 1, full_action_space=True).action_space.n == 18
    assert make("ALE/Carnival-v5", 1).reset().shape == (1, 84, 84, 4)  # a screen of another height


@pytest.mark.parametrize("missing", ["ale_py", "cv2"])
def test_what_is_missing_is_said(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"pip install 'sb3_resnet\[atari\]'"):
        make_atari_vec_env(BREAKOUT)


def test_converted_environments_keep_settings_seeds_and_logs(tmp_path):
    settings = {"noop_max": 0, "frame_skip": 2, "screen_size": 60, "terminal_on_life_loss": False, "clip_reward": False}
    env_kwargs = {"max_num_frames_per_episode": 90, "full_action_space": True}

    def build(folder):
        return make_atari_env(
            BREAKOUT, 2, seed=4, wrapper_kwargs=settings, env_kwargs=env_kwargs, monitor_dir=str(tmp_path / folder)
        )

    old = build("ours")
    seeds = [*old._seeds]
    ours = to_atari_vec_env(old, n_threads=1)
    assert isinstance(ours, AtariVecEnv)
    assert ours._seeds == seeds
    episodes, games = compare(build("theirs"), ours, 60)
    assert episodes == games == 2  # truncated by the limit, which counts emulator frames
    ours.close()
    for index in range(2):
        assert (tmp_path / "ours" / f"{index}.monitor.csv").read_text().count("\n") == 3
    stacked = to_atari_vec_env(make_atari_env(BREAKOUT, 1), frame_stack=3)
    assert stacked.observation_space.shape == (84, 84, 3)
    assert stacked.games[0].rules.max_frames == 108_000
    stacked.close()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: make_vec_env("CartPole-v1"), "env_wrapper: stable_baselines3.common.atari_wrappers.AtariWrapper"),
        (lambda: make_atari_env("ALE/Pong-v5"), "env_kwargs: {frameskip: 1}"),
        (lambda: make_atari_env(PONG, wrapper_kwargs={"action_repeat_probability": 0.1}), "repeat_action_probability"),
        (lambda: make_atari_env(PONG, env_kwargs={"mode": 1}), "mode=1 is not supported"),
        (lambda: VecFrameStack(make_atari_env(PONG), 4), "put to_atari_vec_env first"),
    ],
)
def test_what_cannot_be_converted_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        to_atari_vec_env(build())


def test_environments_with_a_window_or_processes_stay_and_are_stacked():
    env = make_atari_env(PONG)
    env.render_mode = "human"
    assert to_atari_vec_env(env) is env
    assert to_atari_vec_env(env, frame_stack=4).observation_space.shape == (84, 84, 4)
    processes = make_atari_env(PONG, vec_env_cls=SubprocVecEnv, vec_env_kwargs={"start_method": "fork"})
    with pytest.warns(UserWarning, match="SubprocVecEnv"):
        assert to_atari_vec_env(processes) is processes
    processes.close()


def test_zoo_configurations_need_one_line(tmp_path):
    import argparse

    section = {**yaml.safe_load(CONFIGS["dqn"].read_text())[PONG]}
    section["vec_env_wrapper"] = "sb3_resnet.envs.to_atari_vec_env"
    config = tmp_path / "dqn.yml"
    config.write_text(yaml.safe_dump({PONG: section}))
    options = {
        "n_timesteps": 30,
        "eval_freq": -1,
        "hyperparams": dict(SHORT_RUN),
        "config": str(config),
        "device": "cpu",
    }
    model, _ = ExperimentManager(argparse.Namespace(), "dqn", PONG, str(tmp_path), seed=7, **options).setup_experiment()
    env = model.env.unwrapped
    assert isinstance(env, AtariVecEnv)
    assert is_vecenv_wrapped(model.env, VecFrameStack)
    assert model.observation_space.shape == (4, 84, 84)
    assert env._seeds[0] == 7
    model.env.close()


@pytest.mark.slow
def test_zoo_trains_and_plays(tmp_path):
    section = {**yaml.safe_load(CONFIGS["dqn"].read_text())[PONG]}
    del section["frame_stack"]
    section["vec_env_wrapper"] = [{"sb3_resnet.envs.to_atari_vec_env": {"frame_stack": 4}}]
    section["n_envs"] = 2
    config = tmp_path / "dqn.yml"
    config.write_text(yaml.safe_dump({PONG: section}))
    small = [f"{key}:{value}" for key, value in SHORT_RUN.items()]
    arguments = ["--conf-file", config, "-n", 300, "--eval-freq", 200, "--eval-episodes", 1, "--n-eval-envs", 1]
    # The game's own limit would let one evaluation take thousands of steps.
    zoo("train", "dqn", tmp_path, *arguments, "--eval-env-kwargs", "max_num_frames_per_episode:400", "-params", *small)
    folder = tmp_path / "dqn" / f"{PONG}_1"
    model = DQN.load(folder / f"{PONG}.zip", device="cpu")
    assert model.observation_space.shape == (4, 84, 84)
    assert model.num_timesteps >= 300
    assert model._n_updates > 30
    assert {"0.monitor.csv", "1.monitor.csv"} <= {path.name for path in folder.iterdir()}
    assert len(np.load(folder / "evaluations.npz")["ep_lengths"]) == 1
    assert "Loading" in zoo("enjoy", "dqn", tmp_path, "-n", 20, "--no-render")
