"""Frozen, augmented, mixed precision and micro-batches together: train, save, load, and resume bit for bit."""

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import CallbackList

from sb3_resnet.callbacks import (
    AMPCallback,
    DoctorCallback,
    GradientClipCallback,
    LRScheduleCallback,
    MonitorCallback,
    UnfreezeCallback,
)
from sb3_resnet.common.step_hooks import before_step
from tests.helpers import (
    ALGORITHMS,
    POLICYS,
    TinyGame,
    amp,
    drive,
    everything,
    fill,
    make_model,
    observations,
    q_values,
    random_state,
    small,
    start,
)

TOTAL = 14
BEGINS = 4  # updates before layer4 trains
SAVES = (2, 4, 9)
GAME = TinyGame((4, 17, 17))


def callbacks(dtype):
    scaling = {"init_scale": 2.0**24, "growth_interval": 3} if dtype == "float16" else {}
    phases = [{"at_update": BEGINS, "unfreeze_from": "layer4", "ramp": 4}]
    return [
        AMPCallback(dtype, verbose=0, **scaling),
        UnfreezeCallback(phases, verbose=0),
        LRScheduleCallback(4, "cosine", decay_steps=40),
        GradientClipCallback(1.0),
    ]


def resume(job):
    """What the new process does."""
    th.set_num_threads(1)
    model = ALGORITHMS[job["algorithm"]].load(job["model"], env=GAME, device="cpu")
    model.load_replay_buffer(job["buffer"])
    model._setup_learn(1, None, reset_num_timesteps=False)
    with open(job["random"], "rb") as file:
        random_state(pickle.load(file))
    drive(model, callbacks(job["dtype"]), job["rounds"])
    th.save(everything(model), job["result"])


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "dtype"), [("dqn", "float16"), ("qrdqn", "bfloat16")])
def test_invariant_7_golden_resume_with_everything_on(algorithm, dtype, tmp_path):
    augment = [{"random_shift": {"padding": 2}}, {"color_jitter": {"brightness": 0.2, "contrast": 0.2}}]
    extractor = {"backbone": "resnet_mini", "augment": augment, "micro_batch_size": 3}
    policy_kwargs = {"dropout": 0.2}
    model = fill(make_model(algorithm, GAME, extractor=extractor, policy_kwargs=policy_kwargs, learning_rate=1e-3))
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    obs = observations(model)

    def save(done):
        if done in SAVES:
            model.save(tmp_path / f"{done}.zip")
            (tmp_path / f"{done}.pkl").write_bytes(pickle.dumps(random_state()))

    frozen = {name: value.clone() for name, value in model.policy.named_parameters() if "layer3" in name}
    th.manual_seed(0)
    np.random.seed(0)
    used = callbacks(dtype)
    drive(model, used, TOTAL, save)
    assert model.policy.freeze_boundary == "layer4"
    assert all(th.equal(value, frozen[name]) for name, value in model.policy.named_parameters() if name in frozen)
    jobs = [
        {
            "algorithm": algorithm,
            "dtype": dtype,
            "model": str(tmp_path / f"{done}.zip"),
            "random": str(tmp_path / f"{done}.pkl"),
            "buffer": str(tmp_path / "buffer.pkl"),
            "rounds": TOTAL - done,
            "result": str(tmp_path / f"{done}.pth"),
        }
        for done in SAVES
    ]
    script = "import json, sys; from tests.test_together import resume; [resume(job) for job in json.load(sys.stdin)]"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script], input=json.dumps(jobs), text=True, check=True, env=environment)
    whole = everything(model)
    if dtype == "float16":
        scaling = whole["optimizer"]["param_groups"][0]["amp"]
        assert scaling["skipped"] > 0
    for job in jobs:
        assert_equal(whole, th.load(job["result"], weights_only=True))
    for callback in used:
        callback.on_training_end()
    assert q_values(model, obs).isfinite().all()


def assert_equal(left, right):
    """Nested dicts and lists are equal bit for bit."""
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key, value in left.items():
            assert_equal(value, right[key])
    elif isinstance(left, list):
        for pair in zip(left, right, strict=True):
            assert_equal(*pair)
    elif isinstance(left, th.Tensor):
        assert th.equal(left, right)
    else:
        assert left == right


@pytest.mark.slow
def test_bfloat16_learns_as_float32_does():
    """500 updates on a fixed buffer: the loss, averaged over 20 updates, stays within 5 %."""

    def losses(dtype):
        model = small()
        amp(model, dtype)
        np.random.seed(0)
        seen = []
        for _ in range(500):
            model.train(1, 8)
            seen.append(model.logger.name_to_value["train/loss"])
        return np.array(seen).reshape(-1, 20).mean(axis=1)

    exact, reduced = losses("float32"), losses("bfloat16")
    assert exact[-1] < 0.3 * exact[0]
    np.testing.assert_allclose(reduced, exact, rtol=0.05)
    assert not np.array_equal(reduced, exact)


@pytest.mark.filterwarnings("ignore:frozen_random_backbone")
@pytest.mark.parametrize(
    "make",
    [
        lambda: LRScheduleCallback(warmup_steps=10, verbose=0),
        lambda: GradientClipCallback(1.0),
        lambda: MonitorCallback(),
        lambda: DoctorCallback(),
        lambda: AMPCallback("bfloat16", verbose=0),
        lambda: UnfreezeCallback([{"at_timestep": 4, "unfreeze_from": "all"}], verbose=0),
    ],
)
def test_two_callbacks_of_a_kind_are_refused_and_one_may_follow_an_interrupted_one(make):
    model = make_model()
    first = make()
    name = type(first).__name__
    with pytest.raises(ValueError, match=rf"learn\(\) was given 2 callbacks {name}, which would .*: write one"):
        model.learn(10, callback=[first, CallbackList([make()])])
    assert model.q_net.features_extractor.precision is None
    start(model, first)  # never ends
    model.learn(10, callback=make())
    assert before_step(model.policy.optimizer).keys == POLICYS  # the policy's own
