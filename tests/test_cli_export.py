"""ONNX against torch in ONNX Runtime, over real frames."""

import numpy as np
import onnxruntime
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecFrameStack
from typer.testing import CliRunner

from sb3_resnet.cli import export as exporting
from sb3_resnet.cli import trial
from sb3_resnet.cli.app import app
from sb3_resnet.cli.envs import env_for, register_atari
from tests.helpers import TinyGame, make_model, q_values

PONG = "PongNoFrameskip-v4"
HARD = {"adapter": "per_frame", "pooling": "spatial_softmax", "image_size": [40, 34], "use_imagenet_norm": True}


def trained(model):
    """After some updates the features' mean and variance are those of observations."""
    trial.play(model, 40)
    model._setup_learn(1, None)
    model.train(5, 8)
    return model


def run_onnx(path, observations):
    session = onnxruntime.InferenceSession(path)
    (entry,) = session.get_inputs()
    assert entry.type == "tensor(uint8)"
    assert entry.shape == ["batch", *observations.shape[1:]]
    return session.run(["scores"], {"observation": observations})[0], session.get_modelmeta().custom_metadata_map


@pytest.mark.slow
def test_export_of_pong_through_the_command(tmp_path):
    register_atari()
    # As the environment of a script gives it, channels last.
    env = VecFrameStack(make_atari_env(PONG, seed=3), 4)
    assert env.observation_space.shape == (84, 84, 4)
    model = trained(make_model(env=env, extractor={"pooling": "flatten"}))
    model.save(tmp_path / "pong.zip")
    result = CliRunner().invoke(app, ["export", str(tmp_path / "pong.zip"), "--env", PONG, "--channels-last"])
    assert result.exit_code == 0, result.stderr
    assert "uint8 ('batch', 84, 84, 4) to scores" in result.stdout
    assert f"over 100 frames of {PONG}" in result.stdout

    frames = trial.random_play(env_for(model, PONG, seed=5), 100)
    assert frames.std() > 1
    scores, metadata = run_onnx(tmp_path / "pong.onnx", np.ascontiguousarray(np.moveaxis(frames, 1, -1)))
    np.testing.assert_allclose(scores, q_values(model, frames), rtol=0, atol=1e-4)
    assert scores.std(axis=0).max() > 1e-3
    assert metadata["layout"] == "NHWC"


@pytest.mark.slow
def test_export_of_quantiles_of_resized_frames_each_alone(tmp_path):
    model = trained(make_model("qrdqn", extractor=HARD))
    frames = np.concatenate([trial.play(model, 79)[0][:, 0], exporting.random_observations(model, 20)])
    done = exporting.export(model, tmp_path / "model.onnx", frames)
    assert (done.compared, done.shape) == (100, ("batch", 4, 32, 32))
    expected = q_values(model, frames).mean(dim=1)
    for some in (slice(0, 1), slice(0, 100)):
        scores, metadata = run_onnx(done.path, frames[some])
        np.testing.assert_allclose(scores, expected[some], rtol=0, atol=1e-4)
    assert metadata["algorithm"] == "QRDQN"


class _Means(th.nn.Module):
    """Stands for the network, since exporting a ResNet takes seconds."""

    def __init__(self, model):
        super().__init__()

    def forward(self, observations):
        return observations.float().mean(dim=(2, 3))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pixel", "shift", "fits"),
    [(0, 5e-5, True), (0, 2e-4, False), (0, np.nan, False), (0, np.inf, False), (250, 0.02, True), (250, 0.03, False)],
)
def test_a_graph_that_differs_is_not_written(pixel, shift, fits, tmp_path, monkeypatch):
    model = make_model()
    wanted = exporting._scores
    monkeypatch.setattr(exporting, "ScoreNetwork", _Means)
    monkeypatch.setattr(exporting, "_scores", lambda *args: wanted(*args) + np.float32(shift))
    observations = np.full((4, 4, 32, 32), pixel, np.uint8)
    if fits:
        assert exporting.export(model, tmp_path / "model.onnx", observations).difference == pytest.approx(shift, 1e-2)
        return
    with pytest.raises(ValueError, match=r"differ by (0.0002|nan|inf|0.03) over 4 observations, more than .*: nothing"):
        exporting.export(model, tmp_path / "model.onnx", observations)
    assert not any(tmp_path.iterdir())


def test_errors_come_before_the_work(tmp_path):
    model = make_model()
    with pytest.raises(FileNotFoundError, match="is no folder"):
        exporting.export(model, tmp_path / "none" / "model.onnx", exporting.random_observations(model, 2))


def test_random_observations_fill_the_space():
    model = make_model(env=TinyGame((3, 32, 32)))
    noise = exporting.random_observations(model, 3)
    assert (noise.shape, noise.dtype) == ((3, 3, 32, 32), np.uint8)
    assert (noise.min(), noise.max()) == (0, 255)


@pytest.mark.slow
def test_the_difference_from_a_model_in_reduced_precision_is_said(tmp_path):
    model = make_model(extractor={"frozen_dtype": "bfloat16"})
    done = exporting.export(model, tmp_path / "model.onnx", exporting.random_observations(model, 4))
    assert done.frozen_dtype == "bfloat16"
    assert done.difference < 1e-4 < done.rounding < 1.0


def test_observations_without_bounds_are_drawn_too():
    model = make_model(env=TinyGame(), policy_kwargs={})
    model.observation_space = spaces.Box(-np.inf, np.inf, (4, 32, 32), np.float32)
    drawn = exporting.random_observations(model, 3)
    assert (drawn.shape, drawn.dtype) == ((3, 4, 32, 32), np.float32)
    assert 0.9 < drawn.std() < 1.1
