"""DoctorCallback: each finding has a sick run that provokes it, and a healthy run is left alone."""

import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback
from stable_baselines3.common.monitor import Monitor

from sb3_resnet.callbacks import DoctorCallback, FeatureCacheCallback, LRScheduleCallback, UnfreezeCallback
from sb3_resnet.common.step_hooks import before_step
from sb3_resnet.diagnosis import setup_rules as diagnosis
from tests.helpers import POLICYS, TinyGame, assert_same, fill, make_model, slowly, snapshot, start, trained

UNFROZEN = {"freeze_backbone": False}


class Rewards(gym.Wrapper):
    """The tiny game with other rewards."""

    def __init__(self, reward):
        super().__init__(TinyGame())
        self.reward = reward

    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, self.reward(reward), *rest


class Blind(gym.ObservationWrapper):
    """A wrapper that lost the picture."""

    def observation(self, observation):
        return np.full_like(observation, 7)


class Skips(BaseCallback):
    """Logs what an AMP callback would that skips every second update."""

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        self.logger.record("train/amp_skipped", self.model._n_updates // 2)
        self.logger.record("train/amp_scale", 2.0**-10)


def change(model, value, name, **kwargs):
    """Set parameters of both networks' heads."""
    with th.no_grad():
        for network in (model.q_net, model.q_net_target):
            getattr(network.q_net[kwargs.get("layer", -1)], name).fill_(value)
    return model


def frozen_random():
    return make_model()


def lr_order():
    return make_model(policy_kwargs={"lr_head": 1e-4, "lr_backbone": 1e-3}, extractor=UNFROZEN)


def lr_never_above_zero():
    return make_model(learning_rate=0.0, extractor=UNFROZEN)


def lr_zero_from_then_on():
    return trained(make_model()), LRScheduleCallback(schedule="linear", decay_steps=1)


def epsilon():
    return trained(make_model(exploration_final_eps=0.9))


def never_trains():
    return trained(make_model(learning_starts=1000))


def batch_below_micro_batch():
    model = trained(make_model())
    model.policy.online.features_extractor.micro_batch_size = 8
    return model


def diverging(**kwargs):
    return trained(make_model(learning_rate=0.1, target_update_interval=1, train_freq=1, **kwargs))


def flat_rewards():
    return trained(make_model(env=Rewards(lambda reward: 1.0), learning_rate=1e-5))


def overfit():
    evaluation = EvalCallback(Rewards(lambda reward: -1.0), n_eval_episodes=1, eval_freq=20, verbose=0, warn=False)
    return trained(make_model(learning_rate=1e-5)), evaluation


def overestimating():
    return change(trained(make_model(learning_rate=1e-5)), 60.0, "bias")


def blind():
    return trained(make_model(env=Blind(TinyGame()), learning_rate=1e-5))


def dormant():
    return change(trained(make_model(learning_rate=1e-5)), -1e4, "bias", layer=1)


def nothing_to_learn():
    model = trained(make_model(env=Rewards(lambda reward: 0.0), learning_rate=1e-3))
    return change(change(model, 0.0, "bias"), 0.0, "weight")


def clipped_away():
    return trained(make_model(max_grad_norm=1e-3))


def drifting():
    model = make_model(extractor={"freeze_backbone": False, "norm": "batch"}, learning_rate=1e-5)
    for norm in model.policy.online.features_extractor.boundary.live_norms:
        norm.momentum = 1e-6
    return model


def skipping():
    return trained(make_model(train_freq=1)), Skips()


SICK = {
    "frozen_random_backbone": frozen_random,
    "lr_order": lr_order,
    "lr_zero": lr_never_above_zero,
    "lr_zero ": lr_zero_from_then_on,
    "epsilon_never_ends": epsilon,
    "never_trains": never_trains,
    "micro_batch": batch_below_micro_batch,
    "loss_explodes loss_oscillates q_explodes": diverging,
    "slow_curve": flat_rewards,
    "overfitting": overfit,
    "q_overestimation": overestimating,
    "dead_features": blind,
    "dormant_units": dormant,
    "gradients_vanish": nothing_to_learn,
    "gradients_explode": clipped_away,
    "batchnorm_drift": drifting,
    "amp_skips": skipping,
}


def watched(made, steps=64, **kwargs):
    model, *callbacks = made if isinstance(made, tuple) else (made,)
    doctor = DoctorCallback(**{"every": 1, **kwargs})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.learn(steps, callback=[doctor, *callbacks])
    told = [str(warning.message) for warning in caught if str(warning.message) in map(str, doctor.findings)]
    assert told == [*map(str, doctor.findings)]  # each once
    return doctor


#: Trained for longer than the others.
LONG = (
    *("amp_skips", "slow_curve", "lr_zero ", "overfitting"),
    "loss_explodes loss_oscillates q_explodes",
)


@pytest.mark.parametrize("codes", [*(codes for codes in SICK if codes not in LONG), *slowly(*LONG)])
def test_each_sick_run_is_found_out(codes, capsys):
    steps = {"amp_skips": 130, "overfitting": 110, "slow_curve": 150, "never_trains": 20}.get(codes, 64)
    doctor = watched(SICK[codes](), steps, **({"slow_after": 100} if codes == "slow_curve" else {}))
    found = {finding.code: finding for finding in doctor.findings}
    for code in codes.split():
        assert code in found
        finding = found[code]
        assert finding.seen.endswith(".")
        assert finding.why.endswith(".")
        assert "=" in finding.change or "Callback" in finding.change  # an argument and a value
    summary = capsys.readouterr().out.splitlines()
    assert summary[-len(found) - 1].startswith(f"Doctor: {len(found)} finding")
    assert [line.split()[1].rstrip(":") for line in summary[-len(found) :]] == [*found]


def test_a_buffer_beyond_the_memory_that_is_left_is_found_when_its_final_form_is_known(monkeypatch):
    monkeypatch.setattr(diagnosis, "available_bytes", lambda: 1_000_000)
    assert [finding.code for finding in watched(trained(make_model()), 20).findings] == ["buffer_memory"]
    assert watched((trained(make_model()), FeatureCacheCallback()), 20).findings == []  # frames are stored once


@pytest.mark.parametrize("algorithm", ["dqn", "qrdqn"])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_healthy_run_is_left_alone(algorithm, frozen, capsys):
    model = make_model(algorithm, learning_rate=1e-4, extractor={"freeze_backbone": frozen})
    model, *cache = trained(model), *([FeatureCacheCallback()] if frozen else [])
    assert watched((model, *cache), 64, action="stop").findings == []
    assert model.num_timesteps == 64
    assert "Doctor: no findings" in capsys.readouterr().out


def test_a_coming_phase_cures_a_frozen_random_backbone():
    phases = UnfreezeCallback([{"at_timestep": 24, "unfreeze_from": "all"}], verbose=0)
    assert watched((make_model(learning_rate=1e-4), CallbackList([phases])), 40).findings == []


def test_what_no_phase_reaches_stays_frozen():
    def phases(when, stage):
        return UnfreezeCallback([{"at_timestep": when, "unfreeze_from": stage}], verbose=0)

    (lower,) = watched((make_model(learning_rate=1e-4), phases(24, "layer4")), 40).findings
    assert lower.seen == "The stages stem, layer1, layer2, layer3 are frozen and their weights random."
    frozen, late = watched((make_model(learning_rate=1e-4), phases(5000, "all")), 40).findings
    assert frozen.seen == "The stages stem, layer1, layer2, layer3, layer4 are frozen and their weights random."
    assert (late.code, late.severity) == ("phase_never_begins", "warning")
    assert late.seen == "Training ends at step 40, before the phase with unfreeze_from='all' at timestep 5000."
    # Steps count over the whole training, whatever SB3 counts.
    model = make_model(learning_rate=1e-4)
    with pytest.warns(UserWarning, match="never began"):
        model.learn(40, callback=phases(100, "all"))
    assert watched((model, phases(70, "all")), 40).findings == []


def test_stop_ends_training_at_the_first_finding():
    model = make_model()
    assert [finding.code for finding in watched(model, action="stop").findings] == ["frozen_random_backbone"]
    assert model.num_timesteps == 1
    model = clipped_away()
    watched(model, 500, action="stop")
    assert model.num_timesteps < 60


def test_training_is_the_same_with_a_doctor():
    def train(*callbacks):
        model = trained(make_model(policy_kwargs={"dropout": 0.2}, learning_rate=1e-3))
        model.learn(60, callback=[FeatureCacheCallback(), *callbacks])
        return snapshot(model.policy), np.random.get_state()[1].tolist(), th.get_rng_state().tolist()

    (plain, *randomness), (watched_, *expected) = train(), train(DoctorCallback(every=3, verbose=0))
    assert_same(plain, watched_)
    assert randomness == expected


def test_a_second_end_and_a_second_learn_repeat_nothing(capsys):
    model = clipped_away()
    doctor = watched(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        doctor.on_training_end()
        assert capsys.readouterr().out.count("Doctor:") == 1
        model.learn(20, callback=doctor, reset_num_timesteps=False)
    assert capsys.readouterr().out.count("Doctor: 1 finding\n") == 1
    assert before_step(model.policy.optimizer).keys == POLICYS


def test_a_slow_curve_names_a_stage_that_this_trunk_has():
    model = trained(make_model(extractor={"last_stage": "layer2"}))
    doctor = DoctorCallback(verbose=0)
    start(model, doctor)
    for i in range(10):
        doctor._note({"eval/mean_reward": 1.0, **doctor._context(), "time/total_timesteps": 1e6 * i})
    with pytest.warns(UserWarning, match="unfreeze_from='layer2'"):
        doctor._examine()
    doctor.on_training_end()


def test_it_counts_the_episodes_of_the_mean_and_no_lost_lives():
    class Lives(gym.Wrapper):
        """Every third step costs a life, and the game goes on."""

        steps, over = 0, True

        def step(self, action):
            self.steps += 1
            obs, reward, *ends, info = super().step(action)
            self.over = any(ends)
            return obs, reward, ends[0] or self.steps % 3 == 0, ends[1], info

        def reset(self, **kwargs):
            return super().reset(**kwargs) if self.over else (self.env.unwrapped.frames.copy(), {})

    model = trained(make_model(env=Lives(Monitor(TinyGame()))))
    doctor = watched(model, 60)
    assert doctor._columns["time/episodes"][-1] == len(model.ep_info_buffer) < model._episode_num
    doctor = watched(model, 20)
    assert doctor._columns["time/episodes"][-1] == len(model.ep_info_buffer)


def test_it_can_be_driven_without_an_environment_and_a_logger():
    model = make_model(extractor=UNFROZEN)
    doctor = DoctorCallback(every=1, verbose=0)
    start(model, doctor)
    doctor.on_rollout_start()
    fill(model)
    for _ in range(3):
        doctor.on_rollout_end()
        model.train(1, 4)
        doctor.on_rollout_start()
    assert doctor._rows == 3
    doctor.on_training_end()


def test_wrong_use_is_refused():
    with pytest.raises(ValueError, match="action must be one of 'warn', 'stop', got 'stopp'; did you mean 'stop'"):
        DoctorCallback("stopp")
    model = DQN("CnnPolicy", TinyGame((1, 36, 36)), buffer_size=10)
    with pytest.raises(TypeError, match="DoctorCallback needs ResNetCnnPolicy"):
        start(model, DoctorCallback())
