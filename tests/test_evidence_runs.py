"""A run of benchmarks/atari.py gives the same result each time, whatever kills it."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import gymnasium as gym
import numpy as np
import pytest
import torch as th

from tests.evidence import (
    ROOT,
    SCRIPT,
    arms,
    budgets,
    commands,
    games,
    pong,
    recording,
    result,
    results,
    runs,
    spec,
    suite,
)


def test_pong_ends_when_it_is_won_or_the_time_is_over(tmp_path):
    ends = pong.ends(60.0)
    log = recording.Log()
    assert not ends(log)
    log.evaluations = [{"step": 8, "returns": [17.0, 18.9]}]
    assert not ends(log)
    log.evaluations = [{"step": 8, "returns": [17.0, 19.0]}]
    assert ends(log)
    log.evaluations, log.spent = [{"step": 8, "returns": [0.0]}], [0.0, 0.0, 3600.0]
    assert ends(log)
    files = [result(tmp_path, "random_frozen", "Pong", seed, returns) for seed, returns in ((0, [19, 2]), (1, [3, 17]))]
    found = pong.summary(files, 60.0)
    assert found[pong.SHARE] == "1 of 2"
    assert [row["best evaluation"] for row in found["runs"]] == [19.0, 17.0]
    assert [row["minutes"] for row in found["runs"]] == [1.5, 1.5]
    late = result(tmp_path, "random_frozen", "Pong", 2, [3, 19])
    assert pong.summary([late], 1.0)[pong.SHARE] == "0 of 1", "it won after its time was over"


@pytest.mark.slow
def test_a_run_of_pong_stops_at_the_evaluation_that_wins(tmp_path, monkeypatch):
    pytest.importorskip("ale_py")
    small = {"steps": 480, "eval_every": 160, "save_every": 480, "learning_starts": 480, "buffer_size": 480}
    monkeypatch.setitem(budgets.BUDGETS, "pong", dataclasses.replace(budgets.BUDGETS["pong"], threads=1, **small))
    left = iter([2.0, 19.0, 3.0])
    monkeypatch.setattr(recording, "evaluate", lambda *args: [next(left)])
    found = pong.pong(tmp_path / "results", tmp_path / "checkpoints", [0], 60.0, None)
    assert found == json.loads((tmp_path / "results" / "atari" / "pong" / "random_frozen.json").read_text())
    assert found[pong.SHARE] == "1 of 1"
    assert found["runs"][0]["steps"] == 320
    assert found["command"] == "python benchmarks/atari.py pong --minutes 60 --seeds 1"
    assert (tmp_path / "results" / "atari" / "pong" / "random_frozen.png").stat().st_size > 5_000
    assert len([*(tmp_path / "checkpoints").rglob("agent.zip")]) == 1


def test_another_runs_file_is_not_taken_for_ones_own(tmp_path):
    path = result(tmp_path, "nature", "Pong", 0, [1.0], rate=3e-4)
    run = spec.Run("atari", "cpu", "Pong", "nature", 0, 20_000, 1e-4)
    with pytest.raises(ValueError, match=r"is of another run \(.*--learning-rate 0.0003\): delete it"):
        runs.execute(run, tmp_path, tmp_path / "checkpoints")
    same = spec.Run("atari", "cpu", "Pong", "nature", 0, 20_000, 3e-4)
    assert runs.execute(same, tmp_path, tmp_path / "checkpoints") == path
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"other")
    pretrained = spec.Run("atari", "cpu", "Pong", "pretrained_frozen", 0, 20_000, 3e-4, str(weights))
    path = result(tmp_path, "pretrained_frozen", "Pong", 0, [1.0], rate=3e-4, weights=str(weights))
    written = json.loads(path.read_text())
    written["settings"]["trunk"] = {"weights": {"file": "weights.pth", "sha256": arms.sha256(str(weights))}}
    path.write_text(json.dumps(written))
    assert runs.execute(pretrained, tmp_path, tmp_path / "checkpoints") == path
    weights.write_bytes(b"changed")
    with pytest.raises(ValueError, match=r"was trained with another weights\.pth: delete it"):
        runs.execute(pretrained, tmp_path, tmp_path / "checkpoints")


def finished(run, folder):
    """The checkpoints of a run that has made its last step."""
    place = folder / run.folder / run.name
    place.mkdir(parents=True)
    for steps in (10_000, 9_000):
        (place / f"model-{steps}.zip").write_text(str(steps))
    (place / "settings.json").write_text(json.dumps({"command": run.command, "shared": {}}))
    (place / "buffer-10000.pkl").touch()
    log = recording.Log(steps=10_000, evaluations=[{"step": 10_000, "returns": [1.0]}], seconds=[[10_000, 1, 1, 1]])
    (place / "log.json").write_text(json.dumps(dataclasses.asdict(log)))
    return place


def test_the_last_model_is_kept_as_the_agent_also_beside_an_older_one(tmp_path):
    run = spec.Run("atari", "cpu", "Pong", "nature", 0, 10_000, 1e-4)
    place = finished(run, tmp_path / "checkpoints")
    runs.execute(run, tmp_path, tmp_path / "checkpoints")
    assert sorted(file.name for file in place.iterdir()) == ["agent.zip", "lock"]
    assert (place / "agent.zip").read_text() == "10000"


@pytest.mark.slow
def test_a_run_killed_right_after_its_result_keeps_its_agent(tmp_path):
    run = spec.Run("atari", "cpu", "Pong", "nature", 0, 10_000, 1e-4)
    result(tmp_path, "nature", "Pong", 0, [1.0], steps=10_000)
    place = finished(run, tmp_path / "checkpoints")
    suite.execute_all([run], tmp_path, tmp_path / "checkpoints")
    assert sorted(file.name for file in place.iterdir()) == ["agent.zip", "lock"]
    assert (place / "agent.zip").read_text() == "10000"


def test_a_run_that_is_not_finished_keeps_its_checkpoints_where_another_folder_has_a_result(tmp_path):
    result(tmp_path, "nature", "Pong", 0, [1.0])
    run = spec.Run("atari", "cpu", "Pong", "nature", 0, 20_000, 1e-4)
    place = finished(run, tmp_path / "checkpoints")
    before = sorted(file.name for file in place.iterdir())
    runs.execute(run, tmp_path, tmp_path / "checkpoints")
    suite.execute_all([run], tmp_path, tmp_path / "checkpoints")
    assert sorted(file.name for file in place.iterdir()) == sorted([*before, "lock"])


def test_a_checkpoint_of_another_rate_is_not_taken_for_this_run_though_nothing_is_left_to_train(tmp_path):
    place = finished(spec.Run("atari", "cpu", "Pong", "nature", 0, 10_000, 3e-4), tmp_path / "checkpoints")
    with pytest.raises(ValueError, match="is of another run"):
        runs.execute(spec.Run("atari", "cpu", "Pong", "nature", 0, 10_000, 1e-4), tmp_path, tmp_path / "checkpoints")
    assert (place / "model-10000.zip").exists()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_seed_has_environments_of_its_own_in_each_piece(seed, tmp_path, monkeypatch):
    gym.register_envs(pytest.importorskip("ale_py"))
    tiny = dataclasses.replace(
        budgets.BUDGETS["smoke"], steps=160, save_every=80, eval_every=160, learning_starts=16, buffer_size=400
    )
    monkeypatch.setitem(budgets.BUDGETS, "smoke", tiny)
    monkeypatch.setattr(recording, "evaluate", lambda *_: [0.0])
    make, first, pictures = games.make_env, [], []

    def made(*arguments, **others):
        env = make(*arguments, **others)
        give, reset = env.venv.seed, env.venv.reset

        def seeded(number=None):
            first.append(number)
            return give(number)

        def begun():
            pictures.append((first[-1], reset()))
            return pictures[-1][1]

        env.venv.seed, env.venv.reset = seeded, begun
        return env

    monkeypatch.setattr(runs, "make_env", made)
    run = spec.Run("atari", "smoke", "Pong", "nature", seed, 160, 1e-4)
    runs.execute(run, tmp_path, tmp_path)  # which would say if it did not play the same again
    assert [number for number, _ in pictures if number is not None][:1] == [games.N_ENVS * seed]


WRONG = {
    "pong --minutes 0": "--minutes must be above 0, got 0",
    "pong --minutes nan": "--minutes must be above 0, got nan",
    "pong --weights pong=x.safetensors": "--weights pong=...: pong is not played here, but Pong",
    "pong --weights Pong=x.safetensors": "x.safetensors is no file: the weights of Pong",
    "pong --learning-rate -1": "--learning-rate must be above 0, got -1",
    "--budget smoke --weights Pnog=x": "--weights Pnog=...: Pnog is not played here, but Pong",
    "tune --rates 0": "--rates must be above 0, got 0",
    "tune --rates 1e-4 1e-4": "--rates has the same rate twice: 0.0001 0.0001",
    "run --game Zaxxon --arm nature": "'Zaxxon' has no human score here: write one of Alien, ",
    "run --suite minigrid --game foo --arm nature": "MiniGrid-foo-v0 is not registered: write the game as in DoorKey",
    "run --game Pong --arm nature --steps 2000": "--steps 2000: nothing is trained before step 2,000, so write more",
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wrong_words_are_said_in_one_line(capsys, tmp_path):
    pytest.importorskip("ale_py")
    pytest.importorskip("minigrid")
    assert commands.main(["--arms", "natur"]) == 1
    assert capsys.readouterr().err.startswith("Error: --arms must be of nature, ")
    assert commands.main(["report", "--results", "none"]) == 1
    assert "holds no results" in capsys.readouterr().err
    assert commands.main(["--seeds", "0"]) == 1
    assert "at least 1, got 0" in capsys.readouterr().err
    for rate in ("0", "-1", "nan", "inf"):
        words = ["run", "--budget", "smoke", "--game", "Pong", "--arm", "nature", f"--learning-rate={rate}"]
        assert commands.main(words) == 1
        assert f"--learning-rate must be above 0, got {rate}" in capsys.readouterr().err
    assert commands.main(["tune", "--games", "Boxing"]) == 1
    assert "--games must be of Pong, Breakout, which are never reported, got 'Boxing'" in capsys.readouterr().err
    for words, said in WRONG.items():
        assert commands.main([*words.split(), "--results", str(tmp_path), "--checkpoints", str(tmp_path)]) == 1
        assert said in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == []
    for words in ("--processes -1", "--processes 0", "report --steps 0", "run --game Pong --arm nature --steps x"):
        with pytest.raises(SystemExit):
            commands.main(words.split())
        assert "write a whole number of at least 1, got" in capsys.readouterr().err
    if not th.cuda.is_available():
        assert (
            commands.main(["agent", "--budget", "gpu", "--game", "Pong", "--arm", "nature", "--results", "none"]) == 1
        )
        assert "agent.zip is not there" in capsys.readouterr().err
        assert commands.main(["--budget", "gpu"]) == 1
        assert "PyTorch finds no GPU: write --budget cpu" in capsys.readouterr().err


def started(folder, *words):
    """A command of the suite in a process of its own."""
    places = ["--results", str(folder), "--checkpoints", str(folder / "checkpoints")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(SCRIPT), *words, *places]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def ended(process):
    error = process.communicate()[1]
    assert process.returncode == 0, error


def results_in(folder):
    """By name, without times."""
    files = (folder / "atari" / "smoke").glob("*.json")
    return {file.name: file.read_bytes() for file in files if not file.name.endswith(".times.json")}


SMOKE = ("--budget", "smoke", "--arms", "random_frozen", "--games", "Pong")


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    """The same command in two folders: 5,000 steps of Pong."""
    pytest.importorskip("ale_py")
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "other")]
    alone = ("run", "--budget", "smoke", "--game", "Pong", "--arm", "random_frozen", "--learning-rate", "0.0001")
    for process in [started(folder, *alone) for folder in folders]:
        ended(process)
    return folders


@pytest.mark.slow
@pytest.mark.xdist_group("evidence")
def test_the_same_command_gives_the_same_result_file_bit_for_bit(twice):
    one, other = map(results_in, twice)
    assert [*one] == ["Pong-random_frozen-5000-s0.json"]
    assert one == other
    found = json.loads(one["Pong-random_frozen-5000-s0.json"])
    assert [entry["step"] for entry in found["evaluations"]] == [4_000, 5_000]
    assert found["last evaluation"] == np.mean(found["evaluations"][-1]["returns"])
    assert found["steps done"] == 5_000
    assert found["command"].startswith("python benchmarks/atari.py run --suite atari --budget smoke --game Pong ")
    times = json.loads((twice[0] / "atari" / "smoke" / "Pong-random_frozen-5000-s0.times.json").read_text())
    assert [row[0] for row in times[results.SECONDS]] == [4_000, 5_000]
    assert 0 < times[results.SECONDS][0][1] < times[results.SECONDS][1][1]


@pytest.mark.slow
@pytest.mark.xdist_group("evidence")
def test_a_signal_to_the_suite_alone_ends_its_runs_too(tmp_path):
    process = started(tmp_path, *SMOKE)
    while process.poll() is None and not [*tmp_path.glob("**/settings.json")]:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "Stopped: the same command goes on" in error
    assert "Traceback" not in error
    (place,) = (tmp_path / "checkpoints").glob("atari/smoke/*")
    with runs.locked(place):  # which its process would hold
        assert not results_in(tmp_path)


@pytest.mark.slow
@pytest.mark.xdist_group("evidence")
def test_a_suite_killed_three_times_ends_with_the_same_files(twice, tmp_path):
    checkpoints = tmp_path / "checkpoints"
    # In the first piece, in the second one, and in the last one.
    moments = [*(f"**/model-{steps}.zip" for steps in (2_000, 4_000))]
    kills = 0
    for pattern in ("**/settings.json", *moments):
        process = started(tmp_path, *SMOKE)
        while process.poll() is None and not [*checkpoints.glob(pattern)]:
            time.sleep(0.05)
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
        assert not results_in(tmp_path)
    assert kills == 3
    ended(started(tmp_path, *SMOKE))
    assert results_in(tmp_path) == results_in(twice[0])
    # What is left is the agent, for `sb3-resnet watch`.
    left = sorted(file.name for file in checkpoints.rglob("*") if file.is_file())
    assert left == ["agent.zip", "lock"]
