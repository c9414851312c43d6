"""``sb3-resnet zoo-config``: the shipped configurations, from wherever the package lies."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sb3_resnet.cli import zoo_config
from tests.helpers import ROOT, run_command

CONFIGS = {path.stem: path for path in (ROOT / "zoo_configs").glob("*.yml")}


def test_a_name_gives_the_path_alone():
    status, text, _ = run_command("zoo-config", "dqn", width=20)
    assert status == 0
    assert Path(text.strip()) == CONFIGS["dqn"]
    assert text.count("\n") == 1  # not folded at any width: it is used as $(sb3-resnet zoo-config dqn)
    assert run_command("zoo-config", "dqn.yml")[1] == text


def test_without_a_name_all_are_listed():
    status, text, _ = run_command("zoo-config")
    assert status == 0
    assert text.splitlines() == [f"{name}: {CONFIGS[name]}" for name in sorted(CONFIGS)]


def test_show_prints_the_text_as_it_is():
    status, text, _ = run_command("zoo-config", "demo", "--show")
    assert (status, text) == (0, CONFIGS["demo"].read_text())


@pytest.mark.parametrize(("name", "hint"), [("dnq", "did you mean 'dqn'"), ("ppo9", "write one of demo, dqn")])
def test_another_name_is_one_line_with_those_that_are_there(name, hint):
    status, _, error = run_command("zoo-config", name)
    assert status == 1
    assert error.startswith(f"Error: There is no configuration '{name}'")
    assert hint in error
    assert len(error.splitlines()) == 1


def test_the_copy_inside_the_package_is_taken_first(monkeypatch, tmp_path):
    # A wheel has no folder beside the package; a clone has none inside it.
    (tmp_path / "inside").mkdir()
    shutil.copy(CONFIGS["dqn"], tmp_path / "inside" / "own.yml")
    monkeypatch.setattr(zoo_config, "PLACES", (tmp_path / "inside", ROOT / "zoo_configs"))
    assert run_command("zoo-config")[1] == f"own: {tmp_path / 'inside' / 'own.yml'}\n"
    monkeypatch.setattr(zoo_config, "PLACES", (tmp_path / "nowhere",))
    status, _, error = run_command("zoo-config", "dqn")
    assert status == 1
    assert "holds no configurations" in error


@pytest.mark.slow
def test_it_works_from_any_folder(tmp_path):
    command = [sys.executable, "-m", "sb3_resnet", "zoo-config", "dqn"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).samefile(CONFIGS["dqn"])
