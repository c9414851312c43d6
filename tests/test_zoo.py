"""RL-Zoo's own commands with the shipped configurations, on real games."""

import argparse

import gymnasium as gym
import pytest
import torch as th
import yaml
from rl_zoo3.exp_manager import ExperimentManager

from tests.helpers import ALGORITHMS, CONFIGS, PONG, SHORT_RUN, zoo

SECTIONS = {"default": "FakeRGBImage-v0", "atari": "BreakoutNoFrameskip-v4", PONG: PONG}
STEPS, UPDATES = 60, 10  # with SHORT_RUN


@pytest.fixture
def _image_env(monkeypatch):
    monkeypatch.setattr(gym.envs.registration, "registry", dict(gym.registry))
    monkeypatch.setattr(gym.envs, "registry", gym.envs.registration.registry)
    entry_point = "stable_baselines3.common.envs:FakeImageEnv"
    gym.register(SECTIONS["default"], entry_point, kwargs={"screen_height": 64, "screen_width": 64, "n_channels": 3})


@pytest.mark.slow
def test_train_enjoy_and_continue(tmp_path):
    algorithm = "dqn"
    small = [f"{key}:{value}" for key, value in SHORT_RUN.items()]
    train = ["--conf-file", CONFIGS[algorithm], "-n", STEPS, "--eval-freq", -1, "--seed", 0, "-params", *small]
    zoo("train", algorithm, tmp_path, *train)
    first = tmp_path / algorithm / f"{PONG}_1" / f"{PONG}.zip"
    assert "Loading" in zoo("enjoy", algorithm, tmp_path, "-n", 20, "--no-render")
    zoo("train", algorithm, tmp_path, "-i", first, *train)
    second = tmp_path / algorithm / f"{PONG}_2" / f"{PONG}.zip"

    cache, schedule, _ = yaml.safe_load(CONFIGS[algorithm].read_text())[PONG]["callback"]
    assert cache == "sb3_resnet.callbacks.FeatureCacheCallback"
    (arguments,) = schedule.values()
    for path, updates in ((first, UPDATES), (second, 2 * UPDATES)):
        model = ALGORITHMS[algorithm].load(path, device="cpu")
        assert model._n_updates == updates
        # RL-Zoo sets the step counter back to 0 for the second run; the warmup goes on nevertheless.
        rates = {group["name"]: group["lr"] for group in model.policy.optimizer.param_groups}
        assert rates["head"] == pytest.approx(model.lr_schedule(1.0) * updates / arguments["warmup_steps"])
        assert rates["backbone"] == pytest.approx(rates["head"] / 10)


@pytest.mark.slow
@pytest.mark.usefixtures("_image_env")
@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_each_section_trains(algorithm, section, tmp_path, hub_weights):
    manager = ExperimentManager(
        argparse.Namespace(),
        algorithm,
        SECTIONS[section],
        str(tmp_path),
        n_timesteps=28,
        eval_freq=-1,
        log_interval=-1,
        hyperparams=dict(SHORT_RUN),
        config=str(CONFIGS[algorithm]),
        device="cpu",
    )
    model, _ = manager.setup_experiment()
    extractor = model.policy.online.features_extractor
    shipped = extractor.backbone.conv1.weight.detach().clone()
    manager.learn(model)

    assert model._n_updates == 2 * model.gradient_steps
    assert extractor.freeze_boundary is None
    assert th.equal(extractor.backbone.conv1.weight, shipped)
    # The demo must work offline; the other sections have the file of torch's hub cache.
    pretrained = th.load(hub_weights, weights_only=True)["conv1.weight"]
    assert th.equal(shipped, pretrained) == (section != PONG)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_values_mean_what_they_look_like(algorithm):
    sections = yaml.safe_load(CONFIGS[algorithm].read_text())
    assert {*sections} == {*SECTIONS}  # an anchor at the top level would be taken for an environment
    for values in sections.values():
        assert isinstance(values["policy_kwargs"], dict)  # RL-Zoo evaluates a string as Python code
        assert isinstance(values["learning_rate"], float)  # and reads one here as a linear schedule
        assert values["optimize_memory_usage"] is False
        assert 1 <= values["max_grad_norm"] <= 5
        assert values["buffer_size"] * 2 * 84 * 84 * 4 < 4e9
