"""MonitorCallback: the numbers are right, and training does not notice that it is watched."""

import csv
import re

import numpy as np
import pytest
import stable_baselines3
import torch as th
from stable_baselines3 import DQN
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import HumanOutputFormat, Logger, configure
from torch.nn import functional as F

import sb3_resnet.buffers
from sb3_resnet.buffers import FrameNStepReplayBuffer
from sb3_resnet.callbacks import (
    FeatureCacheCallback,
    GradientClipCallback,
    LRScheduleCallback,
    MonitorCallback,
    UnfreezeCallback,
    monitor,
)
from sb3_resnet.common.step_hooks import after_step, before_step
from tests.helpers import POLICYS, TinyGame, assert_same, fill, make_actor_critic, make_model, slowly, snapshot, start


class Log(Logger):
    """Keeps every recorded value."""

    def __init__(self):
        super().__init__(None, [])
        self.seen = {}

    def record(self, key, value, exclude=None):
        self.seen.setdefault(key, []).append(value)

    record_mean = record


def watch(model, callback, updates=1, batch_size=8):
    model.set_logger(Log())
    start(model, callback)
    callback.on_rollout_end()
    model.train(updates, batch_size)
    return model.logger.seen


def hooks_of(model):
    modules = [*model.policy.modules()]
    own = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)
    own += sum(len(p._post_accumulate_grad_hooks or ()) for p in model.policy.parameters())
    return own


@pytest.mark.parametrize(
    ("algorithm", "cached", "n_envs", "frozen"),
    [("dqn", True, 3, True), ("dqn", False, 1, False), *slowly(("dqn", False, 1, True), ("qrdqn", True, 1, True))],
)
def test_training_is_the_same_bit_for_bit(algorithm, cached, n_envs, frozen):
    def trained(*callbacks):
        env = make_vec_env(TinyGame, n_envs=n_envs, seed=0)
        extractor = {"freeze_backbone": frozen, "norm": "frozen" if frozen else "batch"}
        model = make_model(
            algorithm, env, {"dropout": 0.2}, extractor, learning_rate=1e-3, gradient_steps=2, exploration_fraction=0.5
        )
        cache = [FeatureCacheCallback()] if cached else []
        model.learn(28 * n_envs, callback=[*cache, *callbacks])
        return model, np.random.get_state()[1].tolist(), th.get_rng_state().tolist(), env.action_space.sample()

    (plain, *randomness), (watched, *expected) = trained(), trained(MonitorCallback(every=2))
    assert_same(snapshot(plain.policy), snapshot(watched.policy))
    for left, right in zip(*(m.policy.optimizer.state.values() for m in (plain, watched)), strict=True):
        assert th.equal(left["exp_avg"], right["exp_avg"])
    assert randomness == expected


def test_the_log_holds_every_documented_key(tmp_path):
    model = make_model(extractor={"norm": "batch", "freeze_backbone": False}, learning_starts=14)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(60, callback=MonitorCallback(every=1), log_interval=1)
    cached = make_model()
    cached.set_logger(configure(str(tmp_path / "cached"), ["csv"]))
    cached.learn(60, callback=[FeatureCacheCallback(), MonitorCallback(every=5)], log_interval=1)
    logged = set()
    for path in (tmp_path, tmp_path / "cached"):
        with open(path / "progress.csv", newline="") as file:
            logged |= {key for row in csv.DictReader(file) for key, value in row.items() if value}
    documented = MonitorCallback.__doc__.split("Under ``monitor/``:")[1].split(":param")[0]
    wanted = {f"monitor/{name}" for name in re.findall(r"``([a-z]+_[a-z0-9_]+|loss|phase)``", documented)}
    assert wanted - {"monitor/device_mb"} == {key for key in logged if key.startswith("monitor/")}
    for group in (*(group["name"] for group in model.policy.optimizer.param_groups), "all"):
        by_group = ("grad_norm", "grad_norm_clipped") + ("param_norm", "update_ratio") * (group != "all")
        assert {f"{key}/{group}" for key in by_group} <= logged
        assert f"train/lr_{group}" in logged or group == "all"
    assert not [key for key in logged if key.startswith("lr/")]


def test_every_output_of_sb3_takes_the_keys(capsys):
    model = fill(make_model(policy_kwargs={"lr_decay_per_stage": 0.5}, extractor={"freeze_backbone": False}))
    model.set_logger(Logger(None, [HumanOutputFormat(__import__("sys").stdout)]))
    callback = MonitorCallback()
    start(model, callback)
    callback.on_rollout_end()
    model.train(1, 8)
    model.logger.dump()
    assert "backbone.layer4_no_decay" in capsys.readouterr().out


@pytest.mark.parametrize("max_grad_norm", [1e9, 0.05])
def test_values_equal_those_computed_by_hand(max_grad_norm):
    model = fill(make_model(extractor={"freeze_backbone": False}, learning_rate=1e-3, max_grad_norm=max_grad_norm))
    twin = fill(make_model(extractor={"freeze_backbone": False}, learning_rate=1e-3))
    with th.no_grad():
        for network in (model.q_net, twin.q_net):
            network.q_net[1].bias += 0.1  # online and target network differ
    before = {name: value.clone() for name, value in model.q_net.named_parameters()}
    np.random.seed(3)
    seen = watch(model, MonitorCallback())
    np.random.seed(3)
    batch = twin.replay_buffer.sample(8)
    twin.policy.set_training_mode(True)
    with th.no_grad():
        target = batch.rewards + 0.99 * twin.q_net_target(batch.next_observations).max(dim=1, keepdim=True).values
    values = twin.q_net(batch.observations)
    error = target - values.gather(1, batch.actions)
    loss = F.smooth_l1_loss(values.gather(1, batch.actions), target)
    loss.backward()
    gradients = th.cat([p.grad.flatten() for p in twin.q_net.parameters()])
    expected = {
        "monitor/loss": loss,
        "monitor/q_mean": values.max(dim=1).values.mean(),
        "monitor/q_max": values.max(),
        "monitor/q_min": values.min(),
        "monitor/td_p50": error.abs().quantile(0.5),
        "monitor/td_p90": error.abs().quantile(0.9),
        "monitor/td_max": error.abs().max(),
        "monitor/td_mean": error.mean(),
        "grad_norm/all": gradients.norm(),
        "grad_norm_clipped/all": gradients.norm().clamp(max=max_grad_norm),
        "monitor/clip_share": float(gradients.norm() > max_grad_norm),
        "monitor/trained_share": 1.0,
        "monitor/freeze_boundary": 0.0,
        "monitor/phase": 1.0,
        "train/lr_head": 1e-3,
        "train/lr_backbone": 1e-4,
    }
    for key, value in expected.items():
        assert seen[key] == [
            pytest.approx(value.item() if isinstance(value, th.Tensor) else value, rel=1e-4, abs=1e-6)
        ], key
    groups = {g["name"]: g["params"] for g in model.policy.optimizer.param_groups}
    names = {id(p): name for name, p in model.q_net.named_parameters()}
    for name, parameters in groups.items():
        old = th.cat([before[names[id(p)]].flatten() for p in parameters])
        new = th.cat([p.detach().flatten() for p in parameters])
        assert seen[f"param_norm/{name}"] == [pytest.approx(old.norm().item(), rel=1e-4)]
        assert seen[f"update_ratio/{name}"] == [pytest.approx(((new - old).norm() / old.norm()).item(), rel=1e-3)]
    old, target = (
        th.cat([v.flatten() for v in values]) for values in (before.values(), model.q_net_target.parameters())
    )
    assert seen["monitor/target_lag"] == [pytest.approx(((old - target).norm() / old.norm()).item(), rel=1e-4)]


def test_clips_and_schedules_of_other_callbacks_are_seen_whatever_the_order():
    for order in (1, -1):
        model = fill(make_model(learning_rate=1e-3, max_grad_norm=1e9))
        monitor = MonitorCallback()
        callbacks = [monitor, GradientClipCallback(1e-3), LRScheduleCallback(warmup_steps=10)]
        model.set_logger(Log())
        start(model, *callbacks[::order])
        for callback in callbacks:
            callback.on_rollout_end()
        model.train(1, 8)
        seen = model.logger.seen
        assert seen["grad_norm_clipped/all"] == [pytest.approx(1e-3, rel=1e-2)]
        assert seen["grad_norm/all"][0] > 1e-2
        assert seen["monitor/clip_share"] == [1.0]
        assert seen["train/lr_head"] == [pytest.approx(1e-4)] * 2  # of both callbacks


def test_qrdqn_shows_the_means_of_its_quantiles():
    model = fill(make_model("qrdqn"))
    np.random.seed(0)
    seen = watch(model, MonitorCallback())
    model = fill(make_model("qrdqn"))
    np.random.seed(0)
    model.policy.set_training_mode(True)
    quantiles = model.quantile_net(model.replay_buffer.sample(8).observations)
    assert seen["monitor/q_mean"] == [pytest.approx(quantiles.mean(dim=1).max(dim=1).values.mean().item(), rel=1e-5)]
    assert seen["monitor/td_p50"][0] <= seen["monitor/td_p90"][0] <= seen["monitor/td_max"][0]


class Told(DQN):
    """A ``train()`` of its own that says what it computed: SB3's, or that of Double DQN."""

    double = False

    def train(self, gradient_steps, batch_size=100):
        self.policy.set_training_mode(True)
        self.told = []
        for _ in range(gradient_steps):
            batch = self.replay_buffer.sample(batch_size)
            discounts = self.gamma if batch.discounts is None else batch.discounts
            with th.no_grad():
                following = self.q_net_target(batch.next_observations)
                greedy = self.q_net(batch.next_observations).argmax(dim=1) if self.double else following.argmax(dim=1)
                best = following.gather(1, greedy[:, None])
                target = batch.rewards + (1 - batch.dones) * discounts * best
                self.greedy = batch.rewards + (1 - batch.dones) * discounts * following.max(dim=1, keepdim=True).values
            current = self.q_net(batch.observations).gather(1, batch.actions.long())
            self.greedy = (self.greedy - current).abs().max().item()
            loss = F.smooth_l1_loss(current, target)
            self.told.append((loss.item(), (target - current).abs().max().item(), (target - current).mean().item()))
            self.policy.optimizer.zero_grad()
            loss.backward()
            th.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
            self.policy.optimizer.step()
        self._n_updates += gradient_steps


@pytest.mark.parametrize("buffer", ["ReplayBuffer", "NStepReplayBuffer", "FrameReplayBuffer", "FrameNStepReplayBuffer"])
@pytest.mark.parametrize("cached", [True, *slowly(False)])
def test_loss_and_td_errors_are_those_of_train_with_every_buffer(buffer, cached):
    classes = {**vars(stable_baselines3.common.buffers), **vars(sb3_resnet.buffers)}

    def model_of():
        kwargs = {"replay_buffer_class": classes[buffer], "learning_rate": 1e-2}
        return fill(make_model(policy_kwargs={"dropout": 0.3}, **kwargs))

    model, twin = model_of(), model_of()
    twin.__class__ = Told
    for one in (model, twin):
        if cached:
            start(one, FeatureCacheCallback())
        np.random.seed(0)
        th.manual_seed(0)
        if one is model:
            callback = MonitorCallback(every=1)
            seen = watch(one, callback, updates=3)
        else:
            one.train(3, 8)
    told = [*zip(*twin.told, strict=True)]
    for key, values in zip(("loss", "td_max", "td_mean"), told, strict=True):
        assert seen[f"monitor/{key}"] == [*values], key
    assert model.logger.seen["train/loss"] == [pytest.approx(np.mean(told[0]))]
    assert "sample" in vars(model.replay_buffer)
    callback.on_training_end()
    assert "sample" not in vars(model.replay_buffer)


def test_loss_and_td_errors_of_qrdqn_are_those_of_its_train():
    model = fill(make_model("qrdqn", policy_kwargs={"n_quantiles": 7}, learning_rate=1e-2))
    seen = watch(model, MonitorCallback(every=1), updates=4)
    assert np.mean(seen["monitor/loss"]) == pytest.approx(seen["train/loss"][0], rel=1e-6)
    model, twin = (fill(make_model("qrdqn", policy_kwargs={"n_quantiles": 7})) for _ in range(2))
    np.random.seed(0)
    seen = watch(model, MonitorCallback())
    np.random.seed(0)
    twin.policy.set_training_mode(True)
    batch = twin.replay_buffer.sample(8)
    following = twin.quantile_net_target(batch.next_observations)
    best = th.stack([quantiles[:, quantiles.mean(dim=0).argmax()] for quantiles in following])
    target = batch.rewards + (1 - batch.dones) * 0.99 * best
    pairs = zip(twin.quantile_net(batch.observations), batch.actions[:, 0], strict=True)
    current = th.stack([quantiles[:, action] for quantiles, action in pairs])
    error = target.mean(dim=1) - current.mean(dim=1)
    assert seen["monitor/td_mean"] == [pytest.approx(error.mean().item(), rel=1e-4)]
    assert seen["monitor/td_max"] == [pytest.approx(error.abs().max().item(), rel=1e-4)]


@pytest.mark.parametrize("double", [False, True])
def test_the_targets_of_another_train_are_not_guessed(double):
    model = fill(make_model(learning_rate=1e-2))
    model.__class__ = type("Double", (Told,), {"double": double})
    with pytest.warns(UserWarning, match="TD errors are not measured: train.. of Double is not that of DQN or QRDQN"):
        seen = watch(model, MonitorCallback(), updates=1)
    assert not [key for key in seen if key.startswith(("monitor/td", "monitor/loss"))]
    assert seen["monitor/greedy_td_max"] == [pytest.approx(model.greedy, rel=1e-6)]
    assert {f"monitor/greedy_td_{name}" for name in ("p50", "p90", "max", "mean")} <= {*seen}


def test_a_buffer_is_saved_as_it_is_while_its_batches_are_watched(tmp_path):
    model = fill(make_model())
    callback = MonitorCallback(every=1)
    model.set_logger(Log())
    start(model, callback)
    callback.on_rollout_end()
    model.save_replay_buffer(tmp_path / "buffer")
    model.load_replay_buffer(tmp_path / "buffer.pkl")
    for _ in range(2):
        model.train(1, 8)
    # Not of the first, in which the batch came from a buffer that nobody watched.
    assert len(model.logger.seen["monitor/td_max"]) == len(model.logger.seen["monitor/loss"]) == 1


def test_measures_every_so_many_updates_and_is_gone_in_between():
    model = fill(make_model())
    clean = hooks_of(model)
    callback = MonitorCallback(every=10)
    model.set_logger(Log())
    start(model, callback)
    counts = []
    for _ in range(25):
        callback.on_rollout_end()
        model.train(1, 4)
        callback.on_rollout_start()
        counts.append(len(model.logger.seen["monitor/loss"]))
        assert hooks_of(model) == clean
    assert counts == [1] * 10 + [2] * 10 + [3] * 5
    callback.on_rollout_end()
    model.train(20, 4)  # several updates in one train()
    assert len(model.logger.seen["monitor/loss"]) == 5
    callback.on_rollout_end()
    callback.on_training_end()
    callback.on_training_end()
    assert hooks_of(model) == clean
    assert before_step(model.policy.optimizer).keys == POLICYS
    assert not after_step(model.policy.optimizer).keys


@pytest.mark.parametrize(
    ("algorithm", "every", "lines"),
    [("ppo", 1, 5), ("ppo", 5, 5), ("ppo", 40, 2), ("dqn", 5, 5), *slowly(("a2c", 1, 5), ("a2c", 2, 3))],
)
def test_speed_is_that_of_whole_rollouts_and_their_updates(algorithm, every, lines, monkeypatch):
    if algorithm == "dqn":  # large train() as well: 16 updates after each 32 steps
        model = make_model(train_freq=32, gradient_steps=16, learning_starts=0)
    else:
        model = make_actor_critic(algorithm, n_steps=32)
    updates = {"ppo": 16, "dqn": 16, "a2c": 1}[algorithm]
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: model.num_timesteps + 0.5 * callback._updates.n)
    callback = MonitorCallback(every=every)
    model.set_logger(Log())
    model.learn(160, callback=callback, log_interval=None)
    per_step = 1 / (1 + 0.5 * updates / 32)
    seen = model.logger.seen
    assert seen["monitor/steps_per_second"] == pytest.approx([per_step] * lines)
    assert seen["monitor/updates_per_second"] == pytest.approx([per_step * updates / 32] * lines)


def test_a_learn_of_one_rollout_logs_its_speed():
    model = make_actor_critic("ppo")
    for _ in range(2):
        model.set_logger(Log())
        model.learn(8, callback=MonitorCallback(every=1), reset_num_timesteps=False, log_interval=None)
        assert len(model.logger.seen["monitor/steps_per_second"]) == 1


def test_a_new_callback_takes_the_place_of_one_whose_learn_was_interrupted():
    model = fill(make_model())
    clean = hooks_of(model)
    model.set_logger(Log())
    for _ in range(2):
        callback = MonitorCallback()
        start(model, callback)
        callback.on_rollout_end()
    assert hooks_of(model) > clean
    model.train(1, 4)
    assert len(model.logger.seen["monitor/loss"]) == 1
    assert hooks_of(model) == clean


def test_a_phase_that_begins_at_the_same_moment_is_measured_whole():
    model = fill(make_model())
    callbacks = [MonitorCallback(every=1), UnfreezeCallback([{"at_update": 1, "unfreeze_from": "layer4"}], verbose=0)]
    model.set_logger(Log())
    start(model, *callbacks)
    groups = []
    for _ in range(3):
        for callback in callbacks:
            callback.on_rollout_end()
        model.train(1, 4)
        groups.append(len(model.logger.seen.get("grad_norm/backbone", [])))
    assert groups == [0, 0, 1]  # not the update at which the boundary moved after the hooks were set
    assert len(model.logger.seen["monitor/loss"]) == 2


def test_a_skipped_update_has_no_gradient_norm():
    model = fill(make_model())

    def skip(optimizer, args, kwargs):
        optimizer.zero_grad()

    model.policy.optimizer.register_step_pre_hook(skip)
    seen = watch(model, MonitorCallback())
    assert "monitor/td_p50" in seen
    assert not [key for key in seen if "norm" in key or "ratio" in key or "clip" in key]


def test_a_train_of_another_make_warns_once():
    class Other(DQN):
        def train(self, gradient_steps, batch_size=100):
            for _ in range(gradient_steps):
                batch = self.replay_buffer.sample(batch_size)
                self.policy.optimizer.zero_grad()
                self.q_net(batch.observations).mean().backward()
                self.policy.optimizer.step()

    model = fill(make_model())
    model.__class__ = Other
    with pytest.warns(UserWarning, match="TD errors are not measured: train.. of Other") as caught:
        seen = watch(model, MonitorCallback(every=1), updates=3)
    assert len(caught) == 1
    assert len(seen["monitor/q_mean"]) == 3
    assert "monitor/td_p50" not in seen


def test_expected_and_realised_returns_belong_to_the_same_episodes():
    class OneRewardAStep(TinyGame):
        def step(self, action):
            obs, _, _, truncated, info = super().step(action)
            over = self.clock >= self.length
            return obs, 2.0, over and not truncated, truncated, info

    model = make_model(env=OneRewardAStep(length=5), gamma=0.5, learning_starts=500)
    model.set_logger(Log())
    callback = MonitorCallback(every=1)
    model.learn(43, callback=callback)
    discounted = 2.0 * (1 - 0.5**5) / (1 - 0.5)
    finished = [*callback._episodes.finished]
    assert len(finished) == 4  # of eight, half of them truncated; the first is never measured
    assert [got for _, got in finished] == pytest.approx([discounted] * 4)
    assert callback._episodes.measured(model)["monitor/q_bound"] == 4.0
    assert len({round(value, 6) for value, _ in finished}) > 1


def test_returns_are_measured_in_a_second_learn_too():
    model = make_model(env=TinyGame(length=5), learning_starts=500)
    model.set_logger(Log())
    callback = MonitorCallback(every=1)
    model.learn(43, callback=callback)
    before = len(callback._episodes.finished)
    model.learn(20, callback=callback)  # whose timesteps begin at 0 again
    assert len(callback._episodes.finished) > before


def test_the_discount_is_that_of_the_buffer_where_it_has_one():
    kwargs = {"replay_buffer_class": FrameNStepReplayBuffer, "replay_buffer_kwargs": {"n_steps": 2, "gamma": 0.75}}
    model = make_model(**kwargs, gamma=0.5)
    model.set_logger(Log())
    callback = MonitorCallback(every=1)
    model.learn(16, callback=callback)
    values = callback._episodes.measured(model)
    assert values["monitor/q_bound"] == pytest.approx(4 * values["monitor/reward_max"])


def test_an_adapter_that_trains_below_a_frozen_trunk_moves_no_boundary():
    seen = watch(fill(make_model(extractor={"train_adapter": True})), MonitorCallback())
    assert (seen["monitor/freeze_boundary"], seen["monitor/phase"]) == ([6.0], [0.0])
    assert seen["update_ratio/backbone"][0] > 0
    assert "``train_adapter=True``, moves neither" in MonitorCallback.__doc__


def test_wrong_use_is_refused():
    with pytest.raises(ValueError, match="every must be"):
        MonitorCallback(every=0)
    model = DQN("CnnPolicy", TinyGame((1, 36, 36)), buffer_size=10)
    with pytest.raises(TypeError, match="MonitorCallback needs ResNetCnnPolicy"):
        start(model, MonitorCallback())
