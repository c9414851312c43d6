"""Column buffers give the batches of SB3's own buffers, as pixels and as entries (invariant 10)."""

import pickle
import warnings

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_resnet.buffers import FrameNStepReplayBuffer, FrameReplayBuffer, with_columns
from sb3_resnet.cache.acting import CachedEncoding
from sb3_resnet.cache.batch import EncodedBatch
from sb3_resnet.cache.entries import EntryCache
from sb3_resnet.cache.table import EntryTable
from sb3_resnet.extractor import ResNetExtractor
from tests.helpers import TinyGame, slowly

SPACE = spaces.Box(0, 255, (4, 32, 32), np.uint8)
ACTIONS = spaces.Discrete(3)
KINDS = {
    "one step": (ReplayBuffer, FrameReplayBuffer, {}),
    "three steps": (NStepReplayBuffer, FrameNStepReplayBuffer, {"n_steps": 3, "gamma": 0.9}),
    "one array": (
        ReplayBuffer,
        FrameReplayBuffer,
        {"optimize_memory_usage": True, "handle_timeout_termination": False},
    ),
}


class Player:
    """Adds the same transitions to several buffers: stacks of frames, episodes that end or are truncated."""

    def __init__(self, n_envs, seed, channels=4, frame_channels=1, copies=False):
        self.rng = np.random.default_rng(seed)
        self.n_envs = n_envs
        self.channels, self.frame_channels, self.copies = channels, frame_channels, copies
        self.obs = np.stack([self.first() for _ in range(n_envs)])

    def frame(self, event="step"):
        frame = self.rng.integers(0, 256, (self.frame_channels, 32, 32), dtype=np.uint8)
        return np.zeros_like(frame) if event == "empty" else frame

    def first(self):
        frame, count = self.frame(), self.channels // self.frame_channels
        before = frame if self.copies else np.zeros_like(frame)
        return np.concatenate([before] * (count - 1) + [frame])

    def step(self, event, buffers):
        newest = self.frame_channels
        frames = [stack[-newest:] if event == "still" else self.frame(event) for stack in self.obs]
        following = np.stack([np.concatenate([s[newest:], f]) for s, f in zip(self.obs, frames, strict=True)])
        done = np.full(self.n_envs, event in ("done", "truncated"))
        infos = [{"TimeLimit.truncated": event == "truncated"}] * self.n_envs
        action, reward = self.rng.integers(0, 3, (self.n_envs, 1)), self.rng.normal(size=self.n_envs)
        for buffer in buffers:
            buffer.add(self.obs, following, action, reward, done, infos)
        self.obs = np.stack([self.first() if over else stack for over, stack in zip(done, following, strict=True)])


def same_batch(plain, other, seed, encode=None):
    batches = []
    for buffer in (plain, other):
        np.random.seed(seed)
        batches.append(buffer.sample(8))
    for name, expected, got in zip(batches[0]._fields, *batches, strict=True):
        if isinstance(got, EncodedBatch):
            assert th.allclose(encode(expected), got.features, rtol=1e-4, atol=1e-5), name
        elif expected is not None:
            assert expected.dtype == got.dtype
            assert th.equal(expected, got), name


EVENTS = st.lists(st.sampled_from(["step"] * 6 + ["done", "truncated"]), min_size=2, max_size=30)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None)
@given(events=EVENTS, n_envs=st.integers(1, 3), seed=st.integers(0, 99), rows=st.integers(3, 12))
def test_pixels_are_those_of_the_stock_buffer(kind, events, n_envs, seed, rows):
    stock, ours, options = KINDS[kind]
    buffers = [cls(rows * n_envs, SPACE, ACTIONS, "cpu", n_envs=n_envs, **options) for cls in (stock, ours)]
    player = Player(n_envs, seed)
    for index, event in enumerate(events):
        player.step(event, buffers)
        if index > 0:
            same_batch(*buffers, seed)
    converted, copied = with_columns(buffers[0]), pickle.loads(pickle.dumps(buffers[1]))
    for event in ("step", "done", "step"):
        player.step(event, [*buffers, converted, copied])
        same_batch(buffers[0], converted, seed)
        same_batch(buffers[1], copied, seed)


@pytest.fixture(scope="module")
def extractor():
    th.manual_seed(0)
    return ResNetExtractor(SPACE, backbone="resnet_tiny")


OPERATIONS = st.lists(
    st.sampled_from(["step"] * 8 + ["done", "truncated", "boundary", "weights", "save", "act"]), min_size=3, max_size=25
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6, deadline=None)
@given(operations=OPERATIONS, n_envs=st.integers(1, 2), seed=st.integers(0, 99), limit=st.sampled_from([None, 5000]))
def test_invariant_10_any_sequence_of_operations_gives_what_the_plain_module_makes_of_the_stock_batch(
    extractor, kind, operations, n_envs, seed, limit
):
    stock, ours, options = KINDS[kind]
    buffers = [cls(9 * n_envs, SPACE, ACTIONS, "cpu", n_envs=n_envs, **options) for cls in (stock, ours)]
    extractor.set_freeze_boundary(None)
    encoder = extractor.encoder
    boundaries = iter(["layer4", "layer2", "adapter", None] * 10)

    def encode(pixels):
        return extractor.frozen_part(extractor.preprocess(extractor.scale_raw(pixels)))

    buffers[1].shared.encode_with(EntryCache(encoder, "cpu", limit))
    player = Player(n_envs, seed)
    player.step("step", buffers)
    for operation in operations:
        if operation == "boundary":
            extractor.set_freeze_boundary(next(boundaries))
        elif operation == "weights":
            with th.no_grad():
                extractor.backbone.conv1.weight.mul_(-1.0)
        elif operation == "save":
            buffers[1] = pickle.loads(pickle.dumps(buffers[1]))
            assert buffers[1].shared.cache is None
            buffers[1].shared.encode_with(EntryCache(encoder, "cpu", limit))
        elif operation == "act":
            CachedEncoding(buffers[1].shared).encode(th.as_tensor(player.obs))
        else:
            player.step(operation, buffers)
        same_batch(*buffers, seed, encode)


FRAMES = {  # channels, channels of a frame, options
    "grey": (4, 1, {}),
    "grey, ImageNet statistics": (3 + 1, 1, {"use_imagenet_norm": True}),
    "RGB": (6, 3, {}),
    "one grey frame": (1, 1, {}),
    "one RGB frame": (3, 3, {"adapter": "conv1x1"}),
    "up to layer2": (4, 1, {"last_stage": "layer2", "pooling": "spatial_softmax"}),
}
FRAME_OPERATIONS = st.lists(
    st.sampled_from(["step"] * 6 + ["still", "empty", "done", "truncated", "boundary", "weights", "save", "act"]),
    min_size=3,
    max_size=25,
)


@pytest.mark.parametrize(
    "frames",
    ["grey", "RGB", "up to layer2", *slowly("grey, ImageNet statistics", "one grey frame", "one RGB frame")],
)
@settings(max_examples=6, deadline=None)
@given(
    kind=st.sampled_from([*KINDS]),
    operations=FRAME_OPERATIONS,
    n_envs=st.integers(1, 2),
    seed=st.integers(0, 99),
    limit=st.sampled_from([None, 2500]),
    copies=st.booleans(),
)
def test_invariant_10_holds_frame_by_frame(frames, kind, operations, n_envs, seed, limit, copies):
    stock, ours, buffer_options = KINDS[kind]
    channels, frame_channels, options = FRAMES[frames]
    space = spaces.Box(0, 255, (channels, 32, 32), np.uint8)
    pooling = {} if "pooling" in options else {"pooling": "grid", "grid_size": 2}
    options = {**pooling, "adapter": "per_frame", "backbone": "resnet_mini", **options}
    extractor = ResNetExtractor(space, **options)
    buffers = [cls(9 * n_envs, space, ACTIONS, "cpu", n_envs=n_envs, **buffer_options) for cls in (stock, ours)]
    wanted = frame_channels if extractor.preprocessing.per_frame else 1
    buffers[1] = with_columns(buffers[1], wanted)
    boundaries = iter([*reversed(extractor.stages[1:]), None] * 10)

    def encode(pixels):
        with th.no_grad():
            return extractor.frozen_part(extractor.preprocess(extractor.scale_raw(pixels)))

    buffers[1].shared.encode_with(EntryCache(extractor.encoder, "cpu", limit, 4))
    player = Player(n_envs, seed, channels, frame_channels, copies)
    player.step("step", buffers)
    for operation in operations:
        if operation == "boundary":
            extractor.set_freeze_boundary(next(boundaries))
        elif operation == "weights":
            with th.no_grad():
                extractor.backbone.conv1.weight.mul_(-1.0)
        elif operation == "save":
            buffers[1] = pickle.loads(pickle.dumps(buffers[1]))
            buffers[1].shared.encode_with(EntryCache(extractor.encoder, "cpu", limit, 4))
        elif operation == "act":
            encoded = CachedEncoding(buffers[1].shared).encode(th.as_tensor(player.obs))
            if encoded is not None:
                assert th.allclose(encoded.features, encode(th.as_tensor(player.obs)), rtol=1e-4, atol=1e-5)
        else:
            player.step(operation, buffers)
        same_batch(*buffers, seed, encode)


def test_a_buffer_of_planes_becomes_one_of_rgb_frames():
    space = spaces.Box(0, 255, (6, 32, 32), np.uint8)
    plain, planes = ReplayBuffer(10, space, ACTIONS, "cpu"), FrameReplayBuffer(10, space, ACTIONS, "cpu")
    player = Player(1, 0, 6, 3)
    for _ in range(14):
        player.step("step", [plain, planes])
    extractor = ResNetExtractor(space, backbone="resnet_mini", adapter="per_frame")
    with pytest.raises(ValueError, match=r"frames of 1 channels.*sees frames of 3: convert it with .*with_columns"):
        planes.shared.encode_with(EntryCache(extractor.encoder, "cpu"))
    frames = with_columns(planes, 3)
    same_batch(plain, frames, 0)
    assert frames.shared.store.n_planes <= planes.shared.store.n_planes
    frames.shared.encode_with(EntryCache(extractor.encoder, "cpu"))
    same_batch(plain, frames, 0, lambda pixels: extractor.encode(extractor.scale_raw(pixels)))


@pytest.mark.parametrize("limit", [None, 10**6])
def test_maps_lie_in_one_order_whether_they_were_kept_or_just_encoded(limit):
    """The order decides which convolutions run on them, so a resumed run would round differently."""
    extractor = ResNetExtractor(SPACE, backbone="resnet_tiny", adapter="per_frame")
    extractor.set_freeze_boundary("layer3")
    buffer = FrameReplayBuffer(40, SPACE, ACTIONS, "cpu")
    buffer.shared.encode_with(EntryCache(extractor.encoder, "cpu", limit))
    player, rows = Player(1, 0), np.arange(3)
    for _ in range(5):
        player.step("step", [buffer])
    acted = CachedEncoding(buffer.shared).encode(th.as_tensor(player.obs)).entries
    fresh, kept = (buffer.observations[rows, 0 * rows].entries for _ in range(2))
    with th.no_grad():
        plain = extractor.encode(extractor.scale_raw(th.as_tensor(buffer.shared.store.pixels(rows))))
    assert fresh.stride() == kept.stride() == plain.stride()
    assert acted.stride()[1:] == kept.stride()[1:]
    assert acted.flatten(0, 1).is_contiguous(memory_format=th.channels_last)


def test_each_observation_is_encoded_once(extractor):
    extractor.set_freeze_boundary(None)
    buffer = FrameReplayBuffer(40, SPACE, ACTIONS, "cpu")
    cache = EntryCache(extractor.encoder, "cpu")
    cache.encoder.images = 0
    buffer.shared.encode_with(cache)
    player = Player(1, 0)
    for event in ["step"] * 9 + ["done"] + ["step"] * 10:
        player.step(event, [buffer])
    for seed in range(30):
        np.random.seed(seed)
        buffer.sample(16)
    assert cache.encoder.images == len(cache) == 22  # 20 transitions and two last observations
    assert 0 < cache.misses <= 22  # some were taken along before they were sampled
    assert cache.hits > 20 * cache.misses


def test_what_exploration_left_is_encoded_along_with_a_missing_observation(extractor):
    extractor.set_freeze_boundary(None)
    buffer = FrameReplayBuffer(40, SPACE, ACTIONS, "cpu")
    player = Player(1, 0)
    for event in ["step"] * 5:
        player.step(event, [buffer])  # stored before the cache was there
    cache = EntryCache(extractor.encoder, "cpu")
    cache.encoder.images = 0
    buffer.shared.encode_with(cache)
    for event in ["step"] * 20:
        player.step(event, [buffer])
    first, none = np.zeros(1, int), np.zeros(1, int)
    features = buffer.observations[first, none].features
    assert cache.encoder.images == len(cache) == 16
    assert (cache.hits, cache.misses) == (0, 1)
    assert cache.has(buffer.next_observations.obs_ids[10:25, 0]).all()
    assert th.equal(buffer.observations[first, none].features, features)
    extractor.set_freeze_boundary("layer4")
    buffer.observations[first, none]
    assert cache.encoder.images == 32, "all that had an entry wait for one again"


def test_with_a_limit_none_is_pushed_out_by_what_nobody_asked_for(extractor):
    extractor.set_freeze_boundary(None)
    buffer = FrameReplayBuffer(40, SPACE, ACTIONS, "cpu")
    cache = EntryCache(extractor.encoder, "cpu", 3 * 256 * 4)
    cache.encoder.images = 0
    buffer.shared.encode_with(cache)
    player = Player(1, 0)
    for event in ["step"] * 10:
        player.step(event, [buffer])
    for row in (0, 1, 2):
        buffer.observations[np.full(1, row), np.zeros(1, int)]
        assert cache.has(buffer.observations.obs_ids[:1, 0]).all()
    assert len(cache) == 3


def test_what_was_acted_upon_is_not_encoded_again(extractor):
    extractor.set_freeze_boundary(None)
    buffer = FrameReplayBuffer(40, SPACE, ACTIONS, "cpu", n_envs=2)
    cache = EntryCache(extractor.encoder, "cpu")
    cache.encoder.images = 0
    buffer.shared.encode_with(cache)
    player = Player(2, 0)
    for event in ["step"] * 4 + ["done"] + ["step"] * 5:
        CachedEncoding(buffer.shared).encode(th.as_tensor(player.obs))
        player.step(event, [buffer])
    assert cache.encoder.images == len(cache) == 20
    for seed in range(20):
        np.random.seed(seed)
        buffer.sample(16)
    assert cache.encoder.images == 24  # and the last observations of two episodes in two environments


def test_a_limit_of_bytes_keeps_the_newest(extractor):
    extractor.set_freeze_boundary(None)
    buffer = FrameReplayBuffer(40, SPACE, ACTIONS, "cpu")
    entry = 256 * 4
    cache = EntryCache(extractor.encoder, "cpu", max_bytes=5 * entry + 10)
    cache.encoder.images = 0
    buffer.shared.encode_with(cache)
    player = Player(1, 0)
    for _ in range(12):
        CachedEncoding(buffer.shared).encode(th.as_tensor(player.obs))
        player.step("step", [buffer])
        assert cache.nbytes <= 5 * entry + 10
    assert len(cache) == 5
    assert cache.has(buffer.observations.obs_ids[:12, 0]).tolist() == [False] * 7 + [True] * 5
    tiny = EntryCache(cache.encoder, "cpu", max_bytes=10)
    assert tiny.get(buffer.observations.obs_ids[:3], buffer.shared.store).shape == (3, 256)
    assert len(tiny) == 0


@pytest.mark.parametrize("error", [MemoryError("no"), th.OutOfMemoryError("CUDA out of memory")])
def test_without_memory_there_is_no_cache_one_warning_and_no_loss(extractor, monkeypatch, error):
    extractor.set_freeze_boundary(None)
    plain, buffer = ReplayBuffer(40, SPACE, ACTIONS, "cpu"), FrameReplayBuffer(40, SPACE, ACTIONS, "cpu")
    buffer.shared.encode_with(EntryCache(extractor.encoder, "cpu"))
    player = Player(1, 0)
    player.step("step", [plain, buffer])

    def fail(*args):
        raise error

    monkeypatch.setattr(EntryTable, "_grow", fail)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(3):
            player.step("step", [plain, buffer])
            same_batch(plain, buffer, seed)
    assert ["going on without the cache" in str(warning.message) for warning in caught] == [True]
    assert buffer.shared.cache is None


def test_other_errors_are_not_taken_for_a_lack_of_memory(extractor, monkeypatch):
    buffer = FrameReplayBuffer(40, SPACE, ACTIONS, "cpu")
    buffer.shared.encode_with(EntryCache(extractor.encoder, "cpu"))
    Player(1, 0).step("step", [buffer])
    monkeypatch.setattr(EntryCache, "encode", lambda *args: (_ for _ in ()).throw(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        buffer.sample(4)


def test_vecnormalize_of_rewards_alone_is_fine(extractor):
    env = VecNormalize(make_vec_env(TinyGame), norm_obs=False)
    buffer = FrameReplayBuffer(40, SPACE, ACTIONS, "cpu")
    buffer.shared.encode_with(EntryCache(extractor.encoder, "cpu"))
    Player(1, 0).step("step", [buffer])
    assert isinstance(buffer.sample(4, env=env).observations, EncodedBatch)


def test_buffers_reserve_no_memory_in_advance():
    buffer = FrameReplayBuffer(10**6, spaces.Box(0, 255, (4, 84, 84), np.uint8), ACTIONS, "cpu")
    assert buffer.buffer_size == 10**6
    assert len(buffer.rewards) == 10**6
    assert buffer.observations.shape == (10**6, 1, 4, 84, 84)
    assert len(buffer.observations) == 10**6
    assert buffer.shared.store.capacity == 0


def test_reading_one_row_reads_no_others(monkeypatch):
    buffer = FrameReplayBuffer(10, SPACE, ACTIONS, "cpu")
    player = Player(1, 0)
    for _ in range(5):
        player.step("step", [buffer])
    taken = []
    pixels = buffer.shared.store.pixels
    monkeypatch.setattr(buffer.shared.store, "pixels", lambda obs_ids: taken.append(obs_ids.size) or pixels(obs_ids))
    assert buffer.observations[3].shape == (1, *SPACE.shape)
    assert taken == [1]


def test_a_saved_buffer_holds_what_was_written_and_no_more():
    buffer = FrameReplayBuffer(1000, SPACE, ACTIONS, "cpu")
    player = Player(1, 0)
    for _ in range(20):
        player.step("step", [buffer])
    content = pickle.dumps(buffer.shared)
    assert len(content) < 10**6  # memory grows by 32 MiB
    store = pickle.loads(content).store
    obs_ids = buffer.observations.obs_ids[:20, 0]
    assert np.array_equal(store.pixels(obs_ids), buffer.shared.store.pixels(obs_ids))
    store.refer(store.add(0, player.first())[0])  # and it can be written again


def test_a_column_reads_like_an_array():
    plain, buffer = ReplayBuffer(10, SPACE, ACTIONS, "cpu"), FrameReplayBuffer(10, SPACE, ACTIONS, "cpu")
    player = Player(1, 0)
    for _ in range(3):
        player.step("step", [plain, buffer])
    assert np.array_equal(np.asarray(buffer.observations), plain.observations)
    rows = np.array([2, 0])
    for key in (1, -1, slice(1, 3), rows, [0, 2], (1, 0), (1, slice(None), 2), (rows, 0, 1, ..., 3), (None, 1), ...):
        assert np.array_equal(buffer.observations[key], plain.observations[key]), key
    assert buffer.observations.dtype == plain.observations.dtype
    buffer.reset()
    assert buffer.pos == 0
    assert not np.asarray(buffer.observations).any()


def test_buffers_of_other_classes_are_refused():
    class Other(ReplayBuffer):
        pass

    with pytest.raises(ValueError, match=r"Other cannot be cached.*leave replay_buffer_class out"):
        with_columns(Other(10, SPACE, ACTIONS, "cpu"))
    buffer = FrameReplayBuffer(10, SPACE, ACTIONS, "cpu")
    assert with_columns(buffer) is buffer


def test_batches_of_maps_have_one_memory_order_however_many_of_them_are_encoded_now(extractor):
    extractor.set_freeze_boundary("layer4")
    buffer = FrameReplayBuffer(40, SPACE, ACTIONS, "cpu")
    buffer.shared.encode_with(EntryCache(extractor.encoder, "cpu", max_bytes=8 * 128 * 2 * 2 * 4))
    actor, player = CachedEncoding(buffer.shared), Player(1, 0)
    for _ in range(30):
        player.step("step", [buffer])
    rows, envs = np.arange(6), np.zeros(6, int)
    batches = [buffer.observations[rows + first, envs].entries for first in (0, 0, 3)]  # none, all, some had entries
    batches += [actor.encode(th.as_tensor(player.obs)).entries for _ in range(2)]
    assert {batch.flatten(0, 1).is_contiguous(memory_format=th.channels_last) for batch in batches} == {True}
    extractor.set_freeze_boundary(None)
