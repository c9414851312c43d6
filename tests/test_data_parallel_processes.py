"""Ranks as processes of their own: over a real link, with a rank that is killed, and by RL-Zoo."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
WORKER = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "rank_worker.py")]


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def variables(rank, size, address="127.0.0.1", port=0, **more):
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("RANK", "WORLD", "SLURM"))},
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        **more,
    }


def start(*arguments, prefix=(), **kwargs):
    line = [*prefix, *WORKER, *map(str, arguments)]
    return subprocess.Popen(line, env=variables(**kwargs), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(processes, timeout=120):
    """:return: exit status, what was printed, and errors, of each"""
    try:
        found = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, found, strict=True)]


def run(folder, total, size):
    port = free_port()
    done = end([start(folder, total, rank=rank, size=size, port=port) for rank in range(size)])
    assert [status for status, *_ in done] == [0] * size, done
    return [out for _, out, _ in done]


def wait_for(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(process.stderr.read())


@pytest.fixture
def link():
    """Two network namespaces, as two machines that one cable connects."""
    names = [f"sb3a{os.getpid() % 100000}", f"sb3b{os.getpid() % 100000}"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "cable")
            for device in ("cable", "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces are not allowed here: {error}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL, check=False)


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, stderr=subprocess.PIPE)


def over_the_link(link, *arguments):
    interface = {"GLOO_SOCKET_IFNAME": "cable"}
    return [
        start(
            *arguments,
            prefix=["ip", "netns", "exec", name],
            rank=rank,
            size=2,
            address="10.77.0.1",
            port=29501,
            **interface,
        )
        for rank, name in enumerate(link)
    ]


def test_over_a_link_a_killed_rank_ends_the_other_and_any_number_of_ranks_resumes(link, tmp_path):
    processes = over_the_link(link, tmp_path, 100_000, 30)
    wait_for(processes[1], "rollout 120")
    processes[1].send_signal(signal.SIGKILL)
    (status, _, errors), (killed, *_) = end(processes, timeout=60)
    assert killed == -signal.SIGKILL
    assert status == 1
    last = errors.strip().splitlines()[-1]
    assert "LostRankError: Rank 0 has lost another rank" in last
    assert errors.count("Traceback") == 1
    assert "start all of them again from the newest checkpoint" in last

    reached = 0
    for size, total in ((1, 200), (3, 300), (2, 400)):
        outputs = run(tmp_path, total, size)
        weights = {re.search(r"weighs (\w+)", out)[1] for out in outputs}
        assert len(weights) == 1
        began = {int(re.search(r"resumed (\d+) layer4", out)[1]) for out in outputs}
        assert len(began) == 1
        assert min(began) > reached
        reached = min(began)
        assert all(total <= int(re.search(r"ended (\d+) layer4", out)[1]) < total + 4 * size for out in outputs)


def test_over_a_link_ranks_end_with_one_model(link, tmp_path):
    done = end(over_the_link(link, tmp_path, 160, 30))
    assert [status for status, *_ in done] == [0, 0], done
    assert len({re.search(r"weighs (\w+)", out)[1] for _, out, _ in done}) == 1
    assert all("ended 160 layer4" in out for _, out, _ in done)


def test_srun_needs_an_address_alone(tmp_path):
    port, done = free_port(), []
    for rank in range(2):
        slurm = {"SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": "2"}
        environment = {**variables(rank, 2, port=port), **slurm}
        del environment["RANK"], environment["WORLD_SIZE"]
        line = [*WORKER, str(tmp_path), "64"]
        done.append(subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    done = end(done)
    assert [status for status, *_ in done] == [0, 0], done
    assert len({re.search(r"weighs (\w+)", out)[1] for _, out, _ in done}) == 1


ZOO = """
RankGame-v0:
  n_timesteps: 80
  policy: ResNetCnnPolicy
  learning_starts: 20
  buffer_size: 100
  batch_size: 4
  policy_kwargs: {features_extractor_kwargs: {backbone: resnet_mini}}
  callback: [sb3_resnet.callbacks.DataParallelCallback]
"""
GAME = """
import gymnasium
from tests.helpers import TinyGame
gymnasium.register("RankGame-v0", TinyGame)
"""


def test_rl_zoo_trains_with_ranks_in_folders_of_their_own(tmp_path):
    (tmp_path / "dqn.yml").write_text(ZOO)
    (tmp_path / "rank_game.py").write_text(GAME)
    launch = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    train = [
        "-m",
        "rl_zoo3.train",
        "--algo",
        "dqn",
        "--env",
        "RankGame-v0",
        "--gym-packages",
        "sb3_resnet",
        "rank_game",
    ]
    train += ["--conf-file", str(tmp_path / "dqn.yml"), "-f", str(tmp_path), "--device", "cpu", "--seed", "1"]
    train += ["--eval-freq", "30", "--eval-episodes", "1", "--n-eval-envs", "1", "--log-interval", "1", "--uuid"]
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    line = [sys.executable, "-W", "ignore", "-m", *launch, *train]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    folders = [path for path in (tmp_path / "dqn").iterdir() if path.is_dir()]
    assert len(folders) == 2
    assert all((folder / "RankGame-v0.zip").is_file() for folder in folders)
    assert sorted((folder / "best_model.zip").is_file() for folder in folders) == [False, True]
