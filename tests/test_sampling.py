"""Batches are seen on their way to train(), and a saved buffer knows nothing of it."""

import copy
import pickle

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer

from sb3_resnet.buffers import FrameReplayBuffer, with_columns
from sb3_resnet.common.sampling import WatchedSample, unwatch_samples, watch_samples
from tests.helpers import fill, make_model


def buffer_of(cls=ReplayBuffer):
    return fill(make_model(replay_buffer_class=cls)).replay_buffer


@pytest.mark.parametrize("cls", [ReplayBuffer, FrameReplayBuffer])
def test_each_batch_is_seen_and_is_the_one_that_is_given(cls):
    buffer, seen = buffer_of(cls), []
    np.random.seed(0)
    plain = buffer.sample(4)
    watch_samples(buffer, "a", seen.append)
    watch_samples(buffer, "b", seen.append)
    watch_samples(buffer, "b", seen.append)
    np.random.seed(0)
    batch = buffer.sample(4, env=None)
    assert len(seen) == 2
    assert seen[0] is seen[1] is batch
    assert th.equal(batch.rewards, plain.rewards)
    unwatch_samples(buffer, "a")
    buffer.sample(4)
    assert len(seen) == 3
    for _ in range(2):
        unwatch_samples(buffer, "b")
    assert "sample" not in vars(buffer)
    buffer.sample(4)
    assert len(seen) == 3


def test_a_sample_method_that_somebody_has_put_there_is_used_and_comes_back():
    buffer, calls, seen = buffer_of(), [], []
    plain = buffer.sample

    def theirs(*args, **kwargs):
        calls.append(args)
        return plain(*args, **kwargs)

    buffer.sample = theirs
    watch_samples(buffer, "key", seen.append)
    buffer.sample(3)
    assert calls == [(3,)]
    assert len(seen) == 1
    unwatch_samples(buffer, "key")
    assert buffer.sample is theirs


@pytest.mark.parametrize("copied", [lambda one: pickle.loads(pickle.dumps(one)), copy.deepcopy], ids=["pickle", "copy"])
def test_a_saved_buffer_is_not_watched_and_samples_its_own_rows(copied):
    buffer, seen = buffer_of(), []
    watch_samples(buffer, "key", seen.append)
    other = copied(buffer)
    assert not isinstance(other.sample, WatchedSample)
    other.rewards[:] = 5.0
    assert (other.sample(4).rewards == 5.0).all()
    assert (buffer.sample(4).rewards != 5.0).any()
    assert len(seen) == 1
    again = copied(other)
    again.rewards[:] = 6.0
    assert (again.sample(4).rewards == 6.0).all()


def test_nothing_of_this_package_is_in_the_file():
    buffer = buffer_of()
    watch_samples(buffer, "key", print)
    assert b"sb3_resnet" not in pickle.dumps(buffer)


def test_a_buffer_with_columns_samples_its_own_rows():
    buffer = buffer_of()
    watch_samples(buffer, "key", lambda batch: None)
    new = with_columns(buffer)
    new.rewards = np.full_like(new.rewards, 5.0)
    assert (new.sample(4).rewards == 5.0).all()


def test_what_has_no_sample_method_is_left_alone():
    unwatch_samples(None, "key")
    unwatch_samples(object(), "key")
