"""What holds for the repository and the import, whatever the models do."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import sb3_resnet

ROOT = Path(__file__).parent.parent
OPTIONAL = (
    "ale_py",
    "captum",
    "cv2",
    "imageio",
    "mlflow",
    "onnx",
    "onnxruntime",
    "psutil",
    "rl_zoo3",
    "safetensors",
    "sb3_contrib",
    "typer",
    "wandb",
)
TO_SB3_ALONE = """
import sys
import stable_baselines3
before = set(sys.modules)
import sb3_resnet
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""
WITHOUT_EXTRAS_AND_NETWORK = """
import socket, sys, warnings
for name in %r:
    sys.modules[name] = None  # as if it were not installed

def refuse(*args):
    raise AssertionError("the network was used")

socket.socket.connect = socket.getaddrinfo = refuse
warnings.simplefilter("ignore")
import sb3_resnet, sb3_resnet.envs
from stable_baselines3 import DQN
from stable_baselines3.common.envs import FakeImageEnv

model = DQN("ResNetCnnPolicy", FakeImageEnv(), buffer_size=10, device="cpu")
print(type(model.policy).__name__)
"""


def test_importing_the_package_imports_no_extra_but_sb3_contrib():
    # Counted from SB3's own imports on: it takes OpenCV along where that is installed.
    imported = python(TO_SB3_ALONE).split()
    assert "sb3_resnet" in imported
    assert {*imported} & {*OPTIONAL} <= {"sb3_contrib"}


def test_the_core_works_without_extras_and_without_the_network():
    assert python(WITHOUT_EXTRAS_AND_NETWORK % (OPTIONAL,)).strip() == "ResNetCnnPolicy"


def test_registering_twice_changes_nothing():
    from stable_baselines3 import DQN

    before = dict(DQN.policy_aliases)
    sb3_resnet.register_policies()
    assert DQN.policy_aliases == before
    assert DQN.policy_aliases["ResNetCnnPolicy"] is sb3_resnet.ResNetCnnPolicy


@pytest.mark.parametrize("name", sb3_resnet.__all__)
def test_public_names_are_documented(name):
    assert (getattr(sb3_resnet, name).__doc__ or "").strip()


def test_the_changelog_names_the_version():
    assert sb3_resnet.__version__ in (ROOT / "CHANGELOG.md").read_text()


def test_no_tracked_file_holds_a_path_of_somebodys_machine():
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    private = re.compile(r"(?<![\w.])/(?:work|root|home|Users)/\w")
    found = [
        f"{name}: {line.strip()}"
        for name in listing.stdout.split("\0")
        if (ROOT / name).is_file()
        for line in (ROOT / name).read_text(errors="replace").splitlines()
        if private.search(line)
    ]
    assert not found


def python(code):
    """:return: what the code prints in a fresh interpreter"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "sb3_resnet" / "callbacks").glob("[a-z]*.py")), ids=lambda p: p.stem)
def test_a_callback_imports_no_other_callback(path):
    imported = {*re.findall(r"from sb3_resnet\.callbacks\.([a-z]\w*) import", path.read_text())}
    assert path.stem == "__init__" or not imported
