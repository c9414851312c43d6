"""Models, folders and YAML of other people: nothing in them runs without ``--trust``."""

import base64
import io
import json
import os
import pickle
import sys
import zipfile
from operator import attrgetter
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
import torch as th
import torchvision.models as tvm
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.utils import LinearSchedule
from typer.testing import CliRunner

from sb3_resnet import ResNetExtractor, param_group_summary
from sb3_resnet.buffers import FrameNStepReplayBuffer, FrameReplayBuffer
from sb3_resnet.callbacks import FeatureCacheCallback
from sb3_resnet.cli.app import app
from sb3_resnet.cli.loading import load_model
from sb3_resnet.cli.pickles import UntrustedError, loads, read_pickle
from sb3_resnet.cli.saved_groups import saved_groups
from sb3_resnet.cli.setups import from_zoo, read_sections
from sb3_resnet.cli.zoo_code import refuse_code
from tests.helpers import TinyGame, assert_same, fill, make_model, snapshot

pytestmark = pytest.mark.usefixtures("tiny_id")

TINY = "Tiny-v0"


def run(*arguments):
    result = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "400"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout + result.stderr


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def make_ppo(algorithm=PPO, **extractor):
    policy_kwargs = {
        "features_extractor_class": ResNetExtractor,
        "features_extractor_kwargs": {"backbone": "resnet_tiny", **extractor},
    }
    batch = {"batch_size": 4} if algorithm is PPO else {}
    return algorithm("CnnPolicy", TinyGame((4, 36, 36)), n_steps=4, policy_kwargs=policy_kwargs, device="cpu", **batch)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "plain.zip"
    make_model().save(path)
    return path


def changed(source, target, replace=None, **data):
    """Copy a model with other files in it, or other entries in its data."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "data":
                content = json.dumps({**json.loads(content), **data})
            new.writestr(name, (replace or {}).get(name, content))
    return target


def serialized(value):
    return {":type:": "dict", ":serialized:": base64.b64encode(cloudpickle.dumps(value)).decode()}


def saved_by_torch(value):
    stream = io.BytesIO()
    th.save(value, stream)
    return stream.getvalue()


def plant(place, source, folder, trap):
    """:return: a model with a trap in one place"""
    target = folder / "planted.zip"
    if place.endswith(".pth"):
        return changed(source, target, {place: saved_by_torch({"trap": trap})})
    if place == "lambda":
        return changed(source, target, lr_schedule=serialized(lambda _, path=str(trap.folder): os.mkdir(path) or 0.1))
    return changed(source, target, **{place: serialized({"trap": trap})})


PLACES = [
    "policy_class",
    "policy_kwargs",
    "lr_schedule",
    "_last_obs",
    "observation_space",
    "replay_buffer_class",
    "new",
]


@pytest.mark.parametrize("place", [*PLACES, "lambda", "policy.pth", "policy.optimizer.pth", "pytorch_variables.pth"])
def test_no_command_runs_what_a_model_holds(place, plain, tmp_path):
    trap = Trap(tmp_path / "ran")
    model = plant(place, plain, tmp_path, trap)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "progress.csv").write_text("time/total_timesteps,rollout/ep_rew_mean\n1,2\n2,3\n")
    (folder / "planted.zip").write_bytes(model.read_bytes())
    commands = {
        "groups": ["groups", model],
        "doctor": ["doctor", folder],
        "export": ["export", model, "-o", tmp_path / "x.onnx"],
        "explain": ["explain", model, "--env", TINY, "-o", tmp_path / "explain"],
        "watch": ["watch", model, "--env", TINY, "-o", tmp_path / "film.gif"],
    }
    for command, arguments in commands.items():
        status, text = run(*arguments)
        assert not (tmp_path / "ran").exists(), command
        if command != "groups" and not place.endswith(".pth"):
            named = "_make_function" if place == "lambda" else "posix.mkdir"
            assert named in text
            assert "--trust" in text
        if command == "groups" and not place.startswith("policy."):
            assert status == 0  # from tensors alone
            assert "head_no_decay" in text
        elif command != "doctor":
            assert status == 1


def test_a_trap_of_these_tests_works_and_trust_lets_it(plain, tmp_path):
    model = plant("new", plain, tmp_path, Trap(tmp_path / "ran"))
    assert load_model(model, trust=True).num_timesteps == 0
    assert (tmp_path / "ran").exists()
    (tmp_path / "ran").rmdir()
    (tmp_path / "progress.csv").write_text("time/total_timesteps,rollout/ep_rew_mean\n1,2\n2,3\n")
    status, text = run("doctor", tmp_path, "--trust")
    assert (tmp_path / "ran").exists(), text
    assert status == 0


def test_learning_rates_that_are_functions_need_trust(tmp_path):
    make_model(learning_rate=lambda left: 1e-4 * left).save(tmp_path / "model.zip")
    with pytest.raises(
        UntrustedError, match=r"its learning_rate wants to call cloudpickle\S+ when it is loaded.*--trust"
    ):
        load_model(tmp_path / "model.zip")
    assert load_model(tmp_path / "model.zip", trust=True).learning_rate(0.5) == 5e-5


def test_an_environment_that_a_model_names_is_not_imported(plain, tmp_path, monkeypatch):
    (tmp_path / "planted_module.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    model = changed(plain, tmp_path / "model.zip", env="planted_module:Any-v0")
    load_model(model)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(Exception, match="Any"):
        DQN.load(model, device="cpu")
    assert (tmp_path / "ran").exists()  # the trap is a working one


@pytest.mark.slow
def test_ordinary_models_load_as_sb3_loads_them(tmp_path):
    models = {
        "dqn": make_model().learn(20),
        "nstep": make_model("qrdqn", n_steps=3, learning_rate=LinearSchedule(1e-3, 1e-4, 0.5)).learn(20),
        "frames": make_model(replay_buffer_class=FrameReplayBuffer, policy_kwargs={"activation_fn": "Tanh"}),
        "cached": make_model().learn(20, callback=FeatureCacheCallback()),
        "ppo": make_ppo().learn(4),
        "a2c": make_ppo(A2C).learn(4),
        "enum": make_model(policy_kwargs={"optimizer_class": th.optim.RMSprop}),
    }
    for name, model in models.items():
        model.save(tmp_path / f"{name}.zip")
        loaded = load_model(tmp_path / f"{name}.zip")
        assert_same(snapshot(loaded.policy), snapshot(model.policy))
        assert loaded.num_timesteps == model.num_timesteps
        assert loaded.lr_schedule(0.7) == model.lr_schedule(0.7)
        assert loaded.policy_kwargs == model.policy_kwargs


@pytest.mark.slow
def test_groups_from_tensors_are_those_of_the_model(tmp_path):
    models = {
        "frozen": make_model(),
        "all": make_model("qrdqn", extractor={"freeze_backbone": False}),
        "layers": make_model(policy_kwargs={"lr_decay_per_stage": 0.5, "lr_backbone": 3e-5}, learning_rate=2e-4),
        "adapter": make_model(extractor={"train_adapter": True}),
        "three": make_model(
            env=TinyGame((3, 36, 36)), extractor={"features_dim": 7}, policy_kwargs={"weight_decay": 0.0}
        ),
        "adapter of classes": make_model(
            extractor={"train_adapter": True}, policy_kwargs={"optimizer_class": th.optim.RMSprop}
        ),
        "ppo": make_ppo(freeze_backbone=False),
        "a2c": make_ppo(A2C),
    }
    models["layers"].policy.set_freeze_boundary("layer3")
    for name, model in models.items():
        model.save(tmp_path / f"{name}.zip")
        assert saved_groups(tmp_path / f"{name}.zip") == param_group_summary(model, show=False), name
    trained = make_model(extractor={"freeze_backbone": False}).learn(24)
    trained.save(tmp_path / "trained.zip")
    assert saved_groups(tmp_path / "trained.zip") == param_group_summary(trained, show=False)


def test_groups_of_another_optimizer_are_refused(plain, tmp_path):
    with zipfile.ZipFile(plain) as archive:
        optimizer = th.load(io.BytesIO(archive.read("policy.optimizer.pth")), weights_only=True)
    optimizer["param_groups"][0]["params"].append(99)
    model = changed(plain, tmp_path / "model.zip", {"policy.optimizer.pth": saved_by_torch(optimizer)})
    assert "its optimizer holds 3 parameters in group head, its policy 2" in run("groups", model)[1]


def test_replay_buffers_are_read_without_their_code(tmp_path):
    for kwargs in (
        {},
        {"n_steps": 3},
        {"replay_buffer_class": FrameReplayBuffer},
        {"replay_buffer_class": FrameNStepReplayBuffer},
    ):
        model = fill(make_model(**kwargs), 20)
        model.save_replay_buffer(tmp_path / "buffer.pkl")
        buffer = read_pickle(tmp_path / "buffer.pkl")
        assert type(buffer) is type(model.replay_buffer)
        assert np.array_equal(buffer.rewards, model.replay_buffer.rewards)
        rows = np.arange(20)
        assert np.array_equal(buffer.observations[rows, 0], model.replay_buffer.observations[rows, 0])
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"buffer": Trap(tmp_path / "ran")}))
    with pytest.raises(UntrustedError, match=r"evil.pkl wants to call posix.mkdir when it is loaded"):
        read_pickle(tmp_path / "evil.pkl")
    assert not (tmp_path / "ran").exists()
    read_pickle(tmp_path / "evil.pkl", trust=True)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name",
    [
        "builtins eval",
        "builtins getattr",
        "builtins type",
        "builtins __import__",
        "operator attrgetter",
        "torch load",
        "torch.serialization load",
        "torch.hub load",
        "numpy load",
        "numpy.testing runstring",
        "stable_baselines3.common.save_util cloudpickle",
        "stable_baselines3.common.save_util json_to_data",
        "stable_baselines3.common.vec_env.base_vec_env CloudpickleWrapper",
        "stable_baselines3.common.base_class BaseAlgorithm",
        "stable_baselines3.dqn.dqn DQN",
        "sb3_resnet.cli.pickles pickle",
        "sb3_resnet.cli main",
        "sb3_resnet.__main__ main",
        "gymnasium.spaces.box np",
        "gymnasium make",
        "torch.optim.optimizer warnings",
        "torchvision.models._api importlib",
        "functools reduce",
        "planted_module Any",
        "sb3_resnetty Any",
    ],
)
def test_names_that_lead_to_code_are_refused(name, tmp_path, monkeypatch):
    for module in ("planted_module", "sb3_resnetty"):
        (tmp_path / f"{module}.py").write_text("class Any: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    module, attribute = name.split()
    with pytest.raises(UntrustedError, match=rf"it wants to call {module}.{attribute} when it is loaded"):
        loads(f"c{module}\n{attribute}\n.".encode(), "it")
    if module not in ("sb3_resnet.__main__",):
        assert pickle.loads(f"c{module}\n{attribute}\n.".encode()) is not None or attribute == "Any"
    sys.modules.pop("planted_module", None)


@pytest.mark.parametrize("dotted", ["DQNPolicy.load", "DQNPolicy.load.__globals__"])
def test_attributes_of_allowed_classes_are_refused(dotted):
    parts = [text.encode() for text in ("stable_baselines3.dqn.policies", dotted)]
    code = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(part)]) + part for part in parts) + b"\x93."
    pickle.loads(code)
    with pytest.raises(UntrustedError, match=dotted):
        loads(code, "it")


def test_members_of_torchvisions_enum_are_data():
    value = {"weights": tvm.ResNet18_Weights.DEFAULT}
    assert loads(cloudpickle.dumps(value), "it") == value


YAML = {
    "policy": "ResNetCnnPolicy",
    "n_timesteps": 1000,
    "policy_kwargs": {"features_extractor_kwargs": {"backbone": "resnet_tiny"}},
}


def planted_yaml(folder, places):
    code = f"__import__('os').mkdir({str(folder / 'ran')!r})"
    (folder / "planted_module.py").write_text(f"{code}\n")
    values = {
        "policy_kwargs": f"dict(a={code})",
        "replay_buffer_class": f"{code}.x",
        "replay_buffer_kwargs": f"dict(a={code})",
        "monitor_kwargs": code,
        "normalize": f"dict(norm_obs={code})",
        "policy": "planted_module.Policy",
        "env_wrapper": "planted_module.Wrapper",
        "vec_env_wrapper": ["planted_module.Wrapper"],
        "callback": [{"planted_module.Callback": {"a": 1}}],
        "called": [{"subprocess.call": {"args": ["mkdir", str(folder / "ran")]}}],
        "imported": f"importlib.import_module('planted_module').X or {code}",
    }
    names = {"called": "callback", "imported": "replay_buffer_class"}
    return {**YAML, **{names.get(place, place): values[place] for place in places}}


ZOO_PLACES = ["policy_kwargs", "replay_buffer_class", "replay_buffer_kwargs", "monitor_kwargs", "normalize"]
ZOO_PLACES += ["policy", "env_wrapper", "vec_env_wrapper", "callback", "called", "imported"]


@pytest.mark.parametrize("place", ZOO_PLACES)
def test_check_runs_nothing_of_a_yaml_without_trust(place, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "planted_module", raising=False)
    path = tmp_path / "zoo.yml"
    path.write_text(json.dumps({"default": planted_yaml(tmp_path, [place])}))
    status, text = run("check", "--env", TINY, "--conf-file", path)
    assert status == 1
    assert "--trust" in text
    assert str(path) in text
    assert not (tmp_path / "ran").exists()
    run("check", "--env", TINY, "--conf-file", path, "--trust")
    assert (tmp_path / "ran").exists()  # the trap is a working one
    sys.modules.pop("planted_module", None)


def test_other_sections_of_a_yaml_do_not_matter(tmp_path):
    path = tmp_path / "zoo.yml"
    sections = {TINY: YAML, "default": planted_yaml(tmp_path, ZOO_PLACES)}
    path.write_text(json.dumps(sections))
    assert from_zoo(path, TINY).total_timesteps == 1000
    assert not (tmp_path / "ran").exists()


def test_a_yaml_that_is_python_too_is_read_as_yaml(tmp_path):
    path = tmp_path / "conf.py"
    path.write_text(f"default: {json.dumps(YAML)}\nother: dict(a=__import__('os').mkdir({str(tmp_path / 'ran')!r}))\n")
    _, text = run("check", "--env", TINY, "--conf-file", path)
    assert "no configuration of RL-Zoo" in text
    path.write_text(f"default: {json.dumps(YAML)}\n")
    _, text = run("check", "--env", TINY, "--conf-file", path)
    assert "ResNetCnnPolicy" in text
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["dict()", "'ReplayBuffer'.upper()", "[x for x in ()]", "a.b"])
def test_texts_that_rl_zoo_evaluates_ask_for_trust(name, tmp_path):
    path = tmp_path / "zoo.yml"
    path.write_text(json.dumps({"default": {**YAML, "replay_buffer_kwargs": name}}))
    with pytest.raises(
        UntrustedError, match="which RL-Zoo evaluates as Python code: write it as a dict of YAML, or write --tr"
    ):
        from_zoo(path, TINY)


def test_doctor_reads_no_pickles_of_a_folder(tmp_path):
    trap = Trap(tmp_path / "ran")
    for name in ("replay_buffer.pkl", "vecnormalize.pkl", "rl_model_8_steps_replay_buffer.pkl", "Tiny-v0.pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(trap))
    (tmp_path / "Tiny-v0").mkdir()
    (tmp_path / "Tiny-v0" / "config.yml").write_text(f"!!python/object/apply:os.mkdir [{str(trap.folder)!r}]\n")
    (tmp_path / "progress.csv").write_text("time/total_timesteps,rollout/ep_rew_mean\n1,2\n2,3\n")
    assert run("doctor", tmp_path)[0] == 0
    np.savez(tmp_path / "evaluations.npz", timesteps=np.array([trap], object), results=np.zeros((1, 1)))
    status, text = run("doctor", tmp_path)
    assert status == 1
    assert "evaluations.npz is no file of EvalCallback" in text
    assert not trap.folder.exists()


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parent.parent / "zoo_configs").glob("*.yml")), ids=lambda file: file.name
)
def test_the_shipped_configurations_need_no_trust(file):
    for section in read_sections(file).values():
        refuse_code(section, file)


def test_what_an_allowed_module_merely_imports_is_refused(monkeypatch):
    monkeypatch.setattr("sb3_resnet.buffers.attrgetter", attrgetter, raising=False)
    with pytest.raises(UntrustedError, match=r"it wants to call sb3_resnet\.buffers\.attrgetter"):
        loads(b"csb3_resnet.buffers\nattrgetter\n.", "it")
