import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecFrameStack

import sb3_resnet.pretraining
from sb3_resnet import ResNetExtractor
from sb3_resnet.callbacks import UnfreezeCallback
from sb3_resnet.nn.cards import extractor_arguments, read_card, save_with_card
from sb3_resnet.nn.pretraining import identity
from sb3_resnet.nn.pretraining import settings as settings_of
from sb3_resnet.nn.pretraining.barlow import barlow_loss
from sb3_resnet.nn.pretraining.collapse import CollapseError, spread_and_rank
from sb3_resnet.nn.pretraining.frames import Frames
from sb3_resnet.nn.pretraining.identity import source_of
from sb3_resnet.nn.pretraining.objective import Objective
from sb3_resnet.nn.pretraining.run import Probed, refuse_other
from sb3_resnet.nn.pretraining.settings import Settings
from sb3_resnet.nn.pretraining.trainer import Trainer
from sb3_resnet.pretraining import pretrain
from tests.helpers import CutError, TinyGame, fill, make_actor_critic, make_model, run_command

SPACE = spaces.Box(0, 255, (4, 32, 32), np.uint8)
SMALL = {
    "backbone": "resnet_mini",
    "last_stage": "layer1",
    "frames": 160,
    "held_out": 120,
    "batch_size": 8,
    "warmup": 3,
    "probe_every": 2,
    "updates": 6,
    "dtype": "float32",
}


def column(env):
    return {"column": float(env.column)}


class RGBGame(TinyGame):
    """Its four grey frames, without the oldest, as colours."""

    def __init__(self):
        super().__init__((3, 32, 32))


class TwoRGBGame(TinyGame):
    """Its frames as two RGB images."""

    def __init__(self):
        super().__init__((6, 32, 32))


class OneAxisGame(TinyGame):
    """Takes a number in the place of a choice."""

    def __init__(self):
        super().__init__()
        self.action_space = spaces.Box(-1.0, 1.0, (1,))

    def step(self, action):
        return super().step(int(action[0] > 0))


class OneActionGame(TinyGame):
    """Leaves no choice."""

    def __init__(self):
        super().__init__()
        self.action_space = spaces.Discrete(1)


class StillGame(TinyGame):
    """Shows nothing."""

    def _observe(self):
        super()._observe()
        return np.zeros(self.observation_space.shape, np.uint8)


def small(path, env=TinyGame, **changes):
    options = {**SMALL, **changes}
    return pretrain(make_vec_env(env, 4), path, labels=options.pop("labels", column), **options)


def some_frames(rows=64):
    generator = th.Generator().manual_seed(0)
    # Each episode has a picture of its own, which grows brighter with time.
    pictures = th.rand(4, 1, 4, 4, generator=generator).repeat_interleave(16, 0)[:rows]
    large = th.nn.functional.interpolate(pictures, (32, 32)) * (0.5 + th.arange(rows) % 16 / 32)[:, None, None, None]
    pixels = (255 * large).to(th.uint8)
    parts = (th.arange(rows)[:, None] + th.arange(-3, 1)).clamp(min=0)
    return Frames(pixels, parts, th.arange(rows) // 16, th.arange(rows) % 3)


def make_trainer(**changes):
    return Trainer(Settings(**{**SMALL, **changes}), SPACE, some_frames(), 3)


def assert_equal_files(one, other):
    left, right = load_file(one), load_file(other)
    assert left.keys() == right.keys()
    assert all(th.equal(value, right[key]) for key, value in left.items())
    assert read_card(one) == read_card(other)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A file of a run without a stop."""
    path = tmp_path_factory.mktemp("pretrained") / "tiny.safetensors"
    small(path)
    return path


def test_the_card_says_what_the_weights_were_trained_on(pretrained):
    card = read_card(pretrained)
    assert (card["adapter"], card["channels"], card["frame_channels"]) == ("per_frame", 4, 1)
    assert (card["backbone"], card["last_stage"], card["image_size"]) == ("resnet_mini", "layer1", [32, 32])
    assert card["input_mean"] == [0.485, 0.456, 0.406]
    assert (card["objective"], card["seed"], card["updates"]) == ("atc", 0, 6)
    assert 150 < card["frames"] <= 160
    assert [entry["update"] for entry in card["history"]] == [0, 2, 4, 6]
    assert card["random_score"] == card["history"][0]["score"]
    assert card["kept"] == "best"
    assert card["score"] == max(entry["score"] for entry in card["history"][1:])
    assert card["score"] == pytest.approx(
        np.mean([card["scores"][name] for name in ("column", "delta_column") if card["scores"][name] is not None])
    )
    assert th.__version__.startswith(card["versions"]["torch"])
    assert not Path(f"{pretrained}.run").exists()


def test_weights_and_statistics_are_trained_and_only_stages_up_to_the_last_are_there(pretrained):
    state = load_file(pretrained)
    th.manual_seed(0)
    fresh = ResNetExtractor(SPACE, backbone="resnet_mini", last_stage="layer1", adapter="per_frame").backbone
    assert state.keys() == fresh.state_dict().keys()
    for key, value in fresh.state_dict().items():
        assert not th.equal(state[key], value), key


@pytest.mark.parametrize("build", ["dqn", "qrdqn", "ppo"])
def test_the_file_works_frozen_and_in_phases_and_a_model_outlives_it(build, pretrained, tmp_path):
    path = shutil.copy(pretrained, tmp_path)
    extractor = {"weights": path, **extractor_arguments(read_card(path))}
    make = make_actor_critic if build == "ppo" else make_model
    model = make(build, extractor=extractor)
    state = load_file(path)
    own = extractor_in(model).backbone
    assert all(th.equal(value, state[key]) for key, value in own.state_dict().items())
    model.learn(32)
    assert all(th.equal(value, state[key]) for key, value in own.state_dict().items())
    unfreeze = UnfreezeCallback([{"at_timestep": 8, "unfreeze_from": "layer1"}], verbose=0)
    model.learn(48, callback=unfreeze)
    assert not th.equal(own.state_dict()["layer1.0.conv1.weight"], state["layer1.0.conv1.weight"])
    assert th.equal(own.state_dict()["conv1.weight"], state["conv1.weight"])
    model.save(tmp_path / "model.zip")
    Path(path).unlink()
    loaded = type(model).load(tmp_path / "model.zip")
    assert all(
        th.equal(value, own.state_dict()[key]) for key, value in extractor_in(loaded).backbone.state_dict().items()
    )


def extractor_in(model):
    return getattr(model.policy, "online", model.policy).features_extractor


@pytest.mark.parametrize(
    ("env", "changes"),
    [
        (TinyGame, {}),
        (TinyGame, {"adapter": "conv1x1", "pooling": "avg"}),
        (TinyGame, {"adapter": "inflate", "use_imagenet_norm": False}),
        (TinyGame, {"image_size": 24, "input_mean": [0.1, 0.2, 0.3], "input_std": [0.5, 0.5, 0.4]}),
        (RGBGame, {"pooling": "grid"}),
        (RGBGame, {"frame_channels": 1}),
        (TwoRGBGame, {"adapter": "inflate", "frame_channels": 3}),
        (TwoRGBGame, {"adapter": "inflate"}),
    ],
    ids=["per_frame", "conv1x1", "inflate", "resized", "RGB", "three grey frames", "colours", "mixed colours"],
)
def test_an_extractor_sees_what_the_trunk_was_trained_on(env, changes, tmp_path, monkeypatch):
    trainers = []

    class Kept(Trainer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            trainers.append(self)

    monkeypatch.setattr(sb3_resnet.pretraining, "Trainer", Kept)
    # The first probe of trained weights is the last, so that the file holds the trunk's.
    result = small(tmp_path / "w.safetensors", env, updates=1, probe_every=9, held_out=60, frames=90, **changes)
    space = env().observation_space
    arguments = extractor_arguments(result.card)
    network = ResNetExtractor(
        space, weights=result.path, pooling=changes.get("pooling", "spatial_softmax"), **arguments
    ).eval()
    trunk = trainers[0].trunk.eval()
    seen = th.randint(0, 256, (5, *space.shape), dtype=th.uint8)
    with th.no_grad():
        features = network(network.scale_raw(seen))
        own = trunk(network.preprocessing.as_images(seen)).reshape(5, -1)
    assert th.allclose(features, own, rtol=1e-4, atol=1e-5)
    assert features.std(dim=0).max() > 1e-3
    if network.adapter is not None:
        assert th.equal(network.adapter.weight, trunk.adapter.weight)


@pytest.mark.parametrize("objective", ["atc", "barlow"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_falls_on_frames_that_can_be_told_apart(objective, dtype):
    trainer = make_trainer(objective=objective, dtype=dtype, batch_size=16)
    losses = [trainer.step() for _ in range(16)]
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.1


def test_temporal_contrast_begins_near_a_guess_and_its_momentum_encoder_follows_by_a_hundredth():
    trainer = make_trainer(batch_size=32)
    objective = trainer.objective
    assert objective.gap == 3
    slow = [parameter.clone() for parameter in objective.momentum.parameters()]
    assert trainer.step() == pytest.approx(np.log(32), abs=1.0)
    fast = [*trainer.trunk.parameters(), *objective.code.parameters()]
    for before, after, leader in zip(slow, objective.momentum.parameters(), fast, strict=True):
        assert th.allclose(after, before + 0.01 * (leader - before), atol=1e-7)
        assert not after.requires_grad


def test_barlow_twins_measures_how_far_correlations_are_from_the_identity():
    codes = th.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert float(barlow_loss(codes, 3.0 * codes + 5.0)) == pytest.approx(0.0, abs=1e-6)
    twice = codes[:, :1].repeat(1, 2)
    assert float(barlow_loss(twice, twice)) == pytest.approx(0.005, rel=1e-3)
    assert float(barlow_loss(codes, codes.flip(1))) == pytest.approx(1.005, rel=1e-3)


def test_the_target_of_barlow_twins_stays_as_it_began():
    trainer = make_trainer(objective="barlow")
    before = [parameter.clone() for parameter in trainer.objective.target.parameters()]
    trunk = trainer.trunk.weights()
    trainer.step()
    assert all(map(th.equal, before, trainer.objective.target.parameters()))
    assert not th.equal(trunk["conv1.weight"], trainer.trunk.weights()["conv1.weight"])


def test_the_learning_rate_warms_up_and_gradients_are_clipped():
    trainer = make_trainer(warmup=4, learning_rate=0.01, max_grad_norm=1e-3)
    rates = []
    for _ in range(6):
        rates.append(trainer.learning_rate)
        trainer.step()
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])
    gradients = [
        parameter.grad
        for part in (trainer.trunk, trainer.objective)
        for parameter in part.parameters()
        if parameter.grad is not None
    ]
    assert float(th.cat([gradient.flatten() for gradient in gradients]).norm()) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(("batch_size", "neighbours"), [(16, 1), (16, 8), (15, 8), (16, 10_000)])
def test_a_batch_is_made_of_stretches_of_neighbouring_pairs(batch_size, neighbours):
    trainer = make_trainer(batch_size=batch_size, neighbours=neighbours)
    length = min(neighbours, len(trainer._starts))
    places = set()
    for _ in range(50):
        chosen = trainer._chosen()
        assert len(chosen) == batch_size
        assert 0 <= int(chosen.min()) <= int(chosen.max()) < len(trainer._starts)
        for stretch in chosen.split(length):
            assert stretch.tolist() == [*range(int(stretch[0]), int(stretch[0]) + len(stretch))]
            places.add(int(stretch[0]))
    assert len(places) > 1 or length == len(trainer._starts)


def test_defaults_are_those_of_the_papers():
    chosen = Settings()
    assert (chosen.batch_size, chosen.learning_rate, chosen.warmup, chosen.max_grad_norm) == (512, 1e-3, 1000, 10.0)
    assert (chosen.shift_probability, chosen.neighbours) == (0.1, 1)
    assert (chosen.objective, chosen.minutes, chosen.updates) == ("atc", 30.0, None)
    assert Settings(updates=5).minutes is None


def test_spread_and_effective_rank_have_their_values():
    rng = np.random.default_rng(0)
    spread, rank = spread_and_rank(rng.normal(size=(500, 8)))
    assert spread == pytest.approx(1.0, abs=0.02)
    assert rank == pytest.approx(8.0, abs=0.1)
    line = np.outer(rng.normal(size=500), np.ones(8)) + 10.0
    assert spread_and_rank(3.0 * line) == pytest.approx((3.0, 1.0), rel=0.1)
    assert spread_and_rank(np.ones((50, 4))) == (0.0, 0.0)
    assert spread_and_rank(np.full((50, 4), np.nan)) == (0.0, 0.0)


class Collapsing(Objective):
    """Is content when all features are the same."""

    def loss(self, trunk, pairs):
        return sum(parameter.square().sum() for parameter in trunk.parameters())


def test_a_collapse_ends_the_run_with_its_name_and_other_settings_begin_with_the_same_frames(tmp_path, monkeypatch):
    monkeypatch.setitem(settings_of.OBJECTIVES, "atc", Collapsing)
    path = tmp_path / "w.safetensors"
    with pytest.raises(CollapseError, match=r"collapsed at update \d+: .*\(spread .*effective rank .*smaller learning"):
        small(path, learning_rate=0.02, warmup=0, updates=90, probe_every=30)
    assert not path.exists()
    monkeypatch.undo()
    monkeypatch.setattr(sb3_resnet.pretraining, "play", None)  # frames are there
    assert small(path, learning_rate=1e-3).card["updates"] == 6


def test_frames_that_are_all_alike_are_named_before_an_update(tmp_path):
    with pytest.raises(CollapseError, match=r"collapsed at update 0: .*next to nothing that changes"):
        small(tmp_path / "w.safetensors", StillGame)


def test_a_loss_that_is_not_finite_ends_the_run():
    trainer = make_trainer(learning_rate=1e30, warmup=0)
    with pytest.raises(CollapseError, match=r"The loss is (nan|inf).*smaller learning_rate"):
        [trainer.step() for _ in range(5)]


def cut(*arguments):
    raise CutError


class Stop:
    """Ends the run when it is told so many things."""

    def __init__(self, left):
        self.left = left

    def __call__(self, what, share, figures):
        self.left -= 1
        if self.left < 0:
            raise CutError


@pytest.mark.parametrize("objective", ["atc", "barlow"])
def test_a_run_that_is_stopped_again_and_again_ends_with_the_weights_of_one_without_a_stop(objective, tmp_path):
    whole, pieces = tmp_path / "whole.safetensors", tmp_path / "pieces.safetensors"
    small(whole, objective=objective)
    stops = 0
    for left in (0, 3, 1, 3, 2, 0, 3):  # while playing, between checkpoints, and right after one
        try:
            small(pieces, objective=objective, told=Stop(left))
        except CutError:
            stops += 1
    assert stops >= 5
    th.manual_seed(stops)  # another global generator, which nothing may depend on
    small(pieces, objective=objective)
    assert_equal_files(whole, pieces)
    assert not Path(f"{pieces}.run").exists()


def test_a_stop_in_the_midst_of_writing_a_checkpoint_loses_nothing(pretrained, tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    save, calls = th.save, []

    def broken(state, file):
        calls.append(file)
        save(state, file)
        if len(calls) == 3:
            Path(file).write_bytes(Path(file).read_bytes()[:100])
            raise CutError

    monkeypatch.setattr(th, "save", broken)
    with pytest.raises(CutError):
        small(path)
    monkeypatch.undo()
    small(path)
    assert_equal_files(pretrained, path)


def test_a_stop_between_the_file_and_the_end_changes_nothing(pretrained, tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    monkeypatch.setattr(sb3_resnet.pretraining, "Result", cut)
    with pytest.raises(CutError):
        small(path)
    monkeypatch.undo()
    monkeypatch.setattr(Trainer, "step", None)  # all is done
    Path(f"{path}.run").mkdir(exist_ok=True)
    small(path)
    assert_equal_files(pretrained, path)
    assert not Path(f"{path}.run").exists()


def test_the_same_call_again_returns_the_file_and_trains_nothing(pretrained, monkeypatch):
    monkeypatch.setattr(sb3_resnet.pretraining, "Trainer", None)
    result = small(pretrained)
    assert result.score == read_card(pretrained)["score"]
    assert result.random_score == read_card(pretrained)["random_score"]
    with pytest.raises(
        ValueError, match=r"other arguments \(updates=6 instead of 8\): write the same ones, or another"
    ):
        small(pretrained, updates=8)


def test_a_file_without_the_names_of_newer_arguments_is_of_a_run_with_their_old_values(pretrained, tmp_path):
    path = tmp_path / "w.safetensors"
    card = read_card(pretrained)
    newer = ("neighbours", "shift_probability", "wrappers", "labels_module", "labels_content", "env_kwargs")
    card["arguments"] = {name: value for name, value in card["arguments"].items() if name not in newer}
    save_with_card(path, load_file(pretrained), card)
    with pytest.raises(ValueError, match=r"other arguments \(shift_probability=1.0 instead of 0.1\): write the same"):
        small(path)
    with pytest.raises(ValueError, match=r"other arguments \(neighbours=1 instead of 2\): write the same"):
        small(path, shift_probability=1.0, neighbours=2)
    assert small(path, shift_probability=1.0).card == card
    with pytest.raises(ValueError, match=r"other arguments \(wrappers=\['a'\] instead of \['b'\]\)"):
        refuse_other(path, {"wrappers": ["a"]}, {"wrappers": ["b"]})
    refuse_other(path, {"frames": 160}, {"frames": 160})  # such as the arguments that collected frames depend on


def test_a_folder_of_another_run_is_not_gone_on_from(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(CutError):
        small(path, told=stop_at_update(3))
    with pytest.raises(ValueError, match=r"other arguments \(batch_size=8 instead of 16\)"):
        small(path, batch_size=16)
    with pytest.raises(ValueError, match=r"other arguments \(n_envs=4 instead of 2\)"):
        pretrain(make_vec_env(TinyGame, 2), path, labels=column, **SMALL)


class Labels:
    def __init__(self, value):
        self.value = value

    def __call__(self, env):
        return {"value": float(self.value)}

    read = __call__


class OneWrapper(gym.Wrapper):
    pass


class OtherWrapper(gym.Wrapper):
    pass


def test_models_buffers_and_environments_that_differ_inside_only_are_not_taken_for_each_other():
    def source(env=TinyGame, model=None, buffer=None):
        return source_of(make_vec_env(env, 1), model, buffer, column, [])

    models = [make_model(extractor={"backbone": "resnet_mini"}, seed=seed) for seed in (0, 0, 1)]
    one, same, other = (source(model=fill(model, seed=model.seed)) for model in models)
    assert one == same
    assert [name for name in one if one[name] != other[name]] == ["source"]
    one, same, other = (source(buffer=model.replay_buffer) for model in models)
    assert one == same
    assert [name for name in one if one[name] != other[name]] == ["source"]
    one, same, other = (source(lambda wrap=wrap: wrap(TinyGame())) for wrap in (OneWrapper, OneWrapper, OtherWrapper))
    assert one == same
    assert [name for name in one if one[name] != other[name]] == ["wrappers"]
    env = make_vec_env(TinyGame, 1)
    of_labels = [source_of(env, None, None, labels, ["lives"]) for labels in (column, partial(column))]
    assert [one["labels"] for one in of_labels] == [["column", "lives"], ["partial", "lives"]]
    assert [one["labels_module"] for one in of_labels] == [__name__, "functools"]

    def around(value):
        return lambda env: {"value": float(value)}

    def content(labels):
        return source_of(env, None, None, labels, [])["labels_content"]

    for make in (around, Labels, lambda value: Labels(value).read, lambda value: partial(column, value)):
        assert content(make(1)) == content(make(1)) != content(make(2))
    assert content(column) == ""
    stacked = source_of(VecFrameStack(make_vec_env(TinyGame, 1), 1), None, None, column, [])
    assert stacked["wrappers"] == [f"{VecFrameStack.__module__}.VecFrameStack", *source()["wrappers"]]
    assert source()["wrappers"][-1] == "tests.helpers.TinyGame"


def test_a_file_of_another_model_with_as_many_steps_is_not_returned(tmp_path):
    options = {"updates": 1, "held_out": 60, "frames": 90}
    for seed in (0, 1):
        model = make_model(extractor={"backbone": "resnet_mini"}, seed=seed)
        if seed == 0:
            small(tmp_path / "w.safetensors", model=model, **options)
    with pytest.raises(ValueError, match=r"other arguments \(source='DQN of 0 steps, checksum \w+' instead of 'DQN"):
        small(tmp_path / "w.safetensors", model=model, **options)


def test_frames_that_turn_out_to_be_too_few_stand_in_nobodys_way(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(ValueError, match="write more frames"):
        small(path, frames=12)
    assert small(path).card["updates"] == 6


def test_minutes_count_the_time_of_earlier_attempts(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    step = Trainer.step

    def slow(self):
        now[0] += 10.0
        return step(self)

    monkeypatch.setattr(Trainer, "step", slow)
    path = tmp_path / "w.safetensors"
    options = {"updates": None, "minutes": 1, "probe_every": 1}
    assert small(tmp_path / "whole.safetensors", **options).card["updates"] == 6
    with pytest.raises(CutError):
        small(path, told=stop_at_update(4), **options)
    now[0] += 1e6  # the pause between attempts costs nothing
    assert small(path, **options).card["updates"] == 6


class SlowGame(TinyGame):
    """Each step of one environment takes a second of the clock of the test."""

    now = None

    def step(self, action):
        self.now[0] += 1.0
        return super().step(action)


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(SlowGame, "now", now)
    return now


def test_collecting_ends_when_half_of_the_minutes_are_spent(tmp_path, clock, monkeypatch):
    step = Trainer.step

    def slow(self):
        clock[0] += 50.0
        return step(self)

    monkeypatch.setattr(Trainer, "step", slow)
    # Held-out steps take 480 seconds of 990, and each step of four environments takes 4.
    path = tmp_path / "w.safetensors"
    words = (
        r"Half of the minutes .* spent, and \d+ of 5,000 frames are there: .* Write fewer frames or held_out, or more"
    )
    with pytest.warns(UserWarning, match=words):
        card = small(path, SlowGame, frames=5_000, updates=None, minutes=990 / 60).card
    assert (card["updates"], card["frames"]) == (10, 4 * 4 + 4)
    clock[0] = 0.0
    whole = small(tmp_path / "whole.safetensors", SlowGame, minutes=1e6)
    assert_same_weights(whole.path, small(tmp_path / "never.safetensors", SlowGame).path)


def test_a_batch_is_collected_however_slow_the_environment(tmp_path, clock):
    # The episodes that are held out take all of the time.
    with pytest.warns(UserWarning, match="fewer frames or held_out, or more minutes"):
        card = small(tmp_path / "w.safetensors", SlowGame, frames=5_000, updates=None, minutes=1.0).card
    assert card["frames"] >= 16
    assert card["updates"] == 1


def test_minutes_count_the_time_of_attempts_that_were_killed_while_they_collected(tmp_path, clock):
    path = tmp_path / "w.safetensors"
    options = {"env": SlowGame, "frames": 5_000, "updates": None}

    def cut(what, share, figures):
        if clock[0] > 700:
            raise CutError

    with pytest.raises(CutError):
        small(path, minutes=100, told=cut, **options)
    assert [file.name for file in Path(f"{path}.run").iterdir()] == ["seconds.json"]
    clock[0] = 0.0
    with pytest.warns(UserWarning, match="Half of the minutes"), pytest.raises(CutError):
        # Of 1,700 seconds about 700 are spent, and half of the others are for collecting.
        small(path, minutes=1700 / 60, told=stop_at_update(1), **options)
    assert 490 < clock[0] < 515
    clock[0] = 0.0
    Path(f"{path}.run", "checkpoint.pt").unlink()
    with pytest.warns(UserWarning, match="Half of the minutes"), pytest.raises(CutError):
        # Not of the same run; and frames for which there was no time are collected again.
        small(path, minutes=1700 / 60, told=stop_at_update(1), **options, patience=9)
    assert 845 < clock[0] < 870


def assert_same_weights(one, other):
    left, right = load_file(one), load_file(other)
    assert all(th.equal(value, right[key]) for key, value in left.items())


def test_frames_for_which_there_was_no_time_are_kept_for_their_checkpoint(tmp_path, clock):
    path = tmp_path / "w.safetensors"
    options = {"env": SlowGame, "frames": 5_000, "minutes": 2000 / 60, "updates": 6}
    with pytest.warns(UserWarning, match="Half of the minutes"):
        whole = small(tmp_path / "whole.safetensors", **options)
    clock[0] = 0.0
    with pytest.warns(UserWarning, match="Half of the minutes"), pytest.raises(CutError):
        small(path, told=stop_at_update(3), **options)
    assert_same_weights(small(path, **options).path, whole.path)
    assert not Path(f"{path}.run").exists()


def stop_at_update(number):
    seen = []

    def told(what, share, figures):
        seen.append(what)
        if seen.count("Pretraining") == number:
            raise CutError

    return told


def test_a_run_without_a_better_score_ends_early_and_the_best_weights_are_written(tmp_path, monkeypatch):
    scores = iter([0.1, 0.5, 0.7, 0.6, 0.65, 0.69, 0.9])
    states = []

    def probe_of(held_out, settings):
        def probe(weights):
            states.append(weights)
            return Probed(next(scores), True, {"column": None}, np.random.default_rng(0).normal(size=(50, 4)))

        return probe

    monkeypatch.setattr(sb3_resnet.pretraining, "_probe_of", probe_of)
    result = small(tmp_path / "w.safetensors", updates=100, probe_every=1, patience=3)
    assert (result.card["updates"], result.card["update"], result.score) == (5, 2, 0.7)
    assert th.equal(load_file(result.path)["conv1.weight"], states[2]["conv1.weight"])


@pytest.mark.parametrize(
    ("scores", "update"),
    [([0.1, -np.inf, 0.2, np.nan, 0.15], 2), ([0.1, 0.3, -np.inf, np.nan, np.inf], 1), ([0.1, np.nan, -np.inf], 2)],
)
def test_a_score_that_is_not_finite_never_counts_as_best_where_there_is_a_finite_one(
    scores, update, tmp_path, monkeypatch
):
    given = iter(scores)

    def probe_of(held_out, settings):
        features = np.random.default_rng(0).normal(size=(50, 4))
        return lambda weights: Probed(next(given), True, {"column": None}, features)

    monkeypatch.setattr(sb3_resnet.pretraining, "_probe_of", probe_of)
    result = small(tmp_path / "w.safetensors", updates=len(scores) - 1, probe_every=1)
    assert result.card["update"] == update


def test_a_score_of_the_actions_neither_chooses_weights_nor_ends_the_run(tmp_path, monkeypatch):
    scores = iter([0.5, 0.4, 0.3, 0.2, 0.1])

    def probe_of(held_out, settings):
        features = np.random.default_rng(0).normal(size=(50, 4))
        return lambda weights: Probed(next(scores), False, {"action": None}, features)

    monkeypatch.setattr(sb3_resnet.pretraining, "_probe_of", probe_of)
    result = small(tmp_path / "w.safetensors", updates=4, probe_every=1, patience=1)
    assert (result.card["updates"], result.card["update"], result.score) == (4, 4, 0.1)
    assert result.card["kept"] == "last"


def test_labels_that_are_classes_are_the_score_where_none_is_a_number(tmp_path):
    result = small(tmp_path / "w.safetensors", OneAxisGame, labels=lambda env: {"column": env.column}, updates=2)
    assert result.score == result.card["scores"]["column"]
    assert result.card["kept"] == "best"


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"length": 14}, r"env_kwargs=\{.* instead of \{'length': '14'"),
        ({"steps": 25}, r"env_kwargs=\{.*'25'"),
        ({"labels": lambda env: {"x": float(env.clock)}}, "labels_content=.*clock"),
    ],
    ids=["arguments", "limit", "labels"],
)
def test_a_run_with_other_arguments_of_the_environment_is_told_apart(other, words, tmp_path):
    gym.register("Long-v0", TinyGame, kwargs={"length": 13})

    def run(length=13, steps=20, labels=lambda env: {"x": float(env.column)}):
        wrap = partial(gym.wrappers.TimeLimit, max_episode_steps=steps)
        env = make_vec_env("Long-v0", 4, env_kwargs={"length": length}, wrapper_class=wrap)
        return pretrain(env, tmp_path / "w.safetensors", labels=labels, **SMALL)

    first = run()
    assert run().card == first.card
    with pytest.raises(ValueError, match=f"other arguments .*{words}"):
        run(**other)
    del gym.envs.registration.registry["Long-v0"]


def test_arguments_of_any_kind_become_a_text_that_is_the_same_in_each_process():
    text = identity._text
    assert text({(0, 1): 1.0, 2: "a", "b": None}) == text({"b": None, 2: "a", (0, 1): 1.0})
    assert text({1: [True, b"x"]}) != text({1: [False, b"x"]})
    assert text(np.arange(3)) != text(np.arange(3) + 1)
    assert text([object()]) == "(object)"
    assert identity._content(print) == identity._content(column) == identity._content(partial(column)) == ""
    one, other = (
        identity._content(function) for function in (lambda e: {"x": e.a, "y": 1}, lambda e: {"q": e.a, "z": 1})
    )
    assert one != other


def test_frames_of_a_version_that_told_less_are_gone_on_with(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    with pytest.raises(CutError):
        small(path, told=stop_at_update(3))
    (folder,) = tmp_path.glob("*.run")
    frames = folder / "frames.safetensors"
    with safe_open(frames, "pt") as file:
        metadata = file.metadata()
    older = {name: value for name, value in json.loads(metadata["arguments"]).items() if name != "env_kwargs"}
    save_file(load_file(frames), frames, {**metadata, "arguments": json.dumps(older)})
    monkeypatch.setattr(sb3_resnet.pretraining, "play", None)  # frames are there
    assert small(path).card["updates"] == 6


def test_without_numbers_as_labels_the_action_is_the_score_and_without_any_the_last_weights_are_kept(tmp_path):
    result = small(tmp_path / "a.safetensors", labels=lambda env: {})
    assert result.score == result.card["scores"]["action"]
    assert result.card["kept"] == "last"
    assert result.card["update"] == result.card["updates"]
    numbers = small(tmp_path / "n.safetensors", OneAxisGame, labels=lambda env: {}, updates=2)
    assert numbers.score == numbers.card["scores"]["action"]
    none = small(tmp_path / "b.safetensors", OneActionGame, labels=lambda env: {}, updates=2)
    assert np.isnan(none.score)
    assert none.card["update"] == 2


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"path": "w.pth"}, ValueError, "must end with .safetensors: other files have no room for the card"),
        ({"batchsize": 4}, TypeError, "pretrain has no argument 'batchsize'; did you mean 'batch_size'"),
        ({"objective": "byol"}, ValueError, "objective must be one of 'atc', 'barlow'"),
        ({"updates": 0}, ValueError, "updates must be finite and >= 1"),
        (
            {"labels": 3.0},
            TypeError,
            "labels must be a function of the innermost environment that returns a dict, got 3",
        ),
        ({"minutes": 0}, ValueError, "minutes must be finite and > 0"),
        ({"dtype": "float16"}, ValueError, "dtype must be one of"),
        ({"device": "gpu"}, ValueError, "device must be 'auto', 'cpu' or 'cuda', got 'gpu'"),
        ({"device": None}, ValueError, "device must be 'auto', 'cpu' or 'cuda', got None"),
        ({"held_out": 2}, ValueError, "held_out=2 are too few steps to be probed"),
        ({"frames": 12}, ValueError, "No two observations of an episode are 3 steps apart: write more frames"),
        ({"frames": 10**13}, ValueError, "Frames take .* GB, and .* GB are left: write fewer frames"),
        ({"env": OneAxisGame, "objective": "barlow"}, ValueError, "write objective='atc'"),
        ({"pooling": "spatial_softmax", "last_stage": "layer4"}, ValueError, "too small for a ResNet up to layer4"),
    ],
    ids=lambda value: ",".join(map(str, value)) if isinstance(value, dict) else None,
)
def test_what_cannot_work_is_refused_with_what_to_write(changes, error, words, tmp_path):
    options = {"path": "w.safetensors", "env": TinyGame, **changes}
    with pytest.raises(error, match=words):
        small(tmp_path / options.pop("path"), options.pop("env"), **options)


@pytest.mark.parametrize("gpus", [0, 1])
def test_the_device_is_decided_before_a_frame_is_played(gpus, monkeypatch):
    monkeypatch.setattr(th.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(th.cuda, "is_available", lambda: gpus > 0)
    assert Settings(device="auto").device == ("cuda" if gpus else "cpu")
    assert Settings(device=th.device("cpu")).device == "cpu"
    found = "no such GPU" if gpus else "no GPU"
    with pytest.raises(ValueError, match=f"device='cuda:{gpus}', but PyTorch finds {found}: write device='auto' or"):
        Settings(device=f"cuda:{gpus}")


def test_a_model_plays_and_one_of_other_observations_is_refused(tmp_path):
    model = make_model(extractor={"backbone": "resnet_mini"})
    result = small(tmp_path / "w.safetensors", model=model, updates=1)
    assert re.fullmatch("DQN of 0 steps, checksum [0-9a-f]{8}", result.card["arguments"]["source"])
    with pytest.raises(ValueError, match="give the environment of its training"):
        small(tmp_path / "other.safetensors", RGBGame, model=model)


def test_images_that_are_no_bytes_are_refused(tmp_path):
    env = make_vec_env(lambda: gym.wrappers.TransformObservation(TinyGame(), np.float32, box_of_floats()), 1)
    with pytest.raises(ValueError, match="keeps frames as uint8, and the observations are float32: declare Box"):
        pretrain(env, tmp_path / "w.safetensors")


def box_of_floats():
    return spaces.Box(0.0, 1.0, (4, 32, 32), np.float32)


def test_files_that_are_no_pretraining_are_not_overwritten(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"is not a whole safetensors file .* or delete it"):
        small(path)
    save_file({"conv1.weight": th.zeros(3)}, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="exists and is no file of a pretraining: write another output"):
        small(path)
    assert path.read_bytes() == before


def test_a_policy_plays_as_its_model_does(tmp_path):
    model = make_model(extractor={"backbone": "resnet_mini"})
    cards = [small(tmp_path / f"{n}.safetensors", model=m, updates=1).card for n, m in enumerate((model, model.policy))]
    assert re.match(r"DQNPolicy, checksum \w+|ResNetCnnPolicy, checksum \w+", cards[1]["arguments"]["source"])
    assert cards[0]["score"] == cards[1]["score"]


def test_numbers_of_numpy_are_settings(tmp_path):
    result = small(tmp_path / "w.safetensors", updates=1, frame_channels=np.int64(1), use_imagenet_norm=np.True_)
    assert result.card["arguments"]["frame_channels"] == 1


def test_an_error_before_there_is_anything_to_go_on_from_leaves_no_folder(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(ValueError, match="held_out=2 are too few steps"):
        small(path, held_out=2)
    short = partial(TinyGame, length=2)
    with pytest.raises(ValueError, match="or objective='barlow', for which one step is enough"):
        small(tmp_path / "other.safetensors", short)
    assert [*tmp_path.glob("w.*")] == []
    assert small(tmp_path / "other.safetensors", short, objective="barlow").card["updates"] == 6


def test_a_replay_buffer_gives_the_frames(tmp_path):
    model = make_model(extractor={"backbone": "resnet_mini"})
    model.learn(60)
    result = small(tmp_path / "w.safetensors", replay_buffer=model.replay_buffer, updates=2)
    assert "ReplayBuffer of 60 rows" in result.card["arguments"]["source"]
    assert 60 <= result.card["frames"] <= 80


@pytest.mark.parametrize("objective", ["atc", "barlow"])
def test_a_replay_buffer_of_others_is_refused_before_the_environment_is_played(objective, tmp_path, monkeypatch):
    def filled(space, actions):
        buffer = ReplayBuffer(40, space, actions, device="cpu")
        observation = np.zeros((1, *space.shape), np.uint8)
        for _ in range(40):
            buffer.add(observation, observation, np.zeros((1, 1)), np.zeros(1), np.zeros(1), [{}])
        return buffer

    class PlayedError(Exception):
        pass

    def play(*arguments):
        raise PlayedError

    monkeypatch.setattr(sb3_resnet.pretraining, "_held_out", play)
    same = TinyGame().action_space
    other = filled(RGBGame().observation_space, same)
    with pytest.raises(ValueError, match=r"The replay buffer has Box.*, and the environment Box.*same wrappers"):
        small(tmp_path / "w.safetensors", objective=objective, replay_buffer=other)
    with pytest.raises(
        TypeError, match=r"replay_buffer must be a ReplayBuffer of SB3, got 'm.pkl': load it first, such"
    ):
        small(tmp_path / "w.safetensors", objective=objective, replay_buffer="m.pkl")
    of_dict = DictReplayBuffer(4, spaces.Dict(image=SPACE), same, device="cpu")
    with pytest.raises(ValueError, match="The replay buffer has Dict observations, and pretraining looks at one image"):
        small(tmp_path / "w.safetensors", objective=objective, replay_buffer=of_dict)
    for actions in (spaces.Discrete(same.n + 1), spaces.Discrete(same.n, start=1)):
        error = ValueError if objective == "barlow" else PlayedError
        with pytest.raises(error, match="The replay buffer has the actions Discrete" if error is ValueError else None):
            small(tmp_path / "w.safetensors", objective=objective, replay_buffer=filled(SPACE, actions))
    with pytest.raises(PlayedError):
        small(tmp_path / "w.safetensors", objective=objective, replay_buffer=filled(SPACE, same))


def test_tensorboard_shows_loss_score_and_collapse(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = small(tmp_path / "w.safetensors", tensorboard_log=tmp_path / "board")
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [event.step for event in events.Scalars("pretrain/loss")] == [1, 2, 3, 4, 5, 6]
    scores = [event.value for event in events.Scalars("pretrain/score")]
    assert scores == pytest.approx([entry["score"] for entry in result.card["history"]])
    assert len(events.Scalars("pretrain/effective_rank")) == len(events.Scalars("pretrain/spread")) == 4


def test_a_run_that_goes_on_takes_back_what_it_will_log_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"path": tmp_path / "w.safetensors", "tensorboard_log": tmp_path / "board"}
    with pytest.raises(CutError):
        small(told=stop_at_update(3), **options)
    small(**options)
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [event.step for event in events.Scalars("pretrain/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("pretrain/score")] == [0, 2, 4, 6]


def test_a_missing_tensorboard_is_found_before_anything_is_played(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setattr(sb3_resnet.pretraining, "record", None)
    with pytest.raises(ImportError, match="tensorboard_log needs TensorBoard: pip install"):
        small(tmp_path / "w.safetensors", tensorboard_log=tmp_path / "board")


def test_the_command_says_why_the_last_weights_were_kept(tiny_id, tmp_path):
    options = ["--updates", 2, "--frames", 160, "--held-out", 120, "--batch-size", 8, "--backbone", "resnet_mini"]
    status, text, error = run_command(
        "pretrain", "--env", tiny_id, "-o", tmp_path / "w.safetensors", *options, "--last-stage", "layer1"
    )
    assert status == 0, error
    said = " ".join(text.split())
    assert "the weights of update 2, score" in said
    assert "the last weights were kept. Labels of the state, --labels or --info-key, would choose the best" in said


def test_the_command_collects_pretrains_and_says_how_to_use_the_file_which_probe_and_check_take(tiny_id, tmp_path):
    path = tmp_path / "tiny.safetensors"
    options = [
        *("--updates", 3, "--frames", 160, "--held-out", 120, "--batch-size", 8, "--backbone", "resnet_mini"),
        *("--last-stage", "layer1", "--labels", "tests.test_pretraining.column", "--n-envs", 4),
    ]
    status, text, error = run_command("pretrain", "--env", tiny_id, "-o", path, *options)
    assert status == 0, error
    said = " ".join(text.split())
    assert "160 frames of 32x32 and 120 held-out observations take 0.7 MB" in said
    assert "The network's activations come on top: about 2 GB for a batch of 512" in said
    used = f"weights='{path}', backbone='resnet_mini', last_stage='layer1', adapter='per_frame'"
    assert f"Use: features_extractor_kwargs=dict({used}, pooling='spatial_softmax')" in " ".join(text.split())
    assert "random weights had" in text
    csv_file = tmp_path / "probe.csv"
    arguments = ["--env", tiny_id, "--labels", "tests.test_pretraining.column", "--steps", 120, "--n-envs", 4]
    arguments += ["--backbone", "resnet_mini", "--weights", path, "--weights", "random", "-o", csv_file]
    assert run_command("probe", *arguments, "--pooling", "avg")[0] == 0
    rows = [(row["weights"], row["last_stage"], row["adapter"]) for row in csv.DictReader(csv_file.open())]
    assert {row for row in rows if row[0] == str(path)} == {(str(path), "layer1", "per_frame")}
    assert len([row for row in rows if row[0] == "random"]) == 8
    used = ["--extractor-kwarg", f"weights={path}", "--extractor-kwarg", "last_stage=layer1", "--backbone"]
    check = ["check", "--env", tiny_id, "--device", "cpu", *used, "resnet_mini", "-n", 10_000, "--batch-size", 4]
    status, text, _ = run_command(*check, "--extractor-kwarg", "adapter=per_frame")
    assert status == 0, text
    status, text, _ = run_command(*check)
    assert status == 1
    assert "write adapter='per_frame'" in " ".join(text.split())


def test_each_option_of_the_command_is_an_argument_of_pretrain(tiny_id, tmp_path, monkeypatch):
    given = {
        "minutes": 2.5, "updates": 7, "objective": "barlow", "backbone": "resnet_mini", "last_stage": "layer1",
        "adapter": "per_frame", "pooling": "avg", "frame_channels": 1, "image_size": 48, "frames": 170,
        "held_out": 130, "batch_size": 8, "neighbours": 2, "shift_probability": 0.25, "learning_rate": 2e-3,
        "warmup": 3, "probe_every": 4, "patience": 5, "dtype": "float32", "seed": 9, "epsilon": 0.3,
    }  # fmt: skip
    others = {"tensorboard_log": tmp_path / "board", "info_key": "place", "no_imagenet_norm": None, "n_envs": 3}
    received = {}

    def pretrain(env, path, **arguments):
        received.update(arguments, path=path, n_envs=env.num_envs)
        raise ValueError("seen")

    monkeypatch.setattr("sb3_resnet.cli.pretrain.pretrain", pretrain)
    words = []
    for name, value in {**given, **others}.items():
        words += [f"--{name.replace('_', '-')}", *([] if value is None else [value])]
    assert "seen" in run_command("pretrain", "--env", tiny_id, "-o", tmp_path / "w.safetensors", *words)[2]
    assert {name: received[name] for name in given} == given
    assert (received["path"], received["n_envs"]) == (tmp_path / "w.safetensors", 3)
    assert received["use_imagenet_norm"] is False
    assert [*received["info_keys"]] == ["place"]
    assert received["tensorboard_log"] == tmp_path / "board"


def test_the_command_takes_three_grey_frames(tmp_path):
    gym.register("ThreeGrey-v0", RGBGame)
    options = ["--updates", 1, "--frames", 160, "--held-out", 120, "--batch-size", 8, "--backbone", "resnet_mini"]
    options += ["--last-stage", "stem", "--labels", "tests.test_pretraining.column", "--n-envs", 4]
    start = ("pretrain", "--env", "ThreeGrey-v0", "-o", tmp_path / "w.safetensors", *options)
    status, text, error = run_command(*start, "--frame-channels", 1)
    assert status == 0, error
    assert "adapter='per_frame', frame_channels=1" in " ".join(text.split())
    del gym.envs.registration.registry["ThreeGrey-v0"]


def test_the_command_reads_a_replay_buffer_and_code_in_it_needs_trust(tiny_id, tmp_path):
    model = make_model(extractor={"backbone": "resnet_mini"}, replay_buffer_class=ReplayBuffer)
    model.learn(60)
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    path = tmp_path / "w.safetensors"
    options = ["--updates", 1, "--held-out", 120, "--batch-size", 8, "--backbone", "resnet_mini", "--n-envs", 4]
    options += ["--last-stage", "stem", "--labels", "tests.test_pretraining.column"]
    start = ("pretrain", "--env", tiny_id, "-o", path, *options)
    status, _, error = run_command(*start, "--replay-buffer", tmp_path / "buffer.pkl")
    assert status == 0, error
    trap = tmp_path / "trap.pkl"
    trap.write_bytes(b"cposix\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    start = ("pretrain", "--env", tiny_id, "-o", tmp_path / "other.safetensors", *options)
    status, _, error = run_command(*start, "--replay-buffer", trap)
    assert status == 1
    assert "--trust" in error
    assert not (tmp_path / "ran").exists()


SCRIPT = """
import sys
import torch as th
th.set_num_threads(1)
from stable_baselines3.common.env_util import make_vec_env
from sb3_resnet.pretraining import pretrain
from tests.helpers import TinyGame
from tests.test_pretraining import column
pretrain(make_vec_env(TinyGame, 4), sys.argv[1], labels=column, backbone="resnet_mini", last_stage="layer1",
         frames=3000, held_out=200, batch_size=16, warmup=3, probe_every=4, updates=160)
"""


@pytest.mark.slow
def test_killed_at_ten_random_moments_it_ends_with_the_weights_of_a_run_without_a_stop(tmp_path):
    root = Path(__file__).parent.parent
    whole, pieces = tmp_path / "whole.safetensors", tmp_path / "pieces.safetensors"

    def start(path):
        return subprocess.Popen([sys.executable, "-c", SCRIPT, str(path)], cwd=root)

    began = time.monotonic()
    assert start(whole).wait() == 0
    length = time.monotonic() - began
    rng = np.random.default_rng(0)
    kills = 0
    for _ in range(60):
        process = start(pieces)
        try:
            process.wait(timeout=float(rng.uniform(0.4, 0.9)) * length if kills < 10 else None)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        assert process.returncode == 0
        if kills >= 10:
            break
        # It got there before ten kills: once more, from the start.
        pieces.unlink()
    assert kills >= 10
    assert_equal_files(whole, pieces)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".writing")] == []
