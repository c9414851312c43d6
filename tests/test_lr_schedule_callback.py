"""LRScheduleCallback: closed forms of a saved counter (invariants 2, 3 and 11)."""

import math

import pytest
from stable_baselines3 import A2C, PPO, SAC
from stable_baselines3.common.callbacks import (
    CallbackList,
    CheckpointCallback,
    ConvertCallback,
    EvalCallback,
    EveryNTimesteps,
)
from stable_baselines3.common.envs import FakeImageEnv

from sb3_resnet.callbacks import LRScheduleCallback
from sb3_resnet.callbacks._evaluations import Evaluations
from sb3_resnet.common.step_hooks import before_step
from sb3_resnet.extractor import ResNetExtractor
from sb3_resnet.optim import schedules
from sb3_resnet.optim.groups import recall
from tests.helpers import POLICYS, Rewards, TinyGame, fill, make_actor_critic, make_model, slowly

LR = 1e-3


class Recorder:
    """The learning rates that the optimizer steps really used."""

    def __init__(self, model):
        self.rates = {}
        model.policy.optimizer.register_step_post_hook(self)

    def __call__(self, optimizer, args, kwargs):
        for group in optimizer.param_groups:
            self.rates.setdefault(group.get("name", "all"), []).append(group["lr"])


def drive(model, callback, trains, gradient_steps=1):
    """What ``learn()`` does with a callback, without an environment."""
    callback.init_callback(model)
    callback.on_training_start({}, {})
    for _ in range(trains):
        callback.on_rollout_end()
        model.train(gradient_steps, 2)
    callback.on_training_end()
    callback.on_training_end()  # RL-Zoo calls it twice


def expected(n, warmup, schedule):
    curves = {
        "constant": lambda k: 1.0,
        "linear": lambda k: schedules.linear(k, 20, 0.1),
        "cosine": lambda k: schedules.cosine(k, 20, 0.1),
        "step": lambda k: schedules.step(k, 5, 0.1),
    }
    return schedules.warmup(n, warmup) * curves[schedule](max(0, n - warmup))


OPTIONS = {
    "constant": {},
    "linear": {"decay_steps": 20, "min_factor": 0.1},
    "cosine": {"decay_steps": 20, "min_factor": 0.1},
    "step": {"step_size": 5, "gamma": 0.1},
}


@pytest.mark.parametrize("gradient_steps", [*slowly(1), 3])
@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("schedule", OPTIONS)
def test_each_update_uses_the_rate_of_the_closed_form(schedule, warmup, gradient_steps):
    model = fill(make_model(learning_rate=LR))
    used = Recorder(model)
    drive(model, LRScheduleCallback(warmup, schedule, **OPTIONS[schedule]), 30 // gradient_steps, gradient_steps)
    factors = [expected(n, warmup, schedule) for n in range(30)]
    assert used.rates["head"] == pytest.approx([LR * factor for factor in factors])
    assert used.rates["backbone_no_decay"] == pytest.approx([LR / 10 * factor for factor in factors])


@pytest.mark.parametrize("stop", [0, 3, 12, 25])
def test_invariant_3_a_second_learn_and_a_resume_restart_nothing(tmp_path, stop):
    model = fill(make_model(learning_rate=LR))
    used = Recorder(model)
    drive(model, LRScheduleCallback(5, "cosine", decay_steps=20), stop)
    model.save(tmp_path / "model")
    drive(model, LRScheduleCallback(5, "cosine", decay_steps=20), 30 - stop)
    resumed = fill(type(model).load(tmp_path / "model", env=TinyGame(), device="cpu"))
    resumed.num_timesteps = 0  # as reset_num_timesteps=True does
    used_after = Recorder(resumed)
    drive(resumed, LRScheduleCallback(5, "cosine", decay_steps=20), 30 - stop)
    whole = [LR * schedules.warmup(n, 5) * schedules.cosine(max(0, n - 5), 20) for n in range(30)]
    assert used.rates["head"] == pytest.approx(whole)
    assert used_after.rates["head"] == pytest.approx(whole[stop:])


def test_without_the_callback_a_resumed_model_keeps_the_last_factor(tmp_path):
    model = fill(make_model(learning_rate=LR))
    drive(model, LRScheduleCallback(0, "step", step_size=4), 6)
    model.save(tmp_path / "model")
    resumed = fill(type(model).load(tmp_path / "model", env=TinyGame(), device="cpu"))
    resumed.train(1, 2)
    rates = {group["name"]: group["lr"] for group in resumed.policy.optimizer.param_groups}
    assert rates["head"] == pytest.approx(LR * 0.1)
    assert rates["backbone"] == pytest.approx(LR * 0.01)


def test_the_horizon_is_what_the_first_learn_has_left_and_stays():
    model = make_model(learning_rate=LR, learning_starts=8)  # one update per 4 steps
    used = Recorder(model)
    model.learn(48, callback=LRScheduleCallback(2, "linear"))
    assert len(used.rates["head"]) == 10
    factors = [schedules.warmup(n, 2) * schedules.linear(max(0, n - 2), 8) for n in range(10)]
    assert used.rates["head"] == pytest.approx([LR * factor for factor in factors])
    model.learn(16, callback=LRScheduleCallback(2, "linear"), reset_num_timesteps=False)
    assert used.rates["head"][10:] == [0.0] * 4


def test_a_first_learn_that_ends_within_the_warmup_leaves_the_horizon_to_the_next():
    model = make_model(learning_rate=LR, extractor={"backbone": "resnet_mini"})
    callback = LRScheduleCallback(10, "cosine")
    model.learn(24, callback=callback)  # 4 updates
    assert model._n_updates == 4
    model.learn(56, callback=callback, reset_num_timesteps=False)  # 14 more
    assert [callback.factor(n) for n in (9, 10, 14, 18)] == pytest.approx([1.0, 1.0, 0.5, 0.0])


def test_gradient_steps_minus_one_counts_one_update_a_step():
    model = make_model(learning_rate=LR, learning_starts=8, gradient_steps=-1)
    callback = LRScheduleCallback(0, "linear")
    model.learn(24, callback=callback)
    assert [callback.factor(n) for n in (0, 8, 15, 16)] == pytest.approx([1.0, 0.5, 1 / 16, 0.0])


def test_episodes_as_train_freq_need_decay_steps():
    model = make_model(train_freq=(1, "episode"))
    with pytest.raises(ValueError, match="write decay_steps="):
        model.learn(30, callback=LRScheduleCallback(0, "cosine"))


def test_a_learn_that_broke_off_leaves_no_second_hook():
    model = fill(make_model(learning_rate=LR))
    for _ in range(2):
        broken = LRScheduleCallback(10)
        broken.init_callback(model)
        broken.on_training_start({}, {})
    used = Recorder(model)
    drive(model, LRScheduleCallback(10), 3)
    assert used.rates["head"] == pytest.approx([LR * (n + 1) / 10 for n in range(3)])
    assert before_step(model.policy.optimizer).keys == POLICYS


def test_invariant_11_nothing_is_hung_on_the_model():
    model = fill(make_model())
    before = {*model.__dict__}
    drive(model, LRScheduleCallback(10), 2)
    assert {*model.__dict__} == before


def test_rates_are_logged_by_group():
    model = fill(make_model(learning_rate=LR))
    callback = LRScheduleCallback(10)
    callback.init_callback(model)
    callback.on_training_start({}, {})
    callback.on_rollout_end()
    assert model.logger.name_to_value["train/lr_head"] == pytest.approx(LR / 10)
    assert model.logger.name_to_value["train/lr_backbone"] == pytest.approx(LR / 100)


REWARDS = [1.0, 2.0, 1.5, 2.0, 2.0, math.nan, 3.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("first", [True, False])
def test_plateau_follows_the_evaluation_reward(first):
    model = make_model(learning_rate=LR, learning_starts=0)
    used = Recorder(model)
    callback, evaluations = LRScheduleCallback(0, "plateau", patience=2, gamma=0.5, verbose=1), Rewards(REWARDS)
    model.learn(40, callback=[callback, evaluations] if first else [evaluations, callback])
    # Patience 2 bears 1.5 and 2.0; the next 2.0 halves the rate; 0.0 for the third time halves it again.
    assert [rate / LR for rate in used.rates["head"]] == pytest.approx([1.0] * 4 + [0.5] * 5 + [0.25])


def test_a_plateau_has_a_smallest_gain_and_a_smallest_factor_and_says_what_it_does(capsys):
    model = make_model(learning_starts=0, extractor={"backbone": "resnet_mini"})
    arguments = {"patience": 0, "min_delta": 0.6, "gamma": 0.1, "min_factor": 0.05, "verbose": 1}
    callback, factors = LRScheduleCallback(0, "plateau", **arguments), []
    look = ConvertCallback(lambda *_: factors.append(callback.factor(0)) is None)
    model.learn(16, callback=[Rewards([0.0, 1.0, 1.5, 2.0]), callback, look])
    assert factors[3::4] == pytest.approx([1.0, 1.0, 0.1, 0.1])
    model.learn(8, callback=[Rewards([0.0, 0.0]), callback, look], reset_num_timesteps=False)
    assert factors[-1] == pytest.approx(0.05)
    text = capsys.readouterr().out
    assert "LRSchedule: warmup 0 updates, then plateau, at update 0" in text
    assert "LRSchedule: no gain on plateau, learning rates x 0.1" in text


def test_plateau_state_lives_in_the_checkpoint(tmp_path):
    model = make_model(learning_rate=LR, learning_starts=0)
    model.learn(24, callback=[LRScheduleCallback(0, "plateau", patience=2, gamma=0.5), Rewards(REWARDS[:6])])
    model.save(tmp_path / "model")
    resumed = type(model).load(tmp_path / "model", env=TinyGame(), device="cpu")
    callback = LRScheduleCallback(0, "plateau", patience=2, gamma=0.5)
    resumed.learn(4, callback=[callback, Rewards([2.0])])
    assert recall(resumed.policy.optimizer, "lr_schedule")["plateau"] == {"best": 2.0, "bad": 2, "factor": 0.5}


@pytest.mark.parametrize("first", [True, False])
def test_plateau_knows_the_evaluation_that_stops_training(first):
    model = make_model(learning_starts=0, extractor={"backbone": "resnet_mini"})
    callback, evaluations = LRScheduleCallback(0, "plateau", patience=0, gamma=0.5), Rewards([5.0, 4.0], stop_at=4.0)
    model.learn(40, callback=[callback, evaluations] if first else [evaluations, callback])
    callback.on_training_end()  # RL-Zoo calls it again
    assert recall(model.policy.optimizer, "lr_schedule")["plateau"] == {"best": 5.0, "bad": 0, "factor": 0.5}
    assert {group["lr_factors"]["schedule"] for group in model.policy.optimizer.param_groups} == {0.5}


def test_a_callback_starts_anew_with_another_model():
    callback = LRScheduleCallback(0, "plateau", patience=0, gamma=0.5)
    for _ in range(2):
        model = make_model(learning_starts=0, extractor={"backbone": "resnet_mini"})
        model.learn(8, callback=[callback, Rewards([5.0, 4.0])])
        assert recall(model.policy.optimizer, "lr_schedule")["plateau"] == {"best": 5.0, "bad": 0, "factor": 0.5}


def test_a_checkpoint_of_the_same_step_has_the_reduction(tmp_path):
    model = make_model(learning_starts=0, extractor={"backbone": "resnet_mini"})
    callback = LRScheduleCallback(0, "plateau", patience=0, gamma=0.5)
    model.learn(8, callback=[Rewards([5.0, 4.0]), callback, CheckpointCallback(8, tmp_path)])
    (checkpoint,) = tmp_path.glob("rl_model_8_steps.zip")
    groups = type(model).load(checkpoint, device="cpu").policy.optimizer.param_groups
    assert {group["lr_schedule"]["plateau"]["factor"] for group in groups if "lr_schedule" in group} == {0.5}
    assert {group["lr_factors"]["schedule"] for group in groups} == {0.5}


def test_evaluations_of_a_model_that_has_not_learnt_since_are_not_counted():
    """Before the first update, and twice within a rollout of PPO."""
    callback = LRScheduleCallback(0, "plateau", patience=0, gamma=0.5)
    model = make_model(learning_starts=12, extractor={"backbone": "resnet_mini"})
    model.learn(20, callback=[callback, Rewards([3.0, 2.0, 1.0, 0.0, -1.0])])  # the first update follows step 16
    assert recall(model.policy.optimizer, "lr_schedule")["plateau"] == {"best": 3.0, "bad": 0, "factor": 0.5}
    ppo = make_actor_critic("ppo", n_steps=8)
    ppo.learn(24, callback=[callback, Rewards([1.0, 0.0, 3.0, 2.0, 0.0, 0.0])])  # updates follow steps 8, 16 and 24
    assert recall(ppo.policy.optimizer, "lr_schedule")["plateau"] == {"best": 3.0, "bad": 0, "factor": 0.5}


def test_plateau_needs_an_evaluation():
    model = make_model()
    with pytest.raises(ValueError, match="add an EvalCallback"):
        model.learn(4, callback=LRScheduleCallback(schedule="plateau"))
    with pytest.raises(ValueError, match="add an EvalCallback"):
        model.learn(4, callback=[LRScheduleCallback(schedule="plateau"), EvalCallback(TinyGame(), eval_freq=0)])


def test_evaluations_finds_nested_callbacks_and_reports_each_reward_once():
    inner = EvalCallback(TinyGame(), eval_freq=2)
    watch = Evaluations(CallbackList([LRScheduleCallback(), EveryNTimesteps(5, CallbackList([inner]))]))
    assert watch.found
    assert watch.poll() is None
    inner.n_calls, inner.last_mean_reward = 2, 1.5
    assert watch.poll() == 1.5
    assert watch.poll() is None
    assert not Evaluations(None).found


@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_on_policy_algorithms_count_optimizer_steps(tmp_path, algorithm):
    """PPO's counter counts epochs; a second learn() goes on with the warmup."""
    options = {"n_steps": 8, **({"batch_size": 4, "n_epochs": 2} if algorithm is PPO else {})}
    policy = {
        "features_extractor_class": ResNetExtractor,
        "features_extractor_kwargs": {"backbone": "resnet_tiny"},
        "net_arch": [8],
    }
    model = algorithm("CnnPolicy", TinyGame(), learning_rate=LR, policy_kwargs=policy, device="cpu", **options)
    used = Recorder(model)
    model.learn(16, callback=LRScheduleCallback(20))
    done = len(used.rates["all"])
    assert done == (8 if algorithm is PPO else 2)
    model.save(tmp_path / "model")
    resumed = algorithm.load(tmp_path / "model", env=TinyGame(), device="cpu")
    used_after = Recorder(resumed)
    resumed.learn(16, callback=LRScheduleCallback(20))
    assert used.rates["all"] + used_after.rates["all"] == pytest.approx([LR * (n + 1) / 20 for n in range(2 * done)])


@pytest.mark.parametrize(("algorithm", "planned"), [(PPO, 8), (A2C, 2)])
def test_the_horizon_of_on_policy_algorithms(algorithm, planned):
    options = {"n_steps": 8, **({"batch_size": 4, "n_epochs": 2} if algorithm is PPO else {})}
    model = algorithm("MlpPolicy", "CartPole-v1", device="cpu", **options)
    callback = LRScheduleCallback(schedule="linear")
    model.learn(16, callback=callback)
    assert [callback.factor(n) for n in (0, planned - 1, planned)] == pytest.approx([1.0, 1 / planned, 0.0])


def test_policies_with_several_optimizers_are_refused():
    model = SAC("CnnPolicy", FakeImageEnv(2, 32, 32, 4, discrete=False), buffer_size=10, device="cpu", policy_kwargs={
        "features_extractor_class": ResNetExtractor, "features_extractor_kwargs": {"backbone": "resnet_tiny"},
    })  # fmt: skip
    with pytest.raises(ValueError, match="needs a policy with one optimizer; SAC has not"):
        model.learn(4, callback=LRScheduleCallback())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"schedule": "cosin"}, ValueError, "did you mean 'cosine'"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps must be finite and >= 0"),
        ({"warmup_steps": 1.5}, ValueError, "whole number"),
        ({"schedule": "step"}, ValueError, "needs step_size"),
        ({"schedule": "step", "step_size": 0}, ValueError, "step_size must be finite and >= 1"),
        ({"schedule": "cosine", "gamma": 0.5}, ValueError, r"gamma means nothing .* \['step', 'plateau'\]"),
        ({"schedule": "step", "step_size": 5, "gamma": 0.0}, ValueError, "gamma must be finite and > 0"),
        ({"schedule": "cosine", "decay_steps": 0}, ValueError, "decay_steps must be finite and >= 1"),
        ({"schedule": "cosine", "min_factor": 2.0}, ValueError, "min_factor must be finite and >= 0 and <= 1"),
        ({"schedule": "plateau", "patience": -1}, ValueError, "patience must be finite and >= 0"),
    ],
)
def test_bad_arguments_are_refused_at_construction(arguments, error, message):
    with pytest.raises(error, match=message):
        LRScheduleCallback(**arguments)


def test_yaml_values_are_enough():
    callback = LRScheduleCallback(**{"warmup_steps": "1e3", "schedule": "cosine", "decay_steps": 1e5})
    assert (callback.warmup_steps, callback.decay_steps) == (1000, 100_000)
