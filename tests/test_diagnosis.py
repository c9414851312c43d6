"""Findings from a model and from a log, without training."""

import math
import re

import numpy as np
import pytest
import torch as th
from stable_baselines3 import DQN, PPO, SAC
from stable_baselines3.common.logger import configure

from sb3_resnet import ResNetExtractor
from sb3_resnet.buffers import FrameReplayBuffer
from sb3_resnet.cache.sizes import growth_bytes
from sb3_resnet.callbacks import FeatureCacheCallback, MonitorCallback
from sb3_resnet.diagnosis import THRESHOLDS, Finding, history_findings, read_log
from sb3_resnet.diagnosis import setup_rules as diagnosis
from sb3_resnet.diagnosis.rolling import episodes_at
from sb3_resnet.diagnosis.setup_rules import has_random_weights
from sb3_resnet.diagnosis.setup_rules import static_findings as static
from tests.helpers import TinyGame, fill, make_actor_critic, make_dict_model, make_model, start, trained


def codes(findings):
    return [finding.code for finding in findings]


def noisy(level, n=30, swing=1.1):
    """Values around a level, up and down by a factor."""
    return [level * swing ** (-1) ** i for i in range(n)]


HEALTHY = {
    "monitor/loss": noisy(0.01, swing=1.8),
    "monitor/td_p50": noisy(0.05),
    "monitor/reward_max": [1.0] * 30,
    "monitor/q_max": noisy(2.0),
    "monitor/q_min": noisy(-1.0),
    "monitor/q_bound": [100.0] * 30,
    "monitor/q_start": noisy(1.0),
    "monitor/return_start": noisy(0.9),
    "monitor/dead_features": noisy(0.01),
    "monitor/dormant_units": noisy(0.1),
    "monitor/batchnorm_drift": noisy(0.1),
    "monitor/freeze_boundary": [6.0] * 30,
    "grad_norm/all": noisy(0.3),
    "grad_norm/head": noisy(0.3),
    "grad_norm_clipped/all": noisy(0.3),
    "update_ratio/head": noisy(1e-3),
    "train/lr_head": [1e-4] * 30,
    "rollout/ep_rew_mean": [float(i) for i in range(30)],
    "eval/mean_reward": [i + 0.5 for i in range(30)],
    "rollout/exploration_rate": [1.0 - i / 30 for i in range(30)],
    "time/total_timesteps": [1e5 * i for i in range(30)],
    "train/n_updates": [200.0 * i for i in range(30)],
    "train/amp_skipped": [16.0 + i // 10 for i in range(30)],
    "train/amp_scale": [65536.0] * 30,
}
RISING = [0.5 * 1.2**i for i in range(30)]
SICK = [
    ("loss_explodes", {"monitor/loss": RISING}, "grew from"),
    ("loss_explodes", {"monitor/loss": [0.1, math.nan]}, "The loss is nan after 2 logged values"),
    ("loss_explodes", {"monitor/loss": [], "train/loss": [0.1, math.inf]}, "The loss is inf"),
    ("loss_oscillates", {"monitor/td_p50": noisy(4.0), "monitor/loss": noisy(4.0)}, "4.02 times the largest reward"),
    ("loss_oscillates", {"monitor/loss": noisy(0.1, swing=4), "monitor/td_p50": []}, "factor of 16"),
    ("q_explodes", {"monitor/q_max": noisy(130)}, "exceed 100"),
    ("q_explodes", {"monitor/q_min": noisy(-130)}, "exceed 100"),
    ("q_overestimation", {"monitor/q_start": noisy(20)}, "and gets 0.9"),
    ("slow_curve", {"eval/mean_reward": noisy(3, swing=1.5), "rollout/ep_rew_mean": []}, "eval/mean_reward was 3."),
    ("slow_curve", {"eval/mean_reward": [], "rollout/ep_rew_mean": [-21.0] * 30}, "rollout/ep_rew_mean was -21"),
    ("overfitting", {"eval/mean_reward": [*range(20), *[12.0] * 10]}, "reward was 12, in training 28"),
    ("dead_features", {"monitor/dead_features": noisy(0.7)}, "70%"),
    ("dormant_units", {"monitor/dormant_units": noisy(0.7)}, "70%"),
    ("gradients_vanish", {"grad_norm/backbone": noisy(1e-9)}, "of backbone is 1.00e-09"),
    ("gradients_explode", {"grad_norm/all": noisy(50.0)}, "50.2 before clipping and 0.301 after"),
    ("gradients_explode", {"grad_norm/all": RISING, "train/policy_loss": noisy(0.1)}, "log: 1.14, 7.06, 43.7)"),
    ("gradients_explode", {"grad_norm/all": [*noisy(0.3), math.inf]}, "before clipping"),
    ("lr_zero", {"train/lr_head": [0.0] * 30}, "No learning rate exceeded 0.0e+00"),
    ("lr_zero", {"train/lr_head": [], "train/learning_rate": [1e-12] * 30}, "exceeded 1.0e-12"),
    ("lr_zero", {"update_ratio/head": noisy(1e-9)}, "by 1.0e-09 of their size, at a learning rate of 1.0e-04"),
    ("batchnorm_drift", {"monitor/batchnorm_drift": noisy(2.0)}, "2 standard deviations"),
    ("amp_skips", {"train/amp_skipped": [20.0 * i for i in range(30)]}, "20 of the last 200 updates"),
    ("epsilon_never_ends", {"rollout/exploration_rate": [1.0] * 30}, "still 1 at the end"),
]


def test_a_healthy_log_gives_no_finding():
    assert history_findings(HEALTHY, finished=True) == []
    assert history_findings({}, finished=True) == []
    early = {key: values[:5] for key, values in HEALTHY.items()}
    assert history_findings(early) == []


@pytest.mark.parametrize(("code", "columns", "seen"), SICK)
def test_a_sick_log_gives_the_one_finding(code, columns, seen):
    found = history_findings({**HEALTHY, **columns}, finished=True)
    assert codes(found) == [code]
    assert seen in found[0].seen
    assert found[0].severity in ("warning", "error")
    assert str(found[0]).startswith(f"{code}: ")
    assert "\n" not in str(found[0])


@pytest.mark.parametrize(("code", "columns", "seen"), SICK)
def test_lines_without_a_value_change_nothing(code, columns, seen):
    holes = {
        key: [value for pair in zip(values, [None] * len(values), strict=True) for value in pair]
        for key, values in {**HEALTHY, **columns}.items()
    }
    assert codes(history_findings(holes, finished=True)) == [code]


@pytest.mark.parametrize("key", [key for key in HEALTHY if "loss" not in key and "grad" not in key])
def test_a_nan_is_no_finding_of_another_kind(key):
    assert history_findings({**HEALTHY, key: [math.nan] * 30}) == []


@pytest.mark.parametrize("n", [60, 3000])
def test_a_schedule_may_end_at_zero_but_not_long_before_the_end(n):
    cosine = [1e-4 * (1 + math.cos(math.pi * i / (n - 1))) / 2 for i in range(n)]
    columns = {"train/lr_head": cosine, "update_ratio/head": [10 * rate for rate in cosine]}
    assert history_findings({**HEALTHY, **columns}) == []
    (found,) = history_findings({**HEALTHY, "train/lr_head": [*cosine[::2], *[0.0] * (n // 2)]})
    assert f"No learning rate exceeded 0.0e+00 in the last {n // 3} logged updates" in found.seen
    (found,) = history_findings({**HEALTHY, "update_ratio/head": [*cosine[::2], *[0.0] * (n // 2)]})
    assert found.code == "lr_zero"


def test_epsilon_may_be_high_while_training_goes_on():
    assert history_findings({**HEALTHY, "rollout/exploration_rate": [1.0] * 30}) == []


@pytest.mark.parametrize("key", ["train/policy_gradient_loss", "train/policy_loss"])
def test_the_loss_of_an_actor_critic_may_grow_and_jump_but_not_be_nan(key):
    """It follows the advantages of each rollout."""
    columns = {key: noisy(-0.01), "monitor/loss": [], "monitor/td_p50": []}
    for loss in (RISING, noisy(0.1, swing=40)):
        assert history_findings({**HEALTHY, **columns, "train/loss": loss}) == []
    (found,) = history_findings({**HEALTHY, **columns, "train/loss": [0.1, math.nan]})
    assert (found.code, found.severity) == ("loss_explodes", "error")
    assert "GradientClipCallback" not in found.change  # max_grad_norm is 0.5 already


@pytest.mark.parametrize(
    ("norms", "clip"),
    [
        (noisy(35.0, swing=1.5), 2.0),  # QR-DQN, whose loss is a sum over its quantiles
        ([5.0 + 1.4 * i for i in range(30)], 0.5),  # PPO, whose critic meets larger returns
        ([0.1] * 10 + [20.0] * 10 + [30.0] * 10, 2.0),  # the first rewards came late
    ],
)
def test_a_norm_far_above_the_clip_is_healthy_where_the_loss_is_large_and_the_norm_does_not_run_away(norms, clip):
    columns = {**HEALTHY, "grad_norm/all": norms, "grad_norm_clipped/all": [clip] * 30}
    assert codes(history_findings(columns)) == ["gradients_explode"]
    assert codes(history_findings(columns, model=make_model())) == ["gradients_explode"]
    assert history_findings(columns, model=make_model("qrdqn")) == []
    assert history_findings(columns, model=make_actor_critic("ppo")) == []
    assert history_findings({**columns, "train/policy_loss": noisy(0.1)}) == []


def test_a_slow_curve_is_advised_by_the_phase_and_forgiven_for_as_long_as_one_says():
    flat = {**HEALTHY, "eval/mean_reward": [], "rollout/ep_rew_mean": [-21.0] * 30}
    (frozen,) = history_findings(flat)
    (open_,) = history_findings({**flat, "monitor/freeze_boundary": [0.0] * 30})
    assert "unfreeze_from=STAGE" in frozen.change
    assert "the last stage of your trunk" in frozen.change
    assert "UnfreezeCallback" not in open_.change
    for model in (make_model(extractor={"last_stage": "layer2"}), make_dict_model(extractor={"last_stage": "layer2"})):
        (found,) = history_findings(flat, model=model)
        assert "UnfreezeCallback([dict(at_timestep=..., unfreeze_from='layer2')])" in found.change
        model.policy.set_freeze_boundary("layer2")
    (found,) = history_findings(flat, model=PPO("MlpPolicy", "CartPole-v1", device="cpu"))
    assert "STAGE" in found.change
    assert history_findings(flat, slow_after=3_000_000) == []


def rolling_log(rewards, every, known_by):
    """The log of some episodes: SB3's rolling mean of 100 in lines that share most of them."""
    ends = np.arange(every, len(rewards) + 1, every)
    steps = 1000.0 * ends
    columns = {
        "rollout/ep_rew_mean": [float(rewards[max(0, end - 100) : end].mean()) for end in ends],
        "time/total_timesteps": steps.tolist(),
        "time/episodes": ends.tolist(),
        "rollout/ep_len_mean": [1000.0] * len(ends),
    }
    return {key: values for key, values in columns.items() if key in ("rollout/ep_rew_mean", *known_by)}


@pytest.mark.parametrize(
    ("episodes", "every", "known_by"),
    [
        *((*run, ["time/episodes"]) for run in ((800, 4), (800, 1), (2000, 130))),
        *((*run, ["rollout/ep_len_mean"]) for run in ((800, 4), (800, 1), (2000, 130))),
        (200, 4, []),  # SB3's interval, where nothing tells
    ],
)
def test_a_flat_rolling_mean_is_no_gain_and_a_rise_is_one(episodes, every, known_by):
    rng = np.random.default_rng(0)
    runs = [rng.normal(size=episodes) for _ in range(60)]
    for rise, few, many in ((0.0, 54, 60), (3.0, 0, 2)):
        logs = [
            rolling_log(run + np.linspace(0, rise, episodes), every, ["time/total_timesteps", *known_by])
            for run in runs
        ]
        assert few <= sum(codes(history_findings(log, slow_after=1)) == ["slow_curve"] for log in logs) <= many


def test_the_model_knows_the_window_and_a_count_that_begins_again_adds_up():
    rewards = np.random.default_rng(1).normal(size=800)
    log = rolling_log(rewards, 4, ["time/total_timesteps", "time/episodes"])
    model = make_model(stats_window_size=1)
    model.learn(1)
    single = {**log, "rollout/ep_rew_mean": (rewards + np.linspace(0, 1, 800))[3::4].tolist()}
    assert codes(history_findings(single, slow_after=1)) == ["slow_curve"]
    assert history_findings(single, slow_after=1, model=model) == []
    again = {**log, "time/episodes": [*log["time/episodes"][:100], *log["time/episodes"][:100]]}
    assert episodes_at(again).tolist() == log["time/episodes"]
    assert episodes_at({"rollout/ep_rew_mean": [1.0, None, 2.0], "time/episodes": [4.0]}).tolist() == [4, 4]
    assert episodes_at({"rollout/ep_rew_mean": [1.0, None, 2.0]}).tolist() == [4, 8]


def test_overfitting_is_cured_by_arguments_there_are_and_by_training_less():
    columns = {**HEALTHY, "eval/mean_reward": [*range(20), *[12.0] * 10]}
    (open_,) = history_findings({**columns, "monitor/freeze_boundary": flat(2.0)})
    assert "augment=['random_shift']" in open_.change
    assert "FeatureCacheCallback(augment_copies=4)" in open_.change
    assert open_.change.endswith("or train fewer stages: a higher unfreeze_from, or freeze_backbone=True.")
    (frozen,) = history_findings(columns)
    assert "train fewer" not in frozen.change
    extractor = {"augment": ["random_shift"]}
    make_model(extractor=extractor, policy_kwargs={"dropout": 0.1, "weight_decay": 1e-3})
    FeatureCacheCallback(augment_copies=4)


@pytest.mark.parametrize(
    ("expected", "got", "sick"),
    [
        (5.0, -2.0, True),  # Pong: a bound of 100, and returns of a few points
        (0.1, -2.4, False),  # before the agent has learned to lose
        (0.3, 0.0, False),
        (1.4, 0.0, True),  # more than the largest reward there is, where most episodes have none
        (50.0, 40.0, False),
        (90.0, 40.0, True),
    ],
)
def test_expectations_are_compared_with_the_returns_there_are(expected, got, sick):
    columns = {"monitor/q_start": flat(expected), "monitor/return_start": flat(got)}
    assert codes(history_findings({**HEALTHY, **columns})) == (["q_overestimation"] if sick else [])
    assert history_findings({**HEALTHY, **columns, "monitor/return_start": flat(0.0), "monitor/reward_max": []}) == []


def test_too_high_expectations_are_cured_by_what_the_algorithm_has():
    high = {**HEALTHY, "monitor/q_start": flat(20.0)}

    def advice(model=None, **columns):
        (found,) = history_findings({**high, **columns}, model=model)
        return found.change

    assert advice() == (
        "Write target_update_interval=10000 and a smaller learning_rate (a third), or train QRDQN instead of DQN."
    )
    assert "target_update_interval=20000 and" in advice(make_model(target_update_interval=10_000))
    assert "train QRDQN" in advice(make_model())
    assert "train QRDQN" not in advice(make_model("qrdqn"))
    assert "n_steps=16 and" in advice(make_actor_critic("ppo", n_steps=8))
    for text in (
        advice(make_actor_critic("a2c")),
        advice(**{"train/policy_loss": flat(0.1)}),
    ):
        assert "n_steps" in text
        assert "target" not in text
        assert "QRDQN" not in text


def test_a_log_is_read_as_sb3_wrote_it(tmp_path):
    model = fill(make_model())
    model.set_logger(configure(str(tmp_path), ["csv"]))
    callback = MonitorCallback(every=2)
    start(model, callback)
    for step in range(4):
        callback.on_rollout_end()
        model.train(1, 4)
        if step == 2:
            model.logger.record("text", "hello")
        model.logger.dump(step)
    columns = read_log(tmp_path / "progress.csv")
    assert [value is None for value in columns["monitor/loss"]] == [False, True, False, True]
    assert columns["train/n_updates"] == [1, 2, 3, 4]
    assert "text" not in columns
    (tmp_path / "empty.csv").write_text("")
    assert read_log(tmp_path / "empty.csv") == {}
    with pytest.raises(FileNotFoundError):
        read_log(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("last", "loss"),
    [
        ("\n3000,1.5\n", 1.5),
        ("\n3000,1.5", None),  # may be 1.5e+09
        ("\n3000,1.2e", None),
        ("\n3000,1.2e\n", None),
        ("\n3000,-\n", None),
        ("\n30", None),
        ("\n3000,1.5,7,8\n", 1.5),
        ("\n\0\0\0,\0\0\n", None),
        ("\n\n", 0.5 * 1.2**29),
    ],
)
def test_a_log_that_was_cut_off_still_tells_that_the_run_diverged(tmp_path, last, loss):
    path = tmp_path / "progress.csv"
    rows = "".join(f"\n{100 * i},{value}" for i, value in enumerate(RISING))
    path.write_text(f"time/total_timesteps,train/loss{rows}{last}")
    columns = read_log(path)
    assert [*columns] == ["time/total_timesteps", "train/loss"]
    assert columns["train/loss"][:30] == RISING
    assert columns["train/loss"][-1] == loss
    assert codes(history_findings(columns)) == ["loss_explodes"]


def test_what_cannot_be_read_as_a_log_is_named(tmp_path):
    (tmp_path / "binary.csv").write_bytes(b"a,b\n\xff\xfe\n")
    (tmp_path / "long.csv").write_text('a,b\n"' + "x" * 200_000)
    for path in (tmp_path / "binary.csv", tmp_path / "long.csv", tmp_path):
        with pytest.raises(ValueError, match=re.escape(f"{path} cannot be read as SB3's log")):
            read_log(path)
    (tmp_path / "extra.csv").write_text("a,b\n1,2,3\n4,5\n")
    assert read_log(tmp_path / "extra.csv") == {"a": [1.0, 4.0], "b": [2.0, 5.0]}


def test_every_limit_names_its_source():
    assert all(limit.source and limit.value > 0 for limit in THRESHOLDS.values())
    assert Finding("code", "Seen.", "Why.", "Change.") == Finding("code", "Seen.", "Why.", "Change.", "warning")


def test_a_healthy_model_gives_no_finding():
    assert static(trained(make_model()), 1000) == []
    assert static(make_model(extractor={"freeze_backbone": False}), 1000) == []
    own = {"backbone_optimizer_class": "SGD", "lr_backbone": 1e-2}  # SGD takes larger rates than AdamW
    assert static(make_model(extractor={"freeze_backbone": False}, policy_kwargs=own), 1000) == []


@pytest.mark.parametrize(
    ("code", "severity", "kwargs"),
    [
        ("frozen_random_backbone", "warning", {"extractor": {}}),
        ("frozen_random_backbone", "warning", {"extractor": {"norm": "group"}}),
        ("lr_order", "error", {"policy_kwargs": {"lr_head": 1e-5, "lr_backbone": 1e-4}}),
        ("lr_zero", "error", {"learning_rate": lambda progress: 0.0}),
        ("lr_zero", "error", {"policy_kwargs": {"lr_backbone": 0.0}}),
        ("epsilon_never_ends", "warning", {"exploration_final_eps": 0.5}),
        ("epsilon_never_ends", "warning", {"exploration_fraction": 1.0}),
        ("never_trains", "error", {"learning_starts": 5000}),
        ("never_trains", "error", {"gradient_steps": 0}),
    ],
)
def test_a_sick_model_gives_the_one_finding(code, severity, kwargs):
    (found,) = static(make_model(**{"extractor": {"freeze_backbone": False}, **kwargs}), 1000)
    assert (found.code, found.severity) == (code, severity)


def test_random_weights_are_told_from_loaded_ones(hub_weights, tmp_path):
    path = tmp_path / "weights.pth"
    state = th.load(hub_weights)
    state["bn1.running_mean"] += 0.1
    th.save(state, path)
    options = {"buffer_size": 10, "device": "cpu"}

    def build(**extractor):
        return DQN("ResNetCnnPolicy", TinyGame(), policy_kwargs={"features_extractor_kwargs": extractor}, **options)

    model = build(weights=str(path))
    extractor = model.q_net.features_extractor
    assert not has_random_weights(extractor, extractor.stages)
    model.save(tmp_path / "model.zip")
    assert static(DQN.load(tmp_path / "model.zip", env=TinyGame())) == []
    assert codes(static(build())) == ["frozen_random_backbone"]
    model = build()
    model.policy.set_freeze_boundary("layer4")
    (found,) = static(model)
    assert found.seen.startswith("The stages stem, layer1, layer2, layer3 are frozen")
    model.policy.set_freeze_boundary("all")
    assert static(model) == []


def test_other_algorithms_are_checked_for_what_they_have():
    kwargs = {"features_extractor_class": ResNetExtractor, "features_extractor_kwargs": {"backbone": "resnet_tiny"}}
    model = PPO("CnnPolicy", TinyGame(), policy_kwargs=kwargs, n_steps=8, batch_size=4, device="cpu")
    assert codes(static(model, 10)) == ["frozen_random_backbone"]
    model = DQN("CnnPolicy", TinyGame((1, 36, 36)), buffer_size=10, device="cpu")
    assert static(model) == []
    assert static(SAC("MlpPolicy", "Pendulum-v1", buffer_size=10, device="cpu")) == []


def test_a_buffer_that_does_not_fit_names_the_size_that_does(monkeypatch):
    model = trained(make_model())
    monkeypatch.setattr(diagnosis, "available_bytes", lambda: growth_bytes(model) // 2)
    (found,) = static(model)
    assert (found.code, found.severity) == ("buffer_memory", "error")
    assert "buffer_size=135, or replay_buffer_class=sb3_resnet.buffers.FrameReplayBuffer" in found.change
    monkeypatch.setattr(diagnosis, "available_bytes", lambda: None)  # nothing tells
    assert static(model) == []
    monkeypatch.setattr(diagnosis, "available_bytes", lambda: 1000)
    (found,) = static(trained(make_model(replay_buffer_class=FrameReplayBuffer)))
    assert "FrameReplayBuffer" not in found.change
    model = make_dict_model(extractor={"freeze_backbone": False})
    monkeypatch.setattr(diagnosis, "available_bytes", lambda: growth_bytes(model) // 2)
    (found,) = static(model)
    assert (found.code, found.change) == ("buffer_memory", "Write buffer_size=27.")


def flat(value, n=30):
    return [value] * n


def third_by_third(first, middle, last):
    return [*first, *middle, *last]


def grown(last, first=1e-3):
    return third_by_third(flat(first, 10), flat(1.1 * first, 10), flat(last, 10))


WAVE = [1.0, -1.0] * 5
WAVE_ERROR = math.sqrt(2 * (10 / 9) / 10)  # standard error of the difference between two such thirds
NO_MONITOR = {"monitor/td_p50": []}
#: For each limit the finding, and a log in which the judged number is the given one.
LOG_LIMITS = {
    "values": ("dead_features", lambda x: {"monitor/dead_features": flat(0.9, round(x))}),
    "loss_growth": (
        "loss_explodes",
        lambda x: {"monitor/loss": third_by_third(flat(2.0, 10), flat(9, 10), flat(2 * x, 10))},
    ),
    "loss_swing": (
        "loss_oscillates",
        lambda x: {"monitor/loss": noisy(0.01, swing=math.sqrt(x)), "monitor/td_p50": flat(4.0)},
    ),
    "loss_swing_alone": ("loss_oscillates", lambda x: {"monitor/loss": noisy(0.01, swing=math.sqrt(x)), **NO_MONITOR}),
    "td_size": ("loss_oscillates", lambda x: {"monitor/td_p50": flat(2 * x), "monitor/reward_max": flat(2.0)}),
    "q_bound": ("q_explodes", lambda x: {"monitor/q_min": flat(-100.0 * x)}),
    "q_overestimation": (
        "q_overestimation",
        lambda x: {"monitor/q_start": flat(5 * x), "monitor/return_start": [-5.0, *flat(-4.0, 29)]},
    ),
    "slow_after": (
        "slow_curve",
        lambda x: {
            "time/total_timesteps": [x * i / 29 for i in range(30)],
            "rollout/ep_rew_mean": flat(3.0),
            "eval/mean_reward": [],
        },
    ),
    "slow_curve": (
        "slow_curve",
        lambda x: {
            "eval/mean_reward": third_by_third(WAVE, WAVE, [w + x * WAVE_ERROR for w in WAVE]),
            "rollout/ep_rew_mean": [],
        },
    ),
    "overfitting": (
        "overfitting",
        lambda x: {
            "rollout/ep_rew_mean": [0.0, 50.0, 100.0, 100.0, 100.0],
            "eval/mean_reward": [0.0, 50.0, *flat(100 - 100 * x, 3)],
        },
    ),
    "dead_features": ("dead_features", lambda x: {"monitor/dead_features": flat(x)}),
    "dormant_units": ("dormant_units", lambda x: {"monitor/dormant_units": flat(x)}),
    "vanishing": ("gradients_vanish", lambda x: {"grad_norm/backbone": flat(x)}),
    "exploding": ("gradients_explode", lambda x: {"grad_norm/all": flat(0.5 * x), "grad_norm_clipped/all": flat(0.5)}),
    "norm_growth": (
        "gradients_explode",
        lambda x: {"grad_norm/all": grown(8.0 * x, first=8.0), "train/policy_loss": flat(0.1)},
    ),
    "lr_zero": ("lr_zero", lambda x: {"train/lr_head": flat(x)}),
    "update_ratio": ("lr_zero", lambda x: {"update_ratio/head": flat(x)}),
    "batchnorm_drift": ("batchnorm_drift", lambda x: {"monitor/batchnorm_drift": flat(x)}),
    "final_epsilon": ("epsilon_never_ends", lambda x: {"rollout/exploration_rate": [1.0, x]}),
    "amp_skips": ("amp_skips", lambda x: {"train/amp_skipped": [*flat(16.0, 29), 16 + 200 * x]}),
    "amp_updates": ("amp_skips", lambda x: {"train/amp_skipped": [0.0, 60.0], "train/n_updates": [200.0, 200 + x]}),
}
MODEL_LIMITS = {
    "final_epsilon": ("epsilon_never_ends", lambda x: {"exploration_final_eps": x}),
    "exploration_fraction": ("epsilon_never_ends", lambda x: {"exploration_fraction": x}),
    "lr_order": (
        "lr_order",
        lambda x: {"learning_rate": 1e-4, "policy_kwargs": {"lr_head": 1e-4, "lr_backbone": x * 1e-4}},
    ),
    "lr_zero": ("lr_zero", lambda x: {"learning_rate": x, "policy_kwargs": {"lr_head": x, "lr_backbone": x}}),
}
#: Limits that a healthy number exceeds.
FLOORS = {"slow_curve", "vanishing", "lr_zero", "update_ratio"}


def around(name):
    """The numbers just within and just beyond a limit; a count differs by one."""
    limit = THRESHOLDS[name].value
    step = 1.0 if name == "values" else 1e-6 * limit
    below, above = limit - step, limit if name == "values" else limit + step
    return (above, below) if name in FLOORS else (below, above)


def test_each_limit_is_tested():
    assert {*LOG_LIMITS, *MODEL_LIMITS, "buffer_memory"} == {*THRESHOLDS}


@pytest.mark.parametrize("name", LOG_LIMITS)
def test_a_log_just_within_a_limit_is_healthy_and_just_beyond_it_is_not(name):
    code, columns = LOG_LIMITS[name]
    within, beyond = around(name)
    assert codes(history_findings({**HEALTHY, **columns(within)}, finished=True)) == []
    assert codes(history_findings({**HEALTHY, **columns(beyond)}, finished=True)) == [code]


@pytest.mark.parametrize("name", MODEL_LIMITS)
def test_a_model_just_within_a_limit_is_healthy_and_just_beyond_it_is_not(name):
    code, kwargs = MODEL_LIMITS[name]
    within, beyond = around(name)
    whole = {"extractor": {"freeze_backbone": False}}
    assert codes(static(make_model(**whole, **kwargs(within)), 1000)) == []
    assert codes(static(make_model(**whole, **kwargs(beyond)), 1000)) == [code]


def test_a_buffer_may_take_all_that_is_left_and_no_more(monkeypatch):
    model = trained(make_model())
    needed, limit = growth_bytes(model), THRESHOLDS["buffer_memory"].value
    for room, found in ((needed / limit + 1, []), (needed / limit - 1, ["buffer_memory"])):
        monkeypatch.setattr(diagnosis, "available_bytes", lambda room=room: room)
        assert codes(static(model)) == found


@pytest.mark.parametrize(("learning_starts", "updates"), [(19, 1), (20, 0), (21, 0)])
def test_never_trains_is_what_sb3_does_at_equality_too(learning_starts, updates):
    model = make_model(learning_starts=learning_starts, extractor={"freeze_backbone": False, "backbone": "resnet_mini"})
    assert codes(static(model, 20)) == ([] if updates else ["never_trains"])
    model.learn(20)
    assert model._n_updates == updates
