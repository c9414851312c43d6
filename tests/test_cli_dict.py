"""``sb3-resnet check`` and ``explain`` of models that see a Dict."""

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from PIL import Image
from stable_baselines3 import DQN, HerReplayBuffer
from stable_baselines3.common.buffers import DictReplayBuffer
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack

from sb3_resnet.callbacks import FeatureCacheCallback
from sb3_resnet.cli import check as checking
from sb3_resnet.cli import setups, trial
from sb3_resnet.cli.doctor import examine
from sb3_resnet.cli.envs import env_for
from sb3_resnet.cli.explain import default_layer, heat_maps, image_key, play_greedily
from sb3_resnet.cli.loading import extractors_of, load_model
from sb3_resnet.cli.network import ScoreNetwork
from sb3_resnet.cli.observed import by_key, described, flat
from tests.helpers import (
    DictGame,
    GoalGame,
    dict_observations,
    make_dict_model,
    make_model,
    run_command,
    scores,
    slowly,
)

GREY = spaces.Box(0, 255, (1, 32, 32), np.uint8)
SPEED = spaces.Box(-np.inf, np.inf, (3,), np.float32)
CACHE_REFUSES = "FeatureCacheCallback keeps the entries of one image, and the observation space is a Dict: leave it out"
YAML = """
default:
  policy: ResNetMultiInputPolicy
  n_timesteps: 1000
  buffer_size: 1000
  batch_size: 8
  policy_kwargs:
    features_extractor_kwargs: {backbone: resnet_mini, freeze_backbone: false}
"""


def report_of(model, buffer_size=None, callbacks=(), available=10**12):
    """What check finds of a model that is there already."""
    return checking.check(lambda: setups.Setup(model, 1000, buffer_size, callbacks), available)


@pytest.mark.parametrize("algorithm", ["dqn", "ppo", *slowly("qrdqn", "a2c")])
def test_check_of_each_algorithm(algorithm, dict_id):
    options = ["--algo", algorithm, "--backbone", "resnet_mini", "--extractor-kwarg", "freeze_backbone=false"]
    options += [] if algorithm == "a2c" else ["--batch-size", 4]
    options += ["--buffer-size", 1000] if "dqn" in algorithm else ["--param", "n_steps=8"]
    status, text, _ = run_command("check", "--env", dict_id, *options)
    assert "Nothing is wrong." in text
    assert status == 0
    assert f"{algorithm.upper()} with ResNet" in text
    for word in ("camera: layer4", "depth: adapter", "steps/s", "gradient update", "backbone_no_decay"):
        assert word in text
    assert "cached" not in text
    assert ("DictReplayBuffer" in text) == ("dqn" in algorithm)
    assert "FrameReplayBuffer" not in text
    assert "feature cache" not in text


def test_rows_are_those_of_each_image():
    by_key = {"depth": {"backbone": "resnet_tiny", "pooling": "flatten", "image_size": 40}}
    model = make_dict_model(extractor={"by_key": by_key, "frozen_dtype": "bfloat16"})
    report = report_of(model, 100)
    rows = dict(report.model)
    assert rows["observations"] == (
        "1 x camera uint8 (3, 32, 32), count Discrete(4), depth float32 (1, 36, 36), speed float32 (5,)"
    )
    assert rows["camera: backbone"] == "resnet_mini: nothing of it trains"
    assert rows["depth: backbone"] == "resnet_tiny: nothing of it trains"
    for key in ("camera", "depth"):
        text = rows[f"{key}: frozen stages"]
        assert text.startswith("bfloat16, off by ")
        assert 0.0 < float(text.split()[3].rstrip("%")) < 5.0
        assert text.endswith("over 64 observations")
    shapes = dict(report.shapes)
    assert shapes["camera: observations"] == (4, 3, 32, 32)
    assert shapes["camera: layer4"] == (4, 64, 1, 1)
    assert "camera: adapter" not in shapes
    assert shapes["depth: observations"] == (4, 1, 36, 36)
    assert shapes["depth: preprocessed"] == (4, 1, 40, 40)
    assert shapes["depth: adapter"] == (4, 3, 40, 40)
    assert shapes["depth: pooled (flatten)"] == (4, 256 * 2 * 2)
    assert shapes["scores of actions"] == (4, 3)
    speed = dict(report.speed)
    assert {"camera: frozen stages, fast encoder", "depth: frozen stages, fast encoder"} <= {*speed}
    assert "gradient update, cached" not in speed
    assert [finding.code for finding in report.findings] == ["frozen_random_backbone"]


def test_memory_is_that_of_the_buffer_of_sb3(dict_id):
    # Twice 3,072 bytes of camera, 8 of count, 5,184 of depth and 20 of speed; then the action and three numbers.
    needed = 10**6 * (2 * (3072 + 8 + 5184 + 20) + 8 + 3 * 4)
    report = report_of(make_dict_model(), 10**6, available=5 * 10**9)
    assert report.memory == [("DictReplayBuffer", needed), ("available", 5 * 10**9)]
    (finding,) = (finding for finding in report.findings if finding.code == "buffer_memory")
    assert finding.seen == "The replay buffer of 1,000,000 transitions takes 16.6 GB."
    assert finding.change == "Write buffer_size=270000."
    assert report_of(make_dict_model("ppo")).memory == []


@pytest.mark.parametrize("algorithm", ["dqn", "ppo"])
def test_the_cache_is_a_finding_only_where_it_is_configured(algorithm):
    size = 100 if algorithm == "dqn" else None
    codes = {finding.code for finding in report_of(make_dict_model(algorithm), size).findings}
    assert codes == {"frozen_random_backbone"}
    report = report_of(make_dict_model(algorithm), size, [FeatureCacheCallback()])
    (finding,) = (finding for finding in report.findings if finding.code == "feature_cache")
    assert finding.seen == f"FeatureCacheCallback: {CACHE_REFUSES}."
    assert "feature cache" not in dict(report.memory)


def test_check_reads_rl_zoos_yaml(tmp_path, dict_id):
    file = tmp_path / "zoo.yml"
    file.write_text(YAML)
    options = ["check", "--env", dict_id, "--conf-file", file]
    status, text, _ = run_command(*options)
    assert "Nothing is wrong." in text
    assert status == 0
    assert "camera: preprocessed" in text
    file.write_text(YAML + "  callback:\n    - sb3_resnet.callbacks.FeatureCacheCallback\n")
    status, text, _ = run_command(*options)
    assert status == 1
    assert f"error feature_cache: FeatureCacheCallback: {CACHE_REFUSES}" in text


@pytest.fixture
def goal_id():
    gym.register("Goal-v0", "tests.test_cli_dict:LongGoalGame")
    yield "Goal-v0"
    del gym.envs.registration.registry["Goal-v0"]


class LongGoalGame(GoalGame):
    """No episode ends within a trial."""

    def __init__(self):
        super().__init__(length=10**6)


@pytest.mark.parametrize("from_yaml", [False, True])
def test_check_with_her(from_yaml, tmp_path, goal_id):
    options = ["--batch-size", 4, "--buffer-size", 1000]
    if from_yaml:
        (tmp_path / "zoo.yml").write_text(YAML + "  replay_buffer_class: HerReplayBuffer\n")
        options += ["--conf-file", tmp_path / "zoo.yml"]
    else:
        options += ["--backbone", "resnet_mini", "--extractor-kwarg", "freeze_backbone=false"]
        options += ["--param", "replay_buffer_class=stable_baselines3.HerReplayBuffer"]
    status, text, _ = run_command("check", "--env", goal_id, *options)
    assert "Nothing is wrong." in text
    assert status == 0
    assert "HerReplayBuffer" in text
    assert "picture: layer4" in text


def test_episodes_of_a_trial_can_be_sampled():
    her = {"replay_buffer_class": HerReplayBuffer, "buffer_size": 64}
    model = make_dict_model(env=LongGoalGame(), **her)
    played, env_step = trial.play(model, 20)
    assert played["picture"].shape == (21, 1, 3, 32, 32)
    assert model.replay_buffer.ep_length[:20].min() == 20
    speed = trial.measure(model, extractors_of(model), played, env_step)
    assert speed.cache_refusal == CACHE_REFUSES
    assert [*speed.encode] == ["picture"]


KEYS = [("camera", {}), ("depth", {"features_dim": 7, "vector_arch": [4]})]


@pytest.mark.parametrize(("key", "extractor"), KEYS)
@pytest.mark.parametrize("algorithm", ["dqn", "ppo", *slowly("qrdqn")])
def test_scores_are_those_of_the_policy_whichever_image_is_looked_at(algorithm, key, extractor):
    model = make_dict_model(algorithm, extractor=extractor)
    model.learn(24)
    observations = dict_observations(model, 5)
    tensors = obs_as_tensor(observations, model.device)
    network = ScoreNetwork(model, key).eval()
    expected = scores(model, observations)
    if algorithm == "ppo":
        found = network.of_policy(tensors).softmax(dim=1)
        assert th.allclose(found, expected[:, :3], rtol=0, atol=1e-6)
    else:
        assert th.allclose(network.of_policy(tensors), expected.reshape(5, -1, 3).mean(dim=1), rtol=0, atol=1e-6)
    # The features of this image are replaced by those of another, and no others.
    other = dict_observations(model, 5, seed=2)[key]
    changed = network.of_policy({**tensors, key: th.as_tensor(other)})
    found = network(th.as_tensor(other), network.features(tensors))
    assert th.allclose(found, changed, rtol=0, atol=1e-5)
    assert float((changed - network.of_policy(tensors)).abs().max()) > 1e-3


def test_the_difference_of_precisions_is_that_of_this_image_alone():
    model = make_dict_model(extractor={"frozen_dtype": "bfloat16"})
    model.learn(24)
    observations = dict_observations(model, 40)
    network = ScoreNetwork(model, "depth").eval()
    features = network.features(obs_as_tensor(observations, model.device))
    depth = observations["depth"]
    found = network.difference(depth, features.numpy())
    with th.no_grad():
        expected = float((network(th.as_tensor(depth), features) - network.scores(features)).abs().max())
    assert found == pytest.approx(expected, rel=0.2)
    assert found > 1e-5


def left(maps):
    mask = th.zeros_like(maps)
    mask[..., : maps.shape[-1] // 2] = 1.0
    return mask


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("method", ["gradcam", "saliency"])
def test_maps_are_those_of_the_image(method, shared):
    """Behind a stem that sees the left half of an image alone, its right half cannot matter."""
    large = spaces.Box(0, 255, (3, 64, 64), np.uint8)
    model = make_dict_model(env=DictGame(one=large, two=large, speed=SPEED), extractor={"shared": shared})
    resnet = model.policy.online.features_extractor.resnets["two"]
    resnet.backbone.layer1.register_forward_pre_hook(lambda module, args: (args[0] * left(args[0]),))
    observations = dict_observations(model, 40)
    network = ScoreNetwork(model, "two").eval()
    features = network.features(obs_as_tensor(observations, model.device))
    actions = network.scores(features).argmax(dim=1).numpy()
    layer = "layer1" if method == "gradcam" else None
    maps = {
        key: heat_maps(model, observations[key], actions, method, layer, key, features.numpy())
        for key in ("one", "two")
    }
    assert {heat.shape for heat in maps.values()} == {(40, 64, 64)}
    ratios = {key: heat[..., :28].mean() / max(heat[..., 44:].mean(), 1e-9) for key, heat in maps.items()}
    assert ratios["two"] > 10
    assert (ratios["one"] > 10) == shared


def test_an_episode_is_that_of_the_agent(dict_id):
    model = make_dict_model()
    episode = play_greedily(model, env_for(model, dict_id), 100, "depth")
    assert episode.observations.shape == (13, 1, 36, 36)
    assert episode.features.shape == (13, 64 + 64 + 5 + 4)
    assert episode.names == ["0", "1", "2"]
    assert (episode.actions == episode.scores.argmax(axis=1)).all()
    camera = play_greedily(model, env_for(model, dict_id), 100, "camera")
    assert camera.observations.shape == (13, 3, 32, 32)
    np.testing.assert_array_equal(camera.scores, episode.scores)


def test_the_image_is_the_first_or_the_one_that_is_named():
    model = make_dict_model()
    assert image_key(model) == "camera"
    assert image_key(model, "depth") == "depth"
    assert image_key(make_model()) == ""
    large = spaces.Box(0, 255, (3, 84, 84), np.uint8)
    model = make_dict_model(env=DictGame(small=GREY, large=large))
    assert (default_layer(model, "small"), default_layer(model, "large")) == ("layer1", "layer3")


@pytest.mark.parametrize("algorithm", ["dqn", "ppo"])
@pytest.mark.slow
def test_explain_writes_sheet_and_episode(algorithm, dict_id, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_dict_model(algorithm, extractor={"frozen_dtype": "bfloat16"}).save("model.zip")
    explain = ["explain", "model.zip", "--env", dict_id, "--frames", 1]
    status, text, _ = run_command(*explain)
    assert status == 0
    assert "in 13 steps; explained in float32, whose scores differ from the model's in bfloat16 by at most" in text
    assert {path.name for path in (tmp_path / "explain").iterdir()} == {"sheet.png", "episode.mp4"}
    assert imageio.get_reader("explain/episode.mp4").get_data(0).shape == (256, 256 + 240, 3)
    assert run_command(*explain, "-o", "depth", "--key", "depth", "--method", "saliency", "--gif")[0] == 0
    # 36 pixels are drawn seven times as large, 32 eight times.
    heights = [Image.open(f"{folder}/sheet.png").size for folder in ("explain", "depth")]
    assert heights == [(260, 22 + 278), (256, 22 + 274)]
    assert (tmp_path / "depth" / "episode.gif").exists()


@pytest.mark.parametrize("trust", [False, True])
def test_a_model_of_her_is_loaded_without_its_environment(trust, tmp_path):
    her = {"replay_buffer_class": HerReplayBuffer, "replay_buffer_kwargs": {"n_sampled_goal": 2}}
    model = make_dict_model(env=GoalGame(), **her)
    model.save(tmp_path / "model.zip")
    loaded = load_model(tmp_path / "model.zip", trust=trust, takes_dict=True)
    observations = dict_observations(model)
    assert th.equal(scores(loaded, observations), scores(model, observations))


class OwnHer(HerReplayBuffer):
    """What a user may have derived."""


def test_only_a_buffer_of_her_is_replaced(tmp_path, monkeypatch):
    her = {"replay_buffer_class": OwnHer, "replay_buffer_kwargs": {"n_sampled_goal": 2}}
    make_dict_model(env=GoalGame(), **her).save(tmp_path / "own.zip")
    assert type(load_model(tmp_path / "own.zip", trust=True, takes_dict=True).replay_buffer) is DictReplayBuffer
    make_model().save(tmp_path / "model.zip")
    given = []

    def load(*arguments, **options):
        given.append(options)
        raise AssertionError("of something else")

    monkeypatch.setattr(DQN, "load", load)
    for trust in (False, True):
        with pytest.raises(ValueError, match=r"cannot be loaded as a DQN model .*of something else"):
            load_model(tmp_path / "model.zip", trust=trust)
    assert len(given) == 2
    assert not [options for options in given if "replay_buffer_class" in options]


def test_explain_refuses_an_image_that_is_not_there(dict_id, tiny_id, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_dict_model().save("dict.zip")
    make_model().save("image.zip")
    status, _, error = run_command("explain", "dict.zip", "--env", dict_id, "--key", "count")
    assert (status, error) == (1, "Error: --key must be one of 'camera', 'depth', got 'count'\n")
    status, _, error = run_command("explain", "image.zip", "--env", tiny_id, "--key", "camera")
    assert (status, error) == (1, "Error: --key camera: the model sees one image, and no Dict: leave --key out\n")
    status, _, error = run_command("explain", "dict.zip", "--env", tiny_id)
    assert status == 1
    assert "The model was trained on a Dict of camera uint8 (3, 32, 32), count Discrete(4), depth float32 (1," in error
    with pytest.raises(ValueError, match="this command works with one image"):
        ScoreNetwork(make_dict_model())
    assert not (tmp_path / "explain").exists()


class ImageGame(DictGame):
    """Its image comes as most environments give it."""

    def __init__(self):
        super().__init__(image=spaces.Box(0, 255, (32, 32, 1), np.uint8), speed=SPEED)


@pytest.fixture
def image_id():
    gym.register("Image-v0", "tests.test_cli_dict:ImageGame")
    yield "Image-v0"
    del gym.envs.registration.registry["Image-v0"]


@pytest.mark.parametrize("count", [1, 4])
def test_frames_of_a_dict_are_stacked_until_they_fit(count, image_id):
    game = DummyVecEnv([ImageGame])
    model = make_dict_model(env=VecFrameStack(game, count) if count > 1 else game)
    env = env_for(model, image_id)
    assert env.observation_space == model.observation_space
    assert env.reset()["image"].shape == (1, count, 32, 32)
    assert env.observation_space["speed"].shape == (3 * count,)


def test_parts_that_would_be_stacked_differently_do_not_fit(image_id):
    model = make_dict_model(env=DictGame(image=spaces.Box(0, 255, (4, 32, 32), np.uint8), speed=SPEED))
    with pytest.raises(
        ValueError, match=r"but Image-v0 gives a Dict of image uint8 \(1, 32, 32\), speed float32 \(3,\)"
    ):
        env_for(model, image_id)


def test_doctor_looks_at_the_model_too(tmp_path):
    (tmp_path / "0.monitor.csv").write_text('#{"t_start": 1}\nr,l,t\n' + "1,10,1\n" * 30)
    make_dict_model().save(tmp_path / "best_model.zip")
    found = examine(tmp_path)
    assert dict(found.facts)["model"] == str(tmp_path / "best_model.zip")
    assert "frozen_random_backbone" in {finding.code for finding in found.findings}


def test_one_image_is_a_dict_of_one():
    played = np.zeros((5, 2, 3, 8, 8))
    assert [*by_key(played)] == [""]
    assert flat(played).shape == (10, 3, 8, 8)
    assert flat({"a": played})["a"].shape == (10, 3, 8, 8)
    assert described(spaces.MultiBinary(3)) == "MultiBinary(3)"
