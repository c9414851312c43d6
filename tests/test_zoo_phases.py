"""Three phases on Pong through RL-Zoo: stopped in the second, continued with ``-i``, ended in the third."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sb3_resnet import newest_checkpoint
from tests.helpers import ALGORITHMS

ROOT = Path(__file__).parent.parent
PONG = "PongNoFrameskip-v4"
SECTION = {
    "policy": "ResNetCnnPolicy",
    "env_wrapper": ["stable_baselines3.common.atari_wrappers.AtariWrapper"],
    "frame_stack": 4,
    "n_timesteps": 100_000,
    "buffer_size": 200,
    "batch_size": 4,
    "learning_starts": 8,
    "train_freq": 4,
    "learning_rate": 1e-4,
    "policy_kwargs": {"features_extractor_kwargs": {"image_size": 32}},
    "callback": [
        {"sb3_resnet.callbacks.LRScheduleCallback": {"warmup_steps": 10}},
        {
            "sb3_resnet.callbacks.UnfreezeCallback": {
                "phases": [
                    {"at_timestep": 24, "unfreeze_from": "layer4", "ramp": 5},
                    {"at_timestep": 60, "unfreeze_from": "layer3", "lr_backbone": "2e-5"},
                    {"at_timestep": 140, "unfreeze_from": "all"},
                ]
            }
        },
    ],
}


def command(folder, *arguments):
    line = [sys.executable, "-m", "rl_zoo3.train", "--algo", "dqn", "--env", PONG, "-f", folder, "--eval-freq", -1]
    line += ["--gym-packages", "sb3_resnet", "--device", "cpu", "--conf-file", folder / "phases.yml", *arguments]
    return [*map(str, line)]


def heed_interrupts():
    """A shell starts background jobs with SIGINT ignored, and their children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
def test_three_phases_stopped_and_continued(tmp_path):
    checkpoints = {
        "sb3_resnet.callbacks.BestCheckpointCallback": {"save_freq": 8, "save_path": str(tmp_path / "saved")}
    }
    section = {**SECTION, "callback": [*SECTION["callback"], checkpoints]}
    (tmp_path / "phases.yml").write_text(yaml.safe_dump({PONG: section}))
    options = {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}, "text": True}

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "preexec_fn": heed_interrupts}
    with subprocess.Popen(command(tmp_path), **pipes, **options) as first:
        for line in first.stdout:
            if line.startswith("Phase 2 of 3"):
                first.send_signal(signal.SIGINT)  # as a person does; RL-Zoo then saves the model
        assert first.wait() == 0
    stopped = tmp_path / "dqn" / f"{PONG}_1" / f"{PONG}.zip"
    before = ALGORITHMS["dqn"].load(stopped, device="cpu")
    assert before.policy.freeze_boundary == "layer3"
    assert ALGORITHMS["dqn"].load(newest_checkpoint(tmp_path / "saved"), device="cpu")._n_updates <= before._n_updates

    second = subprocess.run(command(tmp_path, "-i", stopped, "-n", 120), capture_output=True, **options)
    assert second.returncode == 0, second.stderr
    begun = [line.split(" begins")[0] for line in second.stdout.splitlines() if line.startswith("Phase")]
    assert begun == ["Phase 3 of 3"]
    after = ALGORITHMS["dqn"].load(tmp_path / "dqn" / f"{PONG}_2" / f"{PONG}.zip", device="cpu")
    assert after.policy.freeze_boundary == "adapter"
    assert after._n_updates > before._n_updates
    rates = {group["name"]: group["lr"] for group in after.policy.optimizer.param_groups}
    assert rates["head"] == pytest.approx(1e-4)
    assert rates["backbone"] == pytest.approx(2e-5)
    moved = after.policy.q_net.features_extractor.boundary.moved_at_update
    assert before._n_updates < moved <= after._n_updates
