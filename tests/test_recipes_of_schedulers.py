"""The scripts of the guide on pre-emption, with a scheduler that stands in for SLURM."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

PAGE = (ROOT / "docs" / "guides" / "preemption.md").read_text()
SCRIPTS = re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
#: Stand-ins: one rank for each task, signals to all of them as srun passes them on, and notes of what is requeued.
STAND_INS = {
    "srun": """#!/bin/bash
pids=()
for ((rank = 0; rank < SLURM_NTASKS; rank++)); do
  SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" &
  pids+=($!)
done
trap 'kill -USR1 "${pids[@]}"' USR1
most=0
for pid in "${pids[@]}"; do
  until wait "$pid"; code=$?; [ "$code" -le 128 ]; do :; done
  [ "$code" -gt "$most" ] && most=$code
done
exit "$most"
""",
    "scontrol": """#!/bin/bash
if [ "$1" = requeue ]; then echo "$2" >> requeued; else echo 127.0.0.1; fi
""",
}
TRAIN = """
import os, sys
import torch as th
from stable_baselines3.common.callbacks import ConvertCallback
from sb3_resnet.callbacks import PreemptionCallback
from tests.helpers import make_model

if int(os.environ.get("WORLD_SIZE", 1)) > 1:
    th.distributed.init_process_group("gloo")
model = make_model(extractor={"backbone": "resnet_mini"}, seed=int(os.environ.get("RANK", 0)))

def tell(*args):
    if model.num_timesteps % 20 == 0:
        print("at", model.num_timesteps, flush=True)
    return True

total = int(open("total").read())
model.learn(total, callback=[PreemptionCallback("logs/run1"), ConvertCallback(tell)])
print("finished at", model.num_timesteps, flush=True)
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_bash(script):
    assert len(SCRIPTS) == 4
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def start(folder, script, total, tasks):
    (folder / "total").write_text(str(total))
    (folder / "train.py").write_text(TRAIN)
    (folder / "job.sh").write_text(script)
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    programs = {name: Path(sys.executable).with_name(name) for name in ("python", "torchrun")}
    passed_on = {name: f'#!/bin/bash\nexec "{path}" "$@"\n' for name, path in programs.items()}
    for name, text in {**STAND_INS, **passed_on}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "0", "SLURM_JOB_NODELIST": "here", "SLURM_NNODES": "1"}
    environment = {**os.environ, **slurm, "SLURM_NTASKS": str(tasks), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{tools}:{environment['PATH']}"
    command = ["bash", "job.sh"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, start_new_session=True, **pipes)


#: Which of the guide's scripts, how many tasks, and whether SLURM signals the step (all but the shell) or the shell.
RECIPES = {
    "array with srun": (0, 1, "step"),
    "array without srun": (1, 1, "shell"),
    "ranks of srun": (2, 2, "step"),
    "torchrun": (3, 1, "step"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_job_is_requeued_and_goes_on(tmp_path, name):
    number, tasks, receiver = RECIPES[name]
    script = SCRIPTS[number].replace("29500", "29533").replace("--nproc-per-node=4", "--nproc-per-node=2")
    job = start(tmp_path, script, 10**6, tasks)
    before = []
    for line in job.stdout:
        before.append(line)
        if line.startswith("at"):
            break
    assert job.poll() is None, before
    if receiver == "shell":
        os.kill(job.pid, 10)
    else:
        found = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True, check=True)
        for pid in found.stdout.split():
            os.kill(int(pid), 10)
    output, _ = job.communicate(timeout=600)
    assert "because of a signal; exit with 75" in output, output
    assert (tmp_path / "requeued").read_text() == "17\n"
    assert name == "torchrun" or job.returncode == 75, output
    saved = sorted((tmp_path / "logs" / "run1").glob("**/rl_model_*_steps.zip"))
    assert len(saved) == (2 if name in ("ranks of srun", "torchrun") else 1)
    steps = int(saved[0].stem.split("_")[2])
    (tmp_path / "requeued").unlink()
    output, _ = start(tmp_path, script, steps + 40, tasks).communicate(timeout=600)
    assert f"at timestep {steps}; " in output, output
    assert f"finished at {steps + 40}" in output
    assert not (tmp_path / "requeued").exists()
