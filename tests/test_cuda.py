"""
What must hold on a GPU: `python benchmarks/gpu.py` runs these first.

``SB3_RESNET_TEST_DEVICE=cpu`` runs them on the CPU instead, to see that the tests themselves are sound.
"""

import copy
import os

import numpy as np
import pytest
import torch as th

import sb3_resnet
from sb3_resnet.callbacks import AMPCallback, FeatureCacheCallback, LRScheduleCallback, UnfreezeCallback
from tests.helpers import ALGORITHMS, TinyGame, assert_same, fill, make_model, observations, snapshot

DEVICE = os.environ.get("SB3_RESNET_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(DEVICE == "cuda" and not th.cuda.is_available(), reason="needs a GPU"),
]
LEAN = {"adapter": "per_frame", "last_stage": "layer2", "pooling": "spatial_softmax"}
#: Largest difference relative to the spread of what is compared.
CLOSE = {"float32": 2e-3, "bfloat16": 0.1, "float16": 0.02}


def on_device(**kwargs):
    return make_model(device=DEVICE, **kwargs)


def relative(one, other):
    one, other = one.detach().float().cpu(), other.detach().float().cpu()
    return float((one - other).norm() / other.norm().clamp(min=1e-12))


@pytest.mark.parametrize("stage", [None, "layer2"])
@pytest.mark.parametrize("extractor", [{}, LEAN], ids=["stack", "frames"])
@pytest.mark.parametrize("dtype", CLOSE)
def test_the_encoder_computes_what_the_plain_modules_compute(dtype, extractor, stage):
    model = on_device(extractor={**extractor, "frozen_dtype": dtype})
    model.policy.set_freeze_boundary(stage)
    network = model.policy.online.features_extractor
    obs = th.as_tensor(observations(model, 16), device=DEVICE)
    with th.no_grad():
        plain = network.frozen_part(network.preprocess(network.scale_raw(obs)))
        assert relative(network.encode(network.scale_raw(obs)), plain) < CLOSE[dtype]


@pytest.mark.parametrize("extractor", [{}, LEAN], ids=["stack", "frames"])
@pytest.mark.parametrize("dtype", CLOSE)
def test_captured_graphs_give_the_same(dtype, extractor):
    model = on_device(extractor={**extractor, "frozen_dtype": dtype})
    network = model.policy.online.features_extractor
    batches = [th.as_tensor(observations(model, 8, seed=seed), device=DEVICE) for seed in range(5)]
    with th.no_grad():
        without = [network(network.scale_raw(batch)) for batch in batches]
        network.encoder.uses_graphs = True
        for _ in range(2):  # the first time captures
            captured = [network(network.scale_raw(batch)) for batch in batches]
    for one, other in zip(captured, without, strict=True):
        assert relative(one, other) < CLOSE[dtype] / 10


@pytest.mark.parametrize("where", [DEVICE, "cpu"])
@pytest.mark.parametrize("extractor", [{}, LEAN], ids=["stack", "frames"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_updates_with_the_cache_are_those_without(algorithm, extractor, where):
    models = [fill(on_device(algorithm=algorithm, extractor=extractor), 48) for _ in range(2)]
    callback = FeatureCacheCallback(device=where)
    callback.init_callback(models[1])
    callback.on_training_start({"callback": callback}, {})
    for model in models:
        np.random.seed(0)  # SB3 samples from the global generator
        th.manual_seed(0)
        model.train(20, 8)
    for one, other in zip(models[0].policy.parameters(), models[1].policy.parameters(), strict=True):
        assert relative(one, other) < 2e-3


@pytest.mark.parametrize("stage", [None, "layer2", "all"])
def test_learning_with_phases_cache_and_amp_runs_and_what_is_frozen_stays(stage):
    model = on_device(extractor={**LEAN, "frozen_dtype": "bfloat16"})
    before = snapshot(model.policy.online.features_extractor.backbone)
    callbacks = [FeatureCacheCallback(), AMPCallback("bfloat16"), LRScheduleCallback(warmup_steps=5)]
    if stage is not None:
        callbacks.append(UnfreezeCallback([{"at_timestep": 60, "unfreeze_from": stage}], verbose=0))
    model.learn(120, callback=callbacks)
    after = snapshot(model.policy.online.features_extractor.backbone)
    frozen = [key for key in before if stage is None or (stage == "layer2" and not key.startswith("layer2"))]
    assert all(th.equal(before[key], after[key]) for key in frozen)
    assert stage is None or not th.equal(before["layer2.0.conv1.weight"], after["layer2.0.conv1.weight"])
    assert all(parameter.isfinite().all() for parameter in model.policy.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loaded_model_predicts_the_same(tmp_path, dtype):
    model = on_device(extractor={**LEAN, "frozen_dtype": dtype})
    model.learn(60, callback=FeatureCacheCallback())
    model.save(tmp_path / "model.zip")
    obs = observations(model, 32)
    loaded = ALGORITHMS["dqn"].load(tmp_path / "model.zip", device=DEVICE)
    assert np.array_equal(loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])
    assert loaded.policy.online.features_extractor.frozen_dtype == dtype


def test_stopped_and_resumed_updates_equal_those_without_a_stop(tmp_path):
    sb3_resnet.seed_everything(0, deterministic=True)
    try:
        model = fill(on_device(), 48)
        model.policy.set_freeze_boundary("layer4")
        model.train(5, 8)
        model.save(tmp_path / "model.zip")
        model.save_replay_buffer(tmp_path / "buffer.pkl")
        resumed = ALGORITHMS["dqn"].load(tmp_path / "model.zip", env=TinyGame(), device=DEVICE)
        resumed.load_replay_buffer(tmp_path / "buffer.pkl")
        resumed.set_logger(model.logger)
        for one in (model, resumed):
            sb3_resnet.seed_everything(1, deterministic=True)
            one.train(5, 8)
        assert_same(model.policy.state_dict(), resumed.policy.state_dict())
    finally:
        sb3_resnet.seed_everything(0)


def test_the_same_seed_gives_the_same_bits_with_deterministic_algorithms():
    states = []
    for _ in range(2):
        sb3_resnet.seed_everything(3, deterministic=True)
        model = on_device()
        model.policy.set_freeze_boundary("all")
        fill(model, 48).train(5, 8)
        states.append(copy.deepcopy(model.policy.state_dict()))
    sb3_resnet.seed_everything(0)
    assert_same(*states)
