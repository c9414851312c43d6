"""Planes stored once: exact for any data, small for stacks."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sb3_resnet.cache.frames import ObservationStore, Pool


def test_a_pool_reuses_what_nobody_refers_to():
    pool = Pool((2,), np.int64)
    obs_ids = [pool.put(np.array([index, index])) for index in range(3)]
    for obs_id in obs_ids:
        pool.refer(obs_id)
    pool.refer(obs_ids[0])
    assert not pool.release(obs_ids[0])
    assert pool.release(obs_ids[1])
    assert len(pool) == 2
    assert pool.put(np.array([7, 7])) == obs_ids[1]
    assert pool.take(np.array([[obs_ids[0]], [obs_ids[1]]])).tolist() == [[[0, 0]], [[7, 7]]]


def test_memory_grows_in_steps(monkeypatch):
    monkeypatch.setattr("sb3_resnet.cache.frames._CHUNK_BYTES", 64)
    pool = Pool((4,), np.int64)  # two rows a step
    obs_ids = [pool.put(np.full(4, index)) for index in range(5)]
    assert pool.references.size == 6
    assert pool.take(np.array(obs_ids))[:, 0].tolist() == [0, 1, 2, 3, 4]


class Stack:
    """A frame stack as VecFrameStack makes it (zeros at the start) or as Gymnasium does (copies)."""

    def __init__(self, rng, depth, channels, zeros):
        self.rng, self.depth, self.channels, self.zeros = rng, depth, channels, zeros

    def frame(self):
        return self.rng.integers(0, 4, (self.channels, 2, 2), dtype=np.uint8)

    def reset(self):
        first = self.frame()
        older = np.zeros_like(first) if self.zeros else first
        self.frames = [older] * (self.depth - 1) + [first]
        return np.concatenate(self.frames)

    def step(self):
        self.frames = [*self.frames[1:], self.frame()]
        return np.concatenate(self.frames)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    depth=st.integers(1, 5),
    channels=st.sampled_from([1, 3]),
    zeros=st.booleans(),
    ends=st.lists(st.booleans(), min_size=1, max_size=40),
    keep=st.integers(1, 8),
)
def test_any_sequence_of_observations_comes_back_exactly(seed, depth, channels, zeros, ends, keep):
    stack = Stack(np.random.default_rng(seed), depth, channels, zeros)
    store = ObservationStore((depth * channels, 2, 2), np.uint8, 1)
    kept = []
    obs = stack.reset()
    for end in ends:
        obs_id, _, _ = store.add(0, obs)
        store.refer(obs_id)
        kept.append((obs_id, obs))
        if len(kept) > keep:
            store.release(kept.pop(0)[0])
        obs = stack.reset() if end else stack.step()
        obs_ids = np.array([obs_id for obs_id, _ in kept])
        assert np.array_equal(store.pixels(obs_ids), np.stack([pixels for _, pixels in kept]))
    assert len(store) <= keep + 1
    for obs_id, _ in kept:
        store.release(obs_id)
    assert len(store) == 1  # the last one, with which the next is compared
    assert store.n_planes <= depth * channels


def test_stacks_share_their_planes_and_others_do_not():
    rng = np.random.default_rng(0)
    stack = Stack(rng, 4, 1, True)
    stack.frame = lambda: rng.integers(0, 256, (1, 8, 8), dtype=np.uint8)
    store = ObservationStore((4, 8, 8), np.uint8, 1)
    obs_ids = []
    obs = stack.reset()
    for _ in range(50):
        obs_ids.append(store.add(0, obs)[0])
        store.refer(obs_ids[-1])
        obs = stack.step()
    assert store.n_planes == 51  # one a step, and the zeros
    whole = ObservationStore((4, 8, 8), np.uint8, 1)
    for _ in range(10):
        obs_id, _, _ = whole.add(0, rng.integers(0, 256, (4, 8, 8), dtype=np.uint8))
        whole.refer(obs_id)
    assert whole.n_planes == 40


def test_unknown_observations_are_zeros():
    store = ObservationStore((2, 3, 3), np.uint8, 1)
    assert not store.pixels(np.array([-1, -1])).any()
    obs_id, _, _ = store.add(0, np.ones((2, 3, 3), np.uint8))
    assert store.pixels(np.array([[obs_id, -1]])).sum(axis=(2, 3, 4)).tolist() == [[18, 0]]


STARTS = st.sampled_from(["step"] * 4 + ["again", "restart", "back", "shift"])


@settings(max_examples=150, deadline=None)
@given(
    bits=st.lists(st.tuples(STARTS, st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=30),
    depth=st.integers(1, 4),
    channels=st.sampled_from([1, 2]),
    n_envs=st.integers(1, 2),
    keep=st.integers(1, 6),
)
def test_frames_that_look_alike_are_never_taken_for_each_other(bits, depth, channels, n_envs, keep):
    """Frames of one pixel that is 0 or 1: nearly all of them are equal to others, by chance and not by history."""
    store = ObservationStore((depth * channels, 1, 1), np.uint8, n_envs, channels)
    stacks = np.zeros((n_envs, depth * channels, 1, 1), np.uint8)
    kept = []
    for index, (start, *new) in enumerate(bits):
        env = index % n_envs
        stack = stacks[env]  # changed in place, as environments do that return a buffer of their own
        frame = np.array(new[:channels], np.uint8).reshape(-1, 1, 1)
        if start == "restart":
            stack[:] = np.random.default_rng(index).integers(0, 2, stack.shape)
        elif start == "back":
            stack[:] = stack[::-1].copy()
        elif start != "again":
            for _ in range(1 + (start == "shift")):
                stack[:] = np.concatenate([stack[channels:], frame])
        obs_id, _, _ = store.add(env, stack)
        store.refer(obs_id)
        kept.append((obs_id, stack.copy()))
        if len(kept) > keep:
            store.release(kept.pop(0)[0])
        obs_ids = np.array([obs_id for obs_id, _ in kept])
        assert np.array_equal(store.pixels(obs_ids), np.stack([pixels for _, pixels in kept]))
    for obs_id, _ in kept:
        store.release(obs_id)
    assert len(store) <= n_envs
    assert store.n_planes <= n_envs * depth * channels
