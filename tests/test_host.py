"""Parts of PyTorch and SB3 that nobody promises: found where they are, replaced or named where they are not."""

import os
import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import stable_baselines3
import torch as th
from stable_baselines3 import DQN
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback
from stable_baselines3.common.policies import ActorCriticPolicy, BaseModel, BasePolicy
from torch import nn

from sb3_resnet.buffers import FrameReplayBuffer, resize_replay_arrays
from sb3_resnet.cache.sizes import stored_action_dtype
from sb3_resnet.callbacks import NanGuardCallback
from sb3_resnet.common import host
from tests.helpers import TinyGame, fill, make_model

IMPORT_WITHOUT_PRIVATE_PARTS = """
import torch, torch.cpu, torch.nn.utils
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.policies import BaseModel, BasePolicy

for owner, name in (
    (BaseAlgorithm, "load"), (BaseModel, "load"), (BasePolicy, "init_weights"),
    (BaseModel, "_update_features_extractor"),
    (torch, "_amp_foreach_non_finite_check_and_unscale_"), (torch, "_amp_update_scale_"),
    (torch.cpu, "_is_avx512_bf16_supported"), (torch.cpu, "get_capabilities"), (torch.nn.utils, "get_total_norm"),
    (torch._C._nn, "mkldnn_reorder_conv2d_weight"),
):
    if hasattr(owner, name):
        delattr(owner, name)
import sb3_resnet, sb3_resnet.callbacks, sb3_resnet.buffers
from sb3_resnet.buffers import resize_replay_arrays
from sb3_resnet.cache.sizes import stored_action_dtype
from sb3_resnet.nn.inference import can_pack
print(can_pack(torch.zeros(1)))
"""


class Idle(BaseCallback):
    def _on_step(self):
        return True


@pytest.mark.slow
def test_importing_needs_none_of_them():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_WITHOUT_PRIVATE_PARTS], capture_output=True, text=True, env={**os.environ}
    )
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr


def test_the_error_names_package_version_part_and_what_to_do():
    error = host.HostPartMissingError("torch", "left_hand", "use the right one")
    assert re.fullmatch(r"torch \d+\.\S+ has no left_hand, which sb3_resnet needs: use the right one", str(error))
    assert "(unknown version)" in str(host.HostPartMissingError("no-such-package", "part"))


def test_updates_done_is_the_models_own_counter():
    model = fill(make_model())
    model.train(3, 4)
    assert host.updates_done(model) == model._n_updates == 3
    del model._n_updates
    with pytest.raises(
        host.HostPartMissingError, match=f"stable-baselines3 {stable_baselines3.__version__} has no _n_upd"
    ):
        host.updates_done(model)


def test_planned_timesteps_and_logger_come_with_learn():
    model = make_model()
    assert host.planned_timesteps(model) is None
    assert host.logger_of(model) is None
    model.learn(12)
    assert host.planned_timesteps(model) == 12
    assert host.logger_of(model) is model.logger
    del model._total_timesteps
    assert host.planned_timesteps(model) is None


@pytest.mark.parametrize("owner", [BaseAlgorithm, BaseModel])
def test_loading_is_seen_from_within_and_only_there(owner, monkeypatch, tmp_path):
    seen = []
    make_model().save(tmp_path / "model")
    make_model().policy.save(tmp_path / "policy")
    network = BasePolicy.__init__

    def watch(self, *args, **kwargs):
        seen.append(host.is_loading())
        network(self, *args, **kwargs)

    monkeypatch.setattr(BasePolicy, "__init__", watch)
    load = (
        (lambda: DQN.load(tmp_path / "model"))
        if owner is BaseAlgorithm
        else (lambda: type(make_model().policy).load(tmp_path / "policy"))
    )
    load()
    assert any(seen)
    seen.clear()
    make_model()
    assert seen
    assert not any(seen)


@pytest.mark.parametrize("other", [None, len, staticmethod(lambda path: path)])
def test_other_load_methods_are_not_taken_for_it(other, monkeypatch):
    for owner in (BaseAlgorithm, BaseModel):
        monkeypatch.delattr(owner, "load")
        if other is not None:
            monkeypatch.setattr(owner, "load", other, raising=False)
    assert host.is_loading() is False


def test_sb3s_initialisation_is_recognised_whatever_it_is_called():
    assert host.is_initializer(partial(BasePolicy.init_weights, gain=1.0))
    assert host.is_initializer(BasePolicy.init_weights)
    renamed = eval("lambda module, gain: None", {"__name__": "stable_baselines3.common.policies"})
    assert host.is_initializer(partial(partial(renamed), gain=2.0))
    for mine in (lambda module: None, partial(nn.Module.train, mode=True), nn.init.zeros_):
        assert not host.is_initializer(mine)


def test_an_initialisation_of_another_name_spares_the_trunk(monkeypatch):
    from stable_baselines3 import PPO

    from sb3_resnet import ResNetExtractor

    def set_to_seven(module, gain=1):
        for parameter in module.parameters(recurse=False):
            nn.init.constant_(parameter, 7.0)

    set_to_seven.__module__ = "stable_baselines3.common.policies"
    monkeypatch.setattr(ActorCriticPolicy, "init_weights", staticmethod(set_to_seven))
    kwargs = {
        "features_extractor_class": ResNetExtractor,
        "features_extractor_kwargs": {"backbone": "resnet_mini", "features_dim": 5},
    }
    model = PPO("CnnPolicy", TinyGame(), policy_kwargs=kwargs, device="cpu", n_steps=8, batch_size=8)
    extractor = model.policy.features_extractor
    assert not any((parameter == 7.0).all() for parameter in extractor.backbone.parameters())
    assert (extractor.projection.weight == 7.0).all()


def test_network_arguments_are_those_of_sb3():
    policy = make_model().policy
    mine, sb3s = host.network_arguments(policy), policy._update_features_extractor(policy.net_args, None)
    for arguments in (mine, sb3s):
        assert type(arguments.pop("features_extractor")) is type(policy.q_net.features_extractor)
    assert mine == sb3s
    del policy.net_args
    with pytest.raises(host.HostPartMissingError, match="has no net_args in ResNetCnnPolicy"):
        host.network_arguments(policy)


@pytest.mark.parametrize("name", ["callback", "callbacks"])
def test_the_root_callback_is_found_whatever_the_variable_is_called(name):
    child = Idle()
    root = CallbackList([child, Idle()])
    child.locals = {"self": None, name: root}
    assert host.root_callback(child) is root
    alone = Idle()
    alone.locals = {"total_timesteps": 5, name: alone}
    assert host.root_callback(alone) is alone
    alone.locals = {"total_timesteps": 5}
    assert host.root_callback(alone) is None


def test_the_root_callback_of_a_real_learn():
    class Look(Idle):
        def _on_training_start(self):
            self.root = host.root_callback(self)

    callbacks = [Look(), Look()]
    make_model().learn(10, callback=callbacks)
    assert callbacks[0].root is callbacks[1].root
    assert callbacks[0].root.callbacks == callbacks


def test_evaluations_are_counted():
    callback = EvalCallback(TinyGame(), n_eval_episodes=1, eval_freq=10, verbose=0, warn=False)
    rewards = []
    make_model(learning_starts=100).learn(36, callback=[callback, Counts(callback, rewards)])
    assert rewards == [0] * 9 + [1] * 10 + [2] * 10 + [3] * 7
    assert host.evaluations_done(EvalCallback(TinyGame(), eval_freq=-1, warn=False)) == 0
    del callback.n_calls
    with pytest.raises(host.HostPartMissingError, match="has no n_calls in EvalCallback"):
        host.evaluations_done(callback)


class Counts(Idle):
    def __init__(self, evaluation, seen):
        super().__init__()
        self.evaluation, self.seen = evaluation, seen

    def _on_step(self):
        self.seen.append(host.evaluations_done(self.evaluation))
        return True


@pytest.mark.parametrize("optimize_memory_usage", [False, True])
def test_replay_arrays_are_those_of_sb3_with_more_rows(optimize_memory_usage):
    kwargs = {"optimize_memory_usage": optimize_memory_usage, "handle_timeout_termination": False}
    model = make_model()
    spaces = (model.observation_space, model.action_space)
    ours = FrameReplayBuffer(21, *spaces, "cpu", n_envs=2, **kwargs)
    sb3s = ReplayBuffer(21, *spaces, "cpu", n_envs=2, **kwargs)
    assert ours.buffer_size == sb3s.buffer_size == 10
    arrays = {name: value for name, value in vars(sb3s).items() if isinstance(value, np.ndarray)}
    assert {"actions", "rewards", "dones", "timeouts", "observations"} <= {*arrays}
    for name, value in arrays.items():
        mine = getattr(ours, name)
        assert (mine.shape, mine.dtype) == (value.shape, value.dtype), name


def test_renamed_replay_arrays_are_resized_too_and_renamed_observations_are_named():
    class Buffer:
        buffer_size, n_envs = 1, 2

        def __init__(self):
            self.observations, self.payoffs = np.zeros((1, 2, 3, 4, 4)), np.ones((1, 2), np.float32)
            self.shape = np.zeros(3)

    buffer = Buffer()
    resize_replay_arrays(buffer, 7, ["observations"])
    assert (buffer.buffer_size, buffer.payoffs.shape, buffer.payoffs.dtype) == (7, (7, 2), np.float32)
    assert (len(buffer.observations), buffer.shape.shape) == (1, (3,))
    with pytest.raises(host.HostPartMissingError, match="has no array 'next_observations' in its replay buffers"):
        resize_replay_arrays(Buffer(), 7, ["observations", "next_observations"])


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64, np.uint8])
def test_actions_are_stored_as_sb3_stores_them(dtype):
    from stable_baselines3.common.buffers import ReplayBuffer

    assert stored_action_dtype(dtype) == np.dtype(ReplayBuffer._maybe_cast_dtype(dtype))


def test_tensor_holders_follow_the_module():
    layer = nn.BatchNorm2d(2)
    holders = host.tensor_holders(layer)
    for _ in range(2):
        tensors = [tensor for holder in holders for tensor in holder.values() if tensor is not None]
        assert [*map(id, tensors)] == [*map(id, (*layer.parameters(), *layer.buffers()))]
        layer.weight = nn.Parameter(th.zeros(2))
        layer.running_mean = th.ones(2)
    assert host.tensor_holders(nn.ReLU()) == []


def test_a_module_without_dictionaries_is_an_error_that_names_the_version():
    with pytest.raises(host.HostPartMissingError, match=r"torch .* has no _parameters and _buffers"):
        host.tensor_holders(object.__new__(type("Odd", (), {})))


def test_tensor_versions_change_with_the_tensor():
    tensors = [th.zeros(2), th.zeros(3)]
    before = host.tensor_versions(tensors)
    tensors[1].add_(1)
    after = host.tensor_versions(tensors)
    assert (after[0], after[1] > before[1]) == (before[0], True)
    with pytest.raises(
        host.HostPartMissingError, match=r"torch .* has no Tensor._version.*without FeatureCacheCallback"
    ):
        host.tensor_versions([object()])


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (th.cuda.OutOfMemoryError("CUDA"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("shapes do not fit"), False),
        (ValueError("out of memory"), False),
    ],
)
@pytest.mark.parametrize("older", [False, True])
def test_out_of_memory_is_told_from_other_errors(error, expected, older, monkeypatch):
    if older:
        monkeypatch.delattr(th, "OutOfMemoryError", raising=False)
    assert host.is_out_of_memory(error) is expected


def test_a_real_cpu_error_is_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        th.empty(2**55, dtype=th.uint8)
    assert host.is_out_of_memory(caught.value)


@pytest.mark.parametrize("flag", [False, True])
def test_bfloat16_is_what_either_way_of_asking_says(flag, monkeypatch):
    monkeypatch.setattr(th.cpu, "_is_avx512_bf16_supported", lambda: flag, raising=False)
    monkeypatch.setattr(th.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    assert host.cpu_has_bfloat16() is flag
    monkeypatch.delattr(th.cpu, "_is_avx512_bf16_supported")
    monkeypatch.delattr(th.cpu, "_is_amx_tile_supported")
    monkeypatch.setattr(th.cpu, "get_capabilities", lambda: {"avx512_bf16": flag, "amx_tile": False}, raising=False)
    assert host.cpu_has_bfloat16() is flag
    monkeypatch.delattr(th.cpu, "get_capabilities")
    assert host.cpu_has_bfloat16() is False


def other_signature(*args):
    raise TypeError("takes another number of arguments")


@pytest.mark.parametrize(
    "arrange", [None, other_signature, lambda weight, *args: weight.to_dense() * 2.0], ids=["gone", "other", "wrong"]
)
def test_convolutions_are_packed_only_where_the_functions_do_what_they_did(arrange, monkeypatch):
    state = th.get_rng_state()
    if not host.can_pack_convolutions(th.float32):
        pytest.skip("this build has no oneDNN")
    assert th.equal(th.get_rng_state(), state)
    if arrange is None:
        monkeypatch.delattr(th._C._nn, "mkldnn_reorder_conv2d_weight")
    else:
        monkeypatch.setattr(th._C._nn, "mkldnn_reorder_conv2d_weight", arrange)
    assert host.can_pack_convolutions(th.float32) is False


def test_a_callback_of_a_model_without_counter_says_so():
    model = fill(make_model())
    del model._n_updates
    with pytest.raises(host.HostPartMissingError, match="_n_updates"):
        model.learn(30, callback=[NanGuardCallback(), make_schedule()])


def make_schedule():
    from sb3_resnet.callbacks import LRScheduleCallback

    return LRScheduleCallback(warmup_steps=5)
