"""The arms of benchmarks/atari.py differ in the trunk alone, and are evaluated as the page says."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch as th
import torchvision
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_resnet.callbacks import FeatureCacheCallback
from sb3_resnet.nn import cards
from tests.evidence import agent, arms, budgets, commands, evaluation, games, recording, result, spec, suite
from tests.helpers import make_model, observations, run_command

NEEDS_WEIGHTS = {name for name, arm in arms.ARMS.items() if arm.weights}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """What each arm trains with, read from its model."""
    file = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    th.manual_seed(0)
    th.save(torchvision.models.resnet18().state_dict(), file)
    budget = budgets.budget_of("smoke")
    found = {}
    for arm in arms.ARMS:
        env = DummyVecEnv([lambda: FakeImageEnv(action_dim=6, screen_height=84, screen_width=84, n_channels=4)] * 8)
        weights = str(file) if arm in NEEDS_WEIGHTS else None
        model = arms.build(arm, env, budget, 0, 1e-4, weights)
        found[arm] = arms.resolved(model, arm, "atari", budget, 1e-4, weights)
    return found


@pytest.mark.slow
def test_reported_arms_differ_in_the_trunk_alone(settings):
    assert {*games.SUITES["atari"].arms} < {*settings} == {*arms.ARMS}
    ours = settings["nature_head"]
    for arm, found in settings.items():
        assert found["shared"] == ours["shared"], arm
        assert found["learning_rate"] == ours["learning_rate"]
        assert {*found} == {"shared", "head", "trunk", "learning_rate"}
        if arm != "nature":
            assert found["head"] == ours["head"] == ["FeatureStandardizer", "Linear(256)", "ReLU", "Linear(6)"], arm
    # That one is SB3's own policy, as SB3 has it.
    assert settings["nature"]["head"] == ["Linear(6)"]
    trunks = [json.dumps(found["trunk"], sort_keys=True) for arm, found in settings.items() if arm != "nature"]
    same_file = {"pretrained": "imagenet"}  # both were given one file here
    assert len({*trunks}) == len(trunks) - 2 * len(same_file)


def test_what_is_shared_is_read_from_the_model_and_holds_what_decides_learning(settings):
    shared = settings["random_frozen"]["shared"]
    assert shared["optimizer"] == {
        **{"class": "Adam", "weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8},
        **{"amsgrad": False, "maximize": False, "fused": True},
    }
    assert (shared["gamma"], shared["n_steps"], shared["batch_size"]) == (0.99, 3, 32)
    assert shared["updates per environment step"] == 1 / 8
    assert shared["evaluation"] == {"every": 4_000, "episodes": 1, "epsilon": 0.01, "rewards": "raw"}
    env = DummyVecEnv([FakeImageEnv] * 8)
    model = arms.build("nature", env, budgets.budget_of("smoke"), 0, 1e-4, None)
    model.gamma, model.policy.optimizer.param_groups[0]["eps"] = 0.5, 1e-3
    changed = arms.resolved(model, "nature", "atari", budgets.budget_of("smoke"), 1e-4, None)["shared"]
    assert (changed["gamma"], changed["optimizer"]["eps"]) == (0.5, 1e-3)


def test_a_trunk_that_trains_says_in_which_type(settings):
    trains = {"pretrained_phases", "scratch", "imagenet_phases"}
    assert {arm for arm, found in settings.items() if "trains in" in found["trunk"]} == trains
    assert {settings[arm]["trunk"]["trains in"] for arm in trains} <= {"torch.bfloat16", "torch.float32"}
    for arm in arms.ARMS:
        found = {type(callback).__name__ for callback in arms.callbacks_of(arm, budgets.budget_of("smoke"))}
        assert ("AMPCallback" in found) == (arm in trains)


def test_no_arm_that_needs_weights_trains_with_random_ones(tmp_path, capsys):
    env = DummyVecEnv([FakeImageEnv] * 8)
    for arm in NEEDS_WEIGHTS:
        with pytest.raises(ValueError, match=f"{arm} needs a weights file"):
            arms.build(arm, env, budgets.budget_of("smoke"), 0, 1e-4, None)
    words = ["run", "--budget", "smoke", "--game", "Pong", "--learning-rate", "1e-4", "--results", str(tmp_path)]
    assert commands.main([*words, "--arm", "imagenet_frozen"]) == 1
    assert "imagenet_frozen on Pong needs --imagenet FILE" in capsys.readouterr().err
    run = spec.Run("atari", "smoke", "Pong", "imagenet_frozen", 0, 5_000, 1e-4, "some/r18.pth")
    assert run.options()[-2:] == ["--imagenet", "some/r18.pth"]
    assert run.command.endswith("--imagenet r18.pth")


def test_a_result_says_how_its_trunk_was_pretrained(tmp_path):
    file = tmp_path / "boxing.safetensors"
    card = dict.fromkeys((*cards.CHECKED, "observed_size"))
    card |= {"backbone": "resnet18", "last_stage": "layer2", "env": "Boxing", "frames": 50_000, "seed": 3}
    cards.save_with_card(file, {"a": th.zeros(1)}, {**card, "arguments": {"minutes": 15.0, "labels": ["none"]}})
    found = arms.provenance(str(file))
    assert (found["file"], found["sha256"]) == ("boxing.safetensors", arms.sha256(str(file)))
    told = {"env": "Boxing", "frames": 50_000, "seed": 3, "minutes": 15.0, "labels": ["none"]}
    assert found["pretraining"] == told


def test_the_budgets_compare_at_equal_update_ratios():
    for name in ("cpu", "gpu"):
        budget = budgets.BUDGETS[name]
        assert budget.updates_per_rollout == games.N_ENVS  # an update per step
        assert (budget.eval_every, budget.episodes) == (10_000, 20)
    assert dataclasses.replace(budgets.BUDGETS["quarter"], updates_per_rollout=games.N_ENVS) == budgets.BUDGETS["cpu"]
    assert 4 * budgets.BUDGETS["quarter"].updates_per_rollout == games.N_ENVS
    with pytest.raises(ValueError, match="steps must be a multiple of 8"):
        budgets.budget_of("cpu", 1001)


def test_games_are_not_those_that_rates_are_chosen_on():
    for domain in games.SUITES.values():
        assert not {*domain.games} & {*domain.tuning}
        assert len(domain.arms) >= 3
    assert len(games.SUITES["atari"].games) >= 4
    assert {*games.SUITES["atari"].games, *games.SUITES["atari"].tuning} <= {*games.SCORES}


def test_arms_without_their_weights_are_skipped_with_a_word(tmp_path):
    (tmp_path / "pong.safetensors").write_bytes(b"")
    rates = {arm: [1e-4] for arm in games.SUITES["atari"].arms}
    common = ("atari", "cpu", 100_000, [*games.SUITES["atari"].arms], ["Pong", "Boxing"], [0, 1], rates)
    found, skipped = suite.runs_of(*common, {"Pong": str(tmp_path / "pong.safetensors")}, None)
    assert {run.game for run in found if run.arm == "pretrained_frozen"} == {"Pong"}
    assert len(found) == 2 * (2 * 4 + 2)
    assert "skipped: pretrained_phases on Boxing needs --weights Boxing=FILE (sb3-resnet pretrain makes one)" in skipped
    assert "skipped: imagenet_frozen on Pong needs --imagenet FILE" in skipped
    assert len(skipped) == 6
    with pytest.raises(FileNotFoundError, match=r"none\.pth is no file"):
        suite.runs_of(*common, {}, "none.pth")
    with pytest.raises(ValueError, match="--arms must be of nature, "):
        suite.runs_of("atari", "cpu", 8, ["natur"], ["Pong"], [0], rates, {}, None)
    with pytest.raises(ValueError, match="'Pongg' has no human score"):
        suite.runs_of("atari", "cpu", 8, ["nature"], ["Pongg"], [0], rates, {}, None)


def test_minigrid_is_seen_in_colour_and_plays_the_same_again():
    pytest.importorskip("minigrid", reason="pip install -e '.[evidence]'")
    random = np.random.default_rng(0)
    actions = random.integers(7, size=(40, 2))
    seen = []
    for _ in range(2):
        env = games.make_env("minigrid", "DoorKey-5x5", 2, seed=3)
        images = [env.reset(), *(env.step(action)[0] for action in actions)]
        assert env.observation_space.shape == (3, 84, 84)
        assert images[0].dtype == np.uint8
        assert any((image[:, 0] != image[:, 1]).any() for image in images)
        seen.append(np.stack(images))
    assert np.array_equal(*seen)
    for game in games.SUITES["minigrid"].games:
        games.check_game("minigrid", game)


def test_an_agent_of_minigrid_is_watched_with_the_command_of_its_card(tmp_path, monkeypatch):
    pytest.importorskip("minigrid", reason="pip install -e '.[evidence]'")
    run = spec.Run("minigrid", "cpu", "LavaGapS5", "random_frozen", 0, 20_000, 1e-4)
    env = games.make_env("minigrid", run.game, 8, 0)
    place = tmp_path / "checkpoints" / run.folder / run.name
    place.mkdir(parents=True)
    arms.build(run.arm, env, budgets.budget_of("smoke"), 0, 1e-4, None).save(place / "agent.zip")
    result(tmp_path, run.arm, run.game, 0, [1.0], suite="minigrid")
    monkeypatch.setattr(agent, "evaluate", lambda *_: [1.0])
    agent.export(run, tmp_path, tmp_path / "checkpoints", tmp_path)
    card = json.loads((tmp_path / "LavaGapS5-random_frozen.json").read_text())
    monkeypatch.chdir(tmp_path)
    path, command, *words = card["watch"].split()
    assert (path, command) == ("PYTHONPATH=benchmarks", "sb3-resnet")
    status, said, error = run_command(*words, "--steps", 5, "-o", "film.gif")
    assert status == 0, error
    assert "film.gif: return" in said


def test_an_evaluation_encodes_each_frame_once_and_acts_as_the_network_does():
    model = make_model(extractor={"backbone": "resnet_mini", "adapter": "per_frame"})
    extractor = model.policy.online.features_extractor
    frames = np.random.default_rng(0).integers(0, 256, (9, 3, 1, 32, 32), dtype=np.uint8)
    newest = evaluation.NewestFrames(extractor)
    for step in range(6):
        stacks = np.concatenate([*frames[step : step + 4]], axis=1)
        if step == 4:
            stacks[1] = frames[8, 1]  # another game begins in the second environment
        before = extractor.encoder.images
        entries = newest.encode(th.as_tensor(stacks)).entries
        # After the other game's first observation, its next one is new again as a whole.
        assert extractor.encoder.images - before == {0: 12, 4: 6, 5: 6}.get(step, 3)
        with th.no_grad():
            expected = extractor(extractor.scale_raw(th.as_tensor(stacks)))
        assert th.allclose(entries, expected, atol=1e-5)


def test_an_evaluation_counts_whole_games_and_serves_after_each_lost_life(monkeypatch):
    class Idle:
        """Never presses FIRE, without which a lost ball is not replaced."""

        def predict(self, observation, *args, **kwargs):
            return np.full(len(observation), 2), None

    lives, whole = [], []
    make = evaluation.make_env

    def watched(*args, **kwargs):
        env = make(*args, **kwargs)
        step = env.step_wait

        def note():
            found = step()
            ended = [info for info, done in zip(found[3], found[2], strict=True) if done]
            lives.extend(info["lives"] for info in ended)
            whole.extend(info["episode"]["r"] for info in ended if "episode" in info)
            return found

        env.step_wait = note
        return env

    monkeypatch.setattr(evaluation, "make_env", watched)
    monkeypatch.setattr(evaluation, "EpsilonGreedy", lambda model, seed: Idle())
    returns = evaluation.evaluate(SimpleNamespace(policy=None), "atari", "Breakout", "nature", 2, 0)
    assert len(returns) == 2
    assert [*map(float, whole[:2])] == returns
    assert lives.count(0) >= 2
    assert len(lives) > 2 * lives.count(0)  # those lost before the last of a game


def test_what_a_checkpoint_lacks_is_encoded_before_the_clock_runs():
    class Encode(BaseCallback):
        def _on_rollout_start(self):
            if self.num_timesteps == 24:  # none of these steps is encoded yet
                recording.encode_stored(model)
                done.append(len(model.replay_buffer.shared.cache))

        def _on_step(self):
            return True

    done = []
    model = make_model(extractor={"backbone": "resnet_mini", "adapter": "per_frame"})
    model.learn(24)
    model.learn(8, callback=[Encode(), FeatureCacheCallback()], reset_num_timesteps=False)
    shared = model.replay_buffer.shared
    stored = np.unique(shared.image_ids(model.replay_buffer.observations.obs_ids[:24].ravel()))
    assert shared.cache.has(stored).all()
    assert done[0] >= len(stored)


def test_random_actions_of_an_evaluation_are_its_own():
    model = make_model(extractor={"backbone": "resnet_mini"})
    images = observations(model, 500)
    greedy, _ = model.predict(images, deterministic=True)
    state = np.random.get_state()[1].copy()
    actions, _ = evaluation.EpsilonGreedy(model, 0).predict(images)
    again, _ = evaluation.EpsilonGreedy(model, 0).predict(images)
    assert (np.random.get_state()[1] == state).all()
    assert (actions == again).all()
    assert 0 < (actions != greedy).mean() < 0.02


@pytest.mark.parametrize("arm", ["nature_head", "random_frozen"])
def test_a_small_agent_acts_as_the_large_one_and_names_no_place(arm, tmp_path):
    env = DummyVecEnv([lambda: FakeImageEnv(action_dim=6, screen_height=84, screen_width=84, n_channels=4)] * 8)
    model = arms.build(arm, env, budgets.budget_of("smoke"), 0, 1e-4, None)
    if arm == "random_frozen":
        chosen = {**model.policy_kwargs["features_extractor_kwargs"], "weights": "/some/place/boxing.safetensors"}
        model.policy_kwargs["features_extractor_kwargs"] = chosen
    model.learn(16)
    images = observations(model, 20)
    before = [network(th.as_tensor(images)) for network in (model.q_net, model.q_net_target)]
    model.save(tmp_path / "large.zip")
    agent.save_small(model, tmp_path / "small.zip")
    small = (tmp_path / "small.zip").stat().st_size
    assert small < (tmp_path / "large.zip").stat().st_size - 1_500_000 * (arm == "random_frozen")
    assert b"some/place" not in (tmp_path / "small.zip").read_bytes()
    loaded = type(model).load(tmp_path / "small.zip", device="cpu")
    if arm == "random_frozen":
        assert small < agent.LARGEST
        assert loaded.policy_kwargs["features_extractor_kwargs"]["weights"] == "boxing.safetensors"
    with th.no_grad():
        after = loaded.q_net(th.as_tensor(images))
    assert (after - before[0]).abs().max() < 0.05 * before[0].std()
    with pytest.raises(
        FileNotFoundError, match=r"agent\.zip is not there: write first `python benchmarks/atari\.py run"
    ):
        agent.export(spec.Run("atari", "cpu", "Pong", arm, 0, 8, 1e-4), tmp_path, tmp_path, tmp_path)


@pytest.mark.parametrize("limit", [3_000_000, 1_000])
def test_an_agent_that_is_too_large_leaves_its_card_and_the_command_that_trains_it_again(limit, tmp_path, monkeypatch):
    env = DummyVecEnv([lambda: FakeImageEnv(action_dim=6, screen_height=84, screen_width=84, n_channels=4)] * 8)
    model = arms.build("random_frozen", env, budgets.budget_of("smoke"), 0, 1e-4, None)
    run = spec.Run("atari", "cpu", "Pong", "random_frozen", 0, 20_000, 1e-4)
    result(tmp_path, "random_frozen", "Pong", 0, [1.0])
    place = tmp_path / "checkpoints" / run.folder / run.name
    place.mkdir(parents=True)
    model.save(place / "agent.zip")
    monkeypatch.setattr(agent, "LARGEST", limit)
    monkeypatch.setattr(agent, "evaluate", lambda *_: [1.0, 3.0])
    file = agent.export(run, tmp_path, tmp_path / "checkpoints", tmp_path / "agents")
    card = json.loads((tmp_path / "agents" / "Pong-random_frozen.json").read_text())
    assert card["mean return of this file"] == 2.0
    assert card["environment"] == "PongNoFrameskip-v4"
    assert card["watch"] == "sb3-resnet watch Pong-random_frozen.zip"
    with pytest.raises(ValueError, match=r"is of another run .*--learning-rate 0\.0001"):
        agent.export(dataclasses.replace(run, learning_rate=3e-4), tmp_path, tmp_path / "checkpoints", tmp_path)
    assert file.suffix == (".zip" if limit > 1_000 else ".json")
    assert ("file" in card) == (limit == 1_000)
    if limit == 1_000:
        assert card["file"] == "none, since it is larger than 0.001 MB: see 'trained by'"
        assert card["trained by"] == run.command
    assert len([*(tmp_path / "agents").iterdir()]) == (2 if limit > 1_000 else 1)
