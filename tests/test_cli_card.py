"""``sb3-resnet card``, and its model card and model on the hub of SB3's integration, without the network."""

import json
import shutil
from importlib.metadata import packages_distributions
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import yaml
from huggingface_sb3 import load_from_hub, push_to_hub
from stable_baselines3 import DQN

from sb3_resnet.cli.card import card
from tests.helpers import assert_same, make_model, run_command

ENV = "PongNoFrameskip-v4"
ORDERED = "!!python/object/apply:collections.OrderedDict\n- - - %s\n    - %s\n  - - seed\n    - 7\n"


@pytest.fixture
def run(tmp_path):
    """A folder as RL-Zoo leaves it."""
    folder = tmp_path / f"{ENV}_1"
    (folder / ENV).mkdir(parents=True)
    lines = [f"#{json.dumps({'t_start': 1.0, 'env_id': ENV})}", "r,l,t", "-3,40,1.5", "5,80,2.5"]
    (folder / "0.monitor.csv").write_text("\n".join(lines) + "\n")
    np.savez(folder / "evaluations.npz", timesteps=[10, 20], results=[[4.0, 8.0], [1.0, 2.0]], ep_lengths=0)
    model = make_model(learning_rate=3e-4)
    model.num_timesteps = 30
    model.save(folder / f"{ENV}.zip")
    (folder / ENV / "args.yml").write_text(ORDERED % ("env", ENV))
    (folder / ENV / "config.yml").write_text(ORDERED % ("callback", "[a.B: {warmup_steps: 5}]"))
    command = f"/some/where/python -m rl_zoo3.train --algo dqn --env {ENV} --gym-packages sb3_resnet"
    (folder / ENV / "command.txt").write_text(command)
    return folder


def metadata(text):
    """:return: what the hub reads at the top of a card"""
    return yaml.safe_load(text.split("---")[1])


def test_the_card_holds_set_up_environment_scores_and_command(run):
    text = card(run, repo_id="you/dqn-pong")
    data = metadata(text)
    assert data["library_name"] == "stable-baselines3"
    assert {ENV, "sb3_resnet", "reinforcement-learning"} <= {*data["tags"]}
    (result,) = data["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == "1.50 +/- 0.50"
    assert result["dataset"]["name"] == ENV
    assert f"# DQN agent of {ENV}\n" in text
    assert "| last evaluation | 1.5 ± 0.5 over 2 episodes, at step 20 |" in text
    assert "| best evaluation | 6 ± 2 over 2 episodes, at step 10 |" in text
    assert "| last 2 training episodes | 1 ± 4 |" in text
    assert "| environment steps | 30 up to the end" in text  # 120 frames, 4 of which are a step
    assert f"\npython -m rl_zoo3.train --algo dqn --env {ENV} --gym-packages sb3_resnet\n" in text
    assert "/some/where" not in text
    assert "Seed: 7" in text
    assert "callback:\n- a.B:\n    warmup_steps: 5\n" in text
    assert "| head | 0.0003 |" in text
    assert "Environment steps of the training: 30" in text
    assert "Stable-Baselines3: " in text
    assert f'load_from_hub("you/dqn-pong", "{ENV}.zip")' in text
    for word in ("TODO", "None", "nan", "OWNER"):
        assert word not in text


@pytest.mark.parametrize(
    ("name", "reward"),
    [("best_model", "6.00 +/- 2.00"), ("best", "6.00 +/- 2.00"), ("rl_model_30_steps", "1.50 +/- 0.50")],
)
def test_the_hub_is_told_the_reward_of_the_very_model(run, name, reward):
    (run / f"{ENV}.zip").rename(run / f"{name}.zip")
    text = card(run)
    assert f'"{name}.zip"' in text
    assert metadata(text)["model-index"][0]["results"][0]["metrics"][0]["value"] == reward


def test_the_hub_accepts_the_card(run):
    found = huggingface_hub.ModelCard(card(run))
    assert found.data.eval_results[0].metric_value == "1.50 +/- 0.50"
    assert found.data.library_name == "stable-baselines3"


@pytest.mark.skipif(
    "sb3-team-hf-integration" not in packages_distributions().get("huggingface_sb3", ()),
    reason="RL-Zoo 2.8 brings another package of that name",
)
def test_model_and_card_come_back_from_the_hub(run, hub, monkeypatch):
    readme = run.parent / "README.md"
    assert run_command("card", run, "-o", readme, "--repo-id", "you/pong")[0] == 0
    for file in (run / f"{ENV}.zip", readme):
        push_to_hub("you/pong", str(file), "Add the model")
    assert {path.name for path in (hub / "you" / "pong").iterdir()} == {f"{ENV}.zip", "README.md"}

    with pytest.raises(ValueError, match="TRUST_REMOTE_CODE"):
        load_from_hub("you/pong", f"{ENV}.zip")
    monkeypatch.setenv("TRUST_REMOTE_CODE", "True")
    model = DQN.load(load_from_hub("you/pong", f"{ENV}.zip"), device="cpu")
    assert_same(model.policy.state_dict(), DQN.load(run / f"{ENV}.zip", device="cpu").policy.state_dict())
    assert huggingface_hub.ModelCard.load(hub / "you" / "pong" / "README.md").data.tags[0] == ENV


def test_a_run_of_a_script_needs_the_name_of_its_environment(run):
    shutil.rmtree(run / ENV)
    with pytest.raises(ValueError, match=r"write --env ID"):
        card(run)
    text = card(run, "Game-v0")
    assert "# DQN agent of Game-v0" in text
    assert "Trained by a script" in text
    assert "OWNER/NAME" in text  # to be filled in, as nobody said where the model will be


def test_without_evaluations_the_card_claims_no_reward(run):
    (run / "evaluations.npz").unlink()
    text = card(run)
    assert "model-index" not in text
    assert "evaluation" not in text.partition("## Use it")[0]
    (run / "0.monitor.csv").write_text("")
    assert "not measured" in card(run)


def test_what_is_not_there_is_an_error_in_one_line(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def error_of(*arguments):
        status, _, error = run_command("card", *arguments)
        assert status == 1
        (line,) = error.splitlines()
        return line

    assert "is no folder" in error_of(tmp_path / "nothing")
    Path("README.md").write_text("mine")
    assert "README.md exists and is not overwritten" in error_of(run)
    assert Path("README.md").read_text() == "mine"
    assert "nowhere is no folder" in error_of(run, "-o", "nowhere/README.md")
    shutil.copytree(run, tmp_path / "both" / "Pong_1")
    shutil.copytree(run, tmp_path / "both" / "Pong_2")
    assert "several runs" in error_of(tmp_path / "both", "-o", "x.md")
    (run / ENV / "config.yml").write_text("!!python/object/apply:os.system ['touch harm']")
    assert "is not what RL-Zoo writes" in error_of(run, "-o", "x.md")
    assert not Path("harm").exists()
    (run / f"{ENV}.zip").unlink()
    assert "holds no model" in error_of(run, "-o", "x.md")


def test_tuples_and_classes_of_the_command_line_are_read_as_text(run):
    """RL-Zoo evaluates ``-params`` and dumps what comes out."""
    values = "!!python/tuple [1, episode]"
    (run / ENV / "config.yml").write_text(
        (ORDERED % ("train_freq", values))
        + "  - - activation_fn\n    - !!python/name:torch.nn.modules.activation.ReLU ''\n"
    )
    text = card(run)
    assert "[1, 'episode']" in text or "(1, 'episode')" in text or "- episode" in text
    assert "torch.nn.modules.activation.ReLU" in text


def test_a_dash_prints_the_card(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, text, _ = run_command("card", run, "-o", "-")
    assert (status, text) == (0, card(run))
    assert not Path("README.md").exists()
