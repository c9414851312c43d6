"""Weight files: what loads, what is refused and in which words, and where nothing is read at all."""

import os
import pickle
import shutil
import socket
import sys
import warnings
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError
from urllib.parse import urlparse

import numpy as np
import pytest
import torch as th
import torchvision.models as tvm
from gymnasium import spaces
from safetensors.torch import save_file
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.envs import FakeImageEnv

from sb3_resnet import ResNetCnnPolicy, ResNetExtractor
from sb3_resnet.nn import backbones
from sb3_resnet.nn import weights as weight_files
from tests import helpers
from tests.helpers import resnet_tiny

SPACE = spaces.Box(0, 255, (3, 32, 32), np.uint8)
WEIGHTS_ENUM = tvm.get_model_weights("resnet18")
CACHED_NAME = Path(urlparse(WEIGHTS_ENUM.DEFAULT.url).path).name


REAL_RESNET18 = tvm.resnet18


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    """A tiny ResNet stands in for ResNet-18, whose name torchvision's enum knows."""
    monkeypatch.setattr(tvm, "resnet18", resnet_tiny)


@pytest.fixture
def _real(_tiny, monkeypatch):
    monkeypatch.setattr(tvm, "resnet18", REAL_RESNET18)


def filled(resnet):
    """Its state dict, with nothing in it that a fresh network has, and 10 classes."""
    resnet.fc = th.nn.Linear(resnet.fc.in_features, 10)
    state = resnet.state_dict()
    for key, value in state.items():
        value += 7 if key.endswith("tracked") else th.rand(value.shape) * (value.ndim == 1)
    return state


@pytest.fixture(scope="module")
def source():
    th.manual_seed(0)
    return filled(resnet_tiny())


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub cache of torch; returns the folder of its files."""
    monkeypatch.setattr("torch.hub._hub_dir", None)
    th.hub.set_dir(tmp_path / "hub")
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def offline(monkeypatch):
    """No sockets; returns the list of attempts to open one."""
    attempts = []

    def refuse(*args, **kwargs):
        attempts.append(args)
        raise OSError("no network")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return attempts


@pytest.fixture
def cached(hub, offline, source):
    """The hub cache with the file of ``pretrained=True``, and no network."""
    th.save(source, hub / CACHED_NAME)
    return hub


def build(**kwargs):
    return ResNetExtractor(SPACE, backbone="resnet18", **kwargs)


def assert_same_trunk(extractor, source, ignore=()):
    state = extractor.backbone.state_dict()
    assert [*state] == [*without_fc(source)]
    different = [key for key in state if not key.endswith(ignore) and not th.equal(state[key], source[key])]
    assert different == []


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def r3m(state):
    foreign = {"module.lang_enc.model.weight": th.full((2,), th.nan), "module.lang_rew.pred.0.bias": th.zeros(1)}
    return {"r3m": {**foreign, **prefixed("module.convnet.", state)}, "global_step": 5}


def without_fc(state):
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


def legacy_save(content, path):
    th.save(content, path, _use_new_zipfile_serialization=False)


def name_of_case(value):
    return value if isinstance(value, str) else ""


# --------------------------------------------------------------------------------------------------- what loads


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("plain.pth", th.save),
        ("plain.pt", th.save),
        ("old_format.pth", legacy_save),
        ("plain.safetensors", save_file),
        ("parallel.safetensors", lambda state, path: save_file(prefixed("module.", state), path)),
        ("no.known.suffix", th.save),
    ],
    ids=name_of_case,
)
def test_every_format_gives_its_trunk_bit_for_bit(name, save, source, tmp_path, offline):
    save(source, tmp_path / name)
    extractor = build(weights=str(tmp_path / name))
    assert_same_trunk(extractor, source)
    assert isinstance(extractor.backbone.fc, th.nn.Identity)
    assert offline == []


@pytest.mark.usefixtures("_real")
def test_a_real_resnet18_loads_bit_for_bit(tmp_path):
    state = filled(tvm.resnet18())
    th.save(state, tmp_path / "resnet18.pth")
    assert_same_trunk(build(weights=tmp_path / "resnet18.pth"), state)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("no_fc", without_fc),
        ("state_dict", lambda state: {"state_dict": state, "epoch": 3}),
        ("model", lambda state: {"model": state, "arch": "resnet18"}),
        ("nested", lambda state: {"state_dict": {"model": state}}),
        ("r3m", lambda state: {"r3m": state}),
        ("r3m_convnet", r3m),
        ("backbone", lambda state: {**prefixed("backbone.", state), "head.weight": th.zeros(2)}),
        ("module", lambda state: {"state_dict": prefixed("module.", state)}),
    ],
    ids=name_of_case,
)
def test_every_layout_gives_its_trunk(name, layout, source, tmp_path):
    th.save(layout(source), tmp_path / "trunk.pth")
    assert_same_trunk(build(weights=tmp_path / "trunk.pth"), source)


def test_a_file_without_batch_counters_loads(source, tmp_path):
    th.save({key: value for key, value in source.items() if not key.endswith("tracked")}, tmp_path / "old.pth")
    assert_same_trunk(build(weights=tmp_path / "old.pth"), source, ignore=("tracked",))


def test_a_half_precision_file_becomes_float32(source, tmp_path):
    th.save({key: value.half() for key, value in source.items()}, tmp_path / "half.pth")
    weight = build(weights=tmp_path / "half.pth").backbone.conv1.weight
    assert weight.dtype == th.float32
    assert th.equal(weight, source["conv1.weight"].half().float())


def test_home_and_the_working_directory_are_understood(source, tmp_path, monkeypatch):
    th.save(source, tmp_path / "trunk.bin")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert th.equal(weight_files.read_file("~/trunk.bin")["conv1.weight"], source["conv1.weight"])
    assert_same_trunk(build(weights="trunk.bin"), source)


def test_a_file_goes_before_pretrained(source, tmp_path, hub, offline):
    th.save(source, tmp_path / "own.pth")
    assert_same_trunk(build(weights=tmp_path / "own.pth", pretrained=True), source)


def numbered(
    state, layers=("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool", "fc")
):
    """As ``nn.Sequential(*resnet.children())`` names it."""
    numbers = {name: str(number) for number, name in enumerate(layers)}
    return {".".join([numbers[key.split(".")[0]], *key.split(".")[1:]]): value for key, value in state.items()}


def compiled(state):
    return {f"_orig_mod.{key.replace('layer2.', 'layer2._orig_mod.')}": value for key, value in state.items()}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("children", lambda state: numbered(without_fc(state))),
        ("children_and_fc", numbered),
        ("children_of_an_encoder", lambda state: {"state_dict": prefixed("encoder.", numbered(without_fc(state)))}),
        (
            "children_and_head",
            lambda state: {**prefixed("0.", numbered(without_fc(state))), "1.weight": th.zeros(2, 2)},
        ),
        (
            "children_without_relu",
            lambda state: numbered(without_fc(state), ("conv1", "bn1", "pool", "layer1", "layer2", "layer3", "layer4")),
        ),
        (
            "a_stem_of_its_own",
            lambda state: {
                **{
                    key.replace("conv1", "0.0").replace("bn1", "0.1"): state[key]
                    for key in state
                    if key[:2] in ("co", "bn")
                },
                **{f"{key[5]}{key[6:]}": state[key] for key in state if key.startswith("layer")},
            },
        ),
        ("compiled", compiled),
        ("compiled_and_parallel", lambda state: prefixed("module.", compiled(state))),
        *(
            (name, lambda state, name=name: {name: state, "epoch": 3})
            for name in ("net", "ema", "model_state_dict", "xyz")
        ),
        ("deep", lambda state: {"a": {"b": {"c": {"weights": prefixed("net.", state)}}}}),
        ("beside_an_optimizer", lambda state: {"model": state, "optimizer": {"state": {0: {"step": th.zeros(1)}}}}),
        ("beside_a_head", lambda state: {"backbone": state, "head": {"weight": th.zeros(2)}}),
    ],
    ids=name_of_case,
)
def test_names_of_other_tools_are_understood(name, layout, source, tmp_path):
    th.save(layout(source), tmp_path / "trunk.pth")
    assert_same_trunk(build(weights=tmp_path / "trunk.pth"), source)


SEVERAL = {
    "moco": ("module.encoder_q.", "module.encoder_k."),
    "byol": ("online_encoder.", "target_encoder."),
    "plain and teacher": ("", "teacher."),
}


@pytest.mark.parametrize("case", SEVERAL)
@pytest.mark.parametrize("dot", [True, False])
def test_a_prefix_chooses_one_of_several_resnets(case, dot, source, tmp_path):
    first, second = SEVERAL[case]
    other = {key: value + 1 for key, value in source.items()}
    th.save({"state_dict": {**prefixed(first, source), **prefixed(second, other)}}, tmp_path / "two.pth")
    for prefix, state in ((first, source), (second, other)):
        written = prefix if dot else prefix.removesuffix(".")
        assert_same_trunk(build(weights=tmp_path / "two.pth", weights_prefix=written), state)
    with pytest.raises(ValueError, match="several ResNets") as caught:
        build(weights=tmp_path / "two.pth")
    assert f"under {first!r}, {second!r}" in str(caught.value)
    assert f"weights_prefix={first!r}" in str(caught.value)


def test_dicts_of_a_file_are_prefixes_too(source, tmp_path):
    other = {key: value + 1 for key, value in source.items()}
    th.save({"model": source, "ema": prefixed("module.", other)}, tmp_path / "two.pth")
    with pytest.raises(ValueError, match=r"several ResNets, under 'model\.', 'ema\.module\.'"):
        build(weights=tmp_path / "two.pth")
    assert_same_trunk(build(weights=tmp_path / "two.pth", weights_prefix="ema.module"), other)


@pytest.mark.parametrize(
    ("kwargs", "error", "says"),
    [
        (
            {"weights_prefix": "encoder_x."},
            ValueError,
            r"no ResNet under weights_prefix='encoder_x.'. ResNets are under 'a\.",
        ),
        ({"weights_prefix": 3}, TypeError, "weights_prefix must be a string such as 'module.encoder_q.', got 3"),
        ({"weights": None, "weights_prefix": "a."}, ValueError, "weights_prefix says which ResNet of a file"),
        ({"weights": "DEFAULT", "weights_prefix": "a."}, ValueError, "weights_prefix says which ResNet of a file"),
    ],
)
def test_a_prefix_without_its_resnet_is_refused(kwargs, error, says, source, tmp_path):
    th.save(prefixed("a.", source), tmp_path / "one.pth")
    with pytest.raises(error, match=says):
        build(**{"weights": tmp_path / "one.pth", "pretrained": True, **kwargs})


@pytest.mark.parametrize("algorithm", ["dqn", "qrdqn", "ppo"])
def test_the_model_of_an_agent_is_a_weights_file(algorithm, tmp_path):
    if algorithm == "ppo":
        kwargs = {"backbone": "resnet_tiny", "freeze_backbone": False}
        policy_kwargs = {"features_extractor_class": ResNetExtractor, "features_extractor_kwargs": kwargs}
        env = FakeImageEnv(screen_height=36, screen_width=36, n_channels=3)
        model = PPO("CnnPolicy", env, n_steps=8, batch_size=4, policy_kwargs=policy_kwargs, device="cpu").learn(8)
        trunk = model.policy.features_extractor.backbone
    else:
        model = helpers.make_model(algorithm, extractor={"freeze_backbone": False}, target_update_interval=10**6)
        trunk = model.learn(24).policy.online.features_extractor.backbone
        assert not th.equal(trunk.conv1.weight, model.policy.target.features_extractor.backbone.conv1.weight)
    model.save(tmp_path / "agent.zip")
    assert_same_trunk(build(weights=tmp_path / "agent.zip"), trunk.state_dict())
    th.save(model.policy.state_dict(), tmp_path / "policy.pth")
    assert_same_trunk(build(weights=tmp_path / "policy.pth"), trunk.state_dict())


@pytest.mark.parametrize("kwargs", [{}, {"adapter": "per_frame"}, {"adapter": "inflate"}])
def test_the_model_of_an_agent_sees_as_it_did(kwargs, tmp_path):
    """With the agent's normalisation, and its adapter, whatever a file of weights alone would get."""
    scale = {"input_mean": [0.1, 0.2, 0.3], "input_std": [0.5, 0.6, 0.7]}
    for name, own in (("none", {}), ("own", scale)):
        model = helpers.make_model(extractor={**kwargs, **own, "freeze_backbone": False}).learn(24)
        model.save(tmp_path / f"{name}.zip")
        old = model.policy.online.features_extractor
        new = ResNetExtractor(
            old._observation_space, backbone="resnet_tiny", weights=tmp_path / f"{name}.zip", **kwargs
        )
        images = th.rand(2, *old._observation_space.shape)
        th.testing.assert_close(new.eval()(images), old.eval()(images), rtol=1e-4, atol=1e-5)
        asked = ResNetExtractor(
            old._observation_space,
            backbone="resnet_tiny",
            weights=tmp_path / f"{name}.zip",
            use_imagenet_norm=True,
            **kwargs,
        )
        assert asked.input_mean.flatten()[0] != old.input_mean.flatten()[0]  # what is written out goes first


def test_of_an_agent_with_other_channels_the_trunk_alone_is_taken(tmp_path):
    model = helpers.make_model(extractor={"freeze_backbone": False})
    model.save(tmp_path / "agent.zip")
    space = spaces.Box(0, 255, (5, 32, 32), np.uint8)
    new = ResNetExtractor(space, backbone="resnet_tiny", weights=tmp_path / "agent.zip")
    assert_same_trunk(new, model.policy.online.features_extractor.backbone.state_dict())
    assert new.adapter.weight.shape[1] == 5
    assert not new.input_mean.any()


def test_an_extractor_of_its_own_for_the_critic_must_be_chosen(source, tmp_path):
    names = ("pi_features_extractor.backbone.", "vf_features_extractor.backbone.")
    other = {key: value + 1 for key, value in source.items()}
    state = {
        **prefixed("features_extractor.backbone.", source),
        **prefixed(names[0], source),
        **prefixed(names[1], other),
    }
    th.save(state, tmp_path / "policy.pth")
    with pytest.raises(ValueError, match=r"several ResNets, under 'features_extractor\.backbone\.', 'vf_features"):
        build(weights=tmp_path / "policy.pth")
    assert_same_trunk(build(weights=tmp_path / "policy.pth", weights_prefix=names[1]), other)


def test_a_member_of_the_enum_is_saved_and_loaded_with_the_model(cached, tmp_path):
    kwargs = {"weights": WEIGHTS_ENUM.DEFAULT, "backbone": "resnet18"}
    model = helpers.make_model(extractor=kwargs)
    model.save(tmp_path / "model")
    shutil.rmtree(cached)
    assert DQN.load(tmp_path / "model", device="cpu").policy_kwargs["features_extractor_kwargs"] == kwargs


# ------------------------------------------------------------------------------------------------ what is refused


class Malicious:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def cut(save, size=-500):
    def write(source, path):
        save({key: value.clone() for key, value in source.items() if value.ndim < 2}, path)
        path.write_bytes(path.read_bytes()[:size])

    return write


def write_text(text):
    return lambda source, path: path.write_text(text)


def dump(content):
    return lambda source, path: path.write_bytes(pickle.dumps(content))


def save_changed(change):
    return lambda source, path: th.save(change(source), path)


def without(name, source):
    return {key: value for key, value in source.items() if key != name}


def changed(name, change):
    return lambda source: {**source, name: change(source[name])}


def with_nan(source):
    broken = source["layer2.0.conv1.weight"].clone()
    broken[0, 0, 0, 0] = th.nan
    return {**source, "layer2.0.conv1.weight": broken}


def scripted(source, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; files of it are around
        th.jit.save(th.jit.trace(th.nn.Linear(2, 2), th.zeros(1, 2)), path)


AGAIN = "Download it again"
NUMBERS = "no floating point numbers"
NO_STATE = "expected tensors by name"
WHICH = "Is backbone= the network that it was made for?"


@pytest.mark.filterwarnings("ignore:.*TorchScript archive", "ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    ("name", "write", "says"),
    [
        ("cut.pth", cut(th.save), [AGAIN, "cut off"]),
        ("cut_old_format.pth", cut(legacy_save), [AGAIN, "cut off"]),
        ("cut_in_old_names.pth", cut(legacy_save, 5000), [AGAIN, "cut off"]),
        ("cut_in_old_header.pth", cut(legacy_save, 18), [AGAIN, "cut off"]),
        ("cut.safetensors", cut(save_file), [AGAIN]),
        ("page.pth", write_text("<!DOCTYPE html>\n<html></html>"), [AGAIN, "not a checkpoint"]),
        ("note.pth", write_text("this is not a checkpoint"), [AGAIN, "not a checkpoint"]),
        ("bytes.pth", write_text("random bytes"), [AGAIN, "not a checkpoint"]),
        ("junk.pth", write_text("junk"), [AGAIN, "not a checkpoint"]),
        ("page.safetensors", write_text("<!DOCTYPE html>\n<html></html>"), [AGAIN]),
        ("empty.pth", write_text(""), [AGAIN, "empty"]),
        ("empty.safetensors", write_text(""), [AGAIN, "empty"]),
        ("list.pkl", dump([1, 2, 3]), [AGAIN]),
        ("list.pth", save_changed(lambda source: [1, 2, 3]), [NO_STATE]),
        ("tensor.pth", save_changed(lambda source: th.zeros(3)), [NO_STATE]),
        ("nothing.pth", save_changed(lambda source: {}), [NO_STATE]),
        ("number.pth", save_changed(lambda source: {**source, "epoch": 3}), [NO_STATE]),
        ("no_names.pth", save_changed(lambda source: {0: th.zeros(2), 1: th.zeros(2)}), [NO_STATE]),
        ("module.pth", save_changed(lambda source: th.nn.Linear(2, 2)), ["save its state_dict() alone"]),
        ("script.pt", scripted, ["save its state_dict() alone"]),
        ("other.pth", save_changed(lambda source: {"w": th.zeros(2)}), [WHICH, "missing", "conv1.weight"]),
        (
            "missing.pth",
            save_changed(lambda source: without("layer3.0.bn2.bias", source)),
            [WHICH, "missing: layer3.0.bn2.bias."],
        ),
        *(
            (
                f"prefixed_without_{missing}.pth",
                save_changed(lambda source, missing=missing: prefixed("module.", without(missing, source))),
                [WHICH, f"backbone. missing: {missing}. Is"],
            )
            for missing in ("conv1.weight", "layer1.0.conv1.weight", "layer2.0.conv1.weight")
        ),
        (
            "shape.pth",
            save_changed(lambda source: {**source, "bn1.weight": th.ones(3)}),
            [WHICH, "of another shape: bn1.weight (3,) instead of (64,)."],
        ),
        ("more.pth", save_changed(lambda source: {**source, "extra.weight": th.ones(3)}), ["unexpected: extra.weight"]),
        ("nan.pth", save_changed(with_nan), ["not finite: layer2.0.conv1.weight."]),
        (
            "huge.pth",
            save_changed(changed("bn1.bias", lambda value: value.double() + 1e300)),
            ["not finite: bn1.bias."],
        ),
        ("negative.pth", save_changed(changed("bn1.running_var", th.neg)), ["negative: bn1.running_var."]),
        *(
            (
                f"{kind}.pth",
                save_changed(changed("layer1.0.bn2.weight", cast)),
                [f"{NUMBERS}: layer1.0.bn2.weight ({kind})."],
            )
            for kind, cast in {
                "int64": th.Tensor.long,
                "int8": th.Tensor.char,
                "uint8": th.Tensor.byte,
                "bool": th.Tensor.bool,
                "complex64": lambda value: value + 0j,
            }.items()
        ),
        (
            "counter.pth",
            save_changed(changed("bn1.num_batches_tracked", lambda value: value + 0j)),
            [f"{NUMBERS}: bn1.num"],
        ),
        (
            "statistic.pth",
            save_changed(changed("bn1.running_mean", th.Tensor.int)),
            [f"{NUMBERS}: bn1.running_mean (int32)"],
        ),
        ("sparse.pth", save_changed(changed("conv1.weight", th.Tensor.to_sparse)), ["not dense: conv1.weight."]),
        (
            "foreign.pth",
            save_changed(lambda source: {f"stages.{index}.kernel": th.zeros(2) for index in range(20)}),
            [WHICH, "The file holds stages.0.kernel, stages.1.kernel, ", " and 12 more."],
        ),
        (
            "checkpoint.pth",
            save_changed(lambda source: {"net": 3, "epoch": 5}),
            [NO_STATE, "Found a dict of 'net', 'epoch'."],
        ),
        (
            "two.pth",
            save_changed(lambda source: prefixed("module.encoder_q.", source) | prefixed("module.encoder_k.", source)),
            ["several ResNets", "'module.encoder_q.', 'module.encoder_k.'", "Save the one you want"],
        ),
    ],
    ids=name_of_case,
)
def test_a_bad_file_gives_one_clear_error(name, write, says, source, tmp_path):
    trunk = backbones.build("resnet18")
    path = tmp_path / name
    write(source, path)
    before = trunk.conv1.weight.clone()
    with pytest.raises(ValueError, match=name) as caught:  # a message that names the file
        weight_files.load_into(trunk, weight_files.read_file(path), str(path))
    assert th.equal(trunk.conv1.weight, before)
    message = str(caught.value)
    assert [part for part in says if part not in message] == []
    assert len(message) < 1500
    assert [mark for mark in "\n\x1b" if mark in message] == []  # one line, no terminal codes


@pytest.mark.usefixtures("_real")
def test_a_resnet50_for_a_resnet18_says_which_names_differ(tmp_path):
    with th.device("meta"):
        shapes = {key: value.shape for key, value in tvm.resnet50().state_dict().items()}
    th.save({key: th.zeros(()).expand(shape) for key, shape in shapes.items()}, tmp_path / "trunk.pth")
    with pytest.raises(ValueError, match="Is backbone= the network that it was made for") as caught:
        build(weights=tmp_path / "trunk.pth")
    message = str(caught.value)
    assert "missing" not in message
    assert "unexpected: layer1.0.conv3.weight, layer1.0.bn3.weight," in message
    assert "of another shape: layer1.0.conv1.weight (64, 64, 1, 1) instead of (64, 64, 3, 3)," in message
    assert " more" in message
    assert len(message) < 1500


@pytest.mark.parametrize("end", ["stem", "layer2"])
def test_a_trunk_that_ends_below_says_where(end, source, tmp_path):
    kept = ("conv1.", "bn1.", *backbones.stages_up_to(end))
    th.save({key: value for key, value in source.items() if key.startswith(kept)}, tmp_path / "low.pth")
    with pytest.raises(ValueError, match=rf"ends at {end}: write last_stage='{end}' or a lower one\."):
        build(weights=tmp_path / "low.pth")
    build(weights=tmp_path / "low.pth", last_stage=end)


def test_a_trunk_with_a_gap_is_another_network(source, tmp_path):
    th.save({key: value for key, value in source.items() if not key.startswith("layer3.")}, tmp_path / "gap.pth")
    with pytest.raises(ValueError, match="Is backbone= the network"):
        build(weights=tmp_path / "gap.pth")


def test_a_bad_file_fails_at_construction(source, tmp_path):
    th.save(with_nan(source), tmp_path / "nan.pth")
    with pytest.raises(ValueError, match=r"nan\.pth does not fit the backbone. not finite: layer2"):
        build(weights=str(tmp_path / "nan.pth"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickled_object_is_refused_before_its_code_runs(tmp_path):
    content, trap = {"conv1.weight": Malicious(tmp_path / "ran")}, tmp_path / "trap.pth"
    for write in (th.save, legacy_save, lambda content, path: path.write_bytes(pickle.dumps(content))):
        write(content, trap)
        with pytest.raises(ValueError, match="weights_only=True"):
            weight_files.read_file(trap)
        assert not (tmp_path / "ran").exists()
    with trap.open("rb") as file:
        pickle.load(file)
    assert (tmp_path / "ran").exists()  # the trap is a working one


@pytest.mark.parametrize("name", ["absent.pth", "absent.SAFETENSORS", "absent.zip", "absent_folder/trunk"])
def test_a_missing_file_says_what_to_write(name, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no such file. Write the path of a .pth, .pt or .safetensors"
    ) as caught:
        build(weights=tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("form", [str, Path])
def test_a_url_is_told_from_a_file(form):
    with pytest.raises(
        ValueError, match=r"'https:/{1,2}example.org/resnet18.pth' is a URL, .*torch.hub.download_url_to_file"
    ):
        build(weights=form("https://example.org/resnet18.pth"))


def test_a_name_that_is_too_long_is_shown_in_short():
    with pytest.raises(FileNotFoundError, match="File name too long") as caught:
        build(weights="x" * 100_000 + ".pth")
    assert len(str(caught.value)) < 600


def test_a_folder_is_named_as_one_with_the_files_in_it(source, tmp_path):
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(FileNotFoundError, match=r"folder.pth' is a folder, not a file. Write the path of a .pth"):
        build(weights=tmp_path / "folder.pth")
    th.save(source, tmp_path / "folder.pth" / "trunk.PT")
    with pytest.raises(FileNotFoundError, match=r"Such files in it: trunk\.PT\."):
        build(weights=tmp_path / "folder.pth")


@pytest.mark.parametrize("where", ["pathlib.Path.open", "pathlib.Path.is_file", "pathlib.Path.exists", "torch.load"])
def test_a_file_that_may_not_be_read_is_named_with_the_reason(where, source, tmp_path, monkeypatch):
    path = tmp_path / "secret.pth"
    th.save(source, path)
    bare = tmp_path / "bare"
    th.save(source, bare)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(where, refuse)
    monkeypatch.chdir(tmp_path)
    for weights in (path, bare) if where != "pathlib.Path.exists" else ("bare",):
        if where == "pathlib.Path.exists":
            assert_same_trunk(build(weights=weights), source)  # it can be read, so nothing is wrong
            continue
        with pytest.raises(PermissionError, match="no permission to read it") as caught:
            build(weights=weights)
        assert str(weights) in str(caught.value)
        assert "Download" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".SAFETENSORS", ".SafeTensors"])
def test_suffixes_in_capitals_are_the_same(suffix, source, tmp_path):
    save_file(source, tmp_path / f"trunk{suffix}")
    assert_same_trunk(build(weights=tmp_path / f"trunk{suffix}"), source)


def test_a_state_dict_as_an_argument_is_shown_in_short(source):
    with pytest.raises(TypeError, match="weights must be a path, or a member of torchvision's enum") as caught:
        build(weights=source)
    assert len(str(caught.value)) < 600


def test_a_member_of_another_networks_enum_is_told(hub):
    with pytest.raises(ValueError, match="is of another network: backbone='resnet18' has ResNet18_Weights"):
        build(weights=tvm.ResNet50_Weights.IMAGENET1K_V2)


def test_safetensors_that_is_not_installed_says_how_to_install_it(tmp_path, monkeypatch):
    save_file({"a": th.zeros(1)}, tmp_path / "trunk.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        build(weights=tmp_path / "trunk.safetensors")


@pytest.mark.parametrize("value", [True, 3, {"conv1.weight": th.zeros(2)}], ids=str)
def test_weights_of_another_type_are_named(value):
    with pytest.raises((TypeError, ValueError), match="weights"):
        build(weights=value)


# ------------------------------------------------------------------------------------------ torchvision's weights


@pytest.mark.parametrize(
    "kwargs",
    [
        {"pretrained": True},
        {"weights": "DEFAULT"},
        {"weights": "IMAGENET1K_V1"},
        {"weights": "ResNet18_Weights.IMAGENET1K_V1"},
        {"weights": WEIGHTS_ENUM.DEFAULT},
        {"weights": WEIGHTS_ENUM.IMAGENET1K_V1, "pretrained": True},
    ],
    ids=str,
)
def test_torchvision_weights_come_from_the_hub_cache(kwargs, cached, source, offline):
    assert_same_trunk(build(**kwargs), source)
    assert offline == []


@pytest.mark.parametrize(("name", "hint"), [("IMAGENET1K_V7", "did you mean 'IMAGENET1K_V1'"), ("no_such", "DEFAULT")])
def test_an_unknown_enum_name_lists_the_known_ones(name, hint, cached):
    with pytest.raises(ValueError, match=r"IMAGENET1K_V1, DEFAULT.*[.?;] [Ww]rite one of these names") as caught:
        build(weights=name)
    assert hint in str(caught.value)
    assert repr(name) in str(caught.value)


def test_no_cache_and_no_network_say_file_folder_and_way_out(hub, offline):
    with pytest.raises(FileNotFoundError, match="weights=PATH") as caught:
        build(pretrained=True)
    assert CACHED_NAME in str(caught.value)
    assert str(hub) in str(caught.value)
    assert offline != []
    assert [*hub.iterdir()] == []


def test_a_broken_file_in_the_cache_is_named(cached):
    path = cached / CACHED_NAME
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=AGAIN) as caught:
        build(pretrained=True)
    assert str(path) in str(caught.value)


def test_a_download_is_checked_and_kept(hub, tmp_path):
    content = {"a": th.arange(3.0)}
    th.save(content, tmp_path / "made.pth")
    digest = sha256((tmp_path / "made.pth").read_bytes()).hexdigest()[:8]
    origin = (tmp_path / "made.pth").rename(tmp_path / f"made-{digest}.pth")
    assert th.equal(weight_files.read_url(origin.as_uri())["a"], content["a"])
    origin.unlink()
    assert th.equal(weight_files.read_url(origin.as_uri())["a"], content["a"])

    th.save(content, tmp_path / "other-00000000.pth")
    with pytest.raises(FileNotFoundError, match="other-00000000"):
        weight_files.read_url((tmp_path / "other-00000000.pth").as_uri())
    assert [path.name for path in hub.iterdir()] == [origin.name]


@pytest.fixture
def old_torchvision(monkeypatch, source):
    """A torchvision that knows only ``pretrained=True``."""

    def resnet18(pretrained=False, **kwargs):
        model = resnet_tiny(**kwargs)
        if pretrained:
            model.load_state_dict(without_fc(source), strict=False)
        return model

    old = SimpleNamespace(resnet=SimpleNamespace(resnet18=resnet18), resnet18=resnet18, ResNet=tvm.ResNet)
    monkeypatch.setattr(backbones, "tvm", old)
    return old


def test_an_old_torchvision_loads_through_pretrained(old_torchvision, source, tmp_path, offline):
    assert backbones.pretrained_source("resnet18") is None
    assert_same_trunk(build(pretrained=True), source)
    th.save(source, tmp_path / "own.pth")
    assert_same_trunk(build(weights=tmp_path / "own.pth"), source)


def test_an_old_torchvision_has_no_names_of_weights(old_torchvision):
    with pytest.raises(ValueError, match=r"'IMAGENET1K_V1' needs torchvision >= 0.14; write pretrained=True"):
        build(weights="IMAGENET1K_V1")


def test_an_old_torchvision_without_network_says_the_way_out(old_torchvision, hub):
    def unreachable(pretrained=False, **kwargs):
        if pretrained:
            raise URLError("no network")
        return tvm.resnet18(**kwargs)

    old_torchvision.resnet18 = unreachable
    with pytest.raises(FileNotFoundError, match="weights=PATH"):
        build(pretrained=True)


# --------------------------------------------------------------------------- nothing is read where weights follow


def test_what_follows_is_known_inside_the_context_only():
    assert not weight_files.checkpoint_follows()
    with weight_files.about_to_be_overwritten():
        with weight_files.about_to_be_overwritten():
            assert weight_files.checkpoint_follows()
        assert weight_files.checkpoint_follows()
    with pytest.raises(KeyError), weight_files.about_to_be_overwritten():
        raise KeyError
    assert not weight_files.checkpoint_follows()


def image_env():
    return FakeImageEnv(screen_height=32, screen_width=32, n_channels=4, channel_first=True)


def make_model(name, **extractor_kwargs):
    if name == "PPO":
        policy_kwargs = {"features_extractor_class": ResNetExtractor, "features_extractor_kwargs": extractor_kwargs}
        return PPO("CnnPolicy", image_env(), n_steps=4, batch_size=4, n_epochs=1, policy_kwargs=policy_kwargs, seed=0)
    algorithm = DQN if name == "DQN" else pytest.importorskip("sb3_contrib").QRDQN
    return algorithm(
        "ResNetCnnPolicy",
        image_env(),
        buffer_size=20,
        learning_starts=2,
        batch_size=2,
        policy_kwargs={"net_arch": [8], "features_extractor_kwargs": extractor_kwargs},
        seed=0,
    )


def outputs(policy, name):
    """Q-values, quantiles, or the probabilities and the value of PPO."""
    images = th.randint(256, (3, 4, 32, 32), generator=th.Generator().manual_seed(1), dtype=th.uint8)
    policy.set_training_mode(False)
    with th.no_grad():
        if name == "PPO":
            return th.cat([policy.get_distribution(images).distribution.probs, policy.predict_values(images)], dim=1)
        return policy.online(images)


@pytest.mark.parametrize("name", ["DQN", "QRDQN", "PPO"])
def test_a_model_reads_its_weights_once_and_loads_without_them(name, cached, source, offline, tmp_path, monkeypatch):
    read = []
    with monkeypatch.context() as patch:
        patch.setattr(weight_files, "read_url", lambda url, f=weight_files.read_url: read.append(url) or f(url))
        model = make_model(name, pretrained=True)
    assert read == [WEIGHTS_ENUM.DEFAULT.url]
    networks = [model.policy] if name == "PPO" else [model.policy.online, model.policy.target]
    for network in networks:
        assert_same_trunk(network.features_extractor, source)

    before = outputs(model.learn(4).policy, name)
    model.save(tmp_path / "model")
    shutil.rmtree(cached)
    with pytest.raises(FileNotFoundError):  # the cache is really gone
        build(pretrained=True)
    offline.clear()
    loaded = type(model).load(tmp_path / "model", device="cpu")
    assert offline == []
    assert before.isfinite().all()
    assert (before.std(dim=0) > 0).any()  # it depends on the image
    assert th.equal(outputs(loaded.policy, name), before)
    assert_same_trunk((loaded.policy if name == "PPO" else loaded.policy.online).features_extractor, source)


def test_a_policy_loads_without_network_and_cache(cached, source, offline, tmp_path):
    policy = make_model("DQN", pretrained=True).policy
    before = outputs(policy, "DQN")
    policy.save(tmp_path / "policy.pth")
    shutil.rmtree(cached)
    loaded = ResNetCnnPolicy.load(tmp_path / "policy.pth", device="cpu")
    assert offline == []
    assert before.isfinite().all()
    assert th.equal(outputs(loaded, "DQN"), before)
    assert_same_trunk(loaded.q_net_target.features_extractor, source)


@pytest.mark.parametrize(
    "kwargs", [{"weights": "gone.pth"}, {"pretrained": True}, {"weights": "IMAGENET1K_V1"}], ids=str
)
def test_no_file_is_needed_where_a_checkpoint_follows(kwargs, hub, offline):
    with weight_files.about_to_be_overwritten():
        build(**kwargs)
    assert offline == []
    with pytest.raises(FileNotFoundError):
        build(**kwargs)
