"""The report of benchmarks/atari.py claims no more than its files show."""

import importlib
import itertools
import json
import re

import numpy as np
import pytest

from tests.evidence import arms, games, reports, result, results, statistics, table, tuning


@pytest.fixture
def _rliable(monkeypatch):
    """With fewer bootstrap samples. Skips where the extra is not installed, or not with the pandas that it needs."""
    try:
        importlib.import_module("rliable.library")
    except Exception as error:
        pytest.skip(f"pip install -e '.[evidence]' ({type(error).__name__}: {error})")
    monkeypatch.setattr(statistics, "REPS", 100)


def fill(folder, share, seeds=3, spread=0.02, some_games=("Boxing", "Krull")):
    """Results whose normalised scores are those of ``share`` by arm, give or take ``spread``."""
    random = np.random.default_rng(0)
    for (arm, mean), game, seed in itertools.product(share.items(), some_games, range(seeds)):
        low, high = games.SCORES[game]
        scores = [half * mean + spread * random.uniform(-1, 1) for half in (0.5, 1.0)]
        result(folder, arm, game, seed, [low + (high - low) * score for score in scores])


def mixed(folder, **others):
    fill(folder, {"nature": 0.2, "random_frozen": 0.3}, seeds=2, some_games=["Boxing"])
    path = folder / "atari" / "cpu" / "Boxing-random_frozen-20000-s1.json"
    found = json.loads(path.read_text())
    found.update({name: value for name, value in others.items() if name in found})
    found["settings"].update({name: value for name, value in others.items() if name not in found})
    path.write_text(json.dumps(found))
    return folder / "atari" / "cpu"


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
        assert found["probability of such a difference by chance"][f"random_frozen over {control}"] <= 0.03
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
    assert first[1].startswith("**Nothing was shown to lose**")
    assert re.match(
        r"\*\*Nothing was shown\*\* of `random_frozen` \(difference 0\.\d+ \[.*\], IQM .*\)\.<br>$", first[2]
    )
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
    assert text.splitlines()[2].endswith(". So few runs can show no difference, however large it is.<br>")
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


def test_the_order_of_the_seeds_decides_nothing():
    random = np.random.default_rng(0)
    runs = {"nature": np.zeros((5, 1)), "scratch": np.ones((5, 1)), "random_frozen": np.full((5, 1), 2.0)}
    runs = {arm: values + np.linspace(0, 0.1, 5)[:, None] for arm, values in runs.items()}
    shuffled = [statistics.chances({arm: random.permutation(values) for arm, values in runs.items()}) for _ in range(3)]
    assert shuffled[0] == shuffled[1] == shuffled[2]
    # Of 252 ways, four give as large a difference: interquartile means do not see which run is the lowest.
    assert shuffled[0]["scratch", "nature"] == 2 * 4 / 252
    many = {"nature": np.zeros((5, 4)), "scratch": np.ones((5, 4))}  # too many ways, so some of them
    assert 1 / (1 + statistics.PERMUTATIONS) <= statistics.chances(many)["scratch", "nature"] < 0.01


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


def test_an_arm_that_was_run_in_part_costs_the_others_nothing(tmp_path):
    some_games = ("Assault", "Boxing", "Krull", "RoadRunner")
    folder, suite_ = tmp_path / "atari" / "cpu", games.SUITES["atari"]
    fill(tmp_path, {"nature": 0.1, "random_frozen": 0.5}, some_games=some_games)
    fill(tmp_path, {"scratch": 0.5}, seeds=1, some_games=some_games)
    fill(tmp_path, {"scratch": 0.5}, seeds=2, some_games=some_games[:2])
    fill(tmp_path, {"pretrained_phases": 0.5}, some_games=some_games[:2])
    found = table.read(folder, suite_)
    assert (found.arms, len(found.games), found.seeds) == (("nature", "random_frozen"), 4, (0, 1, 2))
    # One more game, or one more seed, that is not done yet costs nothing either.
    for arm in ("nature", "random_frozen"):
        (folder / f"Krull-{arm}-20000-s2.json").unlink()
    found = table.read(folder, suite_, arms=["nature", "random_frozen"])
    assert (len(found.games), found.seeds) == (3, (0, 1, 2))
    fill(tmp_path, {"nature": 0.1}, seeds=5, some_games=some_games)
    assert table.read(folder, suite_).arms[:2] == ("nature", "random_frozen")  # one alone is no comparison


def test_games_for_tuning_are_reported_where_only_these_were_played(tmp_path):
    fill(tmp_path, {"nature": 0.1, "random_frozen": 0.5}, some_games=["Pong"])
    found = table.read(tmp_path / "atari" / "cpu", games.SUITES["atari"])
    assert (found.arms, found.games) == (("nature", "random_frozen"), ("PongNoFrameskip-v4",))
    with pytest.raises(FileNotFoundError, match="holds no results: there are some of --budget cpu"):
        table.read(tmp_path / "atari" / "quarter", games.SUITES["atari"])


@pytest.mark.usefixtures("_rliable")
def test_one_arm_is_compared_with_nothing(tmp_path):
    fill(tmp_path, {"nature": 0.1})
    text = reports.report(tmp_path / "atari" / "cpu", "atari")
    assert text.startswith("**Nothing was compared**: there is one arm, `nature`, IQM 0.")


@pytest.mark.usefixtures("_rliable")
def test_the_report_tells_tuned_rates_from_others(tmp_path):
    fill(tmp_path, {"nature": 0.1, "random_frozen": 0.5, "scratch": 0.1})  # with 1e-4
    folder = tmp_path / "atari" / "cpu"
    rates = {"nature": 3e-4, "random_frozen": 1e-4}
    chosen = {arm: {"learning_rate": rate, "games": ["Pong"]} for arm, rate in rates.items()}
    (folder / "learning_rates.json").write_text(json.dumps({"arms": chosen}))
    text = reports.report(folder, "atari")
    assert "* Learning rate not tuned (RL-Zoo's is 0.0001): `scratch` (0.0001)." in text
    assert "(learning_rates.json)): `nature` (0.0001, tuned 0.0003)." in text
    assert "* Learning rate tuned on Pong: `random_frozen` " in text


def test_a_page_without_its_markers_is_found_before_anything_is_written(tmp_path):
    fill(tmp_path, {"nature": 0.1})
    folder = tmp_path / "atari" / "cpu"
    with pytest.raises(FileNotFoundError, match=r"--page .*page\.md is no file"):
        reports.report(folder, "atari", page=tmp_path / "page.md")
    (tmp_path / "page.md").write_text("<!-- end of report: atari cpu --> <!-- report: atari cpu -->")
    with pytest.raises(ValueError, match=r"--page .*page\.md lacks a line <!-- report: atari cpu --> and, below it"):
        reports.report(folder, "atari", page=tmp_path / "page.md")
    assert not (folder / "report.json").exists()


def test_arms_with_other_settings_are_not_compared(tmp_path):
    fill(tmp_path, {"nature": 0.1})
    for game, seed in itertools.product(("Boxing", "Krull"), range(3)):
        result(tmp_path, "random_frozen", game, seed, [1.0, 1.0], ratio=0.25)
    with pytest.raises(ValueError, match=r"have other settings \(updates per environment step\)"):
        table.read(tmp_path / "atari" / "cpu", games.SUITES["atari"])


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
    place = tuning.rates_file(tmp_path, "atari", "cpu")
    tuning.check_tries(["scratch"], ([3e-5, 3e-4, 1e-4], ["Pong", "Breakout"], 1, 20_000), place)
    for other in (([1e-4], ["Breakout", "Pong"], 1, 20_000), ([3e-5, 1e-4, 3e-4], ["Pong"], 2, 20_000)):
        with pytest.raises(ValueError, match="Each arm must have the same tries"):
            tuning.check_tries(["scratch"], other, place)
    fewer = [result(tmp_path, "scratch", game, 100, [1.0], is_try=True) for game in games.SUITES["atari"].tuning]
    with pytest.raises(ValueError, match="Each arm must have the same tries"):
        tuning.choose(fewer, "atari", "cpu", tmp_path, "another command")
    assert tuning.learning_rate_of("scratch", tmp_path, "atari", "cpu") == arms.LEARNING_RATE
