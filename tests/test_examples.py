"""Each file of ``examples/`` runs, with a small number of steps."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
# Steps that are enough for each part of an example to happen, and what it must have printed then.
RUNS = {
    "quickstart": (200, r"^\d+ points per game after 200 steps\n$"),
    "phases": (160, r"Lowest stage that trains: (?:stem|layer4)\n[\s\S]*backbone +\S+ +\S+ +[\d,]+ +[1-9][\d,]*"),
    "own_environment": (200, r"Balls caught, of those that fell: \d+% before, \d+% after 200 steps"),
    "pretrain_and_use": (
        224,
        r"features show the game's state: -?[\d.]+ before, .* after\nTrained for 224 steps on pong",
    ),
    "ppo_with_dict": (512, r"Trained for 512 steps on arm, camera"),
}

pytestmark = pytest.mark.slow


def run(*command, folder, **environment):
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_example_is_run_and_listed():
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".yml", ".ipynb", ".sh")}
    assert {f"{name}.py" for name in RUNS} | {"resume.py", "rl_zoo.yml", "two_ranks.py", "watch.ipynb"} <= files
    listed = {*re.findall(r"^\| \[([\w.]+)\]\(\1\)", (EXAMPLES / "README.md").read_text(), re.MULTILINE)}
    assert listed == files


@pytest.mark.parametrize("name", RUNS)
def test_an_example_runs_and_says_what_it_did(name, tmp_path):
    steps, printed = RUNS[name]
    text = run(EXAMPLES / f"{name}.py", steps, folder=tmp_path)
    assert re.search(printed, text), text


def test_two_ranks_train_one_model(tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    text = run(*launch, EXAMPLES / "two_ranks.py", 240, folder=tmp_path)
    assert text.splitlines()[-1] == "2 ranks, 240 steps together"
    assert (tmp_path / "two_ranks.zip").is_file()


def test_a_killed_run_goes_on(tmp_path):
    command = [sys.executable, str(EXAMPLES / "resume.py"), "2000"]
    process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT)
    deadline = time.monotonic() + 300
    saved = tmp_path / "logs" / "resume"
    while not list(saved.glob("rl_model_*_steps.zip")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    text = run(EXAMPLES / "resume.py", 2000, folder=tmp_path)
    at = re.search(r"Going on at step (\d+) from logs/resume/", text)
    assert 0 < int(at[1]) < 2000
    assert "Done: 2000 steps" in text
    assert "Beginning" not in text


def test_the_configuration_trains_with_the_command_that_it_names(tmp_path):
    head = (EXAMPLES / "rl_zoo.yml").read_text().partition("\nSpace")[0].replace("\\\n#", "").replace("\n#", "\n")
    (command,) = re.findall(r"python (-m rl_zoo3\.train .*)", head)
    small = ["-n", "160", "--eval-freq", "-1", "-params", "learning_starts:20", "buffer_size:200", "batch_size:4"]
    arguments = command.replace("examples/", f"{EXAMPLES}/").split()
    run(*arguments, *small, folder=tmp_path)
    assert list(tmp_path.glob("logs/dqn/SpaceInvaders*_1/SpaceInvaders*.zip"))


def test_the_notebook_trains_and_shows_the_agent(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="pip install -e '.[dev]'")
    import nbformat

    monkeypatch.delenv("MPLBACKEND", raising=False)  # so that pictures are outputs of the cells
    for name, value in {**ENVIRONMENT, "STEPS": "400"}.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(EXAMPLES / "watch.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # what is kept in git is what runs
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("head_no_decay" in output.get("text", "") for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
