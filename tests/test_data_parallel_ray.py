"""Ray Train starts ranks of its own, with a process group that exists before the callback begins."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray.train.torch", reason="needs the extra ray")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
SCRIPT = """
import sys
from pathlib import Path

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def train(config):
    import torch as th

    from sb3_resnet.callbacks import DataParallelCallback
    from sb3_resnet.common.in_step import weigh
    from tests.helpers import make_model

    th.set_num_threads(1)
    model = make_model(extractor={"backbone": "resnet_mini"})
    model.learn(64, callback=DataParallelCallback())
    assert th.distributed.is_initialized()  # it is Ray's, and stays
    rank = ray.train.get_context().get_world_rank()
    (Path(config["folder"]) / f"rank{rank}").write_text(f"{model.num_timesteps} {weigh(model)}")


ray.init(num_cpus=3, include_dashboard=False)
run = RunConfig(storage_path=sys.argv[1])
scaling = ScalingConfig(num_workers=2)
TorchTrainer(train, train_loop_config={"folder": sys.argv[1]}, scaling_config=scaling, run_config=run).fit()
"""


def test_two_workers_of_a_local_ray_train_one_model(tmp_path):
    settings = {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    line = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path)]
    environment = {**os.environ, **settings, "PYTHONPATH": path}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = ((tmp_path / f"rank{rank}").read_text() for rank in (0, 1))
    assert first == second
    assert first.startswith("64 ")
