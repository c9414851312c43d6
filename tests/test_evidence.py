"""The suite of benchmarks/atari.py: the same results each time, whatever kills it, and a report that claims no more."""

import dataclasses
import importlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import torchvision
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_resnet.callbacks import FeatureCacheCallback
from sb3_resnet.nn import cards
from tests.helpers import make_model, observations

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "atari.py"
sys.path.insert(0, str(SCRIPT.parent))
from evidence import (  # noqa: E402  # its folder has to be on the path first
    agent,
    arms,
    budgets,
    commands,
    evaluation,
    games,
    pong,
    recording,
    results,
    runs,
    spec,
    statistics,
    suite,
    table,
    tuning,
)
from evidence import report as reports  # noqa: E402

NEEDS_WEIGHTS = {name for name, arm in arms.ARMS.items() if arm.weights}


@pytest.fixture
def _rliable(monkeypatch):
    """With fewer bootstrap samples. Skips where the extra is not installed, or not with the pandas that it needs."""
    try:
        importlib.import_module("rliable.library")
    except Exception as error:
        pytest.skip(f"pip install -e '.[evidence]' ({type(error).__name__}: {error})")
    monkeypatch.setattr(statistics, "REPS", 100)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """What each arm trains with, read from its model."""
    file = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    th.manual_seed(0)
    th.save(torchvision.models.resnet18().state_dict(), file)
    budget = budgets.budget_of("smoke")
    found = {}
    for arm in arms.ARMS:
        env = DummyVecEnv([lambda: FakeImageEnv(action_dim=6, screen_height=84, screen_width=84, n_channels=4)] * 8)
        weights = str(file) if arm in NEEDS_WEIGHTS else None
        model = arms.build(arm, env, budget, 0, 1e-4, weights)
        found[arm] = arms.resolved(model, arm, "atari", budget, 1e-4, weights)
    return found


@pytest.mark.slow
def test_reported_arms_differ_in_the_trunk_alone(settings):
    assert {*games.SUITES["atari"].arms} < {*settings} == {*arms.ARMS}
    ours = settings["nature_head"]
    for arm, found in settings.items():
        assert found["shared"] == ours["shared"], arm
        assert found["learning_rate"] == ours["learning_rate"]
        assert {*found} == {"shared", "head", "trunk", "learning_rate"}
        if arm != "nature":
            assert found["head"] == ours["head"] == ["FeatureStandardizer", "Linear(256)", "ReLU", "Linear(6)"], arm
    # That one is SB3's own policy, as SB3 has it.
    assert settings["nature"]["head"] == ["Linear(6)"]
    trunks = [json.dumps(found["trunk"], sort_keys=True) for arm, found in settings.items() if arm != "nature"]
    same_file = {"pretrained": "imagenet"}  # both were given one file here
    assert len({*trunks}) == len(trunks) - 2 * len(same_file)


def test_what_is_shared_is_read_from_the_model_and_holds_what_decides_learning(settings):
    shared = settings["random_frozen"]["shared"]
    assert shared["optimizer"] == {
        **{"class": "Adam", "weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8},
        **{"amsgrad": False, "maximize": False, "fused": True},
    }
    assert (shared["gamma"], shared["n_steps"], shared["batch_size"]) == (0.99, 3, 32)
    assert shared["updates per environment step"] == 1 / 8
    assert shared["evaluation"] == {"every": 4_000, "episodes": 1, "epsilon": 0.01, "rewards": "raw"}
    env = DummyVecEnv([FakeImageEnv] * 8)
    model = arms.build("nature", env, budgets.budget_of("smoke"), 0, 1e-4, None)
    model.gamma, model.policy.optimizer.param_groups[0]["eps"] = 0.5, 1e-3
    changed = arms.resolved(model, "nature", "atari", budgets.budget_of("smoke"), 1e-4, None)["shared"]
    assert (changed["gamma"], changed["optimizer"]["eps"]) == (0.5, 1e-3)


def test_no_arm_that_needs_weights_trains_with_random_ones(tmp_path, capsys):
    env = DummyVecEnv([FakeImageEnv] * 8)
    for arm in NEEDS_WEIGHTS:
        with pytest.raises(ValueError, match=f"{arm} needs a weights file"):
            arms.build(arm, env, budgets.budget_of("smoke"), 0, 1e-4, None)
    words = ["run", "--budget", "smoke", "--game", "Pong", "--learning-rate", "1e-4", "--results", str(tmp_path)]
    assert commands.main([*words, "--arm", "imagenet_frozen"]) == 1
    assert "imagenet_frozen on Pong needs --imagenet FILE" in capsys.readouterr().err
    run = spec.Run("atari", "smoke", "Pong", "imagenet_frozen", 0, 5_000, 1e-4, "some/r18.pth")
    assert run.options()[-2:] == ["--imagenet", "some/r18.pth"]
    assert run.command.endswith("--imagenet r18.pth")


def test_a_result_says_how_its_trunk_was_pretrained(tmp_path):
    file = tmp_path / "boxing.safetensors"
    card = dict.fromkeys((*cards.CHECKED, "observed_size"))
    card |= {"backbone": "resnet18", "last_stage": "layer2", "env": "Boxing", "frames": 50_000, "seed": 3}
    cards.save_with_card(file, {"a": th.zeros(1)}, {**card, "arguments": {"minutes": 15.0, "labels": ["none"]}})
    found = arms.provenance(str(file))
    assert (found["file"], found["sha256"]) == ("boxing.safetensors", arms.sha256(str(file)))
    told = {"env": "Boxing", "frames": 50_000, "seed": 3, "minutes": 15.0, "labels": ["none"]}
    assert found["pretraining"] == told


def test_the_budgets_compare_at_equal_update_ratios():
    for name in ("cpu", "gpu"):
        budget = budgets.BUDGETS[name]
        assert budget.updates_per_rollout == games.N_ENVS  # an update per step
        assert (budget.eval_every, budget.episodes) == (10_000, 20)
    assert dataclasses.replace(budgets.BUDGETS["quarter"], updates_per_rollout=games.N_ENVS) == budgets.BUDGETS["cpu"]
    assert 4 * budgets.BUDGETS["quarter"].updates_per_rollout == games.N_ENVS
    with pytest.raises(ValueError, match="steps must be a multiple of 8"):
        budgets.budget_of("cpu", 1001)


def test_games_are_not_those_that_rates_are_chosen_on():
    for domain in games.SUITES.values():
        assert not {*domain.games} & {*domain.tuning}
        assert len(domain.arms) >= 3
    assert len(games.SUITES["atari"].games) >= 4
    assert {*games.SUITES["atari"].games, *games.SUITES["atari"].tuning} <= {*games.SCORES}


def test_arms_without_their_weights_are_skipped_with_a_word(tmp_path):
    (tmp_path / "pong.safetensors").write_bytes(b"")
    rates = {arm: [1e-4] for arm in games.SUITES["atari"].arms}
    common = ("atari", "cpu", 100_000, [*games.SUITES["atari"].arms], ["Pong", "Boxing"], [0, 1], rates)
    found, skipped = suite.runs_of(*common, {"Pong": str(tmp_path / "pong.safetensors")}, None)
    assert {run.game for run in found if run.arm == "pretrained_frozen"} == {"Pong"}
    assert len(found) == 2 * (2 * 4 + 2)
    assert "skipped: pretrained_phases on Boxing needs --weights Boxing=FILE (sb3-resnet pretrain makes one)" in skipped
    assert "skipped: imagenet_frozen on Pong needs --imagenet FILE" in skipped
    assert len(skipped) == 6
    with pytest.raises(FileNotFoundError, match=r"none\.pth is no file"):
        suite.runs_of(*common, {}, "none.pth")
    with pytest.raises(ValueError, match="--arms must be of nature, "):
        suite.runs_of("atari", "cpu", 8, ["natur"], ["Pong"], [0], rates, {}, None)
    with pytest.raises(ValueError, match="'Pongg' has no human score"):
        suite.runs_of("atari", "cpu", 8, ["nature"], ["Pongg"], [0], rates, {}, None)


def test_an_evaluation_encodes_each_frame_once_and_acts_as_the_network_does():
    model = make_model(extractor={"backbone": "resnet_mini", "adapter": "per_frame"})
    extractor = model.policy.online.features_extractor
    frames = np.random.default_rng(0).integers(0, 256, (9, 3, 1, 32, 32), dtype=np.uint8)
    newest = evaluation.NewestFrames(extractor)
    for step in range(6):
        stacks = np.concatenate([*frames[step : step + 4]], axis=1)
        if step == 4:
            stacks[1] = frames[8, 1]  # another game begins in the second environment
        before = extractor.encoder.images
        entries = newest.encode(th.as_tensor(stacks)).entries
        # After the other game's first observation, its next one is new again as a whole.
        assert extractor.encoder.images - before == {0: 12, 4: 6, 5: 6}.get(step, 3)
        with th.no_grad():
            expected = extractor(extractor.scale_raw(th.as_tensor(stacks)))
        assert th.allclose(entries, expected, atol=1e-5)


def test_an_evaluation_counts_whole_games_and_serves_after_each_lost_life(monkeypatch):
    class Idle:
        """Never presses FIRE, without which a lost ball is not replaced."""

        def predict(self, observation, *args, **kwargs):
            return np.full(len(observation), 2), None

    lives, whole = [], []
    make = evaluation.make_env

    def watched(*args, **kwargs):
        env = make(*args, **kwargs)
        step = env.step_wait

        def note():
            found = step()
            ended = [info for info, done in zip(found[3], found[2], strict=True) if done]
            lives.extend(info["lives"] for info in ended)
            whole.extend(info["episode"]["r"] for info in ended if "episode" in info)
            return found

        env.step_wait = note
        return env

    monkeypatch.setattr(evaluation, "make_env", watched)
    monkeypatch.setattr(evaluation, "EpsilonGreedy", lambda model, seed: Idle())
    returns = evaluation.evaluate(SimpleNamespace(policy=None), "atari", "Breakout", "nature", 2, 0)
    assert len(returns) == 2
    assert [*map(float, whole[:2])] == returns
    assert lives.count(0) >= 2
    assert len(lives) > 2 * lives.count(0)  # those lost before the last of a game


def test_what_a_checkpoint_lacks_is_encoded_before_the_clock_runs():
    class Encode(BaseCallback):
        def _on_rollout_start(self):
            if self.num_timesteps == 24:  # none of these steps is encoded yet
                recording.encode_stored(model)
                done.append(len(model.replay_buffer.shared.cache))

        def _on_step(self):
            return True

    done = []
    model = make_model(extractor={"backbone": "resnet_mini", "adapter": "per_frame"})
    model.learn(24)
    model.learn(8, callback=[Encode(), FeatureCacheCallback()], reset_num_timesteps=False)
    shared = model.replay_buffer.shared
    stored = np.unique(shared.image_ids(model.replay_buffer.observations.obs_ids[:24].ravel()))
    assert shared.cache.has(stored).all()
    assert done[0] >= len(stored)


def test_random_actions_of_an_evaluation_are_its_own():
    model = make_model(extractor={"backbone": "resnet_mini"})
    images = observations(model, 500)
    greedy, _ = model.predict(images, deterministic=True)
    state = np.random.get_state()[1].copy()
    actions, _ = evaluation.EpsilonGreedy(model, 0).predict(images)
    again, _ = evaluation.EpsilonGreedy(model, 0).predict(images)
    assert (np.random.get_state()[1] == state).all()
    assert (actions == again).all()
    assert 0 < (actions != greedy).mean() < 0.02


def result(folder, arm, game, seed, returns, steps=20_000, rate=1e-4, ratio=1.0, **others):
    """A result file and its times, as a run writes them: one evaluation after each half of the steps."""
    run = spec.Run("atari", "cpu", game, arm, seed, steps, rate, **others)
    log = recording.Log(steps=steps)
    for index, value in enumerate(returns):
        step = steps * (index + 1) // len(returns)
        log.evaluations.append({"step": step, "returns": [value]})
        log.seconds.append([step, 60.0 * index, 70.0 * index, 90.0 * index])
    shared = {"evaluation": {"every": 10_000, "episodes": 1, "epsilon": 0.01}, "updates per environment step": ratio}
    shared |= {"n_steps": 3, "batch_size": 32, "optimizer": {"class": "Adam"}}
    path = folder / run.folder / f"{run.name}.json"
    results.write_result(run, path, log, {"shared": shared})
    return path


def fill(folder, share, seeds=3, spread=0.02, some_games=("Boxing", "Krull")):
    """Results whose normalised scores are those of ``share`` by arm, give or take ``spread``."""
    random = np.random.default_rng(0)
    for (arm, mean), game, seed in itertools.product(share.items(), some_games, range(seeds)):
        low, high = games.SCORES[game]
        scores = [half * mean + spread * random.uniform(-1, 1) for half in (0.5, 1.0)]
        result(folder, arm, game, seed, [low + (high - low) * score for score in scores])


@pytest.mark.usefixtures("_rliable")
@pytest.mark.slow
def test_the_report_says_first_what_won_by_how_much_and_what_lost(tmp_path):
    fill(tmp_path, {"nature": 0.2, "nature_head": 0.11, "random_frozen": 0.6})
    page = tmp_path / "page.md"
    page.write_text("# Title\n<!-- report: atari cpu -->\nold\n<!-- end of report: atari cpu -->\nafter\n")
    text = reports.report(tmp_path / "atari" / "cpu", "atari", page=page)
    first = page.read_text().splitlines()[2:5]
    found = json.loads((tmp_path / "atari" / "cpu" / "report.json").read_text())
    iqm = found["iqm"]["last"]
    for line, control, words in (
        (first[0], "nature_head", "the same head: what sees is all that differs"),
        (first[1], "nature", "as SB3 has it"),
    ):
        won = (
            rf"\*\*Won\*\* over `{control}` \({words}\), IQM 0\.\d+ \[0\.\d+, 0\.\d+\]: "
            r"`random_frozen` by (.+?) \[(.+?), (.+?)\], IQM 0\.\d+ "
        )
        by, low, high = map(float, re.match(won, line).groups())
        assert low < by < high
        assert by == pytest.approx(iqm["random_frozen"]["value"] - iqm[control]["value"], abs=1e-3)
        assert found["probability of such a difference by chance"][f"random_frozen over {control}"] < 0.03
    assert "**Nothing was shown to lose** to it. No arm is left undecided." in first[0]
    assert re.search(r"\*\*Lost\*\* to it: `nature_head` by -0\.\d+ \[", first[1])
    assert first[2].startswith("**Measured:** last evaluation, 3 seeds x 2 games, 20,000 steps")
    assert found["verdict"] == {
        "nature_head": {"won": ["random_frozen"], "lost": [], "open": []},
        "nature": {"won": ["random_frozen"], "lost": ["nature_head"], "open": []},
    }
    assert found["probability of improvement"]["random_frozen over nature"]["value"] == 1.0
    assert found["command"] == "python benchmarks/atari.py report --suite atari --budget cpu"
    # Each table and picture says how many seeds, and each link leads somewhere.
    assert text.count("3 seeds x 2 games") == 7
    for place, written in ((tmp_path / "atari" / "cpu", text), (tmp_path, page.read_text())):
        links = re.findall(r"\]\(([^)]+)\)", written)
        assert len(links) == 24
        assert all((place / link).is_file() for link in links if "://" not in link)
    assert page.read_text().startswith("# Title\n<!-- report: atari cpu -->\n**Won** over ")
    assert page.read_text().endswith("<!-- end of report: atari cpu -->\nafter\n")
    assert "old" not in page.read_text()


@pytest.mark.usefixtures("_rliable")
def test_where_intervals_overlap_the_report_says_that_nothing_was_shown(tmp_path):
    fill(tmp_path, {"nature": 0.2, "random_frozen": 0.32}, spread=0.2)
    first = reports.report(tmp_path / "atari" / "cpu", "atari").splitlines()[:4]
    assert first[0].startswith("**Nothing was shown to win** over `nature` (as SB3 has it), IQM 0.")
    assert "`nature_head` is not among them, so what sees and the head are not told apart" in first[3]
    assert "can show nothing" not in first[3]
    assert first[1].startswith("**Nothing was shown to lose**")
    assert first[2].startswith("**Nothing was shown** of `random_frozen` by 0.")
    assert "Won" not in "".join(first)


@pytest.mark.usefixtures("_rliable")
def test_the_mean_of_all_evaluations_may_decide(tmp_path):
    low, high = games.SCORES["Boxing"]
    for arm, first in (("random_frozen", 0.0), ("pretrained_frozen", 0.5)):
        for seed in range(5):
            scores = [first + 0.01 * seed, 0.6 + 0.01 * seed]  # sooner, and no better in the end
            result(tmp_path, arm, "Boxing", seed, [low + (high - low) * score for score in scores])
    folder = tmp_path / "atari" / "cpu"
    assert reports.report(folder, "atari").startswith("**Nothing was shown to win** over `random_frozen`")
    text = reports.report(folder, "atari", kind="mean")
    assert text.startswith("**Won** over `random_frozen`, IQM 0.32")
    assert "**Measured:** mean of all evaluations, 5 seeds x 1 game" in text
    found = json.loads((folder / "report.json").read_text())
    assert found["score that decides"] == "mean of all evaluations"
    assert found["command"].endswith("--score mean")


@pytest.mark.usefixtures("_rliable")
def test_one_seed_shows_nothing_however_large_the_difference(tmp_path):
    fill(tmp_path, {"nature": 0.0, "random_frozen": 0.9}, seeds=1)
    text = reports.report(tmp_path / "atari" / "cpu", "atari")
    assert text.startswith("**Nothing was shown to win** over `nature`")
    assert "so few runs can show nothing, however far apart they are" in text.splitlines()[3]
    assert "one seed: no interval" in text.splitlines()[0]
    found = json.loads((tmp_path / "atari" / "cpu" / "report.json").read_text())
    assert found["iqm"]["last"]["nature"]["low"] is None
    assert found["verdict"]["nature"]["open"] == ["random_frozen"]


def test_the_verdict_needs_intervals_apart_and_a_difference_that_chance_does_not_make():
    interval = statistics.Interval
    iqm = {"nature": interval(0.3, 0.2, 0.4), "scratch": interval(0.1, 0.0, 0.19)}
    iqm |= {name: interval(0.55, 0.41, 0.6) for name in ("random_frozen", "pretrained_frozen")}
    iqm |= {"nature_head": interval(0.5, 0.39, 0.6)}
    chances = {"scratch": 0.001, "random_frozen": 0.04, "pretrained_frozen": 0.06, "nature_head": 0.01}
    found = statistics.verdict(iqm, {(arm, "nature"): chance for arm, chance in chances.items()})
    assert [*found] == ["nature"]
    assert (found["nature"]["won"], found["nature"]["lost"]) == (["random_frozen"], ["scratch"])
    assert found["nature"]["open"] == ["pretrained_frozen", "nature_head"]


def test_each_arm_is_compared_with_each_control_and_the_controls_once():
    pairs = [("random_frozen", "nature_head"), ("nature_head", "nature"), ("random_frozen", "nature")]
    assert statistics.pairs_of(["nature", "nature_head", "random_frozen"]) == pairs
    assert statistics.pairs_of(["nature", "scratch"]) == [("scratch", "nature")]
    assert statistics.pairs_of(["random_frozen", "scratch"]) == [("scratch", "random_frozen")]


@pytest.mark.parametrize(
    ("seeds", "some_games", "tests", "decides"),
    [
        *((2, 1, 1, False), (3, 1, 1, False), (4, 1, 1, False), (5, 1, 5, False), (2, 2, 1, False)),
        *((5, 1, 1, True), (3, 2, 7, True), (3, 4, 9, True)),
    ],
)
def test_what_cannot_decide_never_does(seeds, some_games, tests, decides):
    by_arm = {"nature": np.zeros((seeds, some_games)), "scratch": np.ones((seeds, some_games))}
    (chance,) = statistics.chances(by_arm).values()  # of arms as far apart as any can be
    assert statistics.can_decide(seeds, some_games, tests) == decides
    if not decides:
        assert tests * chance >= statistics.CHANCE


def test_arms_that_are_alike_seldom_differ():
    random = np.random.default_rng(0)
    alike = [statistics.chances({arm: random.normal(size=(3, 4)) for arm in arms.ARMS}) for _ in range(20)]
    assert sum(min(found.values()) < statistics.CHANCE for found in alike) <= 2
    few = statistics.chances({"nature": np.zeros((3, 1)), "scratch": np.ones((3, 1))})
    assert few["scratch", "nature"] == pytest.approx(
        2 / 20, abs=0.01
    )  # 20 ways to deal out six runs, and two are as far apart
    one = statistics.chances({"nature": np.zeros((1, 4)), "scratch": np.ones((1, 4))})
    assert one["scratch", "nature"] > statistics.CHANCE


@pytest.mark.usefixtures("_rliable")
def test_interquartile_means_leave_out_both_ends():
    found = statistics.interquartile_means({"a": np.array([[0.0, 1.0], [1.0, 100.0]])})["a"]
    assert found.value == 1.0
    assert found.low <= found.value <= found.high


def test_only_what_all_arms_have_is_compared(tmp_path):
    fill(tmp_path, {"nature": 0.1, "random_frozen": 0.5}, seeds=2)
    alone = result(tmp_path, "nature", "Boxing", 5, [1.0, 1.0])
    result(tmp_path, "nature", "Assault", 0, [300.0, 300.0])
    result(tmp_path, "nature", "Boxing", 0, [1.0, 1.0], steps=8_000)
    one_more_arm = result(tmp_path, "scratch", "Boxing", 0, [50.0, 50.0])
    for arm in ("nature", "random_frozen"):
        result(tmp_path, arm, "Pong", 0, [21.0, 21.0])  # a game for tuning
    folder, suite_ = tmp_path / "atari" / "cpu", games.SUITES["atari"]
    (folder / ".writing-1-Boxing-nature-20000-s7.json").write_text("{")
    found = table.read(folder, suite_)
    assert (found.steps, found.arms, found.seeds) == (20_000, ("nature", "random_frozen"), (0, 1))
    assert found.games == ("BoxingNoFrameskip-v4", "KrullNoFrameskip-v4")
    tuning_games = ("Pong-nature-20000-s0.json", "Pong-random_frozen-20000-s0.json")
    assert sorted(found.left_out) == sorted(
        ["Assault-nature-20000-s0.json", alone.name, one_more_arm.name, *tuning_games]
    )
    assert table.read(folder, suite_, 8_000).arms == ("nature",)
    assert table.read(folder, suite_, arms=["nature", "scratch"]).games == ("BoxingNoFrameskip-v4",)
    assert table.read(folder, suite_, games=["Pong"]).games == ("PongNoFrameskip-v4",)
    with pytest.raises(ValueError, match=r"no game of Krull has the same seed of all arms \(nature, scratch\)"):
        table.read(folder, suite_, arms=["nature", "scratch"], games=["Krull"])
    with pytest.raises(FileNotFoundError, match="no results of 16 steps"):
        table.read(folder, suite_, 16)
    with pytest.raises(FileNotFoundError, match=r"run `python benchmarks/atari\.py` first"):
        table.read(tmp_path / "none", suite_)


def test_arms_with_other_settings_are_not_compared(tmp_path):
    fill(tmp_path, {"nature": 0.1})
    for game, seed in itertools.product(("Boxing", "Krull"), range(3)):
        result(tmp_path, "random_frozen", game, seed, [1.0, 1.0], ratio=0.25)
    with pytest.raises(ValueError, match=r"have other settings \(updates per environment step\)"):
        table.read(tmp_path / "atari" / "cpu", games.SUITES["atari"])


def test_minigrid_is_seen_in_colour_and_plays_the_same_again():
    pytest.importorskip("minigrid", reason="pip install -e '.[evidence]'")
    random = np.random.default_rng(0)
    actions = random.integers(7, size=(40, 2))
    seen = []
    for _ in range(2):
        env = games.make_env("minigrid", "DoorKey-5x5", 2, seed=3)
        images = [env.reset(), *(env.step(action)[0] for action in actions)]
        assert env.observation_space.shape == (3, 84, 84)
        assert images[0].dtype == np.uint8
        assert any((image[:, 0] != image[:, 1]).any() for image in images)
        seen.append(np.stack(images))
    assert np.array_equal(*seen)
    for game in games.SUITES["minigrid"].games:
        games.check_game("minigrid", game)


def test_scores_are_human_normalised():
    domain = games.SUITES["atari"]
    assert domain.normalised("Pong", -20.7) == 0.0
    assert domain.normalised("Pong", 14.6) == 1.0
    assert domain.normalised("Boxing", 6.1) == pytest.approx(0.5)


def test_the_learning_rate_with_the_best_mean_over_all_tuning_games_is_taken(tmp_path):
    scores = {1e-4: (0.2, 0.4), 3e-4: (0.5, 0.2), 3e-5: (0.5, 0.2)}
    files = [
        result(tmp_path, "nature", game, 100, [low + (high - low) * score], rate=rate, is_try=True)
        for rate, pair in scores.items()
        for (game, score) in zip(games.SUITES["atari"].tuning, pair, strict=True)
        for low, high in [games.SCORES[game]]
    ]
    assert tuning.learning_rate_of("nature", tmp_path, "atari", "cpu") == arms.LEARNING_RATE
    found = tuning.choose(files, "atari", "cpu", tmp_path, "the command")["arms"]["nature"]
    # The lower one of two that are equal.
    tries = {"3e-05": 0.35, "0.0001": 0.3, "0.0003": 0.35}
    others = {"games": ["Breakout", "Pong"], "runs per try": 2, "steps": 20_000, "command": "the command"}
    assert found == {"learning_rate": 3e-5, "tries": tries, **others}
    assert tuning.learning_rate_of("nature", tmp_path, "atari", "cpu") == 3e-5
    assert all(file.parent.name == "tuning" for file in files)
    fewer = [result(tmp_path, "scratch", game, 100, [1.0], is_try=True) for game in games.SUITES["atari"].tuning]
    with pytest.raises(ValueError, match="Each arm must have the same tries"):
        tuning.choose(fewer, "atari", "cpu", tmp_path, "another command")
    assert tuning.learning_rate_of("scratch", tmp_path, "atari", "cpu") == arms.LEARNING_RATE


def test_pong_ends_when_it_is_won_or_the_time_is_over(tmp_path):
    ends = pong.ends(60.0)
    log = recording.Log()
    assert not ends(log)
    log.evaluations = [{"step": 8, "returns": [17.0, 18.9]}]
    assert not ends(log)
    log.evaluations = [{"step": 8, "returns": [17.0, 19.0]}]
    assert ends(log)
    log.evaluations, log.spent = [{"step": 8, "returns": [0.0]}], [0.0, 0.0, 3600.0]
    assert ends(log)
    files = [result(tmp_path, "random_frozen", "Pong", seed, returns) for seed, returns in ((0, [19, 2]), (1, [3, 17]))]
    found = pong.summary(files, 60.0)
    assert found[pong.SHARE] == "1 of 2"
    assert [row["best evaluation"] for row in found["runs"]] == [19.0, 17.0]
    assert [row["minutes"] for row in found["runs"]] == [1.5, 1.5]
    late = result(tmp_path, "random_frozen", "Pong", 2, [3, 19])
    assert pong.summary([late], 1.0)[pong.SHARE] == "0 of 1", "it won after its time was over"


@pytest.mark.slow
def test_a_run_of_pong_stops_at_the_evaluation_that_wins(tmp_path, monkeypatch):
    pytest.importorskip("ale_py")
    small = {"steps": 480, "eval_every": 160, "save_every": 480, "learning_starts": 480, "buffer_size": 480}
    monkeypatch.setitem(budgets.BUDGETS, "pong", dataclasses.replace(budgets.BUDGETS["pong"], threads=1, **small))
    left = iter([2.0, 19.0, 3.0])
    monkeypatch.setattr(recording, "evaluate", lambda *args: [next(left)])
    found = pong.pong(tmp_path / "results", tmp_path / "checkpoints", [0], 60.0, None)
    assert found == json.loads((tmp_path / "results" / "atari" / "pong" / "random_frozen.json").read_text())
    assert found[pong.SHARE] == "1 of 1"
    assert found["runs"][0]["steps"] == 320
    assert found["command"] == "python benchmarks/atari.py pong --minutes 60"
    assert (tmp_path / "results" / "atari" / "pong" / "random_frozen.png").stat().st_size > 5_000
    assert len([*(tmp_path / "checkpoints").rglob("agent.zip")]) == 1


def test_another_runs_file_is_not_taken_for_ones_own(tmp_path):
    path = result(tmp_path, "nature", "Pong", 0, [1.0], rate=3e-4)
    run = spec.Run("atari", "cpu", "Pong", "nature", 0, 20_000, 1e-4)
    with pytest.raises(ValueError, match=r"is of another run \(.*--learning-rate 0.0003\): delete it"):
        runs.execute(run, tmp_path, tmp_path / "checkpoints")
    same = spec.Run("atari", "cpu", "Pong", "nature", 0, 20_000, 3e-4)
    assert runs.execute(same, tmp_path, tmp_path / "checkpoints") == path
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"other")
    pretrained = spec.Run("atari", "cpu", "Pong", "pretrained_frozen", 0, 20_000, 3e-4, str(weights))
    path = result(tmp_path, "pretrained_frozen", "Pong", 0, [1.0], rate=3e-4, weights=str(weights))
    written = json.loads(path.read_text())
    written["settings"]["trunk"] = {"weights": {"file": "weights.pth", "sha256": arms.sha256(str(weights))}}
    path.write_text(json.dumps(written))
    assert runs.execute(pretrained, tmp_path, tmp_path / "checkpoints") == path
    weights.write_bytes(b"changed")
    with pytest.raises(ValueError, match=r"was trained with another weights\.pth: delete it"):
        runs.execute(pretrained, tmp_path, tmp_path / "checkpoints")


def finished(run, folder):
    """The checkpoints of a run that has made its last step."""
    place = folder / run.folder / run.name
    place.mkdir(parents=True)
    for steps in (10_000, 9_000):
        (place / f"model-{steps}.zip").write_text(str(steps))
    (place / "settings.json").write_text(json.dumps({"command": run.command, "shared": {}}))
    (place / "buffer-10000.pkl").touch()
    log = recording.Log(steps=10_000, evaluations=[{"step": 10_000, "returns": [1.0]}], seconds=[[10_000, 1, 1, 1]])
    (place / "log.json").write_text(json.dumps(dataclasses.asdict(log)))
    return place


def test_the_last_model_is_kept_as_the_agent_also_beside_an_older_one(tmp_path):
    run = spec.Run("atari", "cpu", "Pong", "nature", 0, 10_000, 1e-4)
    place = finished(run, tmp_path / "checkpoints")
    runs.execute(run, tmp_path, tmp_path / "checkpoints")
    assert sorted(file.name for file in place.iterdir()) == ["agent.zip", "lock"]
    assert (place / "agent.zip").read_text() == "10000"


@pytest.mark.slow
def test_a_run_killed_right_after_its_result_keeps_its_agent(tmp_path):
    run = spec.Run("atari", "cpu", "Pong", "nature", 0, 10_000, 1e-4)
    result(tmp_path, "nature", "Pong", 0, [1.0], steps=10_000)
    place = finished(run, tmp_path / "checkpoints")
    suite.execute_all([run], tmp_path, tmp_path / "checkpoints")
    assert sorted(file.name for file in place.iterdir()) == ["agent.zip", "lock"]
    assert (place / "agent.zip").read_text() == "10000"


def test_a_run_that_is_not_finished_keeps_its_checkpoints_where_another_folder_has_a_result(tmp_path):
    result(tmp_path, "nature", "Pong", 0, [1.0])
    run = spec.Run("atari", "cpu", "Pong", "nature", 0, 20_000, 1e-4)
    place = finished(run, tmp_path / "checkpoints")
    before = sorted(file.name for file in place.iterdir())
    runs.execute(run, tmp_path, tmp_path / "checkpoints")
    suite.execute_all([run], tmp_path, tmp_path / "checkpoints")
    assert sorted(file.name for file in place.iterdir()) == sorted([*before, "lock"])


def test_a_checkpoint_of_another_rate_is_not_taken_for_this_run_though_nothing_is_left_to_train(tmp_path):
    place = finished(spec.Run("atari", "cpu", "Pong", "nature", 0, 10_000, 3e-4), tmp_path / "checkpoints")
    with pytest.raises(ValueError, match="is of another run"):
        runs.execute(spec.Run("atari", "cpu", "Pong", "nature", 0, 10_000, 1e-4), tmp_path, tmp_path / "checkpoints")
    assert (place / "model-10000.zip").exists()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_seed_has_environments_of_its_own_in_each_piece(seed, tmp_path, monkeypatch):
    gym.register_envs(pytest.importorskip("ale_py"))
    tiny = dataclasses.replace(
        budgets.BUDGETS["smoke"], steps=160, save_every=80, eval_every=160, learning_starts=16, buffer_size=400
    )
    monkeypatch.setitem(budgets.BUDGETS, "smoke", tiny)
    monkeypatch.setattr(recording, "evaluate", lambda *_: [0.0])
    make, first, pictures = games.make_env, [], []

    def made(*arguments, **others):
        env = make(*arguments, **others)
        give, reset = env.venv.seed, env.venv.reset

        def seeded(number=None):
            first.append(number)
            return give(number)

        def begun():
            pictures.append((first[-1], reset()))
            return pictures[-1][1]

        env.venv.seed, env.venv.reset = seeded, begun
        return env

    monkeypatch.setattr(runs, "make_env", made)
    run = spec.Run("atari", "smoke", "Pong", "nature", seed, 160, 1e-4)
    runs.execute(run, tmp_path, tmp_path)  # which would say if it did not play the same again
    assert [number for number, _ in pictures if number is not None][:1] == [games.N_ENVS * seed]


def mixed(folder, **others):
    fill(folder, {"nature": 0.2, "random_frozen": 0.3}, seeds=2, some_games=["Boxing"])
    path = folder / "atari" / "cpu" / "Boxing-random_frozen-20000-s1.json"
    found = json.loads(path.read_text())
    found.update({name: value for name, value in others.items() if name in found})
    found["settings"].update({name: value for name, value in others.items() if name not in found})
    path.write_text(json.dumps(found))
    return folder / "atari" / "cpu"


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({"learning_rate": 3e-4}, "other learning_rate"),
        ({"head": ["Linear(4)"]}, "other head"),
        ({"trunk": {"arguments": {"frozen_dtype": "float32"}}}, "other trunk"),
        ({"trunk": {"weights": {"sha256": "0"}}}, "other weights"),
    ],
    ids=str,
)
def test_the_runs_of_an_arm_differ_in_game_and_seed_alone(others, words, tmp_path):
    folder = mixed(tmp_path, **others)
    with pytest.raises(
        ValueError, match=rf"Boxing-random_frozen-20000-s0\.json and .*s1\.json are of one arm.* {words}"
    ):
        reports.report(folder, "atari")


def test_a_report_of_what_there_is_not_is_refused(tmp_path):
    fill(tmp_path, {"nature": 0.2, "random_frozen": 0.3}, some_games=["Boxing"])
    folder = tmp_path / "atari" / "cpu"
    with pytest.raises(ValueError, match="--arms: there is no result of random_frozn with 20,000 steps, but of nat"):
        reports.report(folder, "atari", arms=["nature", "random_frozn"])
    with pytest.raises(ValueError, match="--games: there is no result of Krul with 20,000 steps, but of Boxing"):
        reports.report(folder, "atari", games=["Boxing", "Krul"])


@pytest.mark.usefixtures("_rliable")
def test_the_report_names_what_it_compares_and_where_the_code_was_another(tmp_path):
    folder = mixed(tmp_path, code=["of yesterday"])
    result(tmp_path, "scratch", "Krull", 0, [1.0])
    text = reports.report(folder, "atari", arms=["nature", "random_frozen"])
    found = json.loads((folder / "report.json").read_text())
    assert found["left out"] == ["Krull-scratch-20000-s0.json"]
    assert len(found["files"]) == 4
    assert not {*found["files"]} & {*found["left out"]}
    assert f"The code of these runs is not the same for all; each file names its own: {results.CODE}, of yest" in text


@pytest.mark.parametrize("arm", ["nature_head", "random_frozen"])
def test_a_small_agent_acts_as_the_large_one_and_names_no_place(arm, tmp_path):
    env = DummyVecEnv([lambda: FakeImageEnv(action_dim=6, screen_height=84, screen_width=84, n_channels=4)] * 8)
    model = arms.build(arm, env, budgets.budget_of("smoke"), 0, 1e-4, None)
    if arm == "random_frozen":
        chosen = {**model.policy_kwargs["features_extractor_kwargs"], "weights": "/some/place/boxing.safetensors"}
        model.policy_kwargs["features_extractor_kwargs"] = chosen
    model.learn(16)
    images = observations(model, 20)
    before = [network(th.as_tensor(images)) for network in (model.q_net, model.q_net_target)]
    model.save(tmp_path / "large.zip")
    agent.save_small(model, tmp_path / "small.zip")
    small = (tmp_path / "small.zip").stat().st_size
    assert small < (tmp_path / "large.zip").stat().st_size - 1_500_000 * (arm == "random_frozen")
    assert b"some/place" not in (tmp_path / "small.zip").read_bytes()
    loaded = type(model).load(tmp_path / "small.zip", device="cpu")
    if arm == "random_frozen":
        assert small < agent.LARGEST
        assert loaded.policy_kwargs["features_extractor_kwargs"]["weights"] == "boxing.safetensors"
    with th.no_grad():
        after = loaded.q_net(th.as_tensor(images))
    assert (after - before[0]).abs().max() < 0.05 * before[0].std()
    with pytest.raises(
        FileNotFoundError, match=r"agent\.zip is not there: write first `python benchmarks/atari\.py run"
    ):
        agent.export(spec.Run("atari", "cpu", "Pong", arm, 0, 8, 1e-4), tmp_path, tmp_path, tmp_path)


@pytest.mark.parametrize("limit", [3_000_000, 1_000])
def test_an_agent_that_is_too_large_leaves_its_card_and_the_command_that_trains_it_again(limit, tmp_path, monkeypatch):
    env = DummyVecEnv([lambda: FakeImageEnv(action_dim=6, screen_height=84, screen_width=84, n_channels=4)] * 8)
    model = arms.build("random_frozen", env, budgets.budget_of("smoke"), 0, 1e-4, None)
    run = spec.Run("atari", "cpu", "Pong", "random_frozen", 0, 20_000, 1e-4)
    result(tmp_path, "random_frozen", "Pong", 0, [1.0])
    place = tmp_path / "checkpoints" / run.folder / run.name
    place.mkdir(parents=True)
    model.save(place / "agent.zip")
    monkeypatch.setattr(agent, "LARGEST", limit)
    monkeypatch.setattr(agent, "evaluate", lambda *_: [1.0, 3.0])
    file = agent.export(run, tmp_path, tmp_path / "checkpoints", tmp_path / "agents")
    card = json.loads((tmp_path / "agents" / "Pong-random_frozen.json").read_text())
    assert card["mean return of this file"] == 2.0
    assert card["environment"] == "PongNoFrameskip-v4"
    assert file.suffix == (".zip" if limit > 1_000 else ".json")
    assert ("file" in card) == (limit == 1_000)
    if limit == 1_000:
        assert card["file"] == "none, since it is larger than 0.001 MB: see 'trained by'"
        assert card["trained by"] == run.command
    assert len([*(tmp_path / "agents").iterdir()]) == (2 if limit > 1_000 else 1)


def test_wrong_words_are_said_in_one_line(capsys):
    assert commands.main(["--arms", "natur"]) == 1
    assert capsys.readouterr().err.startswith("Error: --arms must be of nature, ")
    assert commands.main(["report", "--results", "none"]) == 1
    assert "holds no results" in capsys.readouterr().err
    assert commands.main(["--seeds", "0"]) == 1
    assert "at least 1, got 0" in capsys.readouterr().err
    for rate in ("0", "-1", "nan", "inf"):
        words = ["run", "--budget", "smoke", "--game", "Pong", "--arm", "nature", f"--learning-rate={rate}"]
        assert commands.main(words) == 1
        assert f"--learning-rate must be above 0, got {rate}" in capsys.readouterr().err
    assert commands.main(["tune", "--games", "Boxing"]) == 1
    assert "--games must be of Pong, Breakout, which are never reported, got 'Boxing'" in capsys.readouterr().err
    if not th.cuda.is_available():
        assert (
            commands.main(["agent", "--budget", "gpu", "--game", "Pong", "--arm", "nature", "--results", "none"]) == 1
        )
        assert "agent.zip is not there" in capsys.readouterr().err
        assert commands.main(["--budget", "gpu"]) == 1
        assert "PyTorch finds no GPU: write --budget cpu" in capsys.readouterr().err


def started(folder, *words):
    """A command of the suite in a process of its own."""
    places = ["--results", str(folder), "--checkpoints", str(folder / "checkpoints")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(SCRIPT), *words, *places]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def ended(process):
    error = process.communicate()[1]
    assert process.returncode == 0, error


def results_in(folder):
    """By name, without times."""
    files = (folder / "atari" / "smoke").glob("*.json")
    return {file.name: file.read_bytes() for file in files if not file.name.endswith(".times.json")}


SMOKE = ("--budget", "smoke", "--arms", "random_frozen", "--games", "Pong")


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    """The same command in two folders: 5,000 steps of Pong."""
    pytest.importorskip("ale_py")
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "other")]
    alone = ("run", "--budget", "smoke", "--game", "Pong", "--arm", "random_frozen", "--learning-rate", "0.0001")
    for process in [started(folder, *alone) for folder in folders]:
        ended(process)
    return folders


@pytest.mark.slow
@pytest.mark.xdist_group("evidence")
def test_the_same_command_gives_the_same_result_file_bit_for_bit(twice):
    one, other = map(results_in, twice)
    assert [*one] == ["Pong-random_frozen-5000-s0.json"]
    assert one == other
    found = json.loads(one["Pong-random_frozen-5000-s0.json"])
    assert [entry["step"] for entry in found["evaluations"]] == [4_000, 5_000]
    assert found["last evaluation"] == np.mean(found["evaluations"][-1]["returns"])
    assert found["steps done"] == 5_000
    assert found["command"].startswith("python benchmarks/atari.py run --suite atari --budget smoke --game Pong ")
    times = json.loads((twice[0] / "atari" / "smoke" / "Pong-random_frozen-5000-s0.times.json").read_text())
    assert [row[0] for row in times[results.SECONDS]] == [4_000, 5_000]
    assert 0 < times[results.SECONDS][0][1] < times[results.SECONDS][1][1]


@pytest.mark.slow
@pytest.mark.xdist_group("evidence")
def test_a_signal_to_the_suite_alone_ends_its_runs_too(tmp_path):
    process = started(tmp_path, *SMOKE)
    while process.poll() is None and not [*tmp_path.glob("**/settings.json")]:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "Stopped: the same command goes on" in error
    assert "Traceback" not in error
    (place,) = (tmp_path / "checkpoints").glob("atari/smoke/*")
    with runs.locked(place):  # which its process would hold
        assert not results_in(tmp_path)


@pytest.mark.slow
@pytest.mark.xdist_group("evidence")
def test_a_suite_killed_three_times_ends_with_the_same_files(twice, tmp_path):
    checkpoints = tmp_path / "checkpoints"
    # In the first piece, in the second one, and in the last one.
    moments = [*(f"**/model-{steps}.zip" for steps in (2_000, 4_000))]
    kills = 0
    for pattern in ("**/settings.json", *moments):
        process = started(tmp_path, *SMOKE)
        while process.poll() is None and not [*checkpoints.glob(pattern)]:
            time.sleep(0.05)
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
        assert not results_in(tmp_path)
    assert kills == 3
    ended(started(tmp_path, *SMOKE))
    assert results_in(tmp_path) == results_in(twice[0])
    # What is left is the agent, for `sb3-resnet watch`.
    left = sorted(file.name for file in checkpoints.rglob("*") if file.is_file())
    assert left == ["agent.zip", "lock"]
