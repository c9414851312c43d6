"""Acting with the fast encoder: what is acted upon is encoded once, and never stale."""

import copy
import pickle

import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_resnet import ResNetExtractor
from sb3_resnet.buffers import FrameReplayBuffer
from sb3_resnet.cache.acting import CachedEncoding
from sb3_resnet.cache.batch import EncodedBatch
from sb3_resnet.cache.entries import EntryCache
from sb3_resnet.callbacks import FeatureCacheCallback
from sb3_resnet.nn import encoder as encoder_module
from sb3_resnet.nn.encoder import FrozenEncoder
from tests.helpers import fill, make_model, observations, q_values

SPACE = spaces.Box(0, 255, (4, 32, 32), np.uint8)


@pytest.fixture
def parts():
    extractor = ResNetExtractor(SPACE, backbone="resnet_tiny")
    buffer = FrameReplayBuffer(20, SPACE, spaces.Discrete(3), "cpu", n_envs=2)
    encoder = FrozenEncoder(extractor.trunk, "float32")
    buffer.shared.encode_with(EntryCache(encoder, "cpu"))
    return extractor, encoder, buffer, CachedEncoding(encoder, buffer.shared)


def images(seed, n=2):
    return np.random.default_rng(seed).integers(0, 256, (n, *SPACE.shape), dtype=np.uint8)


def add(buffer, obs, following):
    buffer.add(obs, following, np.zeros((2, 1)), np.zeros(2), np.zeros(2), [{}, {}])


def test_what_was_acted_upon_is_in_the_buffer_encoded(parts):
    _, encoder, buffer, actor = parts
    entries = actor.encode(th.as_tensor(images(0))).features
    add(buffer, images(0), images(1))
    assert encoder.images == len(buffer.shared.cache) == 2
    found = [buffer.shared.entry(obs_id) for obs_id in buffer.observations.obs_ids[0]]
    assert th.equal(th.stack(found), entries)


def test_what_a_sampled_batch_needed_first_is_not_encoded_again_to_act(parts):
    _, encoder, buffer, actor = parts
    actor.encode(th.as_tensor(images(0)))
    add(buffer, images(0), images(1))
    expected = buffer.next_observations[np.zeros(2, int), np.arange(2)].features
    assert encoder.images == 4
    assert th.equal(actor.encode(th.as_tensor(images(1))).features, expected)
    half_new = np.stack([images(1)[0], images(2)[1]])
    entries = actor.encode(th.as_tensor(half_new)).features
    assert encoder.images == 5
    assert th.equal(entries[0], expected[0])
    assert th.allclose(entries, encoder(th.as_tensor(half_new)), rtol=1e-5, atol=1e-6)


def test_a_sampled_batch_that_needs_one_of_the_next_observations_encodes_all_of_them_at_once(parts):
    _, encoder, buffer, actor = parts
    actor.encode(th.as_tensor(images(0)))
    add(buffer, images(0), images(1))
    buffer.observations[np.zeros(1, int), np.zeros(1, int)]
    assert encoder.images == 2
    one = buffer.next_observations[np.zeros(1, int), np.zeros(1, int)].features
    assert one.shape == (1, 256)
    assert encoder.images == 4
    assert th.equal(actor.encode(th.as_tensor(images(1))).features[:1], one)
    assert encoder.images == 4


def test_evaluation_between_acting_and_storing_costs_nothing(parts):
    _, encoder, buffer, actor = parts
    actor.encode(th.as_tensor(images(0)))
    add(buffer, images(0), images(1))
    actor.encode(th.as_tensor(images(1)))
    actor.encode(th.as_tensor(images(7, 1)))  # an evaluation in one environment
    add(buffer, images(1), images(2))
    assert encoder.images == 5
    assert all(obs_id in buffer.shared.cache for obs_id in buffer.observations.obs_ids[1].tolist())


def test_entries_are_never_stale(parts):
    extractor, _, buffer, actor = parts
    actor.encode(th.as_tensor(images(0)))
    add(buffer, images(0), images(1))
    actor.encode(th.as_tensor(images(1)))
    old = buffer.shared.acted
    with th.no_grad():
        extractor.backbone.conv1.weight.mul_(-1.0)
    acted = actor.encode(th.as_tensor(images(1))).features  # the first to notice that the weights changed
    obs_ids = np.concatenate([buffer.observations.obs_ids[0], buffer.next_observations.obs_ids[0]])
    plain = extractor.frozen_part(extractor.preprocess(th.as_tensor(np.concatenate([images(0), images(1)])) / 255))
    assert th.allclose(acted, plain[2:], rtol=1e-4, atol=1e-5)
    assert th.allclose(buffer.shared.batch(obs_ids).features, plain, rtol=1e-4, atol=1e-5)
    buffer.shared.acted = old
    add(buffer, images(3), images(1))
    add(buffer, images(1), images(4))
    obs_ids = buffer.observations.obs_ids[2]
    assert th.allclose(buffer.shared.batch(obs_ids).features, plain[2:], rtol=1e-4, atol=1e-5)


def test_without_a_cache_it_goes_on_encoding(parts):
    _, encoder, buffer, actor = parts
    buffer.shared.cache = None
    add(buffer, images(0), images(1))
    entries = actor.encode(th.as_tensor(images(1))).features
    assert th.equal(entries, encoder(th.as_tensor(images(1))))


def test_it_acts_in_one_precision_when_that_falls_back(parts, monkeypatch):
    extractor, _, buffer, _ = parts
    encoder = FrozenEncoder(extractor.trunk, "bfloat16")
    buffer.shared.encode_with(EntryCache(encoder, "cpu"))
    actor = CachedEncoding(encoder, buffer.shared)
    monkeypatch.setattr(encoder_module, "_CHECKED", 8)
    monkeypatch.setattr(encoder_module, "MAX_ERROR", 0.001)
    seen = [images(n) for n in range(4)]
    with pytest.warns(UserWarning, match="going on in float32"):
        entries = [actor.encode(th.as_tensor(each)).features for each in seen][-1]
    assert encoder.dtype == th.float32
    assert th.equal(entries, EncodedBatch(encoder(th.as_tensor(seen[-1])), encoder.centre).features)
    add(buffer, seen[-1], images(4))
    entry = buffer.shared.entry(int(buffer.observations.obs_ids[0, 0]))
    assert th.equal(EncodedBatch(entry, encoder.centre).features, entries[0])


def test_where_memory_is_limited_acting_never_reads_a_place_that_was_given_away(parts):
    _, encoder, buffer, _ = parts
    entry_bytes = 256 * 4
    buffer.shared.encode_with(EntryCache(encoder, "cpu", max_bytes=2 * entry_bytes))  # less than what is acted upon
    actor = CachedEncoding(encoder, buffer.shared)
    for step in range(6):
        moved, still = images(step, 2), images(100, 2)
        obs = np.stack([still[0], moved[1]])  # one environment shows what is stored already
        entries = actor.encode(th.as_tensor(obs)).features
        assert th.allclose(entries, encoder(th.as_tensor(obs)), rtol=1e-4, atol=1e-5)
        add(buffer, obs, np.stack([still[0], images(step + 1, 2)[1]]))


def test_nan_in_an_observation_is_named_before_it_is_encoded():
    space = spaces.Box(0.0, 1.0, (4, 32, 32), np.float32)
    extractor = ResNetExtractor(space, backbone="resnet_tiny")
    buffer = FrameReplayBuffer(20, space, spaces.Discrete(3), "cpu")
    actor = CachedEncoding(FrozenEncoder(extractor.trunk), buffer.shared)
    with pytest.raises(ValueError, match="NaN or inf"):
        actor.encode(th.full((1, 4, 32, 32), float("nan")))


def test_it_is_in_no_state_dict_copy_or_pickle(parts):
    policy = make_model().policy
    keys = policy.state_dict().keys()
    policy.encoding = parts[-1]
    assert policy.state_dict().keys() == keys
    assert copy.deepcopy(policy).encoding is None
    assert pickle.loads(pickle.dumps(policy)).encoding is None
    assert policy.encoding is parts[-1]


def test_only_predict_is_acting():
    model = fill(make_model())
    callback = FeatureCacheCallback("float32")
    callback.init_callback(model)
    callback.on_training_start({}, {})
    encoder, pixels = model.replay_buffer.shared.cache.encoder, observations(model, 1)
    expected = q_values(model, pixels)
    with th.no_grad():
        model.q_net(th.as_tensor(pixels))  # such as a measurement: it leaves no trace in the cache
    assert encoder.images == 0
    assert model.replay_buffer.shared.acted is None
    action, _ = model.predict(pixels, deterministic=True)
    assert encoder.images == 1
    assert action == expected.argmax()
