"""DataParallelCallback: ranks (here threads that gloo connects) learn as one process with all of their data."""

import json
import pickle
import re
import warnings

import numpy as np
import pytest
import torch as th
from stable_baselines3 import A2C, DQN, PPO, SAC
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    ProgressBarCallback,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_resnet.callbacks import (
    BestCheckpointCallback,
    DataParallelCallback,
    LRScheduleCallback,
    MonitorCallback,
    UnfreezeCallback,
    newest_checkpoint,
)
from sb3_resnet.common.in_step import IntervalOfAll, seed_apart, weigh
from sb3_resnet.common.ranks import LostRankError, Ranks, ranks_of
from tests.helpers import TinyGame, make_actor_critic, make_model, slowly
from tests.ranks import BATCH, in_threads, results, train_on, values_of

pytestmark = pytest.mark.filterwarnings("ignore:You are using a Backend")
MINI = {"backbone": "resnet_mini"}
STOP_AT = 100
#: The seed of rank 1 after 500 timesteps with seed 7.
RESUMED = int(np.random.SeedSequence([7, 1, 500]).generate_state(1)[0]) % 2**31


def largest_difference(left, right, names=lambda name: True):
    assert left.keys() == right.keys()
    return max(float((left[key].double() - right[key].double()).abs().max()) for key in left if names(key))


def assert_one_model(models):
    first, *others = [values_of(model) for model in models]
    for other in others:
        assert first.keys() == other.keys()
        assert not [key for key in first if not th.equal(first[key], other[key])]


@pytest.mark.parametrize("algorithm", ["dqn", *slowly("ppo")])
def test_two_ranks_learn_as_one_process_with_both_batches(algorithm, monkeypatch):
    settings = {"rounds": 8, "timesteps": 32}
    joint = train_on((0, 1), algorithm, **settings)
    ranks = results(in_threads(monkeypatch, lambda rank: train_on((rank,), algorithm, **settings)))
    assert_one_model(ranks)
    assert {model.policy.freeze_boundary for model in (joint, *ranks)} == {"layer4"}
    assert {model.num_timesteps for model in (joint, *ranks)} == {64}
    assert largest_difference(values_of(ranks[0]), values_of(joint)) <= 1e-6
    assert [ranks_of(model).size for model in ranks] == [1, 1]  # and nothing is left behind


# float16 rounds each rank's gradient by itself: a large eps keeps AdamW from dividing small gradients by themselves.
AMP = {"policy_kwargs": {"optimizer_class": "AdamW", "optimizer_kwargs": {"eps": 0.1}}, "learning_rate": 3e-5}
#: sb3-contrib makes the eps of QR-DQN's own optimizer from the batch size, which differs here.
ADAM = {"policy_kwargs": {"optimizer_class": "Adam", "optimizer_kwargs": {"eps": 1e-3}}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "overflow", "options"),
    [
        ("dqn", None, {}),
        ("dqn", (1, 150), AMP),
        ("qrdqn", None, ADAM),
        ("qrdqn", (1, 160), {**AMP, "learning_rate": 1e-5, "timesteps": 1200}),
        ("ppo", None, {"rounds": 50}),  # of four updates each
    ],
)
def test_after_200_updates_across_a_phase_and_an_overflow_too(algorithm, overflow, options, monkeypatch):
    settings = {"algorithm": algorithm, "overflow": overflow, "rounds": 200, **options}
    settings.setdefault("timesteps", 4 * settings["rounds"])
    joint = train_on((0, 1), **settings)
    ranks = results(in_threads(monkeypatch, lambda rank: train_on((rank,), **settings), timeout=60))
    assert_one_model(ranks)
    mine, expected = values_of(ranks[0]), values_of(joint)
    assert largest_difference(mine, expected, lambda name: not name[0].isdigit()) <= 1e-6
    if overflow:
        states = [model.policy.optimizer.param_groups[0]["amp"] for model in (joint, *ranks)]
        assert states[0] == states[1] == states[2]
        assert states[0]["skipped"] == 1
        steps = [value for name, value in mine.items() if name.endswith(".step")]
        assert max(float(step) for step in steps) == 199
    else:
        assert largest_difference(mine, expected) <= 1e-6


def test_only_parameters_that_train_travel(monkeypatch):
    sent = {}

    def act(rank):
        callback = DataParallelCallback()
        model = make_model(extractor=MINI, batch_size=BATCH, learning_starts=8)
        head = sum(p.numel() for p in model.policy.q_net.parameters() if p.requires_grad)
        whole = sum(p.numel() for p in model.policy.q_net.parameters())
        model.learn(48, callback=[callback, Spy(sent, rank, callback)])
        return head, whole

    head, whole = results(in_threads(monkeypatch, act))[0]
    features = 64  # of resnet_mini; their mean and square travel as float64
    assert sent[0] == sent[1]
    assert 4 * head <= sent[0] <= 4 * head + 64
    assert sent[0] + 16 * features < 4 * whole / 2


class Spy(BaseCallback):
    """Reads from the log what the updates have sent."""

    def __init__(self, sent, rank, owner):
        super().__init__()
        self.sent, self.rank = sent, rank

    def _on_rollout_start(self):
        megabytes = self.logger.name_to_value.get("parallel/megabytes_per_update", 0)
        self.sent[self.rank] = max(self.sent.get(self.rank, 0), round(megabytes * 1e6))

    def _on_step(self):
        return True


class StopsAt(BaseCallback):
    def __init__(self, timestep=None):
        super().__init__()
        self.timestep = timestep

    def _on_step(self):
        return self.timestep is None or self.num_timesteps < self.timestep


@pytest.mark.parametrize("first", [True, False])
def test_a_stop_of_one_rank_stops_all_at_the_same_step(first, monkeypatch):
    def act(rank):
        stop = StopsAt(STOP_AT if rank == 1 else None)
        callbacks = [stop, DataParallelCallback()]
        model = make_model(extractor=MINI)
        model.learn(400, callback=callbacks if first else CallbackList([CallbackList(callbacks)]))
        assert callbacks[0] is stop
        return model

    ranks = results(in_threads(monkeypatch, act))
    assert_one_model(ranks)
    assert len({(model.num_timesteps, model._n_updates) for model in ranks}) == 1
    # The rollout in which it was asked for ends, its updates are made, and the next one's first step is the last.
    assert ranks[0].num_timesteps == 106  # step 100 is in the rollout of 97 to 104


def test_timesteps_are_those_of_all_ranks(monkeypatch):
    seen = {}

    class Look(BaseCallback):
        def _on_step(self):
            seen.setdefault(self.key, []).append((self.num_timesteps, self.model.exploration_rate))
            return True

    def run(key, n_envs, callbacks):
        look = Look()
        look.key = key
        env = DummyVecEnv([TinyGame] * n_envs)
        model = make_model(env=env, extractor=MINI, learning_starts=40, exploration_fraction=0.5)
        schedule = LRScheduleCallback(schedule="linear")
        model.learn(120, callback=[look, schedule, *callbacks])
        return model, schedule.factor(10)

    joint = run("joint", 2, [])
    ranks = results(in_threads(monkeypatch, lambda rank: run(rank, 1, [DataParallelCallback()])))
    assert seen[0] == seen[1] == seen["joint"]
    assert {(model.num_timesteps, model._n_updates) for model, _ in (joint, *ranks)} == {(120, 10)}
    assert {factor for _, factor in (joint, *ranks)} == {joint[1]}


def test_the_target_network_follows_in_timesteps_of_all_ranks(monkeypatch):
    def act(rank):
        model = make_model(extractor=MINI, target_update_interval=48, train_freq=4, learning_starts=0)
        copied = []

        class Look(BaseCallback):
            before = None

            def _on_rollout_end(self):
                now = self.model.policy.q_net_target.q_net[1].weight.detach().clone()
                if self.before is not None and not th.equal(now, self.before):
                    copied.append(self.num_timesteps)
                self.before = now

            def _on_step(self):
                return True

        model.learn(160, callback=[DataParallelCallback(), Look()])
        assert type(model.target_update_interval) is int
        return copied

    assert results(in_threads(monkeypatch, act)) == [[48, 96, 144]] * 2


def test_an_interval_of_all_ranks_is_a_plain_number_in_a_checkpoint():
    interval = IntervalOfAll(10_000, 4)
    assert interval // 2 == 1250
    assert interval == 10_000
    assert json.dumps(interval) == "10000"
    assert type(pickle.loads(pickle.dumps(interval))) is int


class Rewards(EvalCallback):
    """Each rank would find another reward."""

    def __init__(self, reward, evaluated, **kwargs):
        super().__init__(TinyGame(), eval_freq=10, verbose=0, warn=False, **kwargs)
        self.reward, self.evaluated = reward, evaluated

    def _on_step(self):
        if self.n_calls % self.eval_freq:
            return True
        self.evaluated.append(self.reward)
        self.last_mean_reward = self.reward - len(self.evaluated)
        self.best_mean_reward = self.reward - 1.0
        return self._on_event()


def test_the_first_rank_evaluates_logs_and_saves_for_all(tmp_path, monkeypatch):
    evaluated, outputs = [], {}
    phase = {"on_plateau": {"patience": 1}, "unfreeze_from": "layer4", "restore_best": True}

    def act(rank):
        folder = tmp_path / str(rank)
        model = make_model(extractor=MINI)
        unfreeze = UnfreezeCallback([phase], verbose=0)
        evaluation = Rewards(10.0 * (rank + 1), evaluated)
        keeper = BestCheckpointCallback(save_freq=40, save_path=folder)

        class Look(BaseCallback):
            def _on_step(self):
                outputs[rank] = len(self.logger.output_formats)
                return True

        callbacks = [Look(), keeper, CheckpointCallback(20, str(folder / "plain")), evaluation, unfreeze]
        model.verbose = 1
        model.learn(160, callback=[*callbacks, DataParallelCallback()])
        assert len(model.logger.output_formats) == 1
        return model, evaluation.last_mean_reward, evaluation.n_calls, unfreeze.phase

    ranks = results(in_threads(monkeypatch, act))
    assert evaluated == [10.0] * 8
    assert [rest for _, *rest in ranks] == [[2.0, 80, 1]] * 2
    assert_one_model([model for model, *_ in ranks])
    assert outputs == {0: 1, 1: 0}
    assert newest_checkpoint(tmp_path / "0").name == "rl_model_160_steps.zip"
    assert (tmp_path / "0" / "best_frozen.zip").is_file()
    assert sorted(path.name for path in (tmp_path / "0" / "plain").iterdir())[0] == "rl_model_120_steps.zip"
    assert not [path for path in (tmp_path / "1").rglob("*") if path.is_file()]


def test_a_reward_threshold_that_the_first_rank_reaches_stops_all(monkeypatch):
    def act(rank):
        stop = StopTrainingOnRewardThreshold(5.0)
        model = make_actor_critic("ppo")
        model.learn(400, callback=[DataParallelCallback(), Rewards(10.0, [], callback_after_eval=stop)])
        return model

    ranks = results(in_threads(monkeypatch, act))
    assert {model.num_timesteps for model in ranks} == {34}  # call 10 is in the second rollout of 8
    assert_one_model(ranks)


@pytest.mark.parametrize("when", ["_on_rollout_start", "_on_step", "_on_rollout_end", "_on_training_end"])
def test_an_error_on_one_rank_ends_all_and_says_whose_it_is(when, monkeypatch):
    class Breaks(BaseCallback):
        def _on_step(self):
            return True

    def act(rank):
        callback = Breaks()
        if rank == 1:

            def fail():
                raise ValueError("the rewards hold NaN")

            setattr(callback, when, fail)
        make_model(extractor=MINI).learn(48, callback=[callback, DataParallelCallback(timeout=10)])

    first, second = in_threads(monkeypatch, act)
    assert isinstance(first, LostRankError)
    assert str(first) == "Rank 1 ended training with ValueError: the rewards hold NaN. So rank 0 ends too."
    assert isinstance(second, ValueError)


def test_a_rank_that_does_not_come_is_an_error_that_says_what_to_do(monkeypatch):
    class Sleeps(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_end(self):
            raise KeyboardInterrupt

    def act(rank):
        callbacks = [DataParallelCallback(timeout=1), *([Sleeps()] if rank else [])]
        make_model(extractor=MINI).learn(48, callback=callbacks)

    first, second = in_threads(monkeypatch, act)
    assert isinstance(first, LostRankError)
    assert "Rank 0 has lost another rank" in str(first)
    assert "start all of them again from the newest checkpoint" in str(first)
    assert isinstance(second, KeyboardInterrupt)


def test_a_nan_in_one_ranks_gradient_stops_all_with_the_same_error(monkeypatch):
    def act(rank):
        model = make_model(extractor=MINI)
        if rank == 1:
            [*model.policy.q_net.parameters()][-1].register_hook(lambda gradient: gradient * float("nan"))
        model.learn(48, callback=DataParallelCallback())

    errors = in_threads(monkeypatch, act)
    assert [type(error) for error in errors] == [ValueError, ValueError]
    assert len({str(error) for error in errors}) == 1
    assert "The gradient holds NaN or inf" in str(errors[0])


def refused(monkeypatch, act):
    errors = in_threads(monkeypatch, act)
    assert [type(error) for error in errors] == [ValueError, ValueError]
    assert len({str(error) for error in errors}) == 1
    return str(errors[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_freq": 8}, r"train_freq \(TrainFreq\(frequency=4, .* on rank 0, .*=8, .* on rank 1\)"),
        ({"batch_size": 8}, r"batch_size \(4 on rank 0, 8 on rank 1\): give them the same arguments"),
        ({"policy_kwargs": {"dropout": 0.5}}, r"policy_kwargs.dropout \(none on rank 0, 0.5 on rank 1\)"),
        ({"env": DummyVecEnv([TinyGame, TinyGame])}, r"environments \(1 on rank 0, 2 on rank 1\)"),
    ],
)
def test_ranks_that_would_not_be_in_step_are_refused(options, message, monkeypatch):
    def act(rank):
        make_model(**({**options} if rank else {}), extractor=MINI).learn(48, callback=DataParallelCallback())

    assert re.search(message, refused(monkeypatch, act))


def test_ranks_that_resume_from_different_timesteps_are_refused(monkeypatch):
    """What another callback has loaded when training starts."""

    class Jump(BaseCallback):
        def __init__(self, rank):
            super().__init__()
            self.rank = rank

        def _on_training_start(self):
            self.model.num_timesteps = 8 * self.rank

        def _on_step(self):
            return True

    def act(rank):
        make_model(extractor=MINI).learn(32, callback=[Jump(rank), DataParallelCallback()])

    for error in in_threads(monkeypatch, act):
        assert isinstance(error, ValueError)
        assert re.search(r"begin at other timesteps and updates, \[\(0, 0\), \(8, 0\)\]: load the same", str(error))


def test_the_progress_bar_counts_the_steps_of_all_ranks(monkeypatch):
    def act(rank):
        bar = ProgressBarCallback()
        make_model(extractor=MINI).learn(32, callback=[DataParallelCallback(), bar])
        return bar.pbar.n if rank == 0 else None

    assert results(in_threads(monkeypatch, act)) == [32, None]


def test_ranks_that_start_from_different_timesteps_are_refused(monkeypatch):
    def act(rank):
        model = make_model(extractor=MINI)
        model.num_timesteps = 100 * rank
        model.learn(48, callback=DataParallelCallback(), reset_num_timesteps=False)

    assert "num_timesteps (0 on rank 0, 100 on rank 1)" in refused(monkeypatch, act)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_model(extractor=MINI, train_freq=(1, "episode")), "train_freq counts episodes"),
        (lambda: make_actor_critic("ppo", target_kl=0.1), "write target_kl=None"),
    ],
)
def test_updates_of_another_number_on_each_rank_are_refused(make, message, monkeypatch):
    assert message in refused(monkeypatch, lambda rank: make().learn(48, callback=DataParallelCallback()))


def test_two_ranks_that_write_one_monitor_file_are_refused(tmp_path, monkeypatch):
    def act(rank):
        env = Monitor(TinyGame(), str(tmp_path / "0"))
        make_model(env=env, extractor=MINI).learn(48, callback=DataParallelCallback())

    assert "write --uuid for rl_zoo3.train" in refused(monkeypatch, act)


def test_an_evaluation_within_another_callback_is_refused(monkeypatch):
    def act(rank):
        nested = EveryNTimesteps(8, Rewards(1.0, []))
        make_model(extractor=MINI).learn(48, callback=[nested, DataParallelCallback()])

    assert "an EvalCallback must stand in the list itself, not in EveryNTimesteps" in refused(monkeypatch, act)


def test_a_policy_with_several_optimizers_is_refused(monkeypatch):
    def act(rank):
        env = make_vec_env("Pendulum-v1")
        SAC("MlpPolicy", env, device="cpu").learn(4, callback=DataParallelCallback())

    assert "needs a policy with one optimizer" in refused(monkeypatch, act)


def test_ranks_with_the_same_seed_get_others_and_environments_as_in_one_process(monkeypatch):
    def act(rank):
        env = DummyVecEnv([TinyGame, TinyGame])
        model = make_model(env=env, extractor=MINI, seed=3)
        model.learn(2, callback=DataParallelCallback())
        return [one.unwrapped.np_random.bit_generator.state["state"]["state"] for one in env.envs]

    seen = results(in_threads(monkeypatch, act))
    for states, seed in zip(seen, (3, 5), strict=True):
        env = DummyVecEnv([TinyGame, TinyGame])
        env.seed(seed)
        env.reset()
        for one in env.envs * 4:  # a rollout
            one.step(0)
        assert states == [one.np_random.bit_generator.state["state"]["state"] for one in env.envs]


@pytest.mark.parametrize(
    ("same", "timesteps", "expected"),
    [([], 0, None), (["numpy"], 0, 8), (["envs"], 0, 8), (["torch"], 500, RESUMED)],
)
def test_ranks_are_seeded_apart_only_where_they_have_the_same_random_numbers(same, timesteps, expected):
    class Second(Ranks):
        def gather(self, value):
            return [{key: text if key in same else "0" * 64 for key, text in value.items()}, value]

    model = make_model(extractor=MINI, seed=7)
    model.num_timesteps = timesteps
    seeds = []
    model.set_random_seed = seeds.append
    seed_apart(Second(1, 2), model)
    assert seeds == ([] if expected is None else [expected])


def test_vec_normalize_learns_from_the_rewards_of_all_ranks(monkeypatch):
    def act(rank):
        env = VecNormalize(DummyVecEnv([lambda: Pays(rank)]), norm_obs=False)
        model = make_model(env=env, extractor=MINI)
        model.learn(96, callback=DataParallelCallback())
        return env.ret_rms

    first, second = results(in_threads(monkeypatch, act))
    assert (first.mean, first.var, first.count) == (second.mean, second.var, second.count)
    joint = VecNormalize(DummyVecEnv([lambda: Pays(0), lambda: Pays(1)]), norm_obs=False)
    joint.reset()
    for _ in range(48):
        joint.step([0, 0])
    expected = joint.ret_rms
    assert np.allclose([first.mean, first.var, first.count], [expected.mean, expected.var, expected.count], rtol=1e-9)


class Pays(TinyGame):
    def __init__(self, rank):
        super().__init__()
        self.rank = rank

    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, 1.0 + 3.0 * self.rank, *rest


def test_a_single_process_trains_as_without_the_callback():
    def run(*callbacks):
        model = make_model(extractor=MINI)
        model.learn(48, callback=[*callbacks])
        return model

    alone, plain = run(DataParallelCallback(verbose=1)), run()
    assert weigh(alone) == weigh(plain)
    assert alone.num_timesteps == plain.num_timesteps == 48


def test_the_log_has_the_norm_of_the_mean_gradient(monkeypatch):
    def act(rank):
        logged = {}

        class Look(BaseCallback):
            def _on_rollout_end(self):
                logged.update(self.logger.name_to_value)

            def _on_step(self):
                return True

        model = make_model(extractor=MINI, max_grad_norm=1e9)
        model.learn(64, callback=[DataParallelCallback(), MonitorCallback(every=1), Look()], log_interval=None)
        return {key: value for key, value in logged.items() if key.startswith("grad_norm") or "clip" in key}

    first, second = results(in_threads(monkeypatch, act))
    assert first["monitor/clip_share"] == 0.0
    assert first["grad_norm/head"] == pytest.approx(first["grad_norm_clipped/head"])
    assert first == second


@pytest.mark.parametrize("make", [PPO, A2C, DQN])
def test_other_policies_train_in_step_too(make, monkeypatch):
    def act(rank):
        options = {"learning_starts": 4} if make is DQN else {"n_steps": 8}
        model = make("MlpPolicy", make_vec_env("CartPole-v1"), seed=rank, device="cpu", **options)
        model.learn(64, callback=DataParallelCallback())
        return model

    assert_one_model(results(in_threads(monkeypatch, act)))


def test_a_second_learn_and_an_interrupted_one_find_everything_as_before(monkeypatch):
    class Breaks(BaseCallback):
        breaks = True

        def _on_step(self):
            if self.breaks and self.num_timesteps >= 20:
                raise KeyboardInterrupt
            return True

    def act(rank):
        model, breaks, callback = make_model(extractor=MINI), Breaks(), DataParallelCallback()
        callbacks = CallbackList([breaks, callback])
        with pytest.raises(KeyboardInterrupt):
            model.learn(48, callback=callbacks)
        breaks.breaks = False
        model.learn(48, callback=callbacks)
        assert callbacks.callbacks == [breaks, callback]
        assert callback.callbacks == []
        assert type(model.target_update_interval) is int
        model.learn(48, callback=callbacks, reset_num_timesteps=False)
        assert ranks_of(model).size == 1
        return model

    ranks = results(in_threads(monkeypatch, act))
    assert_one_model(ranks)
    assert {model.num_timesteps for model in ranks} == {96}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"timeout": 0}, ValueError, "timeout must be finite and > 0"),
        ({"timeout": "long"}, TypeError, "timeout must be a number"),
        ({"bucket_bytes": 10}, ValueError, "bucket_bytes must be finite and >= 1024"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        DataParallelCallback(**arguments)


def test_ranks_that_have_drifted_apart_are_an_error_at_the_end(monkeypatch):
    class Changes(BaseCallback):
        def _on_step(self):
            with th.no_grad():
                self.model.policy.q_net.q_net[1].bias += 1e-6
            return True

    def act(rank):
        callbacks = [DataParallelCallback(), *([Changes()] if rank else [])]
        make_model(extractor=MINI).learn(48, callback=callbacks)

    errors = in_threads(monkeypatch, act)
    assert all("of ranks [1] are not those of rank 0" in str(error) for error in errors)


def test_the_weights_and_moments_of_the_first_rank_count(monkeypatch):
    def act(rank):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = make_model(extractor=MINI, seed=rank)
            if rank == 0:
                model.learn(32)
            model.num_timesteps, model._n_updates, model._n_calls = 32, 6, 32
            started = []

            class Look(BaseCallback):
                def _on_rollout_start(self):
                    started.append(weigh(self.model))

                def _on_step(self):
                    return True

            callback = [DataParallelCallback(bucket_bytes=2000), Look()]
            model.learn(8, callback=callback, reset_num_timesteps=False)
        return started[0]

    first, second = results(in_threads(monkeypatch, act))
    assert first == second
