import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env

from sb3_resnet.buffers import FrameReplayBuffer
from sb3_resnet.nn.pretraining.frames import Frames, FrameWriter, shifted
from sb3_resnet.nn.pretraining.sources import from_buffer, play
from tests.helpers import TinyGame

SPACE = spaces.Box(0, 255, (4, 8, 8), np.uint8)


def quiet(share):
    pass


def frames_of(lengths):
    episodes = th.tensor(np.repeat(np.arange(len(lengths)), lengths))
    rows = th.arange(len(episodes))
    return Frames(th.zeros(1, 1, 2, 2, dtype=th.uint8), rows[:, None], episodes, rows)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 5))
def test_pairs_never_cross_the_end_of_an_episode_and_all_others_are_there(lengths, gap):
    frames = frames_of(lengths)
    starts = frames.starts(gap)
    assert th.equal(frames.episodes[starts], frames.episodes[starts + gap])
    assert len(starts) == sum(max(length - gap, 0) for length in lengths)
    assert len({*starts.tolist()}) == len(starts)


class Recorder(gym.Wrapper):
    """Keeps what was seen, to be compared with what was stored."""

    seen = None

    def reset(self, **kwargs):
        observation, info = self.env.reset(**kwargs)
        self.own = [(None, observation.copy())]
        self.seen.append(self.own)
        return observation, info

    def step(self, action):
        observation, *rest = self.env.step(action)
        self.own.append((int(action), observation.copy()))
        return observation, *rest


def test_played_observations_come_back_as_they_were_with_each_frame_once():
    Recorder.seen = []
    env = make_vec_env(lambda: Recorder(TinyGame()), 2)
    told = []
    frames = play(env, 150, 1, 0, None, 0.1, told.append)
    assert len(frames.pixels) <= 150
    assert told[-1] == pytest.approx(len(frames.pixels) / 150, abs=0.05)
    # Stacks after a reset are black but for one frame: two frames an episode, and one each step.
    assert len(frames.pixels) == len(frames.episodes) + len(frames.episodes.unique())
    images = frames.images(th.arange(len(frames.episodes)), newest_only=False)
    for number in frames.episodes.unique():
        rows = (frames.episodes == number).nonzero()[:, 0]
        stored = [images[row].numpy().tobytes() for row in rows]
        # The action of the last observation may be one that ended the episode.
        actions = frames.actions[rows[:-1]].tolist()
        assert any(
            [seen.tobytes() for _, seen in played[: len(rows)]] == stored
            and [action for action, _ in played[1 : len(rows)]] == actions
            for played in Recorder.seen
        )
    newest = frames.images(th.arange(4), newest_only=True)
    assert th.equal(newest[:, 0], images[:4, -1])


def test_playing_twice_with_a_seed_gives_the_same_frames():
    one, two, other = (play(make_vec_env(TinyGame, 2), 90, 1, seed, None, 0.1, quiet) for seed in (3, 3, 4))
    assert all(th.equal(value, two.tensors()[name]) for name, value in one.tensors().items())
    assert not th.equal(one.actions, other.actions)


def test_unrelated_frames_are_each_stored():
    writer = FrameWriter(12, (4, 8, 8), 1, 1)
    rng = np.random.default_rng(0)
    seen = rng.integers(0, 256, (3, 4, 8, 8), dtype=np.uint8)
    for index, observation in enumerate(seen):
        assert not writer.is_full
        writer.add(0, observation, index == 0)
    assert writer.is_full
    frames = writer.finished()
    assert np.array_equal(frames.images(th.arange(3), newest_only=False), seen)


def filled_buffer(kind, rows, added, **kwargs):
    """Three-step episodes of two environments; the observation says environment and step."""
    buffer = kind(2 * rows, SPACE, spaces.Discrete(5, start=2), n_envs=2, device="cpu", **kwargs)
    for step in range(added):
        now, after = (
            np.stack([np.full(SPACE.shape, 100 * env + value, np.uint8) for env in range(2)])
            for value in (step, step + 1)
        )
        actions = np.array([[2 + step % 5]] * 2)
        buffer.add(now, after, actions, np.zeros(2), np.array([step % 3 == 2] * 2), [{}] * 2)
    return buffer


@pytest.mark.parametrize("added", [7, 25], ids=["not full", "full"])
@pytest.mark.parametrize(
    ("kind", "kwargs"),
    [
        (ReplayBuffer, {}),
        (ReplayBuffer, {"optimize_memory_usage": True, "handle_timeout_termination": False}),
        (FrameReplayBuffer, {}),
    ],
    ids=["stock", "shared array", "frames"],
)
def test_frames_of_a_replay_buffer_are_in_time_with_its_actions_and_ends(kind, kwargs, added):
    buffer = filled_buffer(kind, 10, added, **kwargs)
    frames = from_buffer(buffer, 500, 1, SPACE, quiet)
    oldest = 0 if added == 7 else added - 10 + ("optimize_memory_usage" in kwargs)
    steps = list(range(oldest, added))
    values = frames.images(th.arange(len(frames.episodes)), newest_only=True)[:, 0, 0, 0].tolist()
    assert sorted(values) == sorted([*steps, *(100 + step for step in steps)])
    by_value = dict(zip(values, range(len(values)), strict=True))
    for step in steps:
        for env in range(2):
            row = by_value[100 * env + step]
            assert int(frames.actions[row]) == step % 5
            if step != steps[-1]:
                goes_on = frames.episodes[row] == frames.episodes[by_value[100 * env + step + 1]]
                assert bool(goes_on) == (step % 3 != 2)
    assert all(values[int(row) + 1] == values[int(row)] + 1 for row in frames.starts(1))


def test_a_run_that_was_stopped_and_went_on_has_an_episode_end_between():
    buffer = filled_buffer(ReplayBuffer, 20, 2)
    buffer.add(*(np.full((2, *SPACE.shape), value, np.uint8) for value in (60, 61)), np.full((2, 1), 2), 0, 0, [{}] * 2)
    frames = from_buffer(buffer, 500, 1, SPACE, quiet)
    assert len(frames.episodes.unique()) == 4
    assert len(frames.starts(1)) == 2


def test_the_newest_frames_of_a_buffer_are_kept():
    frames = from_buffer(filled_buffer(ReplayBuffer, 20, 18), 12, 1, SPACE, quiet)
    values = frames.images(th.arange(len(frames.episodes)), newest_only=True)[:, 0, 0, 0]
    assert len(frames.pixels) <= 12
    assert int(values.min()) >= 12
    assert int(values.max()) >= 115


def stacks(first, count):
    """Successive stacks of four frames, the frames numbered from ``first`` on."""
    return [
        np.repeat(np.arange(first + step, first + step + 4, dtype=np.uint8), 64).reshape(1, *SPACE.shape)
        for step in range(count)
    ]


def shared_buffer(observations):
    options = {"optimize_memory_usage": True, "handle_timeout_termination": False, "device": "cpu"}
    buffer = ReplayBuffer(len(observations) + 1, SPACE, spaces.Discrete(3), **options)
    for now in observations:
        # What follows is overwritten by the next observation that is added.
        buffer.add(now, now, np.zeros((1, 1)), np.zeros(1), np.zeros(1), [{}])
    return buffer


def test_where_next_observations_are_not_kept_a_stack_that_does_not_continue_begins_an_episode():
    buffer = shared_buffer([*stacks(10, 6), *stacks(60, 5)])
    frames = from_buffer(buffer, 500, 1, SPACE, quiet)
    assert frames.episodes.tolist() == [0] * 6 + [1] * 5
    newest = frames.images(th.arange(11), newest_only=True)[:, 0, 0, 0]
    assert newest.tolist() == [*range(13, 19), *range(63, 68)]


def test_channels_that_are_no_stack_of_frames_tell_nothing_of_episodes():
    rng = np.random.default_rng(0)
    buffer = shared_buffer(list(rng.integers(0, 256, (8, 1, *SPACE.shape), dtype=np.uint8)))
    assert len(from_buffer(buffer, 500, 1, SPACE, quiet).episodes.unique()) == 1


def test_the_newest_are_kept_where_stacks_share_few_frames_and_no_room_is_left():
    buffer = ReplayBuffer(60, SPACE, spaces.Discrete(3), device="cpu")
    for episode in range(12):
        seen = stacks(10 * episode, 4)
        for step in range(3):
            buffer.add(seen[step], seen[step + 1], np.zeros((1, 1)), np.zeros(1), np.array([step == 2]), [{}])
    # An episode of three steps has six frames, and its last two steps have five.
    for capacity, rows, used in ((100, 36, 72), (72, 36, 72), (71, 35, 71), (70, 34, 70), (69, 33, 66), (3, 0, 0)):
        frames = from_buffer(buffer, capacity, 1, SPACE, quiet)
        assert (len(frames.episodes), len(frames.pixels)) == (rows, used)
        expected = [frame[0] for episode in range(12) for frame in stacks(10 * episode, 3)]
        images = frames.images(th.arange(rows), newest_only=False).numpy()
        assert np.array_equal(images, np.array(expected[36 - rows :]).reshape(images.shape))


def test_an_empty_buffer_is_refused():
    with pytest.raises(ValueError, match="is empty"):
        from_buffer(filled_buffer(ReplayBuffer, 5, 0), 50, 1, SPACE, quiet)


def test_shifts_are_crops_of_images_with_repeated_edges():
    generator = th.Generator().manual_seed(0)
    images = th.randint(0, 256, (40, 2, 6, 7), dtype=th.uint8, generator=generator)
    moved = shifted(images, 2, 1.0, generator)
    padded = th.nn.functional.pad(images.float(), (2, 2, 2, 2), mode="replicate").to(th.uint8)
    crops = padded.unfold(2, 6, 1).unfold(3, 7, 1)  # (40, 2, 5, 5, 6, 7)
    same = (crops == moved[:, :, None, None]).all(dim=(1, 4, 5))
    assert same.any(dim=(1, 2)).all()
    assert len({tuple(one.nonzero()[0].tolist()) for one in same}) > 15  # of 25
    again = shifted(images, 2, 1.0, th.Generator().manual_seed(1))
    assert th.equal(again, shifted(images, 2, 1.0, th.Generator().manual_seed(1)))


def test_as_many_images_are_shifted_as_the_probability_says():
    images = th.randint(0, 256, (2000, 1, 6, 6), dtype=th.uint8, generator=th.Generator().manual_seed(0))

    def stay(probability):
        moved = shifted(images, 4, probability, th.Generator().manual_seed(2))
        return float((moved == images).all(dim=(1, 2, 3)).float().mean())

    assert stay(0.0) == 1.0
    # Of 81 shifts one is none.
    assert stay(0.1) == pytest.approx(1.0 - 0.1 * 80 / 81, abs=0.02)
    assert stay(1.0) == pytest.approx(1 / 81, abs=0.01)
