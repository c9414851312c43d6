"""Memory estimates against buffers that were really allocated and filled."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer
from stable_baselines3.common.env_util import make_vec_env

from sb3_resnet.buffers import FrameReplayBuffer
from sb3_resnet.cache import sizes
from sb3_resnet.callbacks import FeatureCacheCallback
from sb3_resnet.cli import trial
from tests.helpers import TinyGame, fill, make_model, observations, start, trained


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("optimize", [False, True])
def test_stock_buffer_is_exact(optimize, n_envs):
    options = {"replay_buffer_kwargs": {"handle_timeout_termination": False}} if optimize else {}
    env = make_vec_env(TinyGame, n_envs)
    model = make_model(env=env, buffer_size=100, optimize_memory_usage=optimize, **options)
    arrays = [value for value in vars(model.replay_buffer).values() if isinstance(value, np.ndarray)]
    assert sizes.stock_buffer_bytes(model, 100) == sum(array.nbytes for array in arrays)


@pytest.mark.parametrize("length", [13, 200])
def test_frame_buffer_is_close(length):
    model = make_model(env=TinyGame(length=length), buffer_size=400, replay_buffer_class=FrameReplayBuffer)
    played, seconds = trial.play(model, 400)
    store = model.replay_buffer.shared.store
    used = store.n_planes * (32 * 32 + 4) + len(store) * (4 * 8 + 4)
    used += 400 * (8 + 12) + sum(getattr(model.replay_buffer, name).obs_ids.nbytes for name in ("observations",) * 2)
    assert sizes.frame_buffer_bytes(model, 400, sizes.store_of(played[:200]), 200) == pytest.approx(used, rel=0.05)
    assert sizes.stock_buffer_bytes(model, 400) > 4 * used
    assert seconds > 0


@pytest.mark.parametrize("boundary", [None, "layer4", "layer2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("adapter", ["conv1x1", "per_frame"])
def test_cache_is_exact(boundary, adapter, dtype):
    model = make_model(batch_size=64, extractor={"frozen_dtype": dtype, "adapter": adapter})
    model.policy.set_freeze_boundary(boundary)
    fill(model, 64)
    extractor = model.policy.online.features_extractor
    images = extractor.preprocessing.as_images(th.as_tensor(observations(model, 1)))
    entry = extractor.encoder(images)[0]
    assert sizes.entry_bytes(extractor) == entry.numel() * entry.element_size()


@pytest.mark.parametrize("stage", ["all", "stem"])
def test_nothing_of_the_trunk_frozen_means_nothing_cached(stage):
    model = make_model()
    model.policy.set_freeze_boundary(stage)
    assert sizes.entry_bytes(model.policy.online.features_extractor) == 0


def test_growth_is_what_is_missing_until_the_buffer_is_full(monkeypatch):
    plane, rows, number = 32 * 32, 300, 8 * 2 + 20  # numbers of two observations; action, reward, done, timeout
    model = trained(make_model())
    stock = sum(value.nbytes for value in vars(model.replay_buffer).values() if isinstance(value, np.ndarray))
    assert sizes.growth_bytes(model) == stock == rows * (2 * 4 * plane + 20)
    fill(model, 150)
    assert sizes.growth_bytes(model) == stock / 2
    model = trained(make_model(replay_buffer_class=FrameReplayBuffer))
    frames = rows * (plane + 4 + 4 * 8 + 4 + number)
    assert sizes.growth_bytes(model) == frames
    start(model, FeatureCacheCallback())
    assert sizes.growth_bytes(model) == frames + rows * 4 * 256
    start(model, FeatureCacheCallback(max_bytes=1000))
    assert sizes.growth_bytes(model) == frames + 1000
    model.policy.set_freeze_boundary("layer4")
    model.replay_buffer.shared.cache.max_bytes = None
    assert sizes.growth_bytes(model) == frames + rows * 4 * 128 * 2 * 2


def test_growth_follows_what_the_buffer_has_seen(monkeypatch):
    monkeypatch.setattr(sizes, "_MEASURED", 20)
    model = make_model(replay_buffer_class=FrameReplayBuffer)
    model.learn(150)
    buffer = model.replay_buffer
    store = buffer.shared.store
    used = store.n_planes * (32 * 32 + 4) + len(store) * (4 * 8 + 4) + buffer.pos * (8 * 2 + 20)
    assert 150 <= buffer.pos < 160
    assert sizes.growth_bytes(model) == pytest.approx(used * (300 - buffer.pos) / buffer.pos, rel=1e-3)
    model.learn(200)
    assert sizes.growth_bytes(model) == 0


def test_all_images_of_a_dict_space_count():
    space = spaces.Dict({"a": spaces.Box(0, 255, (4, 8, 8), np.uint8), "b": spaces.Box(0.0, 1.0, (5,), np.float32)})
    model = SimpleNamespace(
        observation_space=space, action_space=spaces.Box(-1, 1, (2,), np.float64), n_envs=2, optimize_memory_usage=False
    )
    buffer = DictReplayBuffer(10, space, model.action_space, n_envs=2)
    arrays = [*buffer.observations.values(), *buffer.next_observations.values()]
    arrays += [value for value in vars(buffer).values() if isinstance(value, np.ndarray)]
    assert sizes.stock_buffer_bytes(model, 10) == sum(array.nbytes for array in arrays)
