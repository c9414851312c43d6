"""seed_everything: the same seed gives the same result bit for bit."""

import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch as th

import sb3_resnet
from sb3_resnet.common import seeding

RUN = """
import hashlib, random, sys
import numpy as np, torch as th
import sb3_resnet
from tests.helpers import make_model
seed = int(sys.argv[1])
th.set_num_threads(1)
sb3_resnet.seed_everything(seed)
augment = ["random_shift", {"color_jitter": {"brightness": 0.2}}]
extractor = {"freeze_backbone": False, "augment": augment, "micro_batch_size": 3}
model = make_model(extractor=extractor, policy_kwargs={"dropout": 0.1}, seed=seed).learn(24)
state = hashlib.sha256()
for value in model.policy.state_dict().values():
    state.update(value.numpy().tobytes())
print(state.hexdigest(), random.random(), np.random.rand(), th.rand(1).item())
"""


@pytest.fixture(autouse=True)
def _restore(monkeypatch):
    """What is global stays as it was."""
    monkeypatch.delenv(seeding._CUBLAS, raising=False)
    state = random.getstate(), np.random.get_state(), th.get_rng_state()
    cudnn = th.backends.cudnn.deterministic, th.backends.cudnn.benchmark
    yield
    th.use_deterministic_algorithms(False)
    th.backends.cudnn.deterministic, th.backends.cudnn.benchmark = cudnn
    random.setstate(state[0])
    np.random.set_state(state[1])
    th.set_rng_state(state[2])


def run(seed):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "random"}
    command = [sys.executable, "-c", RUN, str(seed)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.split()


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits_in_two_processes():
    assert run(5) == run(5)


def draws():
    return random.random(), np.random.rand(), th.rand(1).item()


def test_all_generators_are_seeded():
    assert sb3_resnet.seed_everything(3) == 3
    first = draws()
    assert draws() != first
    sb3_resnet.seed_everything(3, deterministic=False)
    assert draws() == first
    sb3_resnet.seed_everything(4)
    assert all(one != another for one, another in zip(draws(), first, strict=True))


def test_deterministic_can_be_switched_on_and_off(monkeypatch):
    th.backends.cudnn.benchmark = True
    sb3_resnet.seed_everything(0)
    assert th.are_deterministic_algorithms_enabled()
    assert not th.is_deterministic_algorithms_warn_only_enabled()
    assert (th.backends.cudnn.deterministic, th.backends.cudnn.benchmark) == (True, False)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    sb3_resnet.seed_everything(0, deterministic=False)
    assert not th.are_deterministic_algorithms_enabled()
    assert not th.backends.cudnn.deterministic


@pytest.mark.parametrize("value", [":16:8", ":4096:8"])
def test_a_workspace_of_ones_own_stays(value, monkeypatch, recwarn):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", value)
    monkeypatch.setattr(th.cuda, "is_initialized", lambda: True)
    sb3_resnet.seed_everything(0)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == value
    assert not recwarn


def test_too_late_for_cublas_is_said(monkeypatch):
    monkeypatch.setattr(th.cuda, "is_initialized", lambda: True)
    with pytest.warns(UserWarning, match="call seed_everything first, or start Python with CUBLAS_WORKSPACE_CONFIG="):
        sb3_resnet.seed_everything(0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1,), ValueError, "seed must be finite and >= 0"),
        ((2**32,), ValueError, "seed must be at most 4294967295"),
        ((1.5,), ValueError, "seed must be a whole number"),
        ((None,), TypeError, "seed must be a number"),
        ((0, "yes"), TypeError, "deterministic must be true or false"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        sb3_resnet.seed_everything(*arguments)
