"""Fixtures: no network, one torch thread, and a weights file as torchvision would publish it."""

import os
import socket
from pathlib import Path

import gymnasium as gym
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
