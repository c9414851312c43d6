"""The ``sb3-resnet`` command, in this process, on models of the tiny game."""

import io
import re
import sys
import zipfile

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.buffers import RolloutBuffer
from typer.main import get_command

from sb3_resnet import ResNetExtractor, cli
from sb3_resnet.buffers import FrameNStepReplayBuffer, FrameReplayBuffer
from sb3_resnet.callbacks import FeatureCacheCallback, UnfreezeCallback
from sb3_resnet.cli import check as checking
from sb3_resnet.cli import setups, trial
from sb3_resnet.cli.app import app
from sb3_resnet.cli.check_parts import memory_rows
from sb3_resnet.cli.envs import make_env, register_atari
from sb3_resnet.cli.extras import import_extra, missing_extra
from sb3_resnet.cli.loading import extractors_of, load_model
from tests.helpers import TinyGame, assert_same, fill, make_actor_critic, make_model, run_command, slowly, snapshot

pytestmark = pytest.mark.usefixtures("tiny_id")

TINY = "Tiny-v0"
HEALTHY = ["--env", TINY, "--backbone", "resnet_tiny", "--batch-size", 8, "--buffer-size", 1000]
HEALTHY += ["--extractor-kwarg", "freeze_backbone=false"]
YAML = """
default:
  policy: ResNetCnnPolicy
  n_timesteps: 1000
  buffer_size: 1000000
  batch_size: 8
  policy_kwargs:
    features_extractor_kwargs: {backbone: resnet_tiny}
  callback:
    - sb3_resnet.callbacks.UnfreezeCallback:
        phases: [{at_timestep: 500, unfreeze_from: all}]
"""


@pytest.fixture(scope="module")
def dqn_zip(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "dqn.zip"
    make_model().save(path)
    return path


def error_of(*arguments):
    """:return: the one line on stderr with which the command failed"""
    status, _, error = run_command(*arguments)
    assert status == 1
    (line,) = error.splitlines()
    assert line.startswith("Error: ")
    return line


@pytest.mark.parametrize("width", [50, 80, 200])
@pytest.mark.parametrize("command", get_command(app).commands)
def test_help_shows_each_option_whole_at_any_width(command, width):
    status, text, _ = run_command(command, "--help", width=width)
    assert status == 0
    assert max(map(len, text.splitlines())) <= max(width, 80)
    for parameter in get_command(app).commands[command].params:
        for name in (*parameter.opts, *parameter.secondary_opts) if parameter.param_type_name == "option" else ():
            assert re.search(rf"(^|[ ,/]){name}\b", text, re.MULTILINE), name
    assert "…" not in text


def test_without_typer_one_line_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit, match=r"^Error: sb3-resnet needs typer: pip install 'sb3_resnet\[tools\]'$"):
        cli.main()


def test_main_is_the_command(monkeypatch, capsys, dqn_zip):
    monkeypatch.setattr(sys, "argv", ["sb3-resnet", "groups", str(dqn_zip)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert "head_no_decay" in capsys.readouterr().out


def test_groups_prints_the_table_and_a_picture(dqn_zip, tmp_path):
    svg = tmp_path / "groups.svg"
    status, text, _ = run_command("--svg", svg, "groups", dqn_zip)
    assert status == 0
    rows = [line.strip("│").split() for line in text.splitlines() if "," in line]
    counts = {row[0]: [cell for cell in row if cell != "│"][-2:] for row in rows}
    model = make_model()
    total = sum(parameter.numel() for parameter in model.policy.q_net.parameters())
    trains = sum(parameter.numel() for parameter in model.policy.q_net.parameters() if parameter.requires_grad)
    assert counts["all"] == [f"{total:,}", f"{trains:,}"]
    assert counts["backbone"][1] == "0"
    assert svg.read_text().startswith("<svg")
    assert "head_no_decay" in svg.read_text()


def test_a_picture_is_saved_only_where_the_command_did_its_work(dqn_zip, tmp_path):
    svg = tmp_path / "picture.svg"
    svg.write_text("before")
    error_of("--svg", svg, "groups", tmp_path / "none.zip")
    assert svg.read_text() == "before"
    assert f"--svg {tmp_path} is a folder" in error_of("--svg", tmp_path, "groups", dqn_zip)
    status, _, _ = run_command("--svg", svg, "check", *HEALTHY, "--param", "learning_starts=2000000")
    assert status == 1  # of a finding
    assert "never_trains" in svg.read_text()
    assert "sb3-resnet check" in svg.read_text().replace("&#160;", " ")


def test_a_picture_that_cannot_be_written_is_one_line(dqn_zip, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise PermissionError("no right to write")

    monkeypatch.setattr("rich.console.Console.save_svg", fail)
    assert error_of("--svg", tmp_path / "x.svg", "groups", dqn_zip) == "Error: no right to write"


def _zip_of(**files):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in files.items():
            archive.writestr(name.replace("_pth", ".pth"), content)
    return stream.getvalue()


FOREIGN = {
    "text": (b"no zip", "is not a zip file"),
    "zip": (_zip_of(readme="hello"), "no model of Stable-Baselines3"),
    "weights": (_zip_of(policy_pth="x"), "no model of Stable-Baselines3"),
    "not json": (_zip_of(data="{", policy_pth="x"), "no model of Stable-Baselines3"),
    "a list": (_zip_of(data="[]", policy_pth="x"), "no model of Stable-Baselines3"),
    "sac": (_zip_of(data='{"ent_coef": 1}', policy_pth="x"), "another algorithm than qrdqn, dqn, ppo, a2c"),
    "damaged": (_zip_of(data='{"clip_range": 1}', policy_pth="x"), "cannot be loaded as a PPO model"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_zips_end_in_one_line(kind, tmp_path):
    content, message = FOREIGN[kind]
    path = tmp_path / "model.zip"
    path.write_bytes(content)
    line = error_of("groups", path)
    assert message in line
    assert str(path) in line


def test_wrong_paths_name_the_models_nearby(tmp_path, dqn_zip, monkeypatch):
    assert "no file" in error_of("groups", tmp_path / "nothing" / "model.zip")
    assert str(dqn_zip) in error_of("groups", dqn_zip.with_name("other.zip"))
    assert "a folder, not a model" in error_of("groups", dqn_zip.parent)
    assert error_of("groups", "/").startswith("Error: / is a folder, not a model")
    monkeypatch.chdir(dqn_zip.parent)
    assert error_of("groups", ".") == "Error: . is a folder, not a model; models there: dqn.zip"
    assert run_command("groups", dqn_zip.with_suffix(""))[0] == 0


def test_a_model_without_a_resnet_is_refused(tmp_path):
    DQN("CnnPolicy", TinyGame((4, 36, 36)), buffer_size=10, device="cpu").save(tmp_path / "nature.zip")
    assert "sees with NatureCNN" in error_of("groups", tmp_path / "nature.zip")


def test_check_of_a_healthy_run():
    status, text, _ = run_command("check", *HEALTHY)
    assert "Nothing is wrong." in text
    assert status == 0
    for word in ("(8, 4, 32, 32)", "(8, 3)", "steps/s", "ReplayBuffer", "FrameReplayBuffer", "backbone_no_decay"):
        assert word in text


CATCHES = {
    "vectors": (["--env", "CartPole-v1"], 1, "error setup: ResNetExtractor needs images"),
    "continuous actions": (["--env", "CarRacing-v3"], 1, "error setup: "),
    "frozen at random": (["--extractor-kwarg", "freeze_backbone=true"], 0, "warning frozen_random_backbone: "),
    "frozen, strictly": (["--extractor-kwarg", "freeze_backbone=true", "--strict"], 1, "frozen_random_backbone: "),
    "buffer": (["--buffer-size", 10**9, "--memory", 20], 1, "error buffer_memory: The replay buffer of 1,000,000,000"),
    "rates": (
        ["--policy-kwarg", "lr_backbone=1e-2"],
        1,
        "error lr_order: The backbone's learning rate is 100 times the head's.",
    ),
    "unknown game": (["--env", "Pongg-v5"], 1, "error setup: Pongg-v5 is not registered"),
    "unknown backbone": (["--backbone", "resnet19"], 1, "did you mean 'resnet18'?"),
    "unknown argument": (["--param", "batchsize=3"], 1, "error setup: "),
    "algorithm": (["--algo", "sac"], 1, "--algo must be one of dqn, qrdqn"),
}


@pytest.mark.parametrize("case", CATCHES)
def test_check_catches(case):
    changes, expected, message = CATCHES[case]
    status, text, error = run_command("check", *HEALTHY, *changes)
    assert status == expected
    assert sum(message in line for line in text.splitlines()) == 1
    assert not error


def test_check_catches_a_batch_below_the_micro_batch():
    status, text, _ = run_command("check", *HEALTHY, "--extractor-kwarg", "micro_batch_size=16")
    assert status == 1
    assert "error micro_batch: batch_size is 8 and micro_batch_size 16." in text


def test_check_names_the_extra_of_atari(monkeypatch):
    monkeypatch.setitem(sys.modules, "ale_py", None)
    games = {name: spec for name, spec in gym.registry.items() if "AtariEnv" not in str(spec.entry_point)}
    monkeypatch.setattr(gym.envs.registration, "registry", games)
    monkeypatch.setattr(gym, "registry", games)
    for name in ("PongNoFrameskip-v4", "ALE/Pong-v5"):
        status, text, _ = run_command("check", "--env", name)
        assert status == 1
        (line,) = (line for line in text.splitlines() if "error" in line and "setup" in line)
        assert "pip install 'sb3_resnet[atari]'" in line


def test_check_names_a_missing_rom(monkeypatch):
    register_atari()
    monkeypatch.setattr("gymnasium.register_envs", lambda module: None)
    monkeypatch.setattr("ale_py.roms.get_rom_path", lambda name: None)
    status, text, _ = run_command("check", "--env", "PongNoFrameskip-v4")
    assert status == 1
    (line,) = (line for line in text.splitlines() if "error setup" in line)
    assert "PongNoFrameskip-v4 cannot be made" in line
    assert "pong" in line


@pytest.mark.parametrize(
    ("module", "options", "extra"),
    [("rl_zoo3.exp_manager", ["--conf-file", "zoo.yml"], "zoo"), ("sb3_contrib", ["--algo", "qrdqn"], "contrib")],
)
def test_check_names_missing_extras(module, options, extra, monkeypatch, tmp_path):
    (tmp_path / "zoo.yml").write_text(YAML)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    status, text, _ = run_command("check", *HEALTHY, *options)
    assert status == 1
    assert f"pip install 'sb3_resnet[{extra}]'" in text


def test_check_reads_rl_zoos_yaml_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zoo.yml").write_text(YAML)
    options = ["check", "--env", TINY, "--conf-file", "zoo.yml", "--memory", 4]
    status, text, _ = run_command(*options)
    # 2 observations of 4096 bytes, an action of 8, and three numbers of 4, each a million times
    assert "The replay buffer of 1,000,000 transitions takes 8.2 GB." in text
    assert "UnfreezeCallback" in text
    assert "frozen_random_backbone" not in text
    assert status == 1
    status, text, _ = run_command(*options, "--buffer-size", 1000, "--extractor-kwarg", "pooling=flatten", "-n", 777)
    assert status == 0
    assert "(flatten)" in text
    assert "777" in text
    assert [path.name for path in tmp_path.iterdir()] == ["zoo.yml"]


def test_check_names_what_a_phase_leaves_frozen_with_random_weights_and_a_phase_after_the_end(tmp_path):
    file = tmp_path / "zoo.yml"
    options = ["check", "--env", TINY, "--conf-file", file, "--buffer-size", 1000]
    file.write_text(YAML.replace("unfreeze_from: all", "unfreeze_from: layer4"))
    status, text, _ = run_command(*options)
    assert status == 0
    assert "warning frozen_random_backbone: The stages stem, layer1, layer2, layer3 are frozen" in text
    file.write_text(YAML.replace("at_timestep: 500", "at_timestep: 5000"))
    _, text, _ = run_command(*options)
    assert "The stages stem, layer1, layer2, layer3, layer4 are frozen" in text
    assert "warning phase_never_begins: Training ends at step 1000, before the phase with unfreeze_from='all'" in text


CACHE = "    - sb3_resnet.callbacks.FeatureCacheCallback\n"
RESTORE = "{at_timestep: 500, unfreeze_from: all, restore_best: true}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            YAML.replace("resnet_tiny}", "resnet_tiny, augment: [random_shift]}") + CACHE,
            "error feature_cache: FeatureCacheCallback: augment changes an observation each time it is sampled",
        ),
        (
            YAML.replace("{at_timestep: 500, unfreeze_from: all}", RESTORE),
            "error restore_best: A phase has restore_best, and no callback keeps the best model.",
        ),
        (YAML.replace("batch_size: 8", "gradient_steps: 0"), "error never_trains: gradient_steps is 0."),
    ],
)
def test_check_finds_what_ends_training_at_its_start(tmp_path, text, message):
    (tmp_path / "zoo.yml").write_text(text)
    options = ["check", "--env", TINY, "--conf-file", tmp_path / "zoo.yml", "--buffer-size", 1000]
    status, printed, _ = run_command(*options)
    assert status == 1
    assert message in printed
    (tmp_path / "zoo.yml").write_text(YAML + CACHE)
    assert "FeatureCacheCallback:" not in run_command(*options)[1]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--memory", "-1"], "--memory must be finite and > 0, got -1.0"),
        (["--memory", "nan"], "--memory must be finite and > 0, got nan"),
        (["--memory", "0"], "--memory must be finite and > 0, got 0.0"),
        (["--n-envs", "0"], "--n-envs must be finite and >= 1, got 0"),
        (["-n", "-5"], "-n must be finite and >= 0, got -5"),
    ],
)
def test_check_refuses_options_that_cannot_be(option, message):
    assert error_of("check", *HEALTHY, *option) == f"Error: {message}"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("batch_size", "0", "batch_size must be >= 1, got 0"),
        ("buffer_size", "-1", "buffer_size must be >= 1, got -1"),
        # PyYAML reads the one as a string and the other as a float; SB3 takes neither.
        ("buffer_size", "1e6", "buffer_size must be a whole number, with neither point nor exponent, got '1e6'"),
        ("batch_size", "8.0", "batch_size must be a whole number, with neither point nor exponent, got 8.0"),
        ("n_envs", "0", "n_envs must be >= 1, got 0"),
    ],
)
def test_check_names_counts_that_cannot_be(name, value, message, tmp_path):
    file = tmp_path / "zoo.yml"
    file.write_text(re.sub(rf"  {name}: .*\n", "", YAML).replace("callback:", f"{name}: {value}\n  callback:"))
    calls = [["--env", TINY, "--conf-file", file]]
    if name != "n_envs":
        calls.append(["--env", TINY, "--backbone", "resnet_tiny", "--param", f"{name}={value}"])
    for options in calls:
        status, text, _ = run_command("check", *options)
        assert status == 1
        assert f"error setup: {message}" in text


def test_check_names_a_section_without_a_length(tmp_path):
    file = tmp_path / "zoo.yml"
    file.write_text(YAML.replace("  n_timesteps: 1000\n", ""))
    options = ["check", "--env", TINY, "--conf-file", file, "--buffer-size", 1000]
    for length in ([], ["-n", 777]):
        status, text, _ = run_command(*options, *length)
        assert status == 1
        assert f"error setup: {file} has no n_timesteps for {TINY}: write it, RL-Zoo wants it even beside -n" in text


WRONG_YAML = {
    "a: [": "cannot be read as YAML",
    "[1, 2]": "must hold sections",
    "default: 3": "must hold sections",
    "": "must hold sections",
}


@pytest.mark.parametrize("content", WRONG_YAML)
def test_unreadable_yaml_ends_in_one_line(content, tmp_path):
    path = tmp_path / "zoo.yml"
    path.write_text(content)
    assert WRONG_YAML[content] in error_of("check", "--env", TINY, "--conf-file", path)
    path.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as YAML" in error_of("check", "--env", TINY, "--conf-file", path)
    assert "is no file" in error_of("check", "--env", TINY, "--conf-file", tmp_path / "none.yml")


def test_yaml_without_a_section_or_with_code(tmp_path):
    path = tmp_path / "zoo.yml"
    path.write_text("Other-v0: {policy: ResNetCnnPolicy}")
    status, text, _ = run_command("check", "--env", TINY, "--conf-file", path)
    assert status == 1
    assert "Hyperparameters not found for dqn-Tiny-v0" in text
    register_atari()
    status, text, _ = run_command("check", "--env", "PongNoFrameskip-v4", "--conf-file", path)
    assert f"{path} has no section for PongNoFrameskip-v4: it needs 'PongNoFrameskip-v4' or 'atari'" in text
    path.write_text("default: {policy: ResNetCnnPolicy, n_timesteps: 9, policy_kwargs: dict()}")
    assert (
        "write it as a dict" in run_command("check", "--env", TINY, "--conf-file", path, "--backbone", "resnet_tiny")[1]
    )
    assert "none of RL-Zoo's algorithms" in run_command("check", "--env", TINY, "--conf-file", path, "--algo", "dq")[1]


def test_pairs_need_an_equals_sign():
    assert "--param takes KEY=VALUE, got 'batch_size'" in error_of("check", *HEALTHY, "--param", "batch_size")
    assert "--gym-packages nothing_here" in error_of("check", *HEALTHY, "--gym-packages", "nothing_here")


def test_explain_writes_sheet_and_episode(dqn_zip, tmp_path):
    output = tmp_path / "new" / "folder"
    status, text, _ = run_command("explain", dqn_zip, "--env", "Tiny-v0", "-o", output, "--gif", "--method", "saliency")
    assert status == 0
    assert "in 13 steps" in text
    assert {path.name for path in output.iterdir()} == {"sheet.png", "episode.gif"}


OTHER = {
    "unknown": (["--env", "Nothing-v0"], "Nothing-v0 is not registered"),
    "vectors": (
        ["--env", "CartPole-v1"],
        "was trained on uint8 observations (4, 32, 32) and Discrete(3), but CartPole",
    ),
    "wrapper": (["--env", "Tiny-v0", "--wrapper", "nothing.Here"], "--wrapper nothing.Here: No module named 'nothing'"),
    "method": (["--env", "Tiny-v0", "--method", "gradcamm"], "did you mean 'gradcam'?"),
    "layer": (["--env", "Tiny-v0", "--layer", "layer9"], "layer must be one of 'stem'"),
    "steps": (["--env", "Tiny-v0", "--steps", 0], "--steps must be finite and >= 1"),
}


@pytest.mark.parametrize("case", OTHER)
def test_explain_says_what_is_wrong(case, dqn_zip, tmp_path):
    options, message = OTHER[case]
    assert message in error_of("explain", dqn_zip, "-o", tmp_path / "out", *options)


@pytest.mark.parametrize("option", [["--method", "foo"], ["--layer", "foo"], ["-o", "file"], ["-o", "file/below"], []])
def test_explain_refuses_before_it_plays(option, dqn_zip, tmp_path, monkeypatch):
    def play(*args):
        raise RuntimeError("played")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr("sb3_resnet.cli.explain.play_greedily", play)
    error = error_of("explain", dqn_zip, "--env", TINY, *option)
    assert ("played" in error) == (option == [])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_export_says_what_is_wrong(dqn_zip, tmp_path, monkeypatch):
    assert "is no folder" in error_of("export", dqn_zip, "-o", tmp_path / "none" / "x.onnx")
    assert "--frames must be finite and >= 2" in error_of("export", dqn_zip, "--frames", 1)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "pip install 'sb3_resnet[tools]'" in error_of("export", dqn_zip)


def test_narrow_terminals_lose_no_digit(dqn_zip):
    wide, narrow = ("".join(run_command("groups", dqn_zip, width=width)[1].split()) for width in (200, 50))
    total = next(word for word in wide.split("│") if word.count(",") == 2)
    assert "…" not in narrow
    assert total not in narrow  # it is folded
    assert sorted(filter(str.isdigit, narrow)) == sorted(filter(str.isdigit, wide))


def test_unexpected_errors_are_one_line_too(dqn_zip, monkeypatch, tmp_path):
    def fail(path):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr("sb3_resnet.cli.groups.saved_groups", fail)
    assert error_of("groups", dqn_zip) == "Error: RuntimeError: out of memory"
    assert "is no folder" in error_of("--svg", tmp_path / "none" / "x.svg", "groups", dqn_zip)


@pytest.mark.parametrize("algorithm", ["qrdqn", "ppo"])
def test_other_algorithms(algorithm, tmp_path):
    if algorithm == "ppo":
        policy = {"features_extractor_class": ResNetExtractor, "features_extractor_kwargs": {"backbone": "resnet_tiny"}}
        model = PPO("CnnPolicy", TinyGame((3, 32, 32)), n_steps=8, batch_size=4, policy_kwargs=policy, device="cpu")
    else:
        model = make_model(algorithm)
    path = tmp_path / "model.zip"
    model.save(path)
    status, text, _ = run_command("groups", path)
    assert status == 0
    assert f"{sum(parameter.numel() for parameter in model.policy.optimizer.param_groups[0]['params']):,}" in text
    loaded = load_model(path)
    assert type(loaded) is type(model)
    assert_same(snapshot(loaded.policy), snapshot(model.policy))
    if hasattr(loaded, "replay_buffer"):
        assert loaded.replay_buffer.buffer_size == 1


def test_check_of_ppo():
    policy = {"features_extractor_class": ResNetExtractor, "features_extractor_kwargs": {"backbone": "resnet_tiny"}}

    def build(kwargs):
        model = PPO("MlpPolicy", TinyGame(), n_steps=8, batch_size=4, policy_kwargs=kwargs, device="cpu")
        return setups.Setup(model, 1000, None)

    report = checking.check(lambda: build(policy), 10**9)
    assert [finding.code for finding in report.findings] == ["frozen_random_backbone"]
    assert not report.memory
    assert dict(report.model)["batch size"] == "4"
    assert "steps/s" in dict(report.speed)["whole run"]
    (finding,) = checking.check(lambda: build({}), 10**9).findings
    assert (finding.code, finding.severity) == ("setup", "error")
    assert "sees with FlattenExtractor" in finding.seen


def test_a_stock_dqn_policy_with_this_extractor_is_checked_and_loaded(tmp_path):
    policy = {"features_extractor_class": ResNetExtractor, "features_extractor_kwargs": {"backbone": "resnet_tiny"}}
    options = {"buffer_size": 100, "learning_starts": 8, "batch_size": 4, "device": "cpu", "policy_kwargs": policy}
    model = DQN("CnnPolicy", TinyGame((4, 36, 36)), **options)
    report = checking.check(lambda: setups.Setup(model, 1000, None), 10**9)
    assert [finding.code for finding in report.findings if finding.severity == "error"] == []
    assert "frozen_random_backbone" in [finding.code for finding in report.findings]
    assert dict(report.shapes)["scores of actions"] == (4, 3)
    model.save(tmp_path / "model.zip")
    assert_same(snapshot(load_model(tmp_path / "model.zip").policy), snapshot(model.policy))


def test_check_times_an_update_of_ppo_on_entries():
    class Watch(FeatureCacheCallback):
        def _on_training_start(self):
            super()._on_training_start()
            self.before = self.model.policy.features_extractor.encoder.images

        def _on_training_end(self):
            super()._on_training_end()
            self.after = self.model.policy.features_extractor.encoder.images

    model, watch = make_actor_critic(), Watch()
    report = checking.check(lambda: setups.Setup(model, 1000, None, [watch]), 10**9)
    assert "gradient update, cached" in dict(report.speed)
    assert watch.after - watch.before == 4  # the minibatch, before several updates
    assert type(model.rollout_buffer) is RolloutBuffer


@pytest.mark.parametrize("algorithm", ["ppo", "a2c"])
def test_check_builds_ppo_and_a2c_without_a_configuration(algorithm):
    options = ["--algo", algorithm, "--backbone", "resnet_mini", "--param", "n_steps=8"]
    status, text, _ = run_command(
        "check", "--env", TINY, *options, *(["--batch-size", 4] if algorithm == "ppo" else [])
    )
    assert status == 0
    assert f"{algorithm.upper()} with ResNetActorCriticCnnPolicy" in text
    assert "gradient update, cached" in text
    assert "0 errors, 1 warning" in text  # the backbone is frozen with random weights


def test_memory_findings_of_frames_and_cache():
    model = make_model(replay_buffer_class=FrameReplayBuffer)
    setup = setups.Setup(model, 10**6, 48_712, [FeatureCacheCallback()])
    needed = {"ReplayBuffer": 10**10, "FrameReplayBuffer": 10**9, "feature cache": 10**8}
    assert checking.memory_findings(setup, needed) == []  # where nothing tells what is available
    assert checking.memory_findings(setup, {**needed, "available": 2 * 10**9}) == []
    (finding,) = checking.memory_findings(setup, {**needed, "available": 5 * 10**8})
    assert "takes 1.0 GB" in finding.seen
    assert finding.change == "Write buffer_size=21000."
    (finding,) = checking.memory_findings(setup, {**needed, "available": 105 * 10**7})
    assert (finding.code, finding.change) == ("cache_memory", "Write FeatureCacheCallback(max_bytes=45000000).")


def test_a_game_that_skips_frames_itself_plays_as_fast_as_in_training():
    """AtariWrapper skips four frames: ``ALE/Pong-v5`` must not skip four times as many."""
    for name in ("PongNoFrameskip-v4", "ALE/Pong-v5"):
        env = make_env(name)
        env.reset()
        ale = env.get_attr("unwrapped")[0].ale
        frames = []
        for _ in range(3):
            before = ale.getFrameNumber()
            env.step(np.array([0]))
            frames.append(ale.getFrameNumber() - before)
        env.close()
        assert frames == [4, 4, 4], name


def test_an_array_that_sb3_cannot_allocate_is_an_error_though_the_cache_would_replace_it(monkeypatch):
    needed = {"ReplayBuffer": 6 * 10**10, "FrameReplayBuffer": 10**9, "available": 2 * 10**9}
    monkeypatch.setattr("sb3_resnet.cli.check_rules.largest_array_bytes", lambda: 24 * 10**9)
    setup = setups.Setup(make_model(), 10**6, 48_712, [FeatureCacheCallback()])
    (finding,) = checking.memory_findings(setup, needed)
    assert (finding.code, finding.severity) == ("buffer_memory", "error")
    assert "SB3 allocates its own ReplayBuffer first, with arrays of 30.0 GB" in finding.seen
    assert "replay_buffer_class=sb3_resnet.buffers.FrameReplayBuffer" in finding.change
    assert checking.memory_findings(setup, {**needed, "ReplayBuffer": 4 * 10**10}) == []
    frames = setups.Setup(make_model(replay_buffer_class=FrameReplayBuffer), 10**6, 48_712, [FeatureCacheCallback()])
    assert checking.memory_findings(frames, needed) == []


def test_the_memory_of_the_cache_is_that_of_the_largest_phase_and_within_its_limit():
    def cache(*phases, **options):
        callbacks = [FeatureCacheCallback(**options), *([UnfreezeCallback([*phases])] if phases else [])]
        model = make_model()
        setup = setups.Setup(model, 1000, 300, callbacks)
        rows = dict(memory_rows(setup, {"": model.policy.online.features_extractor}, played, None))
        assert model.policy.freeze_boundary is None
        return rows["feature cache"]

    played = np.zeros((4, 1, 4, 32, 32), np.uint8)
    frozen = cache()
    assert frozen == 300 * 4 * make_model().policy.online.features_extractor.features_dim
    unfrozen = cache({"at_timestep": 500, "unfreeze_from": "layer2"})
    assert unfrozen > 4 * frozen
    assert cache({"at_timestep": 2000, "unfreeze_from": "layer2"}) == frozen  # after the end
    assert cache({"at_timestep": 500, "unfreeze_from": "layer2"}, max_bytes=1000) == 1000


def test_memory_advice_keeps_n_step_returns():
    needed = {"ReplayBuffer": 10**10, "FrameReplayBuffer": 10**9, "available": 2 * 10**9}

    def change(yaml=False, callbacks=(), **kwargs):
        setup = setups.Setup(make_model(**kwargs), 10**6, 48_712, callbacks, from_yaml=yaml)
        return [finding.change for finding in checking.memory_findings(setup, needed)]

    (advice,) = change(n_steps=3, gamma=0.9)
    assert "replay_buffer_class=sb3_resnet.buffers.FrameNStepReplayBuffer with replay_buffer_kwargs=" in advice
    assert "{'n_steps': 3, 'gamma': 0.9} instead of n_steps, which takes about 1.0 GB" in advice
    (advice,) = change(yaml=True)
    assert "replay_buffer_class: \"importlib.import_module('sb3_resnet.buffers').FrameReplayBuffer\", which" in advice
    options = {"n_steps": 3, "gamma": 0.9}
    assert change(replay_buffer_class=FrameNStepReplayBuffer, replay_buffer_kwargs=options) == []
    assert change(callbacks=[FeatureCacheCallback()], n_steps=3) == []  # it replaces the buffer


@pytest.mark.slow
def test_the_advised_buffer_is_built_by_rl_zoo_and_by_check(tmp_path):
    file = tmp_path / "zoo.yml"
    many = YAML.replace("buffer_size: 1000000", "buffer_size: 1000000\n  n_steps: 3")
    file.write_text(many)
    options = ["check", "--env", TINY, "--conf-file", file, "--memory", 5]
    _, text, _ = run_command(*options)
    advice = re.search(r"or (replay_buffer_class: .*) with (replay_buffer_kwargs: .*) instead of n_steps", text)
    file.write_text(many.replace("n_steps: 3", "\n  ".join(advice.groups())))
    buffer = setups.from_zoo(file, TINY).model.replay_buffer
    assert (type(buffer), buffer.n_steps) == (FrameNStepReplayBuffer, 3)
    _, text, _ = run_command(*options)
    assert "buffer_memory" not in text

    option = "replay_buffer_class=sb3_resnet.buffers.FrameReplayBuffer"
    for given in (HEALTHY, [*options[1:], "--param", "replay_buffer_kwargs={}"]):
        status, text, _ = run_command("check", *given, "--param", option)
        assert "error" not in text.replace("0 errors", "")
        assert status == 0
    _, text, _ = run_command("check", *HEALTHY, "--param", "replay_buffer_class=FrameReplayBuffer")
    assert "error setup: replay_buffer_class FrameReplayBuffer: " in text
    assert "Write package.module.Class" in text


def test_gradients_that_are_missing_or_infinite_are_found():
    model = make_model()
    (finding,) = checking.gradient_findings(model)
    assert finding.seen.startswith("No gradient reaches q_net")
    fill(model).train(1, 4)
    assert checking.gradient_findings(model) == []
    model.policy.online.q_net[-1].weight.grad[0, 0] = float("nan")
    (finding,) = checking.gradient_findings(model)
    assert "is not finite" in finding.seen


def test_missing_extras_are_told_by_the_error():
    assert missing_extra(ImportError("OpenCV is not installed")) == "pip install 'sb3_resnet[atari]'"
    assert missing_extra(ModuleNotFoundError("No module named 'x'", name="rl_zoo3")) == "pip install 'sb3_resnet[zoo]'"
    assert missing_extra(ImportError("something else")) == ""
    assert missing_extra(ValueError("cv2")) == ""


@pytest.mark.parametrize(
    ("options", "updates"),
    [
        ({"train_freq": 4, "gradient_steps": 2}, 0.5),
        ({"train_freq": 4, "gradient_steps": -1}, 1.0),
        ({"train_freq": (1, "episode")}, None),
    ],
)
def test_updates_for_each_step(options, updates):
    model = make_model(**options)
    played, env_step = trial.play(model, 4)
    speed = trial.measure(model, extractors_of(model), played, env_step)
    assert speed.updates == updates
    assert model._n_updates > 0
    if updates is None:
        assert speed.steps_per_second(1.0) is None
    else:
        assert speed.steps_per_second(1.0) == pytest.approx(1 / (env_step + speed.act + updates))


def test_refused_caches_are_left_out():
    model = make_model(extractor={"norm": "batch"})
    played, env_step = trial.play(model, 4)
    speed = trial.measure(model, extractors_of(model), played, env_step)
    assert speed.cached_update is None
    assert speed.cache_refusal.startswith("norm='batch' makes an entry depend on the batch")


def test_a_trial_that_fails_is_a_finding(monkeypatch):
    def fail(*args):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(trial, "measure", fail)
    status, text, _ = run_command("check", *HEALTHY)
    assert status == 1
    assert "error trial: A trial update failed: CUDA out of memory" in text
    assert "backbone_no_decay" in text


@pytest.mark.parametrize("text", ["[/x]", ":smile:", *slowly("[bold]c[/bold]", "[red]", "[link=a]")])
def test_paths_are_printed_as_they_are_written(text, tmp_path, dqn_zip):
    folder = tmp_path / text
    folder.mkdir(parents=True)
    (folder / "progress.csv").write_text("time/total_timesteps,rollout/ep_rew_mean\n1,2\n2,3\n")
    status, printed, _ = run_command("doctor", folder, width=400)
    assert status == 0
    assert str(folder) in printed
    assert f"{folder} is no folder: make it first" in error_of("plot", folder, "-o", folder / "none" / "c.png").replace(
        "/none", ""
    )
    (folder / "evaluations.npz").write_bytes(_evaluations())
    assert str(folder / "c.png") in run_command("plot", folder, "-o", folder / "c.png", width=400)[1]
    svg = folder / "groups.svg"
    assert run_command("--svg", svg, "groups", dqn_zip)[0] == 0
    assert svg.read_text().startswith("<svg")


def _evaluations():
    stream = io.BytesIO()
    np.savez(stream, timesteps=np.arange(3), results=np.ones((3, 2)))
    return stream.getvalue()


def test_folders_and_logs_cannot_write_to_the_terminal(tmp_path):
    folder = tmp_path / "run\x1b[2J"
    folder.mkdir()
    (folder / "progress.csv").write_text("time/total_timesteps,rollout/ep_rew_mean\n1,2\n2,3\n")
    _, text, _ = run_command("doctor", folder, width=400)
    assert "\x1b[2J" not in text
    assert "run\\x1b[2J" in text
    assert "\x1b[2J" not in error_of("doctor", folder / "none")


def test_names_in_a_model_cannot_write_to_the_terminal(dqn_zip, tmp_path):
    with zipfile.ZipFile(dqn_zip) as old, zipfile.ZipFile(tmp_path / "model.zip", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "policy.optimizer.pth":
                optimizer = th.load(io.BytesIO(content), weights_only=True)
                optimizer["param_groups"][0]["name"] = "head.[/x]\x1b[2J"
                stream = io.BytesIO()
                th.save(optimizer, stream)
                content = stream.getvalue()
            new.writestr(name, content)
    status, text, _ = run_command("groups", tmp_path / "model.zip")
    assert status == 0
    assert "\x1b[2J" not in text
    assert "head.[/x]\\x1b[2J" in text


@pytest.mark.parametrize("name", ["model.zip", "x.png", "x", "x.svg.gz"])
def test_a_picture_never_takes_the_place_of_another_file(name, dqn_zip, tmp_path):
    path = tmp_path / name
    path.write_bytes(dqn_zip.read_bytes())
    assert "must end with .svg" in error_of("--svg", path, "groups", dqn_zip)
    assert path.read_bytes() == dqn_zip.read_bytes()
    disguised = tmp_path / "model.svg"
    disguised.symlink_to(path)
    assert "is a file that is no SVG" in error_of("--svg", disguised, "groups", dqn_zip)
    assert path.read_bytes() == dqn_zip.read_bytes()


def test_an_export_never_takes_the_place_of_the_model(dqn_zip, tmp_path):
    path = tmp_path / "model.zip"
    path.write_bytes(dqn_zip.read_bytes())
    assert "must end with .onnx" in error_of("export", path, "-o", path)
    assert path.read_bytes() == dqn_zip.read_bytes()


def test_paths_of_the_command_line_may_lie_in_the_home_folder(dqn_zip, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m.zip").write_bytes(dqn_zip.read_bytes())
    (tmp_path / "evaluations.npz").write_bytes(_evaluations())
    assert run_command("--svg", "~/x.svg", "groups", "~/m.zip")[0] == 0
    assert run_command("plot", "~", "-o", "~/c.png")[0] == 0
    assert (tmp_path / "x.svg").exists()
    assert (tmp_path / "c.png").exists()


@pytest.mark.skipif(th.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error(dqn_zip, tmp_path):
    for device in ("cuda", "cuda:1"):
        wanted = f"--device {device}, but PyTorch finds no GPU: write --device auto or cpu"
        assert wanted in error_of("explain", dqn_zip, "--env", TINY, "-o", tmp_path / "x", "--device", device)
        assert wanted in run_command("check", *HEALTHY, "--device", device)[1]
        file = tmp_path / "zoo.yml"
        file.write_text(YAML)
        assert wanted in run_command("check", "--env", TINY, "--conf-file", file, "--device", device)[1]
    assert "--device must be auto, cpu or cuda, got 'gpu'" in error_of(
        "explain", dqn_zip, "--env", TINY, "-o", tmp_path / "x", "--device", "gpu"
    )
    assert not (tmp_path / "x").exists()


DEEP = "[" * 100_000
BROKEN = {
    "long cell": (
        "monitor.csv",
        '#{"t_start": 1}\nr,l,t\n1,2,3' + "4" * 200_000 + "\n",
        "field larger than field limit",
    ),
    "deep header": ("monitor.csv", f"#{DEEP}\n", "recursion"),
    "long log": ("progress.csv", "a,b\n1," + "2" * 200_000 + "\n", "field larger than field limit"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_logs_that_cannot_be_read_are_named(case, tmp_path):
    name, content, says = BROKEN[case]
    (tmp_path / name).write_text(content)
    line = error_of("doctor", tmp_path)
    assert str(tmp_path / name) in line
    assert says in line


@pytest.mark.slow
def test_deep_files_are_named(tmp_path):
    model, file = tmp_path / "model.zip", tmp_path / "zoo.yml"
    model.write_bytes(_zip_of(data=DEEP, policy_pth="x"))
    assert f"{model} is no model of Stable-Baselines3" in error_of("groups", model)
    file.write_text("[" * 1500)
    assert f"{file} cannot be read as YAML" in error_of("check", "--env", TINY, "--conf-file", file)
    assert "--param 'a=[[" in error_of("check", *HEALTHY, "--param", "a=" + "[" * 1500)


@pytest.mark.parametrize(
    ("module", "missing", "extra", "says"),
    [
        ("onnxscript", "onnx", "tools", "onnx is missing"),
        ("rl_zoo3.exp_manager", "sb3_contrib", "contrib", "sb3_contrib is missing"),
        ("onnx", "onnx", "tools", "onnx is missing"),
        ("sb3_contrib", "sb3_contrib", "contrib", "sb3_contrib is missing"),
    ],
)
def test_what_is_missing_is_named_exactly(module, missing, extra, says, monkeypatch):
    def fail(name):
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr("importlib.import_module", fail)
    with pytest.raises(
        ImportError, match=rf"^{says} \(No module named '{missing}'\): pip install 'sb3_resnet\[{extra}\]'$"
    ):
        import_extra(module, "zoo" if module.startswith("rl_zoo3") else "tools")


def test_a_module_that_does_not_load_is_not_called_missing(monkeypatch):
    def fail(name):
        raise ImportError("libGL.so.1: cannot open shared object file", name="cv2")

    monkeypatch.setattr("importlib.import_module", fail)
    with pytest.raises(ImportError, match=r"^cv2 cannot be imported \(libGL.*pip install 'sb3_resnet\[atari\]'$"):
        import_extra("cv2")


@pytest.mark.parametrize(
    "error",
    [
        AssertionError("OpenCV is not installed, you can do `pip install opencv-python`"),
        gym.error.DependencyNotInstalled("opencv (cv2) is not installed, run `pip install gymnasium[other]`"),
        ModuleNotFoundError("No module named 'cv2'", name="cv2"),
    ],
)
def test_opencv_is_named_with_its_extra(error, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    assert missing_extra(error) == "pip install 'sb3_resnet[atari]'"
    monkeypatch.setattr("sb3_resnet.cli.envs.make_vec_env", fail)
    _, text, _ = run_command("check", *HEALTHY)
    assert "pip install 'sb3_resnet[atari]'" in text
