"""What online and target network have in common takes its place in a file once; nothing else changes."""

import copy
import io
import os
import pickle
import zipfile

import pytest
import torch as th
from stable_baselines3 import DQN

from tests.helpers import ALGORITHMS, TinyGame, assert_same, fill, make_model, observations, q_values, slowly, snapshot


def through_a_file(state):
    file = io.BytesIO()
    th.save(state, file)
    return th.load(io.BytesIO(file.getvalue()), weights_only=True), len(file.getvalue())


def numbers(module):
    return sum(tensor.numel() for tensor in module.state_dict().values())


@pytest.mark.parametrize("algorithm", ["dqn", *slowly("qrdqn")])
def test_a_checkpoint_holds_a_frozen_trunk_once(tmp_path, algorithm):
    model = fill(make_model(algorithm, extractor={"backbone": "resnet18"}))
    model.train(2, 4)
    model.save(tmp_path / "model.zip")
    assert 44e6 < os.path.getsize(tmp_path / "model.zip") < 50e6
    loaded = ALGORITHMS[algorithm].load(tmp_path / "model.zip", env=TinyGame(), device="cpu")
    assert_same(model.policy.state_dict(), loaded.policy.state_dict())
    addresses = [parameter.data_ptr() for parameter in loaded.policy.parameters()]
    assert len({*addresses}) == len(addresses)  # SB3 writes into the target in place


@pytest.mark.parametrize("stage", ["layer4", "all"])
def test_what_trains_is_stored_for_both(stage):
    model = fill(make_model())
    model.policy.set_freeze_boundary(stage)
    model.train(3, 4)
    state, size = through_a_file(model.policy.state_dict())
    assert_same(state, model.policy.state_dict())
    trunk = model.policy.online.features_extractor.backbone
    twice = numbers(trunk) if stage == "all" else numbers(trunk.layer4)
    assert size > 4 * (numbers(trunk) + 0.95 * twice)


def test_a_file_with_two_trunks_still_loads(tmp_path):
    """As they were written before the target's trunk was left to the online network's."""
    model = fill(make_model())
    model.train(2, 4)
    model.save(tmp_path / "now.zip")
    two = {key: value.clone() for key, value in model.policy.state_dict().items()}
    with zipfile.ZipFile(tmp_path / "now.zip") as now, zipfile.ZipFile(tmp_path / "old.zip", "w") as old:
        for name in now.namelist():
            if name == "policy.pth":
                with old.open(name, "w") as member:
                    th.save(two, member)
            else:
                old.writestr(name, now.read(name))
    trunk = 4 * numbers(model.policy.online.features_extractor.backbone)
    assert os.path.getsize(tmp_path / "old.zip") - os.path.getsize(tmp_path / "now.zip") > 0.95 * trunk
    loaded = DQN.load(tmp_path / "old.zip", device="cpu")
    assert_same(loaded.policy.state_dict(), model.policy.state_dict())
    obs = observations(model)
    assert th.equal(q_values(loaded, obs), q_values(model, obs))


def test_a_target_that_the_host_has_rounded_comes_back_as_it_was(tmp_path):
    model = make_model(tau=0.1, learning_starts=0, target_update_interval=4)
    model.learn(24)
    state = model.policy.state_dict()
    online, target = (network.features_extractor.parameters() for network in (model.q_net, model.q_net_target))
    differences = [float((one - other).abs().max()) for one, other in zip(online, target, strict=True)]
    assert 0 < max(differences) < 1e-6
    model.save(tmp_path / "model.zip")
    assert_same(DQN.load(tmp_path / "model.zip", device="cpu").policy.state_dict(), state)


def test_the_state_dict_is_otherwise_that_of_torch():
    model = make_model()
    state = model.policy.state_dict()
    plain = dict((*model.policy.named_parameters(), *model.policy.named_buffers()))
    assert state.keys() == plain.keys()
    assert all(state[name].data_ptr() == plain[name].data_ptr() for name in plain)
    name = "q_net_target.features_extractor.backbone.conv1.weight"
    assert model.policy.state_dict(keep_vars=True)[name] is plain[name]
    assert repr(state[name]).startswith("tensor(")
    assert {type(value) for value in copy.deepcopy(state).values()} == {th.Tensor}
    assert {type(value + 1) for value in state.values()} == {th.Tensor}
    assert {*th.nn.ModuleDict({"p": model.policy}).state_dict()} == {f"p.{name}" for name in plain}
    model.policy.load_state_dict(state)
    model.set_parameters(model.get_parameters(), exact_match=True)
    assert_same(state, model.policy.state_dict())


def test_a_state_dict_is_stored_as_it_is_when_it_is_stored():
    """It refers to the weights, which go on training; what was equal then need not be equal now."""
    model = make_model()
    state = model.policy.state_dict()
    with th.no_grad():
        model.policy.online.features_extractor.backbone.conv1.weight.add_(1.0)
    stored, _ = through_a_file(state)
    assert_same(stored, model.policy.state_dict())
    name = "features_extractor.backbone.conv1.weight"
    assert not th.equal(stored[f"q_net.{name}"], stored[f"q_net_target.{name}"])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda policy: pickle.loads(pickle.dumps(policy))])
def test_a_duplicate_of_the_policy_stores_its_own_weights_once(duplicate):
    policy = make_model().policy
    other = duplicate(policy)
    before = snapshot(policy)
    with th.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    stored, size = through_a_file(other.state_dict())
    assert_same(stored, other.state_dict())
    assert size < 1.2 * through_a_file(policy.state_dict())[1]
    assert_same(policy.state_dict(), before)


def test_safetensors_takes_the_tensors_as_tensors_of_their_own(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    state = make_model().policy.state_dict()
    # Contiguous, as safetensors asks for; each entry has memory of its own.
    safetensors.save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "policy.safetensors")
    assert_same(safetensors.load_file(tmp_path / "policy.safetensors"), state)
