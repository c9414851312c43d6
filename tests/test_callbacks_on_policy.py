"""The callbacks with PPO and A2C: what works, in gradient updates, and what refuses."""

import warnings

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.logger import configure

from sb3_resnet import fine_tuning_callbacks, newest_checkpoint
from sb3_resnet.callbacks import (
    AMPCallback,
    BestCheckpointCallback,
    DoctorCallback,
    GradientClipCallback,
    LRScheduleCallback,
    MonitorCallback,
    NanGuardCallback,
    UnfreezeCallback,
)
from sb3_resnet.callbacks._updates import extractors_of
from tests.helpers import Rewards, TinyGame, assert_same, make_actor_critic, snapshot

# A2C has PPO's policy and buffer.
algorithms = pytest.mark.parametrize("algorithm", ["ppo"])  # whose policy and buffer A2C has
both = pytest.mark.parametrize("algorithm", ["ppo", pytest.param("a2c", marks=pytest.mark.slow)])
UPDATES = {"ppo": 4, "a2c": 1}  # in each train(), after 8 steps


def rates_of_updates(model, part="backbone"):
    """:return: a list to which each gradient update adds the rate that it used"""
    rates = []

    def note(optimizer, args, kwargs):
        rates.extend(group["lr"] for group in optimizer.param_groups if group["name"] == part)

    model.policy.optimizer.register_step_post_hook(note)
    return rates


@algorithms
@pytest.mark.parametrize("clock", ["at_timestep", "at_update"])
@pytest.mark.parametrize("shared", [True, False])
def test_a_phase_begins_between_rollout_and_training_and_ramps_in_updates(algorithm, clock, shared):
    updates = UPDATES[algorithm]
    model = make_actor_critic(algorithm, policy_kwargs={"share_features_extractor": shared}, learning_rate=1e-3)
    when = 24 if clock == "at_timestep" else 2 * updates
    phase = {clock: when, "unfreeze_from": "layer4", "ramp": 2 * updates}
    before = snapshot(model.policy)
    rates, seen, train = rates_of_updates(model), [], model.train
    model.train = lambda: (seen.append(model.policy.freeze_boundary), train())
    model.learn(48, callback=UnfreezeCallback([phase], verbose=0))
    assert seen == [None, None, "layer4", "layer4", "layer4", "layer4"]
    assert len(extractors_of(model)) == (1 if shared else 2)
    for extractor in extractors_of(model):
        assert extractor.boundary.moved_at_update == 2 * updates
        assert not th.equal(
            extractor.backbone.layer4[0].conv1.weight, before["features_extractor.backbone.layer4.0.conv1.weight"]
        )
    ramp = [1e-4 * step / (2 * updates) for step in range(2 * updates)]
    assert rates[2 * updates : 4 * updates] == pytest.approx(ramp)
    assert rates[4 * updates :] == pytest.approx([1e-4] * 2 * updates)


@both
def test_warmup_is_counted_in_gradient_updates(algorithm):
    model = make_actor_critic(algorithm, learning_rate=1e-3)
    updates = UPDATES[algorithm]
    rates = rates_of_updates(model, "head")
    model.learn(16, callback=LRScheduleCallback(warmup_steps=4 * updates))
    model.learn(16, callback=LRScheduleCallback(warmup_steps=4 * updates))
    assert rates == pytest.approx([1e-3 * step / (4 * updates) for step in range(1, 4 * updates + 1)])


@algorithms
def test_a_phase_begins_with_the_best_model_of_the_one_before(tmp_path, algorithm):
    model = make_actor_critic(algorithm, learning_rate=1e-2)
    phase = {"at_timestep": 32, "unfreeze_from": "layer4", "restore_best": True}
    kept, train = {}, model.train

    def watched():
        kept[model.num_timesteps] = snapshot(model.policy)
        train()

    model.train = watched
    callbacks = [
        UnfreezeCallback([phase], verbose=0),
        BestCheckpointCallback(0, tmp_path),
        Rewards([1.0, 5.0, 2.0, 3.0, 4.0], eval_freq=8),
    ]
    model.learn(40, callback=callbacks)
    assert {"best.zip", "best_frozen.zip", "best_layer4.zip"} <= {path.name for path in tmp_path.iterdir()}
    # Trained by the rollouts up to step 8, as it was evaluated at step 16.
    before, after = kept[16], kept[32]
    weights = [key for key in after if "boundary" not in key]
    assert [key for key in weights if not th.equal(after[key], before[key])] == []
    assert any(not th.equal(kept[24][key], before[key]) for key in weights)


def test_checkpoints_resume_with_their_updates(tmp_path):
    callbacks = [LRScheduleCallback(warmup_steps=40), BestCheckpointCallback(16, tmp_path)]
    model = make_actor_critic()
    with pytest.warns(UserWarning, match="keeps only the newest"):
        model.learn(32, callback=callbacks)
    path = newest_checkpoint(tmp_path)
    assert path.name == "rl_model_32_steps.zip"
    loaded = type(model).load(path, env=TinyGame(), device="cpu")
    rates = rates_of_updates(loaded, "head")
    loaded.learn(8, callback=LRScheduleCallback(warmup_steps=40), reset_num_timesteps=False)
    assert rates == pytest.approx([3e-4 * n / 40 for n in (17, 18, 19, 20)])


def test_head_and_backbone_are_clipped_apart():
    model = make_actor_critic(extractor={"freeze_backbone": False}, max_grad_norm=1e9, ent_coef=100.0)
    norms = []

    def note(optimizer, args, kwargs):
        for part in ("head", "backbone"):
            grads = [p.grad for g in optimizer.param_groups if g["name"].startswith(part) for p in g["params"]]
            norms.append(float(th.stack([grad.norm() for grad in grads]).norm()))

    model.policy.optimizer.register_step_post_hook(note)
    model.learn(16, callback=GradientClipCallback(max_norm=1e-3))
    assert len(norms) == 16
    assert norms == pytest.approx([1e-3] * 16, rel=1e-2)


@algorithms
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_amp_trains_the_live_stages_in_reduced_precision(algorithm, dtype):
    model = make_actor_critic(algorithm, extractor={"freeze_backbone": False})
    seen = set()
    extractors_of(model)[0].backbone.layer4.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    before = snapshot(model.policy)
    model.learn(16, callback=AMPCallback(dtype, verbose=0, **({"init_scale": 64.0} if dtype == "float16" else {})))
    assert getattr(th, dtype) in seen
    after = model.policy.state_dict()
    assert not th.equal(
        after["features_extractor.backbone.conv1.weight"], before["features_extractor.backbone.conv1.weight"]
    )
    assert all(value.isfinite().all() for value in after.values())


class Broken(TinyGame):
    def step(self, action):
        observation, _, *rest = super().step(action)
        return observation, float("inf"), *rest


@algorithms
def test_infinite_rewards_are_not_trained_on(algorithm):
    model = make_actor_critic(algorithm, env=Broken())
    before = snapshot(model.policy)
    with pytest.raises(ValueError, match="rewards hold NaN or inf"):
        model.learn(16, callback=NanGuardCallback())
    assert_same(before, model.policy.state_dict())


@algorithms
def test_gradients_that_are_not_finite_are_refused_without_any_callback(algorithm):
    model = make_actor_critic(algorithm)
    before = snapshot(model.policy)
    model.policy.value_net.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(ValueError, match="gradient holds NaN or inf"):
        model.learn(8)
    trained = [key for key, value in model.policy.named_parameters() if not th.equal(value, before[key])]
    assert trained == []


MEASURED = {
    *(f"{name}/{part}" for name in ("grad_norm", "grad_norm_clipped") for part in ("head", "backbone", "all")),
    *(f"{name}/{part}" for name in ("param_norm", "update_ratio") for part in ("head", "backbone")),
    *(f"monitor/{name}" for name in ("dead_features", "dormant_units", "clip_share", "trained_share", "phase")),
    *(f"monitor/{name}" for name in ("steps_per_second", "updates_per_second", "freeze_boundary", "reward_max")),
    *(f"monitor/{name}" for name in ("q_start", "return_start", "batchnorm_drift")),
    "train/lr_head",
    "train/lr_backbone",
}


@algorithms
@pytest.mark.parametrize("shared", [True, False])
def test_the_monitor_logs_what_applies_and_changes_nothing(algorithm, shared):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        states = []
        for callback in (None, MonitorCallback(every=1)):
            model = make_actor_critic(
                algorithm,
                env=TinyGame(length=5),
                policy_kwargs={"share_features_extractor": shared, "dropout": 0.1},
                extractor={"freeze_backbone": False, "norm": "batch"},
            )
            model.learn(48, callback=callback, log_interval=None)
            states.append(snapshot(model.policy))
    assert_same(*states)
    logged = {*model.logger.name_to_value}
    assert sorted(MEASURED - logged) == []
    assert [key for key in logged if key.startswith(("monitor/td", "monitor/greedy", "monitor/q_m"))] == []


def test_the_monitor_counts_minibatches():
    model = make_actor_critic()
    monitor, seen = MonitorCallback(every=6), []
    monitor._probe._sink = lambda values: seen.append(monitor._updates.n)
    model.learn(32, callback=monitor)
    assert np.diff(seen).tolist() == [6, 6]
    assert seen[0] == 1  # the first is measured


def test_the_norms_are_those_of_the_update():
    model = make_actor_critic(extractor={"freeze_backbone": False}, n_epochs=1, batch_size=8)
    own = {}

    def note(optimizer, args, kwargs):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        own["clipped"] = float(th.stack([grad.norm() for grad in grads]).norm())

    model.policy.optimizer.register_step_post_hook(note)
    model.learn(8, callback=MonitorCallback(every=1))
    assert model.logger.name_to_value["grad_norm_clipped/all"] == pytest.approx(own["clipped"], rel=1e-4)


@algorithms
def test_the_doctor_finds_what_applies_and_nothing_else(algorithm):
    model = make_actor_critic(algorithm)
    doctor = DoctorCallback(every=1, verbose=0)
    phases = UnfreezeCallback([{"at_timestep": 10_000, "unfreeze_from": "layer4"}], verbose=0)
    with pytest.warns(UserWarning, match="never began") as caught:
        model.learn(160, callback=[doctor, phases])
    found = {finding.code for finding in doctor.findings}
    assert {"frozen_random_backbone", "phase_never_begins"} <= found
    assert not found & {"loss_explodes", "loss_oscillates", "q_explodes", "never_trains", "buffer_memory"}
    assert not any("TD errors" in str(warning.message) for warning in caught)


def test_the_doctor_may_stop_ppo():
    model = make_actor_critic()
    with pytest.warns(UserWarning, match="frozen"):
        model.learn(800, callback=DoctorCallback(action="stop", verbose=0))
    assert model.num_timesteps < 800


@algorithms
@pytest.mark.slow
def test_the_recipe_runs(tmp_path, algorithm):
    model = make_actor_critic(algorithm)
    recipe = fine_tuning_callbacks(
        80, warmup_steps=3, ramp=2, save_path=tmp_path, save_freq=16, monitor_every=1, restore_best=True
    )
    model.set_logger(configure(str(tmp_path), ["csv"]))
    seen, train = {}, model.train
    model.train = lambda: (seen.setdefault(model.policy.freeze_boundary, model.num_timesteps), train())
    model.learn(80, callback=[recipe, Rewards(range(10), eval_freq=8)], log_interval=1)
    assert seen == {None: 8, "layer4": 32, "layer3": 56}
    assert {"best_frozen.zip", "best_layer4.zip", "best_layer3.zip"} <= {path.name for path in tmp_path.iterdir()}
    logged = {*(tmp_path / "progress.csv").read_text().split("\n")[0].split(",")}
    assert {"train/lr_head", "grad_norm/head", "monitor/process_mb", "train/phase"} <= logged
