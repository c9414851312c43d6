"""SAC and TD3 with the features extractor: what docs/guides/sac.md says works, and what it says refuses."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC, TD3

from sb3_resnet import ResNetExtractor
from sb3_resnet.buffers import FrameReplayBuffer
from sb3_resnet.callbacks import (
    AMPCallback,
    BestCheckpointCallback,
    DoctorCallback,
    FeatureCacheCallback,
    GradientClipCallback,
    LRScheduleCallback,
    MonitorCallback,
    NanGuardCallback,
    UnfreezeCallback,
)
from sb3_resnet.extractor import extractors_in
from tests.helpers import TinyGame, observations, snapshot

algorithms = pytest.mark.parametrize("algorithm", [SAC, TD3])
NETWORKS = {SAC: ["actor", "critic", "critic_target"], TD3: ["actor", "actor_target", "critic", "critic_target"]}


class Steering(TinyGame):
    def __init__(self):
        super().__init__()
        self.action_space = spaces.Box(-1, 1, (2,), np.float32)

    def step(self, action):
        return super().step(round(float(action[0]) + 1))


def build(algorithm, env=None, shared=False, extractor=None, **kwargs):
    policy_kwargs = {
        "net_arch": [16],
        "share_features_extractor": shared,
        "features_extractor_class": ResNetExtractor,
        "features_extractor_kwargs": {"backbone": "resnet_mini", **(extractor or {})},
    }
    options = {"buffer_size": 100, "learning_starts": 8, "batch_size": 4, "train_freq": 4, "gradient_steps": 4}
    options |= {"learning_rate": 1e-3, "seed": 0, "device": "cpu", **kwargs}
    return algorithm("CnnPolicy", env or Steering(), policy_kwargs=policy_kwargs, **options)


def heads(model):
    """Parameters of the actor beside its eyes."""
    return {name: value for name, value in snapshot(model.actor).items() if "features_extractor" not in name}


@algorithms
def test_only_online_networks_see_augmented_images(algorithm):
    model = build(algorithm, extractor={"augment": ["random_shift"]})
    draws = dict.fromkeys(NETWORKS[algorithm], 0)
    for name in draws:

        def count(images, name=name):
            draws[name] += 1
            return images

        getattr(model, name).features_extractor.augmentation = count
    model.learn(20)
    assert {name for name, times in draws.items() if times} == {"actor", "critic"}


@algorithms
def test_the_frozen_backbone_stays_as_it_is(algorithm):
    model = build(algorithm)
    before = {name: snapshot(getattr(model, name).features_extractor) for name in NETWORKS[algorithm]}
    head = heads(model)
    model.learn(20)
    assert model._n_updates == 12
    assert all(not th.equal(value, head[name]) for name, value in heads(model).items() if name.startswith("mu"))
    for name, state in before.items():
        for key, value in getattr(model, name).features_extractor.state_dict().items():
            if "target" in name:  # SB3 rounds them anew at each update
                assert th.allclose(value, state[key], rtol=1e-5, atol=1e-6), (name, key)
            else:
                assert th.equal(value, state[key]), (name, key)


@algorithms
@pytest.mark.parametrize("shared", [True, False])
def test_each_network_has_a_resnet_of_its_own_unless_they_share(algorithm, shared):
    extractors = extractors_in(build(algorithm, shared=shared).policy)
    assert len(extractors) == (2 if shared else len(NETWORKS[algorithm]))
    assert {extractor.freeze_boundary for extractor in extractors} == {None}


@algorithms
def test_there_is_one_rate_for_all(algorithm):
    model = build(algorithm, extractor={"freeze_backbone": False})
    for optimizer in (model.actor.optimizer, model.critic.optimizer):
        (group,) = optimizer.param_groups
        assert (group["lr"], group["weight_decay"]) == (1e-3, 0)


@algorithms
def test_a_phase_by_hand_trains_its_stages_and_is_saved(tmp_path, algorithm):
    model = build(algorithm)
    model.learn(12)
    model.save(tmp_path / "head")
    model = algorithm.load(tmp_path / "head", env=Steering(), device="cpu", learning_rate=3e-4)
    for extractor in extractors_in(model.policy):
        extractor.set_freeze_boundary("layer4")
    before = [snapshot(extractor) for extractor in extractors_in(model.policy)]
    model.learn(8, reset_num_timesteps=False)
    assert {model.actor.optimizer.param_groups[0]["lr"], model.critic.optimizer.param_groups[0]["lr"]} == {3e-4}
    for extractor, state in zip(extractors_in(model.policy), before, strict=True):
        for key, value in extractor.state_dict().items():
            if "layer4" in key and key.endswith("conv1.weight"):
                assert not th.equal(value, state[key]), key
            elif key.startswith("backbone.layer3"):
                assert th.allclose(value, state[key], rtol=1e-5, atol=1e-6), key
    obs = observations(model)
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", device="cpu")
    assert {extractor.freeze_boundary for extractor in extractors_in(loaded.policy)} == {"layer4"}
    assert np.array_equal(loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])


REFUSING = {
    "needs a policy with one optimizer": [
        lambda: LRScheduleCallback(warmup_steps=4),
        lambda: BestCheckpointCallback(8, "unused"),
        lambda: GradientClipCallback(1.0),
        lambda: AMPCallback("bfloat16", verbose=0),
    ],
    "needs ResNetCnnPolicy": [
        lambda: UnfreezeCallback([{"at_timestep": 8, "unfreeze_from": "layer4"}], verbose=0),
        FeatureCacheCallback,
        MonitorCallback,
        lambda: DoctorCallback(verbose=0),
    ],
}


@algorithms
def test_callbacks_that_need_our_policy_refuse_at_once(algorithm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = build(algorithm)
    for message, callbacks in REFUSING.items():
        for make in callbacks:
            with pytest.raises((TypeError, ValueError), match=message):
                model.learn(8, callback=make())
    assert model.num_timesteps == 0


@algorithms
def test_the_nan_guard_works(algorithm):
    class Broken(Steering):
        def step(self, action):
            observation, _, *rest = super().step(action)
            return observation, float("inf"), *rest

    with pytest.raises(ValueError, match="rewards hold NaN or inf"):
        build(algorithm, Broken()).learn(16, callback=NanGuardCallback())
    build(algorithm).learn(12, callback=NanGuardCallback())


@algorithms
def test_frames_are_stored_once(algorithm):
    model = build(algorithm, replay_buffer_class=FrameReplayBuffer)
    model.learn(20)
    assert model._n_updates == 12
    assert model.replay_buffer.shared.store.n_planes < 40  # of 2 x 20 stacks of 4


@algorithms
def test_our_policys_name_says_what_to_write(algorithm):
    with pytest.raises(ValueError, match="write policy='CnnPolicy', policy_kwargs=dict"):
        algorithm("ResNetCnnPolicy", Steering(), buffer_size=10)
