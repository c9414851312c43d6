"""Run folders as SB3 and RL-Zoo leave them: reading, judging, drawing."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from typer.testing import CliRunner

from sb3_resnet.cli import plot
from sb3_resnet.cli.app import app
from sb3_resnet.cli.doctor import examine
from sb3_resnet.cli.runs import find_runs, rolling_mean, summary
from tests.helpers import TinyGame, make_model


def write_run(folder, rewards=(), evaluations=(), length=10, env_id="Tiny-v0", start=100.0, log=None):
    """A folder with the files of SB3, without training."""
    folder.mkdir(parents=True, exist_ok=True)
    if len(rewards):
        lines = [f"#{json.dumps({'t_start': start, 'env_id': env_id})}", "r,l,t"]
        lines += [f"{reward},{length},{index + 1}.5" for index, reward in enumerate(rewards)]
        (folder / "0.monitor.csv").write_text("\n".join(lines) + "\n")
    if len(evaluations):
        steps = 100 * np.arange(1, len(evaluations) + 1)
        np.savez(folder / "evaluations.npz", timesteps=steps, results=np.array(evaluations), ep_lengths=0)
    if log is not None:
        (folder / "progress.csv").write_text(log)
    return folder


def invoke(*arguments):
    result = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_a_real_run_of_sb3_is_read(tmp_path):
    folder = tmp_path / "run_1"
    model = make_model(env=Monitor(TinyGame(), str(folder / "monitor.csv")))
    model.set_logger(configure(str(folder), ["csv"]))
    evaluate = EvalCallback(Monitor(TinyGame()), n_eval_episodes=2, eval_freq=60, log_path=str(folder), verbose=0)
    model.learn(130, callback=evaluate, log_interval=2)
    model.save(folder / "run.zip")

    (run,) = find_runs(folder)
    assert run.episodes[:, 0].tolist() == [13.0 * n for n in range(1, 11)]
    assert run.evaluations.tolist() == [60, 120]
    assert run.results.shape == (2, 2)
    columns, lines = run.columns(), zip(run.columns()["time/episodes"], run.progress["time/episodes"], strict=True)
    assert all(logged in (None, counted) for counted, logged in lines)
    assert {**columns, "time/episodes": run.progress["time/episodes"]} == run.progress
    assert run.progress["time/total_timesteps"][-1] == 130
    assert run.model == folder / "run.zip"
    examination = examine(folder)
    assert ("training", "10 episodes, 130 steps") in examination.facts
    assert [finding.code for finding in examination.findings] == ["frozen_random_backbone"]


@pytest.mark.parametrize(("env_id", "skip"), [("PongNoFrameskip-v4", 4), ("ALE/Pong-v5", 4), ("Tiny-v0", 1)])
def test_episodes_of_atari_are_counted_in_steps_of_the_agent(env_id, skip, tmp_path):
    (run,) = find_runs(write_run(tmp_path / "run", range(3), length=40, env_id=env_id))
    assert run.episodes[:, 0].tolist() == [40 / skip * n for n in (1, 2, 3)]


def test_rl_zoos_layout_has_steps_of_the_agent_and_columns_from_rewards(tmp_path):
    folder = write_run(tmp_path / "dqn" / "PongNoFrameskip-v4_1", range(8), [[1, 3], [5, 7]], 400, "PongNoFrameskip-v4")
    (folder / "PongNoFrameskip-v4").mkdir()
    for name in ("best_model", "PongNoFrameskip-v4", "rl_model_100_steps"):
        (folder / f"{name}.zip").write_text("no model")
    (run,) = find_runs(tmp_path)
    assert run.folder == folder
    assert run.experiment == tmp_path / "dqn" / "PongNoFrameskip-v4"
    assert run.model == folder / "PongNoFrameskip-v4.zip"
    assert run.episodes[0].tolist() == [100.0, 0.0]
    assert run.columns() == {
        "time/total_timesteps": [100, 200, 400, 800],
        "rollout/ep_rew_mean": [None, None, 1.5, 3.5],
        "eval/mean_reward": [2, 6, None, None],
        "time/episodes": [1, 2, 4, 8],
    }
    facts = dict(summary(run))
    assert facts["best evaluation"] == "6 at step 200"
    assert facts["mean reward of the last 8"] == "3.5"
    assert dict(examine(folder).facts)["model"].startswith("not looked at: ")


def test_episodes_of_several_environments_are_put_in_order(tmp_path):
    folder = write_run(tmp_path / "run", [1, 3])
    (folder / "0.monitor.csv").rename(folder / "1.monitor.csv")
    write_run(folder, [2, 4], start=100.2, length=5)
    assert find_runs(folder)[0].episodes.tolist() == [[10, 1], [15, 2], [25, 3], [30, 4]]


def test_lost_lives_in_the_log_are_no_episodes(tmp_path):
    log = "time/total_timesteps,time/episodes\n" + "".join(f"{100 * n},{15 * n}\n" for n in range(1, 5))
    (run,) = find_runs(write_run(tmp_path / "run", range(8), length=200, log=log))
    assert run.columns()["time/episodes"] == [2, 4, 6, 8]


def test_half_a_last_line_is_left_out(tmp_path):
    folder = write_run(tmp_path / "run", [1, 2])
    path = folder / "0.monitor.csv"
    path.write_text(path.read_text() + "3,1")
    assert len(find_runs(folder)[0].episodes) == 2


def archive(**arrays):
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def test_a_run_that_has_just_begun_does_not_hide_the_others(tmp_path):
    for number in (1, 2):
        write_run(tmp_path / f"a_{number}", [1, 2, 3])
    write_run(tmp_path / "a_3")
    (tmp_path / "a_3" / "0.monitor.csv").write_text("")
    assert [len(run.episodes) for run in find_runs(tmp_path)] == [3, 3, 0]
    status, text, _ = invoke("plot", tmp_path, "-o", tmp_path / "curves.png")
    assert status == 0
    assert "1 curves of 3 runs" in text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("0.monitor.csv", ""),
        ("0.monitor.csv", '#{"t_start": 1}\nr,l,t\n'),
        ("progress.csv", ""),
        ("progress.csv", "time/total_timesteps,train/loss\n"),
    ],
)
def test_doctor_says_that_empty_logs_tell_nothing(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    status, text, error = invoke("doctor", tmp_path)
    assert status == 1
    assert "Nothing is wrong" not in text
    (line,) = error.splitlines()
    assert line.startswith(f"Error: {tmp_path}: the logs hold no line, so nothing could be judged")


NO_EVALUATIONS = "evaluations.npz is no file of EvalCallback"
BROKEN = {
    "no evaluations": ("evaluations.npz", archive(timesteps=np.zeros(0), results=np.zeros((0, 3))), NO_EVALUATIONS),
    "no episodes": ("evaluations.npz", archive(timesteps=np.arange(3), results=np.zeros((3, 0))), NO_EVALUATIONS),
    "scalars": ("evaluations.npz", archive(timesteps=3, results=2.0), NO_EVALUATIONS),
    "fewer results": ("evaluations.npz", archive(timesteps=np.arange(3), results=np.zeros((2, 2))), NO_EVALUATIONS),
    "monitor header": ("0.monitor.csv", b"r,l,t\n1,2,3\n", "is no monitor file of SB3"),
    "monitor line": ("0.monitor.csv", b'#{"t_start": 1}\nr,l,t\n1,x,3\n1,2,3\n', "line 3: no episode"),
    "evaluations": ("evaluations.npz", b"no archive", "is no file of EvalCallback"),
    "nothing": ("other.txt", b"", "holds no logs of a run"),
}


@pytest.mark.parametrize("command", ["doctor", "plot"])
@pytest.mark.parametrize("kind", BROKEN)
def test_broken_folders_end_in_one_line(kind, command, tmp_path):
    name, content, message = BROKEN[kind]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_bytes(content)
    status, _, error = invoke(command, tmp_path / "run")
    assert status == 1
    (line,) = error.splitlines()
    assert message in line
    assert "is no folder" in invoke(command, tmp_path / "none")[2]


SICK = "time/total_timesteps,train/loss\n" + "".join(f"{n},{2.0**n}\n" for n in range(40))


def test_doctor_tells_what_the_log_shows(tmp_path):
    folder = write_run(tmp_path / "run", [1], log=SICK)
    status, text, _ = invoke("doctor", folder)
    assert status == 1
    assert "error loss_explodes: The loss grew from" in text
    assert "1 error, 0 warnings" in text
    healthy = write_run(tmp_path / "healthy", [1], log="time/total_timesteps,train/loss\n1,0.5\n")
    assert invoke("doctor", healthy)[0] == 0
    log = SICK.replace("train/loss", "train/loss,train/policy_gradient_loss").replace(".0\n", ".0,-0.01\n")
    assert invoke("doctor", write_run(tmp_path / "ppo", [1], log=log))[0] == 0
    status, _, error = invoke("doctor", tmp_path)
    assert status == 1
    assert "holds several runs" in error


def test_doctor_names_a_stage_that_this_trunk_has(tmp_path):
    log = "time/total_timesteps,eval/mean_reward,monitor/freeze_boundary\n"
    log += "".join(f"{100_000 * n},1.0,6\n" for n in range(20))
    folder = write_run(tmp_path / "run", [1], log=log)
    assert "unfreeze_from=STAGE" in " ".join(invoke("doctor", folder)[1].split())
    make_model(extractor={"last_stage": "layer2"}).save(folder / "run.zip")
    assert "unfreeze_from='layer2'" in " ".join(invoke("doctor", folder)[1].split())


def test_strict_makes_warnings_errors(tmp_path):
    folder = write_run(tmp_path / "run", [1])
    make_model().save(folder / "run.zip")
    assert invoke("doctor", folder)[0] == 0
    assert invoke("doctor", folder, "--strict")[0] == 1


@pytest.mark.parametrize(
    ("name", "experiment"),
    [("Pong_12", "Pong"), ("a-seed3", "a"), ("a_run_7", "a"), ("Pong-v4", "Pong-v4"), ("seed_1", "."), ("4", ".")],
)
def test_experiments_differ_in_more_than_the_counter(name, experiment, tmp_path):
    (run,) = find_runs(write_run(tmp_path / name, [1]))
    assert run.experiment == (tmp_path if experiment == "." else tmp_path / experiment)


def test_rolling_mean():
    assert rolling_mean(np.array([1.0, 3.0, 5.0, 7.0]), 2).tolist() == [1, 2, 4, 6]
    assert rolling_mean(np.zeros(0), 2).tolist() == []


def test_bootstrap_is_the_interval_of_the_mean():
    random = np.random.default_rng(1)
    values = random.normal(3.0, 2.0, (400, 2))
    low, high = plot.bootstrap(values, 95)
    half = 1.96 * values.std(axis=0) / 20
    np.testing.assert_allclose(low, values.mean(axis=0) - half, atol=0.03)
    np.testing.assert_allclose(high, values.mean(axis=0) + half, atol=0.03)
    narrow = plot.bootstrap(values, 50)
    assert (narrow[0] > low).all()
    assert (narrow[1] < high).all()


def test_curves_over_seeds_are_means_on_common_steps(tmp_path):
    write_run(tmp_path / "a_1", [0] * 20, [[0, 2], [4, 6]])
    write_run(tmp_path / "a_2", [4] * 10, [[2, 4], [6, 8]])
    write_run(tmp_path / "b" / "run_1", [1, 2, 3])
    runs = [run for folder in ("a_1", "a_2", "b") for run in find_runs(tmp_path / folder)]
    (evaluated,) = plot.curves(runs, "evaluations", 100, 95)
    assert (evaluated.label, evaluated.runs) == ("a", 2)
    assert evaluated.steps.tolist() == [100, 200]
    assert evaluated.mean.tolist() == [2, 6]
    assert (evaluated.low.tolist(), evaluated.high.tolist()) == ([1, 5], [3, 7])
    several, single = plot.curves(runs, "training", 100, 95)
    assert several.steps[[0, -1]].tolist() == [10, 100]  # the shorter run ends there
    assert (several.mean == 2).all()
    assert (several.low == 0).all()
    assert (single.label, single.mean.tolist(), single.steps.tolist()) == ("b", [2.0], [30.0])
    assert single.low[0] < 2 < single.high[0]


def test_labels_grow_until_they_differ(tmp_path):
    write_run(tmp_path / "old" / "Pong_1", [1])
    write_run(tmp_path / "new" / "Pong_1", [1])
    found = plot.curves(find_runs(tmp_path), "training", 10, 95)
    assert [curve.label for curve in found] == ["new/Pong", "old/Pong"]


def test_an_experiment_is_one_however_its_folders_are_written(tmp_path, monkeypatch):
    for number in (1, 2):
        write_run(tmp_path / f"a_{number}", [number])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "a_2")
    for other in (tmp_path / "a_2", "link"):
        (curve,) = plot.curves([*find_runs("a_1"), *find_runs(other)], "training", 10, 95)
        assert (curve.label, curve.runs) == ("a", 2)


def test_the_model_of_the_present_folder_is_its_last_one(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "Pong_1", [1])
    for name in ("Pong", "best_model"):
        (folder / f"{name}.zip").touch()
    monkeypatch.chdir(folder)
    (run,) = find_runs(".")
    assert run.model.name == "Pong.zip"


@pytest.mark.slow
def test_plot_writes_a_picture(tmp_path):
    write_run(tmp_path / "logs" / "a_1", range(20), [[0, 2], [4, 6]])
    write_run(tmp_path / "logs" / "a_2", range(20), [[2, 4], [6, 8]])
    output = tmp_path / "curves.png"
    status, text, _ = invoke("plot", tmp_path / "logs", tmp_path / "logs" / "a_1", "-o", output)
    assert status == 0
    assert "2 curves of 2 runs" in text
    picture = np.asarray(Image.open(output).convert("RGB"))
    assert picture.shape[1] > 1000
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
    assert "is no folder" in invoke("plot", tmp_path / "logs", "-o", tmp_path / "none" / "a.png")[2]
    for name in ("curves", "curves.foo", "curves.v2"):
        error = invoke("plot", tmp_path / "logs", "-o", tmp_path / name)[2]
        assert f"{name} names no format of pictures by its end: write one of ." in error
        assert not (tmp_path / name).exists()
    assert "is a folder: write the name of a picture" in invoke("plot", tmp_path / "logs", "-o", tmp_path)[2]
    assert invoke("plot", tmp_path / "logs", "-o", tmp_path / "curves.SVG")[1].startswith(f"{tmp_path}/curves.SVG: ")
    assert (tmp_path / "curves.SVG").read_text().startswith("<?xml")
    write_run(tmp_path / "empty", log="a\n")
    assert "nothing to draw" in invoke("plot", tmp_path / "empty", "-o", output)[2]
    assert "--window must be" in invoke("plot", tmp_path / "logs", "-o", output, "--window", 0)[2]


@pytest.mark.slow
def test_the_window_and_the_confidence_of_the_command_are_those_of_the_picture(tmp_path):
    write_run(tmp_path / "a", range(20))
    options = ("-o", tmp_path / "curves.svg", "--window", 7, "--confidence", 80)
    assert invoke("plot", tmp_path / "a", *options)[0] == 0
    drawn = (tmp_path / "curves.svg").read_text()  # matplotlib writes each text beside its outlines
    assert "training, mean of 7 episodes" in drawn
    assert "Mean and 80 % bootstrap interval" in drawn


def test_the_window_is_the_number_of_episodes_in_a_mean(tmp_path):
    write_run(tmp_path / "a", [0, 2, 4, 6])
    runs = find_runs(tmp_path / "a")
    assert plot.curves(runs, "training", 1, 95)[0].mean.tolist() == [0, 2, 4, 6]
    assert plot.curves(runs, "training", 3, 95)[0].mean.tolist() == [2, 4]  # from the first whole window on
