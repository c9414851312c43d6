import csv
import itertools
import math
import re
import sys
import tracemalloc
import warnings
from dataclasses import replace
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import DDPG, DQN, PPO, SAC
from stable_baselines3.common.atari_wrappers import EpisodicLifeEnv
from stable_baselines3.common.env_util import make_atari_env, make_vec_env, unwrap_wrapper
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import SubprocVecEnv, VecFrameStack, VecNormalize, VecTransposeImage

import sb3_resnet.probing
from sb3_resnet import ResNetExtractor
from sb3_resnet.common.labels import ResetInfos
from sb3_resnet.diagnosis import features
from sb3_resnet.diagnosis.features import features_at
from sb3_resnet.diagnosis.readout import Score, read_out, split_episodes
from sb3_resnet.diagnosis.scores import scores_of
from sb3_resnet.envs import make_atari_vec_env
from sb3_resnet.envs.atari_ram import ADDRESSES, ram_labels
from sb3_resnet.pretraining import pretrain
from sb3_resnet.probing import Recording, Row, check_probe, probe, record
from tests.helpers import DictGame, TinyGame, make_model, run_command

ROWS = 1200
ANY = {"dqn": DQN, "ppo": PPO, "sac": SAC, "ddpg": DDPG}


# Rows of scores, the first four in the order of -3.0, 0.7, 0.5, 0.2.
SCORES = [{"x": -3.0, "action": 0.9}, {"x": 0.7}, {"action": 0.5}, {"x": None, "action": 0.2}, {"action": None}, {}]
REST = ("episodes", "actions", "labels")
SEVEN = gym.spaces.Box(0, 255, (4, 7, 7), np.uint8)
SMALLEST = gym.spaces.Box(0, 255, (4, 12, 12), np.uint8)


def tiny_labels(env):
    return {"column": float(env.column), "is_left": env.column == 0}


@pytest.fixture(scope="module")
def recording():
    return record(make_vec_env(TinyGame, 4), 400, labels=tiny_labels)


class NeverPlayedTiny(TinyGame):
    """Has only its spaces."""

    def reset(self, **kwargs):
        raise AssertionError("it was played")


class TellingGame(TinyGame):
    """Its info is known from the first observation on, but for ``height``, which a reset does not tell."""

    def __init__(self, **more):
        super().__init__((1, 32, 32))
        self.more = more

    def reset(self, **kwargs):
        observation, _ = super().reset(**kwargs)
        return observation, self._info()

    def step(self, action):
        *result, _ = super().step(action)
        return *result, {**self._info(), "height": 2.0 * self.clock, "lives": 3 - self.clock // 5}

    def _info(self):
        return {"column": float(self.column), "clock": self.clock, **self.more}


def splits(rows=ROWS, episodes=12):
    return split_episodes(np.repeat(np.arange(episodes), rows // episodes))


@pytest.mark.parametrize("width", [40, 2 * ROWS], ids=["tall", "wide"])
def test_a_readout_finds_what_is_there_and_nothing_else(width):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(ROWS, width)).astype(np.float32)
    labels = {
        "perfect": 3.0 * features[:, 0] + 1.0,
        "noise": rng.normal(size=ROWS),
        "constant": np.ones(ROWS),
        "class": (features[:, 0] > 0).astype(int),
        "coin": rng.integers(0, 2, ROWS),
    }
    found = read_out(features[:, :40], labels, splits())
    assert found["perfect"].value == pytest.approx(1.0, abs=1e-6)
    assert found["class"].value > 0.9
    assert abs(found["noise"].value) < 0.1
    assert found["coin"].value == pytest.approx(0.5, abs=0.12)
    assert found["constant"].is_constant
    assert [found[name].kind for name in ("perfect", "class")] == ["R2", "F1"]
    wide = read_out(features, labels, splits())
    assert abs(wide["noise"].value) < 0.15
    assert wide["perfect"].value > (0.999 if width < ROWS else 0.2)  # a random direction among too many


def test_a_number_that_varies_by_rounding_alone_is_constant():
    def labels(env):
        return {
            "time": 0.1 * env.clock,
            "same": 0.1 + 0.2 if env.clock % 2 else 0.3,
            "single": np.float32(0.1) * env.clock,
        }

    played = record(make_vec_env(TinyGame, 4), 400, labels=labels)
    scores = scores_of(played, np.random.default_rng(0).normal(size=(400, 8)).astype(np.float32))
    constant = {name for name, score in scores.items() if score.is_constant}
    assert constant == {"same", "delta_same", "delta_time", "delta_single"}


@pytest.mark.parametrize(
    ("kind", "place", "move"), [(np.float16, 84, 2), (np.float32, 2000, 0.005), (np.float64, 1e6, 1e-6)]
)
def test_a_small_move_is_no_rounding(kind, place, move):
    def labels(env):
        return {"x": kind(place + move * env.column)}

    played = record(make_vec_env(TinyGame, 4), 400, labels=labels)
    assert len(np.unique(played.labels["x"])) == 3
    assert len(np.unique(played.labels["delta_x"])) >= 3


def test_a_few_images_unlike_all_others_do_not_decide_the_score():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(ROWS, 8)).astype(np.float32)
    labels = {"number": features[:, 0] + 0.1 * features[:, 1]}
    parts = splits()
    features[np.flatnonzero(parts[2])[:3], 1] = 1e5
    assert read_out(features, labels, parts)["number"].value > 0.9


@pytest.mark.parametrize("factor", [1e-300, 1e-3, 1e300])
def test_the_unit_of_a_label_changes_no_score(factor):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(ROWS, 8)).astype(np.float32)
    label = features[:, 0] + rng.normal(size=ROWS)
    found = read_out(features, {"one": label, "other": factor * label}, splits())
    assert 0.2 < found["one"].value < 0.9
    assert found["other"].value == pytest.approx(found["one"].value)


@pytest.mark.parametrize("seed", range(5))
def test_no_episode_is_in_two_splits_and_none_is_empty(seed):
    episodes = np.repeat(np.arange(9), [5, 80, 3, 40, 40, 7, 90, 10, 10])
    parts = split_episodes(episodes, seed)
    assert np.array_equal(sum(part.astype(int) for part in parts), np.ones(len(episodes)))
    names = [{*episodes[part]} for part in parts]
    assert all(names)
    assert sum(map(len, names)) == len({*episodes})


def test_too_few_episodes_are_refused():
    with pytest.raises(ValueError, match="needs at least 3 episodes, one per split, and there are 2: play more steps"):
        split_episodes(np.array([0, 0, 1]))


def test_labels_belong_to_their_observations(recording):
    newest = recording.observations[:, -1, 0]
    column = recording.labels["column"]
    assert np.array_equal(newest.reshape(len(newest), -1)[:, [0, 10, 20]].argmax(axis=1), column)
    assert recording.labels["is_left"].dtype == bool
    first = np.flatnonzero(np.diff(recording.episodes, prepend=0))
    assert (recording.actions[first] == -1).all()
    assert (np.delete(recording.actions, first) >= 0).all()
    inside = np.delete(np.arange(len(column)), first)
    assert np.array_equal(recording.labels["delta_column"][inside], column[inside] - column[inside - 1])
    # The tiny game pays for naming the column that the observation before showed.
    paid = recording.actions[inside] == column[inside - 1]
    assert np.array_equal(recording.labels["reward"][inside], paid)


def test_the_same_seed_plays_the_same(recording):
    again = record(make_vec_env(TinyGame, 4), 400, labels=tiny_labels)
    assert np.array_equal(again.observations, recording.observations)
    assert np.array_equal(again.actions, recording.actions)


def test_spread_rows_are_pieces_of_a_longer_recording():
    whole = record(make_vec_env(TinyGame, 2), 2 * 96, labels=lambda env: {"clock": float(env.clock)})
    pieces = record(make_vec_env(TinyGame, 2), 2 * 32, labels=lambda env: {"clock": float(env.clock)}, spread=3)
    kept = [env * 96 + start + step for env in (0, 1) for start in (0, 48) for step in range(16)]
    assert np.array_equal(pieces.observations, whole.observations[kept])
    assert np.array_equal(pieces.labels["clock"], whole.labels["clock"][kept])
    begins = np.arange(64) % 16 == 0
    assert (pieces.actions[begins] == -1).all()
    assert np.array_equal(pieces.actions[~begins], whole.actions[kept][~begins])
    assert np.array_equal(pieces.labels["delta_clock"][~begins], whole.labels["delta_clock"][kept][~begins])
    _, numbers = np.unique(whole.episodes[kept], return_inverse=True)
    assert np.array_equal(pieces.episodes, numbers + 1)


def test_lives_of_one_game_are_in_one_split():
    """A lost life ends an episode; what the game shows goes on."""

    class Lives(EpisodicLifeEnv):
        def reset(self, **kwargs):
            return self.env.reset(**kwargs) if getattr(self, "over", True) else (self.latest, {})

        def step(self, action):
            self.latest, reward, ends, cut, info = self.env.step(action)
            self.over = ends or cut
            return self.latest, reward, ends or self.unwrapped.clock % 4 == 0, cut, info

    def starts_of(**kwargs):
        recording = record(make_vec_env(lambda: TinyGame(length=12), 1, **kwargs), 40, 0)
        return np.flatnonzero(np.diff(recording.episodes, prepend=-1)).tolist()

    assert starts_of(wrapper_class=Lives) == starts_of() == [0, 12, 24, 36]


def test_an_episode_that_a_wrapper_ends_is_one_though_no_monitor_tells():
    class Ends(gym.Wrapper):
        def step(self, action):
            observation, reward, _, cut, info = super().step(action)
            return observation, reward, self.unwrapped.clock % 10 == 0, cut, info

    recording = record(make_vec_env(lambda: TinyGame(length=1000), 1, wrapper_class=Ends), 40, 0)
    assert np.flatnonzero(np.diff(recording.episodes, prepend=-1)).tolist() == [0, 10, 20, 30]


def test_progress_of_a_recording_counts_steps_of_each_environment():
    told = []
    record(make_vec_env(TinyGame, 2), 60, labels=tiny_labels, spread=2, progress=lambda *part: told.append(part))
    assert told == [(step, 60) for step in range(1, 61)]


def test_a_model_plays_all_but_epsilon_of_the_actions():
    model = make_model()
    played = record(make_vec_env(TinyGame, 2), 60, model=model, epsilon=0.0, labels=tiny_labels)
    greedy, _ = model.predict(played.observations, deterministic=True)
    led = played.actions[1:] >= 0
    assert np.array_equal(played.actions[1:][led], greedy[:-1][led])


class FiveActions(TinyGame):
    """The tiny game, with actions that never pay."""

    def __init__(self):
        super().__init__()
        self.action_space = gym.spaces.Discrete(5)


@pytest.mark.parametrize("call", [record, lambda env, model: pretrain(env, "w.safetensors", model=model)])
def test_a_model_of_other_observations_or_actions_is_refused_before_anything_is_played(call):
    five = make_model(env=FiveActions(), extractor={"backbone": "resnet_mini"})
    words = (
        r"The model has the actions Discrete\(5\), and the environment Discrete\(3\): give the environment of its tr"
    )
    with pytest.raises(ValueError, match=words):
        call(make_vec_env(NeverPlayedTiny, 2), model=five)
    with pytest.raises(
        ValueError, match=r"The model has the observations Box\(0, 255, \(4, .* environment Box\(0, 255"
    ):
        call(make_vec_env(partial(NeverPlayedTiny, (3, 32, 32)), 2), model=five)
    with pytest.raises(TypeError, match=r"model must be an SB3 model, got 'm.zip': load it first, such as with DQN.lo"):
        call(make_vec_env(NeverPlayedTiny, 2), model="m.zip")


@pytest.mark.parametrize("call", [record, lambda env: pretrain(env, "w.safetensors")], ids=["record", "pretrain"])
def test_an_environment_that_is_no_vecenv_is_refused(call):
    with pytest.raises(TypeError, match=r"env must be a VecEnv, got <.*: write DummyVecEnv\(\[lambda: env\]\)"):
        call(NeverPlayedTiny())


def test_one_key_of_info_may_be_written_without_a_list():
    labels = record(make_vec_env(TellingGame, 2), 60, labels=lambda env: {}, info_keys="clock").labels
    assert {*labels} == {"clock", "reward"}
    with pytest.raises(TypeError, match="info_keys must be a list of names, got 3"):
        record(make_vec_env(NeverPlayedTiny, 2), 60, info_keys=3)
    with pytest.raises(ValueError, match="spread must be finite and >= 1, got 0"):
        record(make_vec_env(NeverPlayedTiny, 2), 60, spread=0)


def test_a_missing_key_of_info_names_those_that_are_there():
    with pytest.raises(ValueError, match="info has no speed: it has "):
        record(make_vec_env(TinyGame, 2), 60, info_keys=["speed"])


def test_keys_of_info_belong_to_their_observations_under_a_wrapper_too():
    env = VecFrameStack(make_vec_env(TellingGame, 2), 4)
    recording = record(env, 120, labels=lambda env: {"true": float(env.column)}, info_keys=["column", "clock"])
    labels = recording.labels
    assert np.array_equal(labels["column"], labels["true"])
    assert np.array_equal(labels["delta_column"], labels["delta_true"])
    assert np.issubdtype(labels["clock"].dtype, np.integer)
    first = labels["clock"] == 0
    assert first.sum() == len({*recording.episodes}) > 2
    assert np.array_equal(recording.actions < 0, first)


def test_a_key_that_resets_lack_stays_whole_and_the_change_to_the_row_after_is_not_scored():
    env = VecFrameStack(make_vec_env(TellingGame, 2), 4)
    keys = ["clock", "lives", "height"]
    recording = record(env, 120, labels=lambda env: {}, info_keys=keys)
    labels, clock = recording.labels, recording.labels["clock"]
    assert np.issubdtype(labels["lives"].dtype, np.integer)
    assert np.array_equal(labels["lives"][clock > 0], 3 - clock[clock > 0] // 5)
    assert np.array_equal(recording.actions < 0, clock <= 1)
    scored = recording.actions >= 0
    assert np.array_equal(labels["height"][scored], 2.0 * clock[scored])
    assert (labels["delta_height"][scored] == 2.0).all()
    whole = record(env, 120, labels=lambda env: {}, info_keys=["clock", "lives"])
    assert np.array_equal(whole.actions < 0, whole.labels["clock"] == 0)


def test_infos_of_environments_that_keep_those_of_their_first_reset_are_not_those_of_later_episodes():
    env = make_vec_env(TellingGame, 1)
    env.reset()
    resets = ResetInfos(env)
    assert resets.of(0)["clock"] == 0
    assert resets.of(0) == {}
    for _ in range(13):
        env.step([0])
    assert resets.of(0)["clock"] == 0


@pytest.mark.parametrize("value", [np.zeros(2), [1.0], "left", None, 1j, {"x": 1}], ids=str)
def test_labels_that_are_no_numbers_are_refused_at_the_first_step(value):
    steps = []

    def labels(env):
        steps.append(env)
        return {"place": value}

    with pytest.raises(ValueError, match=r"label 'place' must be one number, True or False, got .*: leave it out, or"):
        record(make_vec_env(TinyGame, 2), 60, labels=labels)
    assert len(steps) == 1
    with pytest.raises(ValueError, match="label 'parts' must be one number"):
        record(make_vec_env(partial(TellingGame, parts=value), 2), 60, labels=lambda env: {}, info_keys=["parts"])


@pytest.mark.parametrize("value", [np.nan, -np.inf, np.float16("inf")], ids=str)
def test_labels_that_are_not_finite_are_refused_by_name(value):
    words = f"label 'ball' is {value}, .*: give a number where it is not seen, such as -1, or leave the label out"
    with pytest.raises(ValueError, match=words):
        record(make_vec_env(TinyGame, 2), 60, labels=lambda env: {"ball": value if env.clock == 3 else 1.0})
    with pytest.raises(ValueError, match=words):
        record(make_vec_env(partial(TellingGame, ball=value), 2), 60, labels=lambda env: {}, info_keys=["ball"])


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (
            lambda env: {"late": 1.0} if env.clock > 2 else {},
            "label 'late' is there now, and was not at the first step",
        ),
        (
            lambda env: {"early": 1.0} if env.clock < 3 else {},
            "label 'early' is not there now, and was at the first st",
        ),
        (lambda env: {"reward": 1.0}, "labels has 'reward', which is a label of every environment: write another name"),
        (lambda env: {"action": 1.0}, "labels has 'action', which is a label of every environment: write another name"),
        (lambda env: {"delta_x": 1.0, "x": 1.0}, "labels has 'delta_x', which is how the change of 'x' is called: wri"),
        (lambda env: {"delta_clock": 1.0}, "labels has 'delta_clock', which is how the change of 'clock' is called"),
        (lambda env: {"clock": 1.0}, "labels has 'clock', which is also one of info_keys: write another name"),
    ],
)
def test_each_step_tells_the_same_labels_and_none_by_a_name_that_is_taken(labels, words):
    with pytest.raises(ValueError, match=words):
        record(make_vec_env(TellingGame, 2), 60, labels=labels, info_keys=["clock"])


def test_keys_of_info_whose_names_are_taken_are_refused():
    with pytest.raises(ValueError, match=r"info_keys has 'reward', .*: tell it by another name in labels="):
        record(make_vec_env(partial(TellingGame, reward=1.0), 2), 60, labels=lambda env: {}, info_keys=["reward"])


def test_a_change_may_be_told_where_what_changes_is_not():
    labels = record(make_vec_env(TinyGame, 2), 60, labels=lambda env: {"delta_x": float(env.clock)}).labels
    assert {*labels} == {"delta_x", "delta_delta_x", "reward"}


@pytest.mark.parametrize("labels", [math.pi, None, {"x": 1.0}], ids=str)
def test_labels_that_are_no_function_are_refused(labels):
    with pytest.raises(TypeError, match="labels must be a function of the innermost environment that returns a dict"):
        record(make_vec_env(TinyGame, 2), 60, labels=labels)


def test_labels_that_return_no_dict_are_refused():
    with pytest.raises(TypeError, match=r"must return a dict of numbers by name, got None: write \{\} for none"):
        record(make_vec_env(TinyGame, 2), 60, labels=lambda env: None)


@pytest.mark.parametrize(("values", "kind"), [(20, "F1"), (21, "R2")])
def test_whole_numbers_are_classes_up_to_twenty_values(values, kind):
    places = itertools.cycle(range(values))
    labels = record(make_vec_env(TinyGame, 2), 60, labels=lambda env: {"place": next(places)}).labels
    assert np.issubdtype(labels["place"].dtype, np.floating) == ("delta_place" in labels) == (kind == "R2")
    assert {*labels["place"]} == {*range(values)}


class ShiftedGame(TinyGame):
    """Its actions begin at -1."""

    def __init__(self):
        super().__init__()
        self.action_space = gym.spaces.Discrete(3, start=-1)

    def step(self, action):
        return super().step(action + 1)


def test_actions_are_counted_from_0_wherever_they_begin(recording):
    shifted = record(make_vec_env(ShiftedGame, 4), 400, labels=tiny_labels)
    assert np.array_equal(shifted.actions, recording.actions)


@pytest.mark.parametrize("value", [np.array(2.0), np.float32(2.0), 2, np.uint8(2), True], ids=repr)
def test_labels_may_be_numbers_of_any_type(value):
    kept = record(make_vec_env(TinyGame, 2), 60, labels=lambda env: {"place": value}).labels["place"]
    assert kept.dtype == np.asarray(value).dtype
    assert (kept == value).all()


def test_a_number_that_is_changed_in_its_place_is_kept_as_it_was():
    place = np.array(0.0)

    def labels(env):
        place[...] = env.clock
        return {"place": place, "clock": float(env.clock)}

    recording = record(make_vec_env(TinyGame, 2), 60, labels=labels)
    assert np.array_equal(recording.labels["place"], recording.labels["clock"])


def test_a_probe_scores_what_an_extractor_of_its_own_gives(recording):
    options = {"weights": ["random"], "last_stage": ["layer1", "layer2"], "pooling": ["avg", "spatial_softmax"]}
    seen = []
    rows = probe(
        recording, **options, adapter=["per_frame"], backbone="resnet_tiny", progress=lambda *part: seen.append(part)
    )
    assert len(rows) == 4
    assert seen[-1] == (400, 400)
    assert [row.mean for row in rows] == sorted((row.mean for row in rows), reverse=True)
    row = next(row for row in rows if (row.last_stage, row.pooling) == ("layer2", "spatial_softmax"))
    th.manual_seed(0)
    network = ResNetExtractor(
        recording.space, backbone="resnet_tiny", adapter="per_frame", last_stage="layer2", pooling="spatial_softmax"
    )
    with th.no_grad():
        features = network(network.scale_raw(th.as_tensor(recording.observations))).numpy()
    assert row.features == features.shape[1]
    led = recording.actions >= 0
    parts = [part[led] for part in split_episodes(recording.episodes)]
    expected = read_out(features[led], {"column": recording.labels["column"][led]}, parts)["column"].value
    # Stages below the last are the same with the same seed only if they are drawn in the same order.
    assert row.scores["column"].value == pytest.approx(expected, abs=0.05)
    assert row.scores["column"].value > 0.9
    again = probe(recording, **options, adapter=["per_frame"], backbone="resnet_tiny")
    assert [one.scores for one in again] == [one.scores for one in rows]


def test_neither_recording_nor_encoding_copies_all_observations():
    tracemalloc.start()
    recording = record(make_vec_env(partial(TinyGame, (4, 64, 64)), 4), 400, labels=tiny_labels)
    size = recording.observations.nbytes
    assert tracemalloc.get_traced_memory()[1] < 1.3 * size
    tracemalloc.stop()
    network = ResNetExtractor(recording.space, backbone="resnet_mini", last_stage="stem").eval()
    tracemalloc.start()
    ((*_, found, _),) = features_at(network, recording.observations, [("stem", "avg")])
    assert tracemalloc.get_traced_memory()[1] < 0.4 * size
    tracemalloc.stop()
    assert found.shape == (400, 8)


def test_each_image_is_encoded_once_and_each_row_gets_its_own(recording):
    network = ResNetExtractor(recording.space, backbone="resnet_mini", last_stage="stem").eval()
    passed = []
    network.backbone.conv1.register_forward_hook(lambda module, seen, made: passed.append(len(made)))
    rows = [0, 5, 0, 9, 5]
    ((*_, found, _),) = features_at(network, recording.observations[rows], [("stem", "avg")])
    ((*_, apart, _),) = features_at(network, recording.observations[[0, 5, 9]], [("stem", "avg")])
    assert passed == [3, 3]
    assert np.allclose(found, apart[[0, 1, 0, 2, 1]], atol=1e-6)


def test_a_gpu_is_waited_for_before_the_clock_is_read(monkeypatch):
    calls = []
    monkeypatch.setattr(th.cuda, "synchronize", calls.append)
    for name in ("cpu", "cuda"):
        features._now(th.device(name))
    assert calls == [th.device("cuda")]


def test_ends_of_which_images_leave_nothing_are_left_out(recording):
    options = {"adapter": "conv1x1", "backbone": "resnet_mini"}
    rows = probe(recording, last_stage=["layer3", "layer4"], pooling=["avg", "spatial_softmax"], **options)
    ends = {("layer3", "avg"), ("layer3", "spatial_softmax"), ("layer4", "avg")}
    assert {(row.last_stage, row.pooling) for row in rows} == ends
    with pytest.raises(ValueError, match="32x32 are too small for a ResNet up to layer4 with pooling='spatial_softma"):
        probe(recording, last_stage="layer4", pooling="spatial_softmax", **options)
    tiny = Recording(recording.observations[:, :, :12, :12], *(getattr(recording, name) for name in REST), SMALLEST)
    assert {row.last_stage for row in probe(tiny, pooling="avg", **options)} == {"layer1", "layer2", "layer3"}


def test_classes_of_ones_own_count_before_actions_and_behind_numbers():
    scores = {"reward": Score(0.1, "F1"), "column": Score(0.4, "F1"), "is_left": Score(0.8, "F1")}
    scores |= {"action": Score(0.9, "F1"), "still": Score(None, "R2")}
    row = partial(Row, "random", "layer1", "avg", "conv1x1", 1, 1.0)
    assert row(scores).mark == row(scores).mean_f1 == pytest.approx(0.6)
    assert row({**scores, "x": Score(0.2, "R2")}).mark == 0.2
    # The R2 of actions that are numbers is none of a label's.
    assert row({"action": Score(0.3, "R2")}).mark == 0.3
    assert np.isnan(row({"action": Score(0.3, "R2")}).mean)


class SteeredGame(TinyGame):
    """Shows which action was taken last."""

    def __init__(self, space):
        super().__init__((1, 32, 32))
        self.action_space = space

    def step(self, action):
        parts = np.ravel(action) if isinstance(self.action_space, gym.spaces.Box) else np.ravel(action) % 2
        _, *rest = super().step(0)
        picture = np.zeros((1, 32, 32), np.uint8)
        picture[0, :, :8] = 128 + int(100 * parts[0])
        return picture, *rest


@pytest.mark.parametrize(
    ("space", "kind"),
    [
        (gym.spaces.Box(-1.0, 1.0, (2,)), "R2"),
        (gym.spaces.MultiDiscrete([2, 2], start=[3, 0]), "F1"),
        (gym.spaces.MultiBinary(2), "F1"),
    ],
    ids=["Box", "MultiDiscrete", "MultiBinary"],
)
def test_actions_of_any_kind_are_read_part_by_part(space, kind):
    played = record(make_vec_env(partial(SteeredGame, space), 4), 600, labels=lambda env: {})
    assert played.parts.shape == (600, 2)
    assert kind == "R2" or {*played.parts.ravel()} == {0, 1}
    features = played.observations[:, 0, 0, :1].astype(np.float32)
    action = scores_of(played, features)["action"]
    # The first part is in the picture, and nobody can know the second one.
    first, second = (1.0, 0.0) if kind == "R2" else (1.0, 0.5)
    assert action.kind == kind
    assert action.value == pytest.approx((first + second) / 2, abs=0.12)
    assert (played.actions[1:] >= 0).sum() > 500


def test_the_same_seed_plays_the_same_again_also_where_a_lost_life_ends_an_episode():
    gym.register_envs(pytest.importorskip("ale_py"))
    env = VecTransposeImage(make_atari_env("PongNoFrameskip-v4", 2))
    for inner in env.envs:  # not at the end of a game, where SB3's wrapper would go on
        assert unwrap_wrapper(inner, EpisodicLifeEnv) is not None
    one, other = (record(env, 80, seed=3) for _ in range(2))
    assert np.array_equal(one.observations, other.observations)
    assert all(np.array_equal(one.labels[name], other.labels[name]) for name in one.labels)
    assert not np.array_equal(record(env, 80, seed=4).observations, one.observations)


def test_small_images_are_resized(recording):
    tiny = Recording(recording.observations[:, :, :7, :7], *(getattr(recording, name) for name in REST), SEVEN)
    options = {"backbone": "resnet_mini", "adapter": "conv1x1", "last_stage": "layer3", "pooling": "avg"}
    with pytest.raises(ValueError, match="write image_size="):
        probe(tiny, **options)
    (row,) = probe(tiny, image_size=32, device="auto", **options)
    assert row.scores["column"].value is not None


def test_without_numbers_the_best_f1_of_actions_is_first_and_what_is_not_known_last():
    def row(**scores):
        return {name: Score(value, "R2" if name == "x" else "F1") for name, value in scores.items()}

    marks = [Row("random", "layer1", "avg", "conv1x1", 1, 1.0, row(**scores)).mark for scores in SCORES]
    assert marks[:4] == [-3.0, 0.7, 0.5, 0.2]
    assert np.isnan(marks[4:]).all()


@pytest.mark.parametrize("labels", [tiny_labels, lambda env: {}])
def test_rows_are_ordered_by_their_mark(labels, monkeypatch):
    recording = record(make_vec_env(TinyGame, 4), 200, labels=labels)
    given = iter(SCORES)

    def scores_of(*arguments):
        return {name: Score(value, "R2" if name == "x" else "F1") for name, value in next(given).items()}

    monkeypatch.setattr(sb3_resnet.probing, "scores_of", scores_of)
    rows = probe(
        recording,
        last_stage=["stem", "layer1", "layer2"],
        pooling=["avg", "grid"],
        backbone="resnet_mini",
        adapter="conv1x1",
    )
    assert [row.mark for row in rows[:4]] == [0.7, 0.5, 0.2, -3.0]
    assert np.isnan([row.mark for row in rows[4:]]).all()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"last_stage": "layer9"}, ValueError, "last_stage must be one of .*, got 'layer9'"),
        ({"pooling": "max"}, ValueError, "pooling must be one of"),
        ({"adapter": ["conv"]}, ValueError, "adapter must be one of"),
        ({"backbone": "resnet99"}, ValueError, "backbone must be one of"),
        ({"frame_channels": 2}, ValueError, "frame_channels must be 1"),
        ({"weights": "none.pth"}, FileNotFoundError, "none.pth'?: no such file"),
        ({"last_stage": []}, ValueError, "last_stage names none: write one of stem, .*, or leave it out"),
        ({"pooling": 3}, TypeError, "pooling must be a list of names, got 3"),
    ],
    ids=str,
)
def test_what_cannot_be_probed_is_refused_before_anything_is_played(options, error, words):
    with pytest.raises(error, match=words):
        check_probe(make_vec_env(NeverPlayedTiny, 2), **{"backbone": "resnet_mini", **options})


def test_the_command_checks_before_it_plays(tiny_id, monkeypatch):
    monkeypatch.setattr("sb3_resnet.cli.probe.record", None)
    status, _, error = run_command("probe", "--env", tiny_id, "--weights", "none.pth")
    assert status == 1
    assert "no such file" in error


def test_too_few_episodes_or_steps_are_refused_before_anything_is_encoded(monkeypatch):
    monkeypatch.setattr(sb3_resnet.probing, "features_at", None)
    for envs, steps, words in ((2, 10, "needs at least 3 episodes"), (3, 3, "too few steps to be probed: record st")):
        with pytest.raises(ValueError, match=words):
            probe(record(make_vec_env(TinyGame, envs), steps, labels=tiny_labels), backbone="resnet_mini")
    at_once = record(make_vec_env(partial(TinyGame, length=1), 4), 40, labels=tiny_labels)
    with pytest.raises(ValueError, match="Episodes that are over after one step cannot be probed"):
        probe(at_once, backbone="resnet_mini")


class RepeatingGame(TinyGame):
    """Each episode shows the same pictures."""

    def _observe(self):
        self.frames = np.full(self.observation_space.shape, self.clock, np.uint8)
        self.column = self.clock
        return self.frames


def test_episodes_that_repeat_each_other_are_named():
    repeated = record(make_vec_env(RepeatingGame, 4), 200, labels=tiny_labels)
    options = {"last_stage": "stem", "pooling": "avg", "adapter": "per_frame", "backbone": "resnet_mini"}
    with pytest.warns(UserWarning, match="100% of the observations that are scored were fitted too, since episodes re"):
        probe(repeated, **options)
    noise = np.random.default_rng(0).integers(0, 256, repeated.observations.shape, np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probe(replace(repeated, observations=noise), **options)


def test_names_of_labels_are_strings():
    with pytest.raises(TypeError, match="names of labels must be strings, got 0: write '0'"):
        record(make_vec_env(TinyGame, 4), 60, labels=lambda env: {0: 1.0})


def test_rewards_are_those_of_the_environment_and_the_statistics_of_its_normalizer_stay():
    env = VecNormalize(make_vec_env(TinyGame, 4), norm_obs=False)
    one, two = (record(env, 120, labels=tiny_labels) for _ in range(2))
    raw = record(make_vec_env(TinyGame, 4), 120, labels=tiny_labels)
    for found in (one, two):
        assert np.array_equal(found.labels["reward"], raw.labels["reward"])
    assert env.ret_rms.count == VecNormalize(make_vec_env(TinyGame, 4), norm_obs=False).ret_rms.count
    assert env.training


def test_a_recurrent_model_does_not_play():
    contrib = pytest.importorskip("sb3_contrib")
    env = make_vec_env(TinyGame, 4)
    model = contrib.RecurrentPPO("CnnLstmPolicy", make_vec_env(partial(TinyGame, (4, 36, 36)), 1), n_steps=8)
    with pytest.raises(ValueError, match="RecurrentActorCriticCnnPolicy is recurrent, and each step is played on its"):
        record(env, 60, model=model)


def test_the_command_finds_modules_in_the_current_folder(tiny_id, tmp_path, monkeypatch):
    (tmp_path / "own_labels.py").write_text("def state(env):\n    return {'column': float(env.column)}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*filter(None, sys.path)])
    options = ["--env", tiny_id, "--backbone", "resnet_mini", "--last-stage", "stem", "--pooling", "avg"]
    status, shown, error = run_command("probe", *options, "--steps", 200, "--labels", "own_labels.state")
    assert status == 0, error
    assert "column" in shown
    for path, words in {"own_labels": "no module is named", "own_labels.other": "has no attribute 'other'"}.items():
        status, _, error = run_command("probe", *options, "--labels", path)
        assert status == 1
        assert words in error
        assert "Write package.module.function" in error


def test_files_that_cannot_be_written_are_refused_before_anything_is_played(tiny_id, tmp_path, monkeypatch):
    monkeypatch.setattr("sb3_resnet.cli.probe.record", None)
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "file").touch()
    table = tmp_path / "probe.csv"
    for options, words in {
        ("-o", tmp_path / "folder.csv"): "is a folder: write the name of a file",
        ("-o", tmp_path / "file" / "probe.csv"): "File exists",
        ("--plot", tmp_path / "none" / "probe.png"): "make it first, or write another --plot",
    }.items():
        status, _, error = run_command("probe", "--env", tiny_id, *options)
        assert status == 1
        assert words in error
    status, _, error = run_command("probe", "--env", tiny_id, "-o", table, "--backbone", "resnet99")
    assert status == 1
    assert not table.exists()


def test_memory_of_games_is_read_and_other_environments_have_none():
    ale = pytest.importorskip("ale_py")
    gym.register_envs(ale)
    env = gym.make("PongNoFrameskip-v4")
    env.reset(seed=0)
    for _ in range(80):
        env.step(env.action_space.sample())
    labels = ram_labels(env)
    assert labels.keys() == ADDRESSES["pong"].keys()
    assert labels["ball_x"] > 0
    assert len(ADDRESSES) >= 10
    assert ram_labels(gym.make("CartPole-v1")) == {}


def test_another_environment_with_the_name_of_a_game_has_no_memory():
    env = TinyGame()
    env.spec = gym.envs.registration.EnvSpec("MiniBreakout-v0", kwargs={"game": "breakout"})
    assert ram_labels(env) == {}


def test_the_memory_of_games_in_c_is_not_taken_for_empty():
    pytest.importorskip("ale_py")
    env = VecTransposeImage(make_atari_vec_env("PongNoFrameskip-v4", 2))
    with pytest.raises(
        ValueError, match=r"cannot be read: make them with make_atari_env, or write labels=lambda env: "
    ):
        record(env, 60)
    recording = record(env, 60, labels=lambda env: {}, info_keys=["lives"])
    assert {*recording.labels} == {"lives", "reward"}
    env.close()


@pytest.mark.slow
def test_environments_in_other_processes_are_refused():
    env = SubprocVecEnv([TinyGame], start_method="spawn")
    with pytest.raises(ValueError, match="Labels are read from environments in this process: make a DummyVecEnv"):
        record(VecFrameStack(env, 1), 60, labels=tiny_labels)
    env.close()


class LastGame(TinyGame):
    """The tiny game, or another shape of it, as it comes before SB3 transposes."""

    def __init__(self, shape=(32, 32, 4), dtype=np.uint8):
        super().__init__()
        if dtype == np.float32:
            shape = (64, 64, 3)
        self.observation_space = gym.spaces.Box(0, 255 if dtype == np.uint8 else 1, shape, dtype)

    def _observe(self):
        self.frames = np.zeros((self.observation_space.shape[-1], 32, 32), np.uint8)
        return super()._observe().transpose(1, 2, 0)


class NeverPlayed(LastGame):
    """Has only its space."""

    def reset(self, **kwargs):
        raise AssertionError("it was played")


@pytest.mark.parametrize("call", [record, lambda env: pretrain(env, "w.safetensors")], ids=["record", "pretrain"])
@pytest.mark.parametrize(
    ("env", "words"),
    [
        (NeverPlayed, r"shape \(32, 32, 4\) come channels last: write VecTransposeImage\(env\)"),
        (
            partial(NeverPlayed, (4,)),
            r"Images are needed, a Box of shape \(channels, height, width\), got Box\(0, 255, \(4,",
        ),
        (partial(NeverPlayed, dtype=np.float32), r"Images must come channels first, got shape \(64, 64, 3\)"),
        (DictGame, "at one image, not at a Dict: take the image out in a wrapper"),
    ],
    ids=["last", "vector", "floats", "Dict"],
)
def test_other_than_images_channels_first_is_refused_before_it_is_played(call, env, words):
    with pytest.raises(ValueError, match=words):
        call(make_vec_env(env, 2))


def test_what_sb3_transposes_is_taken():
    recording = record(VecTransposeImage(make_vec_env(LastGame, 2)), 60, labels=tiny_labels)
    assert recording.observations.shape == (60, 4, 32, 32)
    # After the transposition, more channels than columns do not speak against it.
    many = VecFrameStack(VecTransposeImage(make_vec_env(LastGame, 2)), 10)
    assert record(many, 60, labels=tiny_labels).observations.shape == (60, 40, 32, 32)


def test_the_command_prints_a_table_and_writes_all_scores(tiny_id, tmp_path):
    file = tmp_path / "scores" / "probe.csv"
    arguments = ["--env", tiny_id, "--labels", "tests.test_probing.tiny_labels", "--backbone", "resnet_tiny"]
    arguments += ["--last-stage", "layer1", "--pooling", "avg", "--steps", 200, "--n-envs", 4, "-o", file]
    status, text, _ = run_command("probe", *arguments, "--plot", tmp_path / "probe.png", width=200)
    assert status == 0
    assert (tmp_path / "probe.png").read_bytes().startswith(b"\x89PNG")
    assert "per_frame" in text
    assert "conv1x1" in text
    rows = [*csv.DictReader(file.open())]
    assert {row["adapter"] for row in rows} == {"per_frame", "conv1x1"}
    assert all(float(row["column R2"]) <= 1 for row in rows)


def test_a_picture_that_cannot_be_written_is_refused_before_anything_is_played(tiny_id, tmp_path, monkeypatch):
    monkeypatch.setattr("sb3_resnet.cli.probe.record", None)
    for plot, said in ((tmp_path / "none" / "probe.png", "make it first"), (tmp_path / "probe.csv", "names no format")):
        status, _, error = run_command("probe", "--env", tiny_id, "--plot", plot, width=300)
        assert status == 1
        assert said in error


class ThreeGreyFrames(TinyGame):
    """Three channels that are no colours."""

    def __init__(self):
        super().__init__((3, 32, 32))


def test_the_command_asks_whether_three_channels_are_one_image(tmp_path):
    file = tmp_path / "probe.csv"
    gym.register("Three-v0", "tests.test_probing:ThreeGreyFrames")
    arguments = ["--env", "Three-v0", "--labels", "tests.test_probing.tiny_labels", "--backbone", "resnet_mini"]
    arguments += ["--last-stage", "layer1", "--pooling", "avg", "--steps", 200, "--n-envs", 4, "-o", file]
    for options, adapters in (([], ["conv1x1"]), (["--frame-channels", 1], ["conv1x1", "per_frame"])):
        assert run_command("probe", *arguments, *options)[0] == 0
        assert sorted(row["adapter"] for row in csv.DictReader(file.open())) == adapters
    del gym.envs.registration.registry["Three-v0"]


def test_one_grey_frame_is_probed_once():
    grey = record(make_vec_env(lambda: TinyGame((1, 32, 32)), 4), 200, labels=tiny_labels)
    rows = probe(grey, last_stage="layer1", pooling="avg", backbone="resnet_mini")
    assert [row.adapter for row in rows] == ["conv1x1"]


@pytest.mark.parametrize("algorithm", ["dqn", "ppo", "sac", "ddpg"])
def test_the_command_lets_any_model_play(algorithm, tmp_path):
    kwargs = {"buffer_size": 10} if algorithm != "ppo" else {"n_steps": 8, "batch_size": 8}
    env = OneAxis() if algorithm in ("sac", "ddpg") else TinyGame((4, 36, 36))
    policy = {"features_extractor_class": FlattenExtractor, "net_arch": [4]}
    ANY[algorithm]("CnnPolicy", env, policy_kwargs=policy, **kwargs).save(tmp_path / "model.zip")
    gym.register("Any-v0", lambda: type(env)((4, 36, 36)))
    arguments = ["--env", "Any-v0", "--labels", "tests.test_probing.tiny_labels", "--backbone", "resnet_mini"]
    arguments += ["--last-stage", "layer1", "--pooling", "avg", "--steps", 120, "--n-envs", 4]
    status, _, error = run_command("probe", *arguments, "--model", tmp_path / "model.zip")
    assert status == 0, error
    del gym.envs.registration.registry["Any-v0"]


@pytest.mark.parametrize("frames", [None, 4])
def test_the_command_plays_with_the_frames_of_the_model(frames, tmp_path, monkeypatch):
    gym.register("Single-v0", lambda: TinyGame((1, 40, 40)))
    env = VecFrameStack(make_vec_env(partial(TinyGame, (1, 40, 40)), 1), 4)
    policy = {"features_extractor_class": FlattenExtractor, "net_arch": [4]}
    DQN("CnnPolicy", env, policy_kwargs=policy, buffer_size=10).save(tmp_path / "model.zip")
    shapes = []
    monkeypatch.setattr(
        "sb3_resnet.cli.probe.check_probe", lambda game, **_: shapes.append(game.observation_space.shape)
    )
    arguments = ["--env", "Single-v0", "--labels", "tests.test_probing.tiny_labels", "--backbone", "resnet_mini"]
    arguments += ["--last-stage", "layer1", "--pooling", "avg", "--steps", 120, "--n-envs", 4]
    if frames is None:
        arguments += ["--model", tmp_path / "model.zip"]
    else:
        arguments += ["--frame-stack", frames]
    status, _, error = run_command("probe", *arguments)
    del gym.envs.registration.registry["Single-v0"]
    assert status == 0, error
    assert shapes == [(4, 40, 40)]


@pytest.mark.parametrize("option", [("--frame-stack", 0), ("--image-size", 0)])
def test_wrong_numbers_of_the_command_are_refused(option, tiny_id):
    status, _, error = run_command("probe", "--env", tiny_id, *option)
    assert status == 1
    assert option[0].removeprefix("--").replace("-", "_") in error.replace("--frame-stack", "frame_stack")


def test_the_table_shows_classes_where_there_are_no_numbers(tiny_id):
    arguments = ["--env", tiny_id, "--labels", "tests.test_probing.columns_alone", "--backbone", "resnet_mini"]
    arguments += ["--last-stage", "layer1", "--pooling", "avg", "--adapter", "conv1x1", "--steps", 120, "--n-envs", 4]
    status, text, error = run_command("probe", *arguments)
    assert status == 0, error
    assert "mean F1" in text
    assert "mean R" not in text
    assert re.search(r"column 0\.\d\d", text)


def columns_alone(env):
    return {"column": env.column}


class OneAxis(TinyGame):
    """Takes a number in the place of a choice."""

    def __init__(self, shape=(4, 36, 36)):
        super().__init__(shape)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (1,))

    def step(self, action):
        return super().step(int(action[0] > 0))
