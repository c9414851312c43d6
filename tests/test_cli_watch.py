"""The film of an episode: the environment's own pictures, the actions that were taken, and the return."""

import json

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import pytest
import torch as th
from sb3_contrib import QRDQN
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_resnet.cli import pictures
from sb3_resnet.cli.envs import env_for
from sb3_resnet.cli.watch import play
from tests.helpers import DictGame, TinyGame, make_dict_model, make_model, q_values, run_command


class DrawnGame(TinyGame):
    """Its picture is larger than what the agent sees, and red where the bar is."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012  # as gymnasium declares it

    def __init__(self, render_mode=None):
        super().__init__()
        self.render_mode = render_mode

    def render(self):
        picture = np.zeros((64, 48, 3), np.uint8)
        picture[:, 16 * self.column : 16 * self.column + 16, 0] = 255
        picture[:, :, 2] = 10 * self.clock
        return picture


def registered(name):
    gym.register(f"{name}-v0", f"tests.test_cli_watch:{name}")
    yield f"{name}-v0"
    del gym.envs.registration.registry[f"{name}-v0"]


@pytest.fixture
def drawn_id():
    yield from registered("DrawnGame")


@pytest.fixture
def steering_id():
    yield from registered("DrawnSteering")


@pytest.fixture
def model_file(tmp_path):
    make_model(env=DrawnGame(), extractor={"backbone": "resnet_mini"}).save(tmp_path / "model.zip")
    return tmp_path / "model.zip"


def test_an_episode_is_played_greedily_with_the_pictures_of_the_environment(drawn_id):
    model = make_model(env=DrawnGame(), extractor={"backbone": "resnet_mini"})
    film = play(model, env_for(model, drawn_id, seed=3), 100)
    assert film.is_over
    assert len(film.frames) == len(film.actions) == 13
    assert (film.actions == q_values(model, np.stack(film.observations)).argmax(dim=1).numpy()).all()
    # A picture shows the state that the agent saw when it chose, which the reward is for.
    columns = np.array([int(frame[0, :, 0].argmax()) // 16 for frame in film.frames])
    assert (film.rewards == (film.actions == columns)).all()
    assert [int(frame[0, 0, 2]) for frame in film.frames] == [10 * step for step in range(13)]
    assert not play(model, env_for(model, drawn_id), 5).is_over


def test_epsilon_is_the_share_of_actions_at_random_and_the_seed_decides_them(drawn_id):
    model = make_model(env=DrawnGame(), extractor={"backbone": "resnet_mini"})

    def actions(epsilon, seed):
        return play(model, env_for(model, drawn_id), 13, epsilon, seed).actions.tolist()

    assert actions(1.0, 1) == actions(1.0, 1)
    assert len({tuple(actions(1.0, seed)) for seed in range(4)}) == 4
    assert actions(0.0, 1) == actions(0.0, 2)


def test_any_model_is_watched_and_a_heat_map_needs_a_resnet(drawn_id, tmp_path):
    DQN("MlpPolicy", DrawnGame(), buffer_size=10).save(tmp_path / "plain.zip")
    words = ("watch", tmp_path / "plain.zip", "--env", drawn_id, "-o", tmp_path / "film.gif")
    assert run_command(*words)[0] == 0
    assert len(imageio.mimread(tmp_path / "film.gif")) == 13
    status, _, error = run_command(*words, "--gradcam")
    assert status == 1
    assert "sees with FlattenExtractor, not with ResNetExtractor" in error


class DrawnSteering(DrawnGame):
    """Takes three numbers; the largest is the action."""

    def __init__(self, render_mode=None):
        super().__init__(render_mode)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (3,), np.float32)

    def step(self, action):
        return super().step(int(np.argmax(action)))


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [QRDQN, PPO, A2C, SAC, TD3])
def test_the_model_of_each_algorithm_is_watched(algorithm, drawn_id, steering_id, tmp_path):
    game_id = steering_id if algorithm in (SAC, TD3) else drawn_id
    game = DrawnSteering() if algorithm in (SAC, TD3) else DrawnGame()
    small = {"buffer_size": 10} if issubclass(algorithm, OffPolicyAlgorithm) else {}
    model = algorithm("MlpPolicy", game, seed=0, **small)
    model.save(tmp_path / "model.zip")
    words = ("--env", game_id, "-o", tmp_path / "film.gif", "--seed", 3)
    status, printed, error = run_command("watch", tmp_path / "model.zip", *words)
    assert status == 0, error
    film = play(model, env_for(model, game_id, seed=3), 100)
    assert film.is_over
    assert f"return {film.rewards.sum():g} in 13 steps" in printed


class DrawnDictGame(DictGame):
    """Draws one grey picture."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012  # as gymnasium declares it

    def __init__(self, render_mode=None):
        super().__init__()
        self.render_mode = render_mode

    def render(self):
        return np.full((32, 32, 3), 100, np.uint8)


def test_an_agent_of_a_dict_is_watched(tmp_path):
    gym.register("DrawnDict-v0", "tests.test_cli_watch:DrawnDictGame")
    try:
        make_dict_model(env=DrawnDictGame()).save(tmp_path / "model.zip")
        words = ("watch", tmp_path / "model.zip", "--env", "DrawnDict-v0", "-o", tmp_path / "film.gif")
        status, printed, error = run_command(*words)
        assert status == 0, error
        assert "film.gif: return " in printed
    finally:
        del gym.envs.registration.registry["DrawnDict-v0"]


def test_an_atari_game_is_played_to_its_end_by_an_agent_that_never_serves():
    pytest.importorskip("ale_py")
    space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    game = FakeImageEnv(action_dim=4, screen_height=84, screen_width=84, n_channels=4)
    model = make_model(env=game, extractor={"backbone": "resnet_mini"})
    assert model.observation_space == space
    with th.no_grad():
        model.q_net.q_net[-1].weight.zero_()
        model.q_net.q_net[-1].bias.copy_(th.tensor([0.0, 0.0, 1.0, 0.0]))  # always to the right
    env = env_for(model, "BreakoutNoFrameskip-v4", serves=True)
    film = play(model, env, 400)
    assert film.is_over
    assert set(film.actions) == {2}
    assert env.unwrapped.envs[0].unwrapped.ale.lives() != 0  # the next game has begun
    env.close()


@pytest.mark.parametrize("suffix", ["gif", "mp4"])
def test_the_film_has_each_step_and_the_return_is_printed(model_file, drawn_id, tmp_path, suffix):
    film = tmp_path / "new" / f"film.{suffix}"
    status, printed, _ = run_command("watch", model_file, "--env", drawn_id, "-o", film, "--seed", 3)
    assert status == 0
    model = make_model(env=DrawnGame(), extractor={"backbone": "resnet_mini"})
    expected = play(model, env_for(model, drawn_id, seed=3), 100)
    assert printed == f"{film}: return {expected.rewards.sum():g} in 13 steps\n"
    frames = [frame[..., :3] for frame in imageio.get_reader(film)]
    assert len(frames) == 13
    assert frames[0].shape == (64, 48, 3)
    # Compression changes colours a little.
    assert all(abs(a.astype(int) - b).mean() < 12 for a, b in zip(frames, expected.frames, strict=True))


def test_gradcam_goes_beside_the_picture(model_file, drawn_id, tmp_path):
    film = tmp_path / "film.gif"
    status, printed, _ = run_command("watch", model_file, "--env", drawn_id, "-o", film, "--gradcam", "--steps", 4)
    assert status == 0
    assert "in 4 steps; the episode was not over, --steps 8 plays on" in printed
    frames = [frame[..., :3] for frame in imageio.get_reader(film)]
    assert len(frames) == 4
    assert frames[0].shape == (64, 96, 3)


def test_beside_leaves_the_picture_and_colours_its_copy_where_the_map_is_hot():
    picture = np.full((8, 6, 3), 40, np.uint8)
    heat = np.zeros((16, 12), np.float32)
    heat[:, 8:] = 1.0
    both = pictures.beside(picture, heat)
    assert both.shape == (8, 12, 3)
    np.testing.assert_array_equal(both[:, :6], picture)
    np.testing.assert_array_equal(both[:, 6:9], picture[:, :3])
    assert (both[:, 11, 0].astype(int) > 100).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-o", "film.avi"), "must end with .gif or .mp4"),
        (("--steps", 0), "--steps must be finite and >= 1"),
        (("--epsilon", 1.5), "--epsilon"),
        (("--env", "Tiny-v0"), "draws no pictures of itself"),
        (("--device", "cuda:99"), "--device cuda:99"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(model_file, drawn_id, tiny_id, tmp_path, arguments, message):
    film = tmp_path / "film.gif"
    status, _, error = run_command("watch", model_file, "--env", drawn_id, "-o", film, *arguments)
    assert status == 1
    assert message in error
    assert error.count("\n") == 1
    assert not film.exists()


def test_the_card_beside_a_model_names_its_environment(model_file, drawn_id, tmp_path):
    words = ("watch", model_file, "-o", tmp_path / "film.gif")
    for text in (None, "{", '{"environment": 3}', "[]"):
        if text is not None:
            model_file.with_suffix(".json").write_text(text)
        status, _, error = run_command(*words, width=1000)
        assert status == 1
        assert f"Write --env ID: there is no {model_file.with_suffix('.json')} that names one" in error
    model_file.with_suffix(".json").write_text(json.dumps({"environment": drawn_id}))
    assert run_command(*words)[0] == 0


def test_code_in_a_model_runs_only_with_trust(drawn_id, tmp_path):
    model = make_model(env=DrawnGame(), extractor={"backbone": "resnet_mini"}, learning_rate=lambda left: 1e-3 * left)
    model.save(tmp_path / "model.zip")
    arguments = ("watch", tmp_path / "model.zip", "--env", drawn_id, "-o", tmp_path / "film.gif", "--steps", 2)
    status, _, error = run_command(*arguments)
    assert status == 1
    assert "--trust" in error
    assert run_command(*arguments, "--trust")[0] == 0


def test_a_missing_model_is_named_before_its_card(tmp_path):
    make_model(extractor={"backbone": "resnet_mini"}).save(tmp_path / "model.zip")
    status, _, error = run_command("watch", tmp_path / "none.zip")
    assert status == 1
    assert "none.zip is no file; models there: " in error
    status, _, error = run_command("watch", tmp_path / "model")
    assert status == 1
    assert "there is no" in error
    assert "model.json that names one" in error
