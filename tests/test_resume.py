"""Golden resume (invariant 7): stopped, saved and loaded in a new process, training goes on bit for bit."""

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch as th

from sb3_resnet.callbacks import GradientClipCallback, LRScheduleCallback, UnfreezeCallback
from tests.helpers import ALGORITHMS, TinyGame, drive, everything, fill, make_model, random_state

pytestmark = pytest.mark.slow

TOTAL = 22
BEGINS = 6  # rounds before the transition; the ramp takes 6 updates more
SAVES = {"before": 3, "at": BEGINS, "right after": BEGINS + 1, "in the ramp": 9, "long after": 16}
# Where it was saved, whether the step counter starts anew, and whether UnfreezeCallback is there again.
VARIANTS = [(point, reset, True) for point in SAVES for reset in (False, True)] + [("long after", False, False)]


def callbacks(unfreeze=True):
    phases = [{"at_timestep": 4 * (BEGINS + 1), "unfreeze_from": "layer4", "lr_backbone": 5e-4, "ramp": 6}]
    others = [LRScheduleCallback(4, "cosine", decay_steps=40), GradientClipCallback(1.0)]
    return [UnfreezeCallback(phases, verbose=0), *others] if unfreeze else others


def resume(job):
    """What the new process does."""
    model = ALGORITHMS[job["algorithm"]].load(job["model"], env=TinyGame(), device="cpu")
    model.load_replay_buffer(job["buffer"])
    model._setup_learn(1, None, reset_num_timesteps=job["reset"])
    with open(job["random"], "rb") as file:
        random_state(pickle.load(file))
    drive(model, callbacks(job["callback"]), job["rounds"])
    th.save(everything(model), job["result"])


RUNS = [*((a, o) for a in ALGORITHMS for o in ("AdamW", "SGD")), ("dqn", "AdamW and SGD")]


@pytest.fixture(scope="module", params=RUNS, ids="-".join)
def runs(request, tmp_path_factory):
    """The uninterrupted run, and the results of all resumed ones by save point and variant."""
    algorithm, optimizer = request.param
    folder = tmp_path_factory.mktemp("resume")
    policy_kwargs = {"optimizer_class": optimizer.split()[0], "dropout": 0.2, "lr_decay_per_stage": 0.9}
    if optimizer == "AdamW and SGD":
        policy_kwargs |= {"backbone_optimizer_class": "SGD", "backbone_optimizer_kwargs": {"momentum": 0.9}}
    if optimizer == "SGD":
        policy_kwargs["optimizer_kwargs"] = {"momentum": 0.9}
    model = fill(make_model(algorithm, learning_rate=1e-3, policy_kwargs=policy_kwargs, extractor={"norm": "batch"}))
    model.save_replay_buffer(folder / "buffer.pkl")

    def save(done):
        if done in SAVES.values():
            model.save(folder / f"{done}.zip")
            (folder / f"{done}.pkl").write_bytes(pickle.dumps(random_state()))

    th.manual_seed(0)
    np.random.seed(0)
    drive(model, callbacks(), TOTAL, save)
    jobs = [
        {
            "algorithm": algorithm,
            "model": str(folder / f"{SAVES[point]}.zip"),
            "random": str(folder / f"{SAVES[point]}.pkl"),
            "buffer": str(folder / "buffer.pkl"),
            "reset": reset,
            "callback": callback,
            "rounds": TOTAL - SAVES[point],
            "result": str(folder / f"{point}-{reset}-{callback}.pth"),
        }
        for point, reset, callback in VARIANTS
    ]
    script = "import json, sys; from tests.test_resume import resume; [resume(job) for job in json.load(sys.stdin)]"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script], input=json.dumps(jobs), text=True, check=True, env=environment)
    results = {v: th.load(job["result"], weights_only=True) for v, job in zip(VARIANTS, jobs, strict=True)}
    return everything(model), results


@pytest.mark.xdist_group("resume")  # the runs are made once a process
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v[0]}, reset={v[1]}, callback={v[2]}")
def test_invariant_7_golden_resume(runs, variant):
    whole, results = runs
    resumed = results[variant]
    assert whole["policy"].keys() == resumed["policy"].keys()
    for name, value in whole["policy"].items():
        assert th.equal(value, resumed["policy"][name]), name
    assert whole["optimizer"]["state"].keys() == resumed["optimizer"]["state"].keys()
    for index, state in whole["optimizer"]["state"].items():
        for name, value in state.items():
            other = resumed["optimizer"]["state"][index][name]
            assert th.equal(value, other) if isinstance(value, th.Tensor) else value == other, (index, name)
    for group, other in zip(whole["optimizer"]["param_groups"], resumed["optimizer"]["param_groups"], strict=True):
        without = ("unfreeze",)  # the clock that only the callback reads
        assert {k: v for k, v in group.items() if k not in without} == {
            k: v for k, v in other.items() if k not in without
        }


@pytest.mark.xdist_group("resume")
def test_the_golden_run_crosses_the_transition(runs):
    """Else the comparison would prove nothing."""
    whole, results = runs
    name = next(key for key in whole["policy"] if key.endswith("boundary.moved_at"))
    assert whole["policy"][name] == BEGINS
    trained = results[("before", False, True)]["optimizer"]["state"]
    groups = whole["optimizer"]["param_groups"]
    assert len(trained) > sum(len(group["params"]) for group in groups if group["name"].startswith("head"))
