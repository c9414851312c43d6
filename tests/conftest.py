"""Fixtures: no network, one torch thread, and a weights file as torchvision would publish it."""

import os
import random
import shutil
import socket
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import torchvision
from hypothesis import settings

th.set_num_threads(1)

# The same examples in each run: a change must not fail by luck. `HYPOTHESIS_PROFILE=search` looks for others.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(autouse=True)
def _seeds():
    """What a test draws does not depend on those before it."""
    random.seed(0)
    np.random.seed(0)
    th.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """Connections to processes on this machine stay allowed."""
    connect = socket.socket.connect

    def refuse(self, address):
        if self.family == socket.AF_UNIX:
            return connect(self, address)
        raise OSError("the tests must not use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def hub_weights(tmp_path, monkeypatch) -> Path:
    """ResNet-18 weights in a torch hub cache of the test's own, under the name of torchvision's default weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(th.hub, "_hub_dir", None)
    url = torchvision.models.ResNet18_Weights.DEFAULT.url
    path = Path(th.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    path.parent.mkdir(parents=True)
    th.manual_seed(7)
    th.save(torchvision.models.resnet18(weights=None).state_dict(), path)
    return path


@pytest.fixture
def tiny_id():
    """The tiny game in gymnasium's registry."""
    registry = gym.envs.registration.registry
    gym.register("Tiny-v0", "tests.helpers:TinyGame")
    yield "Tiny-v0"
    del registry["Tiny-v0"]


@pytest.fixture
def dict_id():
    """The game with a Dict in gymnasium's registry."""
    registry = gym.envs.registration.registry
    gym.register("Dict-v0", "tests.helpers:DictGame")
    yield "Dict-v0"
    del registry["Dict-v0"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The Hugging Face Hub as a folder; what SB3's integration calls of its client is replaced, and nothing else."""
    import huggingface_hub

    folder = tmp_path / "hub"

    class Repository(str):
        repo_id = property(str)

    def create_repo(self, repo_id, exist_ok, **others):
        (folder / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        return Repository(repo_id)

    def upload_file(self, path_or_fileobj, path_in_repo, repo_id, commit_message, **others):
        shutil.copy(path_or_fileobj, folder / repo_id / path_in_repo)

    def download(repo_id, filename, library_name, library_version, **others):
        return str(folder / repo_id / filename)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_file", upload_file)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return folder
