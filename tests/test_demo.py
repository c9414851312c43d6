"""``make demo``: what it claims, and that it runs to its end."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from scripts import demo

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([0, 0, 0, 0], [10, 12, 9, 11], True),
        ([0, 0, 0, 0], [0, 0, 0, 0], False),
        ([10, 12, 9, 11], [0, 0, 0, 0], False),
        ([0, 100, 0, 100], [40, 80, 60, 70], False),  # the mean is higher, by less than chance can make it
        ([50, 50, 50, 50], [51, 51, 51, 51], True),
    ],
)
def test_only_a_rise_beyond_chance_is_called_one(before, after, expected):
    assert demo.rises(before, after) is expected


@pytest.mark.parametrize(("rises", "said"), [(True, "The agent has learned"), (False, "This run did not learn")])
def test_the_report_says_what_the_run_showed(rises, said, tmp_path):
    result = {"before": [0.0, 20.0], "after": [300.0, 500.0], "steps": 40_000, "seconds": 99, "rises": rises}
    lines = demo.report(result, [tmp_path / "curve.png"], tmp_path / "dqn" / "Game_1")
    assert lines[1] == "Before: 10.0 points, 0 to 20 in 2 games (random play)"
    assert lines[2] == "After:  400.0 points, 300 to 500 in 2 games (40,000 steps; all in all 99 s)"
    assert lines[3].startswith(said)
    assert f"Picture: {tmp_path / 'curve.png'}" in lines
    go_on = shlex.split(lines[-1].removeprefix("Go on: "))
    assert go_on[go_on.index("-i") + 1] == str(tmp_path / "dqn" / "Game_1" / f"{demo.GAME}.zip")
    assert go_on[go_on.index("--log-folder") + 1] == str(tmp_path)


@pytest.mark.slow
def test_random_play_gets_the_scores_of_the_game_itself(monkeypatch):
    monkeypatch.setattr(demo, "GAMES", 8)
    found = demo.scores(None, 1, 60)
    assert len(found) == 8
    # RoadRunner counts in hundreds; training sees their sign.
    assert all(score % 100 == 0 and score >= 0 for score in found)
    assert found == demo.scores(None, 1, 60)


def test_the_configuration_of_the_demo_needs_no_network():
    (settings,) = yaml.safe_load((ROOT / "zoo_configs" / "demo.yml").read_text()).values()
    extractor = settings["policy_kwargs"]["features_extractor_kwargs"]
    assert extractor["pretrained"] is False
    assert "weights" not in extractor
    assert settings["n_timesteps"] == 32_000


@pytest.mark.slow
def test_the_demo_trains_scores_draws_and_goes_on(tmp_path):
    script = [sys.executable, str(ROOT / "scripts" / "demo.py")]
    options = ["--steps", "2400", "--game-steps", "40", "--logs", str(tmp_path)]
    done = subprocess.run([*script, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = tmp_path.glob(f"dqn/{demo.GAME}_1")
    result = json.loads((run / "demo.json").read_text())
    assert (result["steps"], len(result["before"]), len(result["after"])) == (2400, 16, 16)
    assert result["rises"] == demo.rises(result["before"], result["after"])
    assert f"{np.mean(result['after']):.1f} points" in done.stdout
    assert ("has learned" in done.stdout) == result["rises"]
    assert (run / "agent.gif").read_bytes().startswith(b"GIF8")
    last = done.stdout.strip().splitlines()[-1]
    go_on = last.removeprefix("Go on: ").replace(f"-n {demo.MORE_STEPS}", "-n 80")
    subprocess.run(go_on, shell=True, cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "dqn" / f"{demo.GAME}_2" / f"{demo.GAME}.zip").is_file()
