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
from sb3_resnet.cache.entries import EntryCache
from sb3_resnet.callbacks import FeatureCacheCallback
from tests.helpers import fill, make_model, observations, q_values

SPACE = spaces.Box(0, 255, (4, 32, 32), np.uint8)


@pytest.fixture
def parts():
    extractor = ResNetExtractor(SPACE, backbone="resnet_tiny")
    buffer = FrameReplayBuffer(20, SPACE, spaces.Discrete(3), "cpu", n_envs=2)
    encoder = extractor.encoder
    buffer.shared.encode_with(EntryCache(encoder, "cpu"))
    return extractor, encoder, buffer, CachedEncoding(buffer.shared)


def images(seed, n=2):
    return np.random.default_rng(seed).integers(0, 256, (n, *SPACE.shape), dtype=np.uint8)


def add(buffer, obs, following):
    buffer.add(obs, following, np.zeros((2, 1)), np.zeros(2), np.zeros(2), [{}, {}])


def test_what_was_acted_upon_is_in_the_buffer_encoded(parts):
    _, encoder, buffer, actor = parts
    entries = actor.encode(th.as_tensor(images(0))).features
    add(buffer, images(0), images(1))
    assert encoder.images == len(buffer.shared.cache) == 2
    assert th.equal(buffer.shared.cache.find(buffer.observations.obs_ids[0]), entries)


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


def test_an_environment_that_writes_into_its_own_images_gets_no_entries_of_earlier_ones(parts):
    """What was acted upon is compared with what is stored, so it must be a copy."""
    extractor, _, buffer, actor = parts
    shown = images(0)
    actor.encode(th.from_numpy(shown))
    shown[:] = images(1)
    add(buffer, shown, images(2))
    got = buffer.observations[np.zeros(2, int), np.arange(2)].features
    with th.no_grad():
        expected = extractor.frozen_part(extractor.preprocess(th.as_tensor(images(1)) / 255))
    assert th.allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_evaluation_between_acting_and_storing_costs_nothing(parts):
    _, encoder, buffer, actor = parts
    actor.encode(th.as_tensor(images(0)))
    add(buffer, images(0), images(1))
    actor.encode(th.as_tensor(images(1)))
    actor.encode(th.as_tensor(images(7, 1)))  # an evaluation in one environment
    add(buffer, images(1), images(2))
    assert encoder.images == 5
    assert buffer.shared.cache.has(buffer.observations.obs_ids[1]).all()


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


def test_without_a_cache_the_network_encodes_by_itself(parts):
    _, _, buffer, actor = parts
    buffer.shared.cache = None
    add(buffer, images(0), images(1))
    assert actor.encode(th.as_tensor(images(1))) is None


def test_where_memory_is_limited_acting_never_reads_a_place_that_was_given_away(parts):
    _, encoder, buffer, _ = parts
    entry_bytes = 256 * 4
    buffer.shared.encode_with(EntryCache(encoder, "cpu", max_bytes=2 * entry_bytes))  # less than what is acted upon
    actor = CachedEncoding(buffer.shared)
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
    buffer.shared.encode_with(EntryCache(extractor.encoder, "cpu"))
    actor = CachedEncoding(buffer.shared)
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
    callback = FeatureCacheCallback()
    callback.init_callback(model)
    callback.on_training_start({}, {})
    encoder, pixels = model.replay_buffer.shared.cache.encoder, observations(model, 1)
    expected = q_values(model, pixels)  # such as a measurement: it leaves no trace in the cache
    assert model.replay_buffer.shared.acted is None
    images = encoder.images
    action, _ = model.predict(pixels, deterministic=True)
    assert encoder.images == images + 1
    assert model.replay_buffer.shared.acted is not None
    assert action == expected.argmax()


@pytest.mark.parametrize("arguments", [{}, {"adapter": "per_frame"}, {"freeze_boundary": "layer4"}])
@pytest.mark.parametrize("filled", [False, True])
def test_no_observations_at_all_give_no_entries_of_the_right_shape(arguments, filled):
    arguments = {**arguments}
    boundary = arguments.pop("freeze_boundary", None)
    extractor = ResNetExtractor(SPACE, backbone="resnet_tiny", **arguments)
    extractor.set_freeze_boundary(boundary)
    buffer = FrameReplayBuffer(20, SPACE, spaces.Discrete(3), "cpu", n_envs=2)
    buffer.shared.encode_with(EntryCache(extractor.encoder, "cpu"))
    if filled:
        add(buffer, images(0), images(1))
        buffer.sample(2)
    expected = extractor.encode(th.as_tensor(images(0))).shape[1:]
    none = np.zeros(0, np.int64)
    assert buffer.observations[none, none].entries.shape == (0, *expected)
    assert CachedEncoding(buffer.shared).encode(th.as_tensor(images(0, n=0))).entries.shape == (0, *expected)
