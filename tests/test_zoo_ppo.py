"""RL-Zoo's own commands with the shipped configuration of PPO, on Atari and on MiniGrid."""

import pytest
import torch as th
import yaml
from stable_baselines3 import PPO

from sb3_resnet.cli import check as checking
from sb3_resnet.cli import setups
from sb3_resnet.optim.updates import gradient_updates
from tests.helpers import PONG, ROOT, run_command, zoo

CONFIG = ROOT / "zoo_configs" / "ppo.yml"
GRID = "MiniGrid-DoorKey-5x5-v0"
SHORT = {"n_envs": 2, "n_steps": 32, "batch_size": 16}
SIZES = {PONG: (4, 84, 84), GRID: (3, 56, 56)}
games = pytest.mark.parametrize("game", [PONG, GRID])


def needs(game):
    if game == GRID:
        pytest.importorskip("minigrid")


@pytest.mark.slow
@games
def test_train_and_continue(game, tmp_path, hub_weights):
    needs(game)
    small = [f"{key}:{value}" for key, value in SHORT.items()]
    train = ["--conf-file", CONFIG, "-n", 192, "--eval-freq", -1, "--seed", 0, "-params", *small]
    printed = zoo("train", "ppo", tmp_path, *train, env=game)
    assert "cache/" in printed
    first = tmp_path / "ppo" / f"{game}_1" / f"{game}.zip"
    zoo("train", "ppo", tmp_path, "-i", first, *train, env=game)
    second = tmp_path / "ppo" / f"{game}_2" / f"{game}.zip"
    shipped = th.load(hub_weights, weights_only=True)["conv1.weight"]
    warmup = yaml.safe_load(CONFIG.read_text())["default"]["callback"][1].popitem()[1]["warmup_steps"]
    for path, updates in ((first, 48), (second, 96)):  # 3 rollouts, 4 epochs, 4 minibatches
        model = PPO.load(path, device="cpu")
        assert model.observation_space.shape == SIZES[game]
        assert gradient_updates(model) == updates
        assert th.equal(model.policy.features_extractor.backbone.conv1.weight, shipped)
        rates = {group["name"]: group["lr"] for group in model.policy.optimizer.param_groups}
        assert rates["head"] == pytest.approx(2.5e-4 * updates / warmup)
        assert rates["backbone"] == pytest.approx(rates["head"] / 10)


@pytest.mark.slow
def test_enjoy_and_explain(tmp_path, hub_weights):
    small = [f"{key}:{value}" for key, value in SHORT.items()]
    zoo("train", "ppo", tmp_path, "--conf-file", CONFIG, "-n", 64, "--eval-freq", -1, "-params", *small)
    assert "Loading" in zoo("enjoy", "ppo", tmp_path, "-n", 20, "--no-render")
    model = tmp_path / "ppo" / f"{PONG}_1" / f"{PONG}.zip"
    options = ["--env", PONG, "-o", tmp_path / "explained", "--steps", 6, "--frames", 2, "--gif", "--device", "cpu"]
    status, _, errors = run_command("explain", model, *options)
    assert status == 0, errors
    assert (tmp_path / "explained" / "sheet.png").stat().st_size > 0


@pytest.mark.slow
@games
def test_check_finds_nothing_wrong(game, hub_weights):
    needs(game)
    arguments = setups.Arguments(model=SHORT)
    report = checking.check(lambda: setups.from_zoo(CONFIG, game, "ppo", arguments, device="cpu", trust=True), 10**10)
    assert [finding.code for finding in report.findings if finding.severity == "error"] == []
    assert not report.memory
    assert "FeatureCacheCallback" in dict(report.model)["callbacks"]
    assert "gradient update, cached" in dict(report.speed)


def test_values_mean_what_they_look_like():
    sections = yaml.safe_load(CONFIG.read_text())
    assert {*sections} == {"default", "atari", GRID}  # an anchor at the top level would be taken for an environment
    for values in sections.values():
        assert isinstance(values["policy_kwargs"], dict)  # RL-Zoo evaluates a string as Python code
        assert isinstance(values["learning_rate"], float)  # and reads one here as a linear schedule
        assert values["n_steps"] * values["n_envs"] % values["batch_size"] == 0
        assert values["callback"][0] == "sb3_resnet.callbacks.FeatureCacheCallback"
        backbone = values["policy_kwargs"]["lr_backbone"]
        assert backbone == pytest.approx(values["learning_rate"] / 10)
