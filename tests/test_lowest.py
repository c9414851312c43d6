"""The constraints with which the tests run on the lowest versions that are allowed, and the bounds themselves."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "lowest.py"
HOSTS = {
    "ale-py": "1",
    "gymnasium": "2",
    "rl-zoo3": "3",
    "sb3-contrib": "3",
    "stable-baselines3": "3",
    "torch": "3",
    "torchvision": "1",
}

spec = importlib.util.spec_from_file_location("lowest", SCRIPT)
lowest = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lowest)


@pytest.mark.parametrize(
    ("project", "expected"),
    [
        ({}, []),
        ({"dependencies": ["torch>=2.3,<3", "gymnasium>=1.0"]}, ["gymnasium==1.0", "torch==2.3"]),
        ({"dependencies": ["PyYAML~=6.0", "rl_zoo3==2.7.*"]}, ["pyyaml==6.0", "rl-zoo3==2.7"]),
        ({"optional-dependencies": {"a": ["rich>=13.9"], "b": ["Rich>=13.10"]}}, ["rich==13.10"]),
        ({"dependencies": ["x>=1,>=2"]}, ["x==2"]),
        ({"dependencies": ["x[more]>=1"]}, ["x==1"]),
    ],
)
def test_a_constraint_is_the_lower_bound(project, expected):
    assert lowest.constraints(project) == expected


@pytest.mark.parametrize("requirement", ["psutil", "psutil<7", "psutil>5", "psutil!=6"])
def test_a_dependency_without_a_lowest_version_is_refused(requirement):
    with pytest.raises(ValueError, match="write psutil>="):
        lowest.constraints({"optional-dependencies": {"monitor": [requirement]}})


def test_the_script_prints_every_dependency_of_the_project_once():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=True)
    names = [line.partition("==")[0] for line in done.stdout.splitlines()]
    assert names == sorted({*names})
    assert {*HOSTS} < {*names}


def test_the_next_major_version_of_a_host_is_shut_out_and_every_release_before_it_is_not():
    project = lowest.tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = (project["dependencies"], *project["optional-dependencies"].values())
    requirements = [Requirement(text) for group in groups for text in group]
    seen = set()
    for one in requirements:
        name = lowest.canonicalize_name(one.name)
        if name in HOSTS:
            seen.add(name)
            assert not one.specifier.contains(HOSTS[name])
            assert one.specifier.contains(f"{int(HOSTS[name]) - 1}.999")
    assert seen == {*HOSTS}
