"""Memory estimates against buffers that were really allocated and filled."""

import numpy as np
import pytest
from stable_baselines3.common.env_util import make_vec_env

from sb3_resnet.buffers import FrameReplayBuffer
from sb3_resnet.callbacks import FeatureCacheCallback
from sb3_resnet.cli import sizes, trial
from tests.helpers import TinyGame, fill, make_model


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
    assert sizes.frame_buffer_bytes(model, 400, played[:200]) == pytest.approx(used, rel=0.05)
    assert sizes.stock_buffer_bytes(model, 400) > 4 * used
    assert seconds > 0


@pytest.mark.parametrize("boundary", [None, "layer4", "layer2"])
def test_cache_is_exact(boundary):
    model = make_model(batch_size=64)
    model.policy.set_freeze_boundary(boundary)
    fill(model, 64)
    callback = FeatureCacheCallback()
    callback.init_callback(model)
    callback.on_training_start({}, {})
    extractor = model.policy.online.features_extractor
    cache = model.replay_buffer.shared.cache
    store = model.replay_buffer.shared.store
    entry = cache.get(np.arange(2)[:, None], store)
    observations = store.pixels(np.arange(2))
    expected = 50 * entry[0].numel() * entry.element_size()
    assert sizes.cache_bytes(model, extractor, observations, 50) == expected


def test_nothing_frozen_means_nothing_cached():
    model = make_model(extractor={"freeze_backbone": False})
    observations = np.zeros((1, 4, 32, 32), np.uint8)
    assert sizes.cache_bytes(model, model.policy.online.features_extractor, observations, 50) is None
