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


def with_nan(source):
    broken = source["layer2.0.conv1.weight"].clone()
    broken[0, 0, 0, 0] = th.nan
    return {**source, "layer2.0.conv1.weight": broken}


def scripted(source, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; files of it are around
        th.jit.save(th.jit.trace(th.nn.Linear(2, 2), th.zeros(1, 2)), path)


AGAIN = "Download it again"
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


@pytest.mark.parametrize("name", ["absent.pth", "absent.safetensors", "folder.pth", "absent_folder/trunk"])
def test_a_missing_file_says_what_to_write(name, tmp_path):
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"no such file. Write the path of a .pth, .pt or .safetensors"
    ) as caught:
        build(weights=tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_safetensors_that_is_not_installed_says_how_to_install_it(tmp_path, monkeypatch):
    save_file({"a": th.zeros(1)}, tmp_path / "trunk.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        build(weights=tmp_path / "trunk.safetensors")


@pytest.mark.parametrize("value", [True, 3, WEIGHTS_ENUM.DEFAULT], ids=str)
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
