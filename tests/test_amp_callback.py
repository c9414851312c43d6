"""AMPCallback: a reduced trunk under the stock ``train()``, equal to a loop with ``torch.amp.GradScaler``."""

import copy
import pickle
import re
import warnings

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib.common.utils import quantile_huber_loss
from stable_baselines3 import DQN, PPO, SAC
from stable_baselines3.common.callbacks import CallbackList
from stable_baselines3.common.env_util import make_vec_env
from torch import nn
from torch.nn import functional as F

from sb3_resnet import ResNetExtractor
from sb3_resnet.callbacks import (
    AMPCallback,
    FeatureCacheCallback,
    GradientClipCallback,
    LRScheduleCallback,
    UnfreezeCallback,
)
from sb3_resnet.common.step_hooks import before_step
from sb3_resnet.nn.precision import DTYPES
from sb3_resnet.optim.groups import is_part
from tests.helpers import (
    LIVE,
    POLICYS,
    TinyGame,
    amp,
    assert_same,
    fill,
    observations,
    q_values,
    slowly,
    small,
    snapshot,
    start,
)

INF, NAN = float("inf"), float("nan")
DEVICES = ["cpu", *(["cuda"] if th.cuda.is_available() else [])]
OPTIMIZERS = {
    "AdamW": {},
    "SGD": {"optimizer_kwargs": {"momentum": 0.9}},
    "RMSprop": {"optimizer_kwargs": {"momentum": 0.5}},
    "Adam": {"weight_decay": 0.0},
    "two": {"optimizer_class": "AdamW", "backbone_optimizer_class": "SGD"},
}


def state_of(model):
    return model.policy.optimizer.param_groups[0]["amp"]


def poison(policy, plan):
    """Put an infinity or NaN into the gradient of one parameter of the head or the trunk, by number of the update."""
    network = policy.online
    parameters = {
        "trunk": network.features_extractor.backbone.layer3[0].conv1.weight,
        "head": [*network.parameters()][-1],
    }
    update = [0]

    def inject(where, gradient):
        part, value = plan.get(update[0], (None, None))
        if part == where:
            gradient = gradient.clone()
            gradient[(0,) * gradient.ndim] = value
        return gradient

    for where, parameter in parameters.items():
        parameter.register_hook(lambda gradient, where=where: inject(where, gradient))
    return update


def loss_of(model, policy, batch):
    """What DQN's and QR-DQN's ``train()`` compute, with autocast around the extractor."""

    def values(network, obs):
        with th.autocast(obs.device.type, th.float16):
            features = network.features_extractor(obs.float() / 255.0)
        return getattr(network, network._head)(features)

    with th.no_grad():
        following = values(policy.target, batch.next_observations)
    if isinstance(model, DQN):
        target = batch.rewards + (1 - batch.dones) * model.gamma * following.max(dim=1).values.reshape(-1, 1)
        return F.smooth_l1_loss(values(policy.online, batch.observations).gather(1, batch.actions.long()), target)
    following = following.reshape(len(following), -1, policy.action_space.n)
    greedy = following.mean(dim=1, keepdim=True).argmax(dim=2, keepdim=True).expand(-1, following.shape[1], 1)
    target = batch.rewards + (1 - batch.dones) * model.gamma * following.gather(2, greedy).squeeze(2)
    current = values(policy.online, batch.observations).reshape(following.shape)
    actions = batch.actions[..., None].long().expand(-1, following.shape[1], 1)
    return quantile_huber_loss(current.gather(2, actions).squeeze(2), target, sum_over_quantiles=True)


def loop_with_grad_scaler(model, plan, updates, **scaling):
    """The reference: what a user would write by hand, on the batches that ``train()`` is about to sample."""
    policy = copy.deepcopy(model.policy)
    scaler = th.amp.GradScaler(model.device.type, **scaling)
    update = poison(policy, plan)
    seen = []
    for n in range(updates):
        update[0] = n
        policy.set_training_mode(True)
        loss = loss_of(model, policy, model.replay_buffer.sample(4))
        policy.optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(policy.optimizer)
        nn.utils.clip_grad_norm_(policy.parameters(), model.max_grad_norm)
        scaler.step(policy.optimizer)
        scaler.update()
        seen.append((scaler.get_scale(), scaler._get_growth_tracker()))
    return policy, seen


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("algorithm", "optimizer"),
    [
        ("dqn", "AdamW"),
        *slowly(("dqn", "two"), ("dqn", "SGD"), ("dqn", "RMSprop"), ("dqn", "Adam"), ("qrdqn", "AdamW")),
    ],
)
def test_invariant_12_float16_equals_a_loop_with_grad_scaler(algorithm, optimizer, device, monkeypatch):
    monkeypatch.setattr(th.backends.cudnn, "deterministic", True)
    policy_kwargs = {"optimizer_class": optimizer, **OPTIMIZERS[optimizer]}
    model = small(algorithm, policy_kwargs=policy_kwargs, max_grad_norm=0.05, device=device)
    plan = {5: ("trunk", INF), 6: ("head", NAN), 9: ("head", -INF), 10: ("trunk", NAN)}
    scaling = {"init_scale": 2.0**20, "growth_factor": 4.0, "backoff_factor": 0.25, "growth_interval": 2}
    np.random.seed(3)
    expected, sequence = loop_with_grad_scaler(model, plan, 12, **scaling)

    np.random.seed(3)
    amp(model, **scaling)
    update = poison(model.policy, plan)
    seen = []
    for n in range(12):
        update[0] = n
        model.train(1, 4)
        seen.append((state_of(model)["scale"], state_of(model)["growth_tracker"]))
    assert seen == sequence
    scales = [scale for scale, _ in sequence]
    pairs = [*zip([2.0**20, *scales], scales, strict=False)]
    assert any(after > before for before, after in pairs)
    assert state_of(model)["skipped"] == sum(after < before for before, after in pairs) > 4
    assert_same(model.policy.state_dict(), expected.state_dict())
    mine, other = model.policy.optimizer.state_dict()["state"], expected.optimizer.state_dict()["state"]
    assert mine.keys() == other.keys()
    for index, state in mine.items():
        for name, value in state.items():
            assert th.equal(th.as_tensor(value), th.as_tensor(other[index][name])), (index, name)
    recorded = model.logger.name_to_value
    assert recorded["train/amp_skipped"] == state_of(model)["skipped"]
    assert recorded["train/amp_scale"] == scales[-1]


def test_the_default_scaling_is_grad_scalers():
    model = small()
    callback = amp(model)
    defaults = th.amp.GradScaler("cpu")
    scaler = callback._scaler
    assert (scaler.scale, scaler._growth_factor, scaler._backoff_factor, scaler._growth_interval) == (
        defaults._init_scale,
        defaults.get_growth_factor(),
        defaults.get_backoff_factor(),
        defaults.get_growth_interval(),
    )


def test_clipping_sees_unscaled_gradients():
    def norms(dtype, *others):
        model = small(max_grad_norm=1e9)
        for callback in others:
            start(model, callback)
        if dtype is not None:
            amp(model, dtype, init_scale=256.0)
        seen = {}

        def look(optimizer, args, kwargs):
            for part in ("head", "backbone"):
                grads = [p.grad for g in optimizer.param_groups if is_part(g, part) for p in g["params"]]
                seen[part] = th.stack([grad.norm() for grad in grads]).norm().item()

        model.policy.optimizer.register_step_post_hook(look)
        np.random.seed(0)
        model.train(1, 8)
        return seen

    plain = norms(None)
    assert norms("float16") == pytest.approx(plain, rel=0.02)
    limit = min(plain.values()) / 2
    assert norms("float16", GradientClipCallback(limit)) == pytest.approx({"head": limit, "backbone": limit}, rel=1e-4)


def test_a_skipped_update_counts_for_schedules_and_leaves_everything_else():
    model = small(learning_rate=1e-3)
    callbacks = [start(model, LRScheduleCallback(10)), start(model, GradientClipCallback(1.0))]
    amp(model, init_scale=1.0)
    update = poison(model.policy, {1: ("head", NAN)})
    model.train(1, 4)
    before = snapshot(model.policy), copy.deepcopy(model.policy.optimizer.state_dict()["state"])
    update[0] = 1
    model.train(1, 4)
    weights = {name for name, _ in model.policy.named_parameters()}
    assert_same(*({k: v for k, v in s.items() if k in weights} for s in (before[0], model.policy.state_dict())))
    for index, state in model.policy.optimizer.state_dict()["state"].items():
        assert_same(before[1][index], state)
    assert model.policy.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 2 / 10)
    assert (model._n_updates, callbacks[0]._updates.n) == (2, 2)
    assert state_of(model) == {"scale": 0.5, "growth_tracker": 0, "skipped": 1}


def test_the_scale_goes_on_after_save_and_load(tmp_path):
    model = small()
    amp(model, init_scale=2.0**10, growth_interval=6)
    update = poison(model.policy, {0: ("trunk", INF)})
    for n in range(5):
        update[0] = n
        model.train(1, 4)
    model.save(tmp_path / "model.zip")
    assert state_of(model) == {"scale": 2.0**9, "growth_tracker": 4, "skipped": 1}
    loaded = fill(DQN.load(tmp_path / "model.zip", env=TinyGame((4, 17, 17)), device="cpu"))
    amp(loaded, init_scale=2.0**10, growth_interval=6)
    loaded.train(2, 4)
    assert state_of(loaded) == {"scale": 2.0**10, "growth_tracker": 0, "skipped": 1}


@pytest.mark.parametrize("algorithm", ["dqn", "qrdqn"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_only_the_trunk_is_reduced(dtype, algorithm):
    model = small(algorithm, {**LIVE, "features_dim": 16, "pooling": "spatial_softmax"}, 33)
    amp(model, dtype, init_scale=16.0)
    seen = {}

    def look(name):
        return lambda module, args, output: seen.setdefault(name, set()).add(output.dtype)

    for network in (model.policy.online, model.policy.target):
        extractor = network.features_extractor
        for name, module in {
            "conv": extractor.backbone.conv1,
            "last conv": extractor.backbone.layer4[0].conv2,
            "projection": extractor.projection,
            "features": extractor,
            "head": getattr(network, network._head),
        }.items():
            module.register_forward_hook(look(name))
    model.train(2, 4)
    assert seen == {
        "conv": {DTYPES[dtype]},
        "last conv": {DTYPES[dtype]},
        "projection": {th.float32},
        "features": {th.float32},
        "head": {th.float32},
    }
    tensors = [value for state in model.policy.optimizer.state_dict()["state"].values() for value in state.values()]
    assert {value.dtype for value in tensors} == {th.float32}
    assert {parameter.dtype for parameter in model.policy.parameters()} == {th.float32}


def test_a_frozen_part_keeps_its_own_precision_and_a_boundary_that_moves_is_followed():
    model = small(extractor={})
    amp(model, init_scale=4.0)
    seen = []
    model.q_net.features_extractor.backbone.conv1.register_forward_hook(lambda m, a, output: seen.append(output.dtype))
    model.train(1, 4)
    assert {*seen} == {th.float32}
    grads = {}

    def gradients(boundary):
        model.policy.set_freeze_boundary(boundary)
        np.random.seed(0)
        model.policy.optimizer.register_step_post_hook(
            lambda optimizer, args, kwargs: grads.update({n: p.grad for n, p in model.q_net.named_parameters()})
        )
        weights = snapshot(model.policy)
        model.train(1, 4)
        model.policy.load_state_dict(weights)
        return {name: grad.clone() for name, grad in grads.items() if grad is not None and "features" in name}

    low = gradients("layer3")
    assert low.keys() > gradients("layer4").keys() > {*()}
    again = gradients("layer3")
    for name, grad in low.items():
        assert grad.norm() > 0, name
        th.testing.assert_close(again[name], grad, rtol=0.1, atol=1e-3)  # not 4 or 16 times as large


def test_gradients_are_unscaled_wherever_the_boundary_moves_above_an_adapter_that_trains():
    def gradients(dtype):
        model = small(extractor={"train_adapter": True}, max_grad_norm=1e9)
        amp(model, dtype, init_scale=1024.0)
        norms, seen = {}, {}

        def look(*_):
            live = (item for item in model.q_net.named_parameters() if item[1].requires_grad)
            norms.update({name: parameter.grad.norm().item() for name, parameter in live})

        model.policy.optimizer.register_step_post_hook(look)
        weights = snapshot(model.policy)
        for number, boundary in enumerate([None, "layer4", None, "layer3"]):
            model.policy.set_freeze_boundary(boundary)
            np.random.seed(0)
            norms.clear()
            model.train(1, 8)
            model.policy.load_state_dict(weights)
            parts = ("adapter.weight", "layer4.0.conv1.weight")
            seen[number] = {n: norm for n, norm in norms.items() if n.endswith(parts)}
        return seen

    plain, reduced = gradients("float32"), gradients("float16")
    assert [len(norms) for norms in plain.values()] == [1, 2, 1, 2]
    for number, norms in plain.items():
        assert reduced[number] == pytest.approx(norms, rel=0.1), number


def test_with_a_cache_it_covers_the_live_part():
    model = small(extractor={})
    model.policy.set_freeze_boundary("layer4")
    cache = start(model, FeatureCacheCallback())
    callback = amp(model, "bfloat16")
    seen = []
    for name in ("layer1", "layer4"):
        getattr(model.q_net.features_extractor.backbone, name).register_forward_hook(
            lambda module, args, output, name=name: seen.append((name, output.dtype))
        )
    model.train(1, 4)
    assert ("layer4", th.bfloat16) in seen
    assert {name for name, _ in seen} == {"layer4"}
    callback.on_training_end()
    cache.on_training_end()


def test_nothing_is_left_behind(tmp_path):
    model = small()
    keys, hooks = model.policy.state_dict().keys(), before_step(model.policy.optimizer).keys
    obs = observations(model)
    plain = q_values(model, obs)
    callback = amp(model)
    model.train(1, 4)
    copied = copy.deepcopy(model.policy)
    assert copied.q_net.features_extractor.precision is None
    assert pickle.loads(pickle.dumps(model.policy)).q_net.features_extractor.precision is None
    assert model.policy.state_dict().keys() == keys
    model.save(tmp_path / "during.zip")
    DQN.load(tmp_path / "during.zip")
    for _ in range(2):
        callback.on_training_end()
    assert model.q_net.features_extractor.precision is model.q_net_target.features_extractor.precision is None
    assert before_step(model.policy.optimizer).keys == hooks
    model.policy.load_state_dict(small().policy.state_dict())
    assert th.equal(q_values(model, obs), plain)


def test_after_an_interruption_a_new_callback_replaces_the_old_one():
    """Its ``on_training_end`` never came."""
    model = small(max_grad_norm=1e9)
    gradients = []
    for _ in range(3):
        amp(model, init_scale=2.0)
        model.policy.load_state_dict(small().policy.state_dict())
        np.random.seed(0)
        model.train(1, 4)
        gradients.append(model.q_net.features_extractor.backbone.conv1.weight.grad.clone())
    assert th.equal(gradients[0], gradients[1])
    assert th.equal(gradients[0], gradients[2])
    assert before_step(model.policy.optimizer).keys == [AMPCallback, *POLICYS]


def test_gradients_outside_training_are_not_scaled():
    """As those of a saliency map."""
    model = small()
    amp(model, init_scale=2.0**10)
    model.policy.set_training_mode(False)
    extractor, image = model.q_net.features_extractor, th.rand(1, 4, 17, 17)
    weight = extractor.backbone.conv1.weight
    (reduced,) = th.autograd.grad(extractor(image).sum(), weight)
    extractor.precision = None
    (plain,) = th.autograd.grad(extractor(image).sum(), weight)
    assert reduced.norm().item() == pytest.approx(plain.norm().item(), rel=0.1)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_ppo_trains_with_the_extractor(dtype, share):
    extractor = {"backbone": "resnet_mini", "freeze_backbone": False}
    model = PPO(
        "CnnPolicy",
        make_vec_env(TinyGame, 2),
        n_steps=4,
        batch_size=4,
        n_epochs=1,
        device="cpu",
        seed=0,
        policy_kwargs={
            "features_extractor_class": ResNetExtractor,
            "features_extractor_kwargs": extractor,
            "share_features_extractor": share,
        },
    )
    before = snapshot(model.policy)
    model.learn(16, callback=AMPCallback(dtype, verbose=0, **({"init_scale": 64.0} if dtype == "float16" else {})))
    moved = [k for k, v in model.policy.state_dict().items() if v.is_floating_point() and not th.equal(v, before[k])]
    assert any("backbone" in name for name in moved)
    assert all(value.isfinite().all() for value in model.policy.state_dict().values())
    assert ("train/amp_scale" in model.logger.name_to_value) == (dtype == "float16")
    assert all(module.precision is None for module in model.policy.modules() if isinstance(module, ResNetExtractor))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_rewards_that_are_not_finite_are_named(value):
    model = small(extractor={}, buffer_size=66)
    callback = amp(model)
    callback.on_rollout_end()
    rng = np.random.default_rng(0)
    for reward in (0.0, 0.0, value, 0.0):  # it wraps around
        obs = rng.integers(0, 256, (1, 4, 17, 17), dtype=np.uint8)
        model.replay_buffer.add(obs, obs, np.zeros((1, 1)), np.array([reward]), np.zeros(1), [{}])
    with pytest.raises(ValueError, match=r"The rewards hold NaN or inf: \[-?(nan|inf)\] in row 0 .*VecCheckNan"):
        callback.on_rollout_end()
    with pytest.raises(ValueError, match="The rewards hold NaN or inf"):
        amp(model)


def test_a_skip_for_ever_ends_in_an_error():
    model = small()
    amp(model)
    with th.no_grad():
        model.q_net.features_extractor.backbone.conv1.weight.mul_(1e9)  # beyond float16 at any scale
    before = snapshot(model.policy)
    with pytest.raises(ValueError, match=r"down to a loss scale of .* write dtype='bfloat16'"):
        model.train(100, 4)
    assert state_of(model)["skipped"] == 33
    weights = [name for name, _ in model.policy.named_parameters()]
    assert all(th.equal(before[name], model.policy.state_dict()[name]) for name in weights)


def test_an_overflow_of_features_spares_the_heads_statistics():
    model = small()
    amp(model, init_scale=1.0)
    with th.no_grad():
        model.q_net.features_extractor.backbone.conv1.weight.mul_(1e9)
    model.train(3, 4)
    assert state_of(model)["skipped"] == 3
    norm = model.q_net.q_net[0]
    assert norm.running_mean.isfinite().all()
    assert norm.running_var.isfinite().all()


@pytest.mark.parametrize("boundary", ["all", "layer4"])
def test_features_that_overflow_are_skipped_and_not_trained_on_as_large_ones(boundary):
    model = small(extractor={})
    model.policy.set_freeze_boundary(boundary)
    with th.no_grad():
        for network in (model.q_net, model.q_net_target):
            network.features_extractor.backbone.layer4[0].bn2.weight.fill_(1e6)
    amp(model, init_scale=1.0)
    before = snapshot(model.q_net.q_net[1])
    model.train(3, 4)
    assert state_of(model)["skipped"] == 3
    assert_same(before, model.q_net.q_net[1].state_dict())


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_what_was_chosen_is_said(dtype, capsys, caplog):
    model = small(extractor={"freeze_backbone": False})
    with caplog.at_level("INFO", "sb3_resnet"):
        callback = start(model, AMPCallback(dtype))
    line = capsys.readouterr().out
    chosen = dtype if dtype != "auto" else "(bfloat16|float32)"
    assert re.search(rf"AMP: adapter, stem, .*layer4 compute in {chosen} on cpu.*dtype='{dtype}'\)$", line.strip())
    assert line.strip() in caplog.text
    precision = model.q_net.features_extractor.precision
    assert (precision is None) == ("in float32" in line)
    callback.on_training_end()


@pytest.mark.parametrize(
    ("boundary", "said"),
    [(None, "AMP: stages that are unfrozen will compute in bfloat16"), ("layer4", "AMP: layer4 compute in bfloat16")],
)
def test_frozen_stages_and_their_own_type_are_said(boundary, said, capsys):
    model = small(extractor={})
    model.policy.set_freeze_boundary(boundary)
    phases = UnfreezeCallback([{"at_timestep": 10**6, "unfreeze_from": "stem"}])
    amp = AMPCallback("bfloat16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start(model, amp, callback=CallbackList([amp, phases]))
    line = capsys.readouterr().out
    assert said in line
    assert "; frozen stages in frozen_dtype='float32'" in line
    amp.on_training_end()


def test_where_nothing_will_train_it_warns_and_says_what_to_write():
    with pytest.warns(
        UserWarning, match=r"nothing to do: .*Write features_extractor_kwargs=dict\(frozen_dtype='auto'\)"
    ):
        start(small(extractor={}), AMPCallback("bfloat16")).on_training_end()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtype": "half"}, ValueError, "dtype must be one of 'auto'.*'float16'"),
        ({"init_scale": 0}, ValueError, "init_scale must be finite and >="),
        ({"init_scale": 1e39}, ValueError, r"init_scale must be finite and >= .* and <= 1.70141e\+38, got 1e\+39"),
        ({"growth_factor": 1.0}, ValueError, "growth_factor must be finite and > 1"),
        ({"backoff_factor": 1.0}, ValueError, "backoff_factor must be finite and > 0"),
        ({"growth_interval": 0}, ValueError, "growth_interval must be finite and >= 1"),
    ],
)
def test_bad_arguments_are_refused_at_construction(arguments, error, message):
    with pytest.raises(error, match=message):
        AMPCallback(**arguments)


def test_policies_that_cannot_are_refused():
    with pytest.raises(TypeError, match="DQNPolicy has no ResNetExtractor"):
        DQN("MlpPolicy", "CartPole-v1", device="cpu").learn(1, callback=AMPCallback())
    model = SAC(
        "CnnPolicy",
        _Continuous(),
        device="cpu",
        buffer_size=10,
        policy_kwargs={
            "features_extractor_class": ResNetExtractor,
            "features_extractor_kwargs": {"backbone": "resnet_tiny"},
        },
    )
    with pytest.raises(ValueError, match="needs a policy with one optimizer; SAC has not"):
        model.learn(1, callback=AMPCallback())


class _Continuous(TinyGame):
    def __init__(self):
        super().__init__()
        self.action_space = spaces.Box(-1, 1, (1,), np.float32)
