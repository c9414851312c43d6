"""``"ResNetMultiInputPolicy"`` of DQN, PPO and A2C: the invariants of the design with a Dict of images and numbers."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib import MaskablePPO
from stable_baselines3 import A2C, DQN, PPO, HerReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecNormalize, VecTransposeImage
from torch import nn

import sb3_resnet
from sb3_resnet.buffers import FrameReplayBuffer
from sb3_resnet.callbacks import (
    AMPCallback,
    BestCheckpointCallback,
    DoctorCallback,
    FeatureCacheCallback,
    GradientClipCallback,
    LRScheduleCallback,
    MonitorCallback,
    NanGuardCallback,
    UnfreezeCallback,
)
from sb3_resnet.cli.loading import extractor_of
from sb3_resnet.cli.saved_groups import saved_groups
from sb3_resnet.diagnosis.setup_rules import static_findings
from sb3_resnet.extractor import extractors_in
from sb3_resnet.nn import weights as weight_files
from sb3_resnet.optim.updates import gradient_updates
from tests.helpers import (
    ALGORITHMS,
    ON_POLICY,
    DictGame,
    GoalGame,
    Rewards,
    TinyGame,
    assert_same,
    dict_observations,
    make_dict_model,
    resumed_in_a_new_process,
    run_command,
    scores,
    slowly,
    snapshot,
)

HOSTS = {"dqn": DQN, "ppo": PPO, "a2c": A2C}
# What PPO does with one image is in test_policies_actor_critic.py, and A2C has PPO's policy.
algorithms = pytest.mark.parametrize("algorithm", ["dqn", pytest.param("ppo", marks=pytest.mark.slow)])
GREY = spaces.Box(0, 255, (1, 32, 32), np.uint8)
SPEED = spaces.Box(-np.inf, np.inf, (3,), np.float32)


def trunks(model):
    return extractors_in(model.policy.trained)


@pytest.mark.parametrize("algorithm", [*HOSTS, "qrdqn"])
def test_invariant_1_groups_hold_each_parameter_once(algorithm):
    model = make_dict_model(algorithm, extractor={"vector_arch": [8], "features_dim": 11})
    policy = model.policy
    held = {group["name"]: {id(p) for p in group["params"]} for group in policy.optimizer.param_groups}
    assert sum(map(len, held.values())) == len({*policy.trained.parameters()})
    eyes = policy.trained.features_extractor
    camera, depth = eyes.resnets.values()
    for extractor in (camera, depth):
        assert {id(p) for p in extractor.backbone.parameters()} <= held["backbone"] | held["backbone_no_decay"]
        assert id(extractor.projection.weight) in held["head"]
    assert camera.adapter is None
    assert id(depth.adapter.weight) in held["backbone"]
    assert id(eyes.vectors[1].weight) in held["head"]
    assert id(eyes.vectors[1].bias) in held["head_no_decay"]
    rows = sb3_resnet.param_group_summary(model, show=False)
    assert sum(row["trainable_parameters"] for row in rows if row["name"].startswith("backbone")) == 0


def test_stages_of_all_images_learn_at_the_rate_of_their_stage():
    by_key = {"camera": {"last_stage": "layer3"}}
    model = make_dict_model(policy_kwargs={"lr_decay_per_stage": 0.5}, extractor={"by_key": by_key})
    groups = {group["name"]: group for group in model.policy.optimizer.param_groups}
    rates = [groups[f"backbone.{stage}"]["lr"] for stage in ("layer4", "layer3", "stem", "adapter")]
    assert rates == pytest.approx([1e-5, 5e-6, 6.25e-7, 3.125e-7])
    for extractor in trunks(model):
        assert id(extractor.backbone.layer3[0].conv1.weight) in {id(p) for p in groups["backbone.layer3"]["params"]}


@algorithms
def test_invariant_2_effective_rates_after_every_train(algorithm):
    model = make_dict_model(
        algorithm,
        policy_kwargs={"lr_head": 2e-3, "lr_backbone": 1e-4},
        extractor={"freeze_backbone": False, "vector_arch": [4]},
        learning_rate=lambda remaining: 1e-3 * remaining,
    )
    seen, train = [], model.train

    def watched(*args, **kwargs):
        train(*args, **kwargs)
        lr = {group["name"]: group["lr"] for group in model.policy.optimizer.param_groups}
        seen.append([model._current_progress_remaining, lr["head"], lr["head_no_decay"], lr["backbone"]])

    model.train = watched
    model.learn(24)
    assert len(seen) >= 3
    for remaining, *rest in seen:
        assert rest == pytest.approx([2e-3 * remaining, 2e-3 * remaining, 1e-4 * remaining])


@algorithms
def test_invariant_5_frozen_means_frozen(algorithm):
    updates = 4
    kwargs = {"weight_decay": 0.1, "lr_backbone": 1e-2}
    model = make_dict_model(algorithm, None, kwargs, {"norm": "batch", "vector_arch": [4]}, learning_rate=1e-2)
    model.policy.set_freeze_boundary("layer3")
    before = [snapshot(extractor) for extractor in trunks(model)]
    vectors = snapshot(model.policy.trained.features_extractor.vectors)
    model.learn({"dqn": 8 + 4 * updates, "ppo": 2 * updates, "a2c": 8 * updates}[algorithm])
    assert gradient_updates(model) == updates
    for extractor, state in zip(trunks(model), before, strict=True):
        moved = {key for key, value in extractor.state_dict().items() if not th.equal(value, state[key])}
        assert any(key.startswith("backbone.layer3") for key in moved)
        assert any("layer4.0.bn1.running_mean" in key for key in moved)
        assert [key for key in moved if not key.startswith(("backbone.layer3", "backbone.layer4"))] == []
    after = model.policy.trained.features_extractor.vectors.state_dict()
    assert [key for key, value in after.items() if th.equal(value, vectors[key])] == ["0.eps_share"]


@algorithms
def test_invariant_6_the_phase_is_part_of_the_model(tmp_path, algorithm):
    model = make_dict_model(algorithm)
    model.policy.set_freeze_boundary("adapter", at_update=7)
    model.learn(24)
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy")
    other = make_dict_model(algorithm)
    other.set_parameters(tmp_path / "model", device="cpu")
    loaded = HOSTS[algorithm].load(tmp_path / "model", device="cpu")
    obs = dict_observations(model)
    for policy in (
        loaded.policy,
        other.policy,
        type(model.policy).load(tmp_path / "policy", device="cpu"),
        copy.deepcopy(model.policy),
        pickle.loads(pickle.dumps(model.policy)),
    ):
        assert policy.freeze_boundary == "adapter"
        for extractor in extractors_in(policy):
            assert extractor.boundary.moved_at_update == 7
            assert extractor.freeze_boundary == ("stem" if extractor.adapter is None else "adapter")
            assert all(parameter.requires_grad for parameter in extractor.backbone.parameters())
        assert th.equal(scores(policy, obs), scores(model, obs))
    assert_same(model.policy.state_dict(), loaded.policy.state_dict())
    loaded.set_env(DictGame())
    loaded.learn(24)
    assert loaded.policy.freeze_boundary == "adapter"


def test_a_copy_trains_by_itself():
    # Channels first: SB3's VecTransposeImage over a Dict cannot be copied.
    env = DictGame(camera=spaces.Box(0, 255, (3, 32, 32), np.uint8), depth=GREY, speed=SPEED)
    model = make_dict_model("ppo", env, extractor={"freeze_backbone": False, "vector_arch": [4]})
    model.learn(8)
    before = snapshot(model.policy)
    clone = copy.deepcopy(model)
    clone.learn(8)
    assert_same(before, model.policy.state_dict())
    moved = [key for key, value in clone.policy.state_dict().items() if not th.equal(value, before[key])]
    for part in (
        "extractors.camera.backbone",
        "extractors.depth.backbone",
        "vectors.0.running_mean",
        "vectors.1.weight",
    ):
        assert any(part in key for key in moved), part


ROUNDS = 9
SAVES = {"before": 2, "right after": 4, "in the ramp": 5, "long after": 7}


def rollout(model, number):
    """One rollout without an environment: what it brings depends on its number alone."""
    rng, buffer, policy = np.random.default_rng(number), model.rollout_buffer, model.policy
    policy.set_training_mode(False)
    buffer.reset()
    for step in range(model.n_steps):
        obs = dict_observations(model, 1, seed=1000 * number + step)
        with th.no_grad():
            actions, values, log_probs = policy(policy.obs_to_tensor(obs)[0])
        buffer.add(obs, actions.numpy().reshape(1, 1), rng.normal(size=1), np.zeros(1), values, log_probs)
    buffer.compute_returns_and_advantage(values, np.zeros(1))


def replay(model, n=40):
    """Fill the replay buffer."""
    rng = np.random.default_rng(0)
    for step in range(n):
        obs, following = (dict_observations(model, 1, seed=2 * step + i) for i in range(2))
        model.replay_buffer.add(obs, following, rng.integers(0, 3, (1, 1)), rng.normal(size=1), np.zeros(1), [{}])


def drive(model, rounds, reset=False, after_round=lambda done: None):
    """``learn()``'s loop without an environment."""
    model._setup_learn(1, None, reset_num_timesteps=reset)
    phase = {"at_timestep": 8 * 4, "unfreeze_from": "layer4", "lr_backbone": 5e-4, "ramp": 3}
    used = [UnfreezeCallback([phase], verbose=0), LRScheduleCallback(4, "cosine", decay_steps=60)]
    for callback in [*used, GradientClipCallback(1.0)]:
        callback.init_callback(model)
        callback.on_training_start({}, {})
    for done in rounds:
        model.num_timesteps += 8
        if hasattr(model, "rollout_buffer"):
            rollout(model, done)
        for callback in used:
            callback.on_rollout_end()
        model.train(**({} if hasattr(model, "rollout_buffer") else {"gradient_steps": 1, "batch_size": 4}))
        after_round(done)


def random_states(states=None):
    if states is not None:
        np.random.set_state(states[0])
        th.set_rng_state(states[1])
    return np.random.get_state(), th.get_rng_state()


def resume(folder, algorithm, point):
    """What a new process does."""
    model = HOSTS[algorithm].load(f"{folder}/{point}.zip", env=DictGame(), device="cpu")
    if algorithm == "dqn":
        model.load_replay_buffer(f"{folder}/buffer.pkl")
    model._setup_learn(1, None, reset_num_timesteps=False)
    with open(f"{folder}/{point}.pkl", "rb") as file:
        random_states(pickle.load(file))
    drive(model, range(point + 1, ROUNDS + 1))
    return model


def assert_golden(whole, resumed):
    assert_same(whole.policy.state_dict(), resumed.policy.state_dict())
    expected, got = whole.policy.optimizer.state_dict(), resumed.policy.optimizer.state_dict()
    assert expected["param_groups"] == got["param_groups"]
    assert expected["state"].keys() == got["state"].keys()
    for index, state in expected["state"].items():
        assert all(
            th.equal(th.as_tensor(value), th.as_tensor(got["state"][index][key])) for key, value in state.items()
        )


def golden_run(folder, algorithm):
    extractor = {"norm": "batch", "vector_arch": [6]}
    model = make_dict_model(algorithm, None, {"dropout": 0.2}, extractor, learning_rate=1e-3)
    if algorithm == "dqn":
        replay(model)
        model.save_replay_buffer(folder / "buffer.pkl")

    def save(done):
        if done in SAVES.values():
            model.save(folder / f"{done}.zip")
            (folder / f"{done}.pkl").write_bytes(pickle.dumps(random_states()))

    th.manual_seed(0)
    np.random.seed(0)
    drive(model, range(1, ROUNDS + 1), True, save)
    moved = {"dqn": 3, "ppo": 12, "a2c": 3}[algorithm]
    assert {extractor.boundary.moved_at_update for extractor in trunks(model)} == {moved}
    return model


def test_invariant_7_golden_resume(tmp_path):
    whole = golden_run(tmp_path, "dqn")
    for point in (SAVES["before"], SAVES["in the ramp"]):
        assert_golden(whole, resume(tmp_path, "dqn", point))


@pytest.mark.slow
@algorithms
def test_invariant_7_golden_resume_in_a_new_process(tmp_path, algorithm):
    whole = golden_run(tmp_path, algorithm)
    for file in resumed_in_a_new_process("test_policies_dict", tmp_path, algorithm, SAVES.values()):
        assert_golden(whole, HOSTS[algorithm].load(file, device="cpu"))


@algorithms
@pytest.mark.slow
def test_invariant_8_loading_needs_neither_network_nor_weights_file(tmp_path, hub_weights, monkeypatch, algorithm):
    reads, original = [], weight_files.read_file
    monkeypatch.setattr(weight_files, "read_file", lambda path: reads.append(path) or original(path))
    extractor = {"backbone": "resnet18", "by_key": {"camera": {"pretrained": True}}}
    model = make_dict_model(algorithm, extractor=extractor, policy_kwargs={"net_arch": [8]})
    assert len(reads) == 1
    file = th.load(hub_weights, weights_only=True)
    camera = model.policy.trained.features_extractor.resnets["camera"]
    assert_same({key: value for key, value in file.items() if not key.startswith("fc.")}, camera.backbone.state_dict())
    model.save(tmp_path / "model")
    hub_weights.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = HOSTS[algorithm].load(tmp_path / "model", device="cpu")
    assert_same(model.policy.state_dict(), loaded.policy.state_dict())
    assert len(reads) == 1


@pytest.mark.parametrize("algorithm", ["ppo", pytest.param("a2c", marks=pytest.mark.slow)])
def test_actor_and_critic_may_have_resnets_of_their_own(tmp_path, algorithm):
    model = make_dict_model(algorithm, None, {"share_features_extractor": False}, {"vector_arch": [4]})
    actor, critic = model.policy.pi_features_extractor, model.policy.vf_features_extractor
    assert len(trunks(model)) == 4
    assert_same(actor.extractors.state_dict(), critic.extractors.state_dict())  # the critic's begin as copies
    model.learn(16, callback=UnfreezeCallback([{"at_timestep": 16, "unfreeze_from": "layer4"}], verbose=0))
    assert {extractor.freeze_boundary for extractor in trunks(model)} == {"layer4"}
    model.save(tmp_path / "model")
    loaded = HOSTS[algorithm].load(tmp_path / "model", device="cpu")
    assert_same(model.policy.state_dict(), loaded.policy.state_dict())


@pytest.mark.parametrize("algorithm", ["dqn", *slowly("qrdqn")])
def test_a_checkpoint_holds_frozen_trunks_once(tmp_path, algorithm):
    model = make_dict_model(algorithm, extractor={"backbone": "resnet_tiny"})
    model.learn(24)
    model.save(tmp_path / "model.zip")
    size = sum(parameter.numel() for extractor in trunks(model) for parameter in extractor.parameters())
    assert (tmp_path / "model.zip").stat().st_size < 4 * size * 1.3
    model.policy.set_freeze_boundary("all")
    model.learn(16)
    model.save(tmp_path / "model.zip")
    assert (tmp_path / "model.zip").stat().st_size > 4 * size * 2


SPACES = {
    "float 0..1": spaces.Box(0.0, 1.0, (3, 36, 36), np.float32),
    "float 0..255": spaces.Box(0.0, 255.0, (3, 36, 36), np.float32),
    "channels last": spaces.Box(0, 255, (36, 40, 3), np.uint8),
    "one channel": GREY,
    "one channel, last": spaces.Box(0, 255, (36, 36, 1), np.uint8),
    "six channels": spaces.Box(0, 255, (6, 33, 33), np.uint8),
}


@pytest.mark.parametrize(("kind", "algorithm"), [*zip(SPACES, 3 * ["dqn", "ppo"], strict=True)])
def test_images_of_each_kind_are_trained_on(algorithm, kind):
    parts = {"first": SPACES[kind], "second": SPACES["float 0..1"], "speed": SPEED}
    model = make_dict_model(algorithm, DictGame(**parts), extractor={"freeze_backbone": False})
    before = [snapshot(extractor) for extractor in trunks(model)]
    model.learn(24)
    for extractor, state in zip(trunks(model), before, strict=True):
        assert not th.equal(extractor.backbone.conv1.weight, state["backbone.conv1.weight"])
    obs = dict_observations(model)
    assert scores(model, obs).isfinite().all()


@algorithms
def test_images_may_share_one_resnet(tmp_path, algorithm):
    env = DictGame(left=GREY, right=GREY, speed=SPEED)
    model = make_dict_model(algorithm, env, extractor={"shared": True, "freeze_backbone": False})
    assert len(trunks(model)) == 1
    model.learn(24)
    model.save(tmp_path / "model")
    loaded = HOSTS[algorithm].load(tmp_path / "model", device="cpu")
    obs = dict_observations(model)
    assert th.equal(scores(model, obs), scores(loaded, obs))
    left = loaded.policy.trained.features_extractor.resnets["left"]
    assert left is loaded.policy.trained.features_extractor.resnets["right"]


@pytest.mark.parametrize(("channels_last", "order"), [(True, "last"), (False, "first")])
def test_frames_may_be_stacked(channels_last, order):
    image = spaces.Box(0, 255, (32, 32, 1) if channels_last else (1, 32, 32), np.uint8)
    env = VecFrameStack(
        DummyVecEnv([lambda: DictGame(image=image, speed=SPEED)] * 2), 4, {"image": order, "speed": None}
    )
    model = make_dict_model("ppo", env, n_steps=4, extractor={"adapter": "per_frame"})
    model.learn(16)
    extractor = model.policy.features_extractor.resnets["image"]
    assert extractor.preprocessing.n_frames == 4
    assert model.policy.features_extractor.features_dim == 4 * 64 + 12


@pytest.mark.slow
def test_environments_may_run_in_processes_of_their_own():
    env = make_vec_env(DictGame, n_envs=2, vec_env_cls=SubprocVecEnv, seed=0)
    model = make_dict_model("dqn", env)
    model.learn(32)
    action, _ = model.predict(env.reset())
    assert action.shape == (2,)
    env.close()


@algorithms
def test_numbers_may_be_normalised_by_sb3(algorithm):
    # Transposed below: SB3's off-policy loop stores what comes out of the environments under VecNormalize.
    env = VecNormalize(VecTransposeImage(DummyVecEnv([DictGame] * 2)), norm_obs_keys=["speed"])
    model = make_dict_model(algorithm, env)
    model.learn(32, callback=AMPCallback("bfloat16", verbose=0))
    assert model.policy.trained.features_extractor.vectors[0].running_count > 0


def her(env=None, **kwargs):
    buffer = {"replay_buffer_class": HerReplayBuffer, "replay_buffer_kwargs": {"n_sampled_goal": 2}}
    return make_dict_model("dqn", env or GoalGame(), **buffer, **{"buffer_size": 100, "learning_starts": 12, **kwargs})


def test_dqn_with_her_trains_saves_and_loads(tmp_path):
    model = her(extractor={"vector_arch": [8]})
    before = snapshot(model.policy)
    phase = UnfreezeCallback([{"at_timestep": 24, "unfreeze_from": "layer4"}], verbose=0)
    model.learn(48, callback=[phase, LRScheduleCallback(4), GradientClipCallback()])
    moved = [key for key, value in model.policy.state_dict().items() if not th.equal(value, before[key])]
    for part in (
        "q_net.features_extractor.vectors.1.weight",
        "q_net.features_extractor.extractors.picture.backbone.layer4",
    ):
        assert any(key.startswith(part) for key in moved), part
    assert not any("backbone.layer3" in key for key in moved)
    obs = dict_observations(model)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = DQN.load(tmp_path / "model", env=GoalGame(), device="cpu")
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert loaded.policy.freeze_boundary == "layer4"
    assert th.equal(scores(model, obs), scores(loaded, obs))
    action, _ = loaded.predict(obs)
    assert action.shape == (4,)
    loaded.learn(24, reset_num_timesteps=False)
    assert gradient_updates(loaded) > gradient_updates(model)


class PictureGoals(GoalGame):
    """Goals are pictures too."""

    def __init__(self):
        super().__init__()
        picture = spaces.Box(0, 255, (1, 32, 32), np.uint8)
        self.parts = dict.fromkeys(("achieved_goal", "desired_goal", "observation"), picture)
        self.observation_space = spaces.Dict(self.parts)

    def compute_reward(self, achieved, desired, info):
        far = np.abs(achieved.astype(np.float32) - desired).reshape(*achieved.shape[:-3], -1).mean(axis=-1) > 1
        return -far.astype(np.float32)


def test_her_with_pictures_as_goals_may_share_one_resnet():
    model = her(PictureGoals(), extractor={"shared": True})
    model.learn(32)
    assert len(trunks(model)) == 1
    assert gradient_updates(model) > 0


@algorithms
@pytest.mark.slow
def test_all_callbacks_work_together(tmp_path, algorithm):
    phases = [
        {"at_timestep": 16, "unfreeze_from": "layer4", "ramp": 2},
        {"at_timestep": 32, "unfreeze_from": "adapter"},
    ]
    phases[1]["restore_best"] = True
    model = make_dict_model(algorithm, DictGame(length=5), learning_rate=1e-3, extractor={"vector_arch": [4]})
    callbacks = [
        UnfreezeCallback(phases, verbose=0),
        LRScheduleCallback(warmup_steps=2),
        AMPCallback("bfloat16", verbose=0),
        GradientClipCallback(),
        NanGuardCallback(),
        BestCheckpointCallback(8, tmp_path, keep_last=1),
        MonitorCallback(every=1),
        DoctorCallback(every=1, verbose=0),
        Rewards(range(20), eval_freq=8),
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, message=".*")  # of the doctor, about a run of 48 steps
        model.learn(48, callback=callbacks)
    assert model.policy.freeze_boundary == "adapter"
    names = {path.name for path in tmp_path.iterdir()}
    assert {"best.zip", "best_frozen.zip", "best_layer4.zip", "best_adapter.zip"} <= names
    logged = {*model.logger.name_to_value}
    assert {"grad_norm/head", "grad_norm/backbone", "monitor/freeze_boundary", "monitor/q_start"} <= logged
    path = sb3_resnet.newest_checkpoint(tmp_path)
    loaded = HOSTS[algorithm].load(path, device="cpu")
    assert loaded.policy.freeze_boundary == "adapter"
    assert all(extractor.precision is None for extractor in extractors_in(model.policy))


NEED = [UnfreezeCallback([{"at_update": 1, "unfreeze_from": "stem"}]), MonitorCallback(), DoctorCallback()]


@pytest.mark.parametrize("callback", NEED, ids=lambda callback: type(callback).__name__)
def test_callbacks_name_the_policy_that_they_need(callback):
    model = PPO("MultiInputPolicy", DictGame(speed=SPEED), n_steps=8, batch_size=8, device="cpu")
    with pytest.raises(TypeError, match="Callback needs ResNetMultiInputPolicy"):
        model.learn(8, callback=callback)


@algorithms
def test_amp_in_float16_scales_the_gradients_of_all_trunks(algorithm):
    """And divides them again: each has the norm that it has in float32."""

    def norms(dtype):
        model = make_dict_model(algorithm, extractor={"freeze_backbone": False}, max_grad_norm=1e9)
        first = {}

        def look(optimizer, *_):
            for extractor in trunks(model)[:2]:  # the online network's
                grads = [p.grad.norm() for p in extractor.parameters() if p.grad is not None]
                first.setdefault(id(extractor), th.stack(grads).norm().item())

        model.policy.optimizer.register_step_post_hook(look)
        model.learn(16, callback=AMPCallback(dtype, verbose=0, init_scale=1024.0))
        return [*first.values()]

    assert len(norms("float16")) == 2
    assert norms("float16") == pytest.approx(norms("float32"), rel=0.1)


def test_the_frozen_precision_is_converted_in_all_trunks():
    model = make_dict_model()
    model.policy.set_frozen_dtype("bfloat16")
    assert {extractor.frozen_dtype for extractor in extractors_in(model.policy)} == {"bfloat16"}
    assert scores(model, dict_observations(model)).isfinite().all()


def test_what_is_flattened_is_told_once(tmp_path):
    heat = spaces.Box(-1.0, 1.0, (2, 5, 5), np.float32)
    with pytest.warns(UserWarning, match="heat") as caught:
        model = make_dict_model(env=DictGame(heat=heat, image=GREY))
    assert ["'heat' has the shape" in str(warning.message) for warning in caught].count(True) == 1
    model.save(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DQN.load(tmp_path / "model", device="cpu")


@algorithms
def test_the_feature_cache_refuses_a_dict_at_once(algorithm):
    model = make_dict_model(algorithm)
    buffer = getattr(model, "replay_buffer", None)
    with pytest.raises(
        ValueError, match=r"^FeatureCacheCallback keeps the entries of one image, .* Dict: leave it out$"
    ):
        model.learn(8, callback=FeatureCacheCallback())
    assert model.num_timesteps == 0
    assert getattr(model, "replay_buffer", None) is buffer


def test_our_replay_buffers_refuse_a_dict():
    with pytest.raises(ValueError, match="FrameReplayBuffer stores one image, and the observation space is a Dict"):
        make_dict_model(replay_buffer_class=FrameReplayBuffer)


WRONG = [
    ("ResNetCnnPolicy", DictGame, "a Dict: write policy='ResNetMultiInputPolicy'"),
    (
        "ResNetCnnPolicy",
        lambda: DictGame(speed=SPEED),
        "a Dict without an image: write policy='MultiInputPolicy' of SB3",
    ),
    ("ResNetMultiInputPolicy", TinyGame, r"sees a Dict, and .* is Box\(0, 255, .*: write policy='ResNetCnnPolicy'"),
    (
        "ResNetMultiInputPolicy",
        lambda: DictGame(speed=SPEED),
        "no image, its keys are 'speed': write policy='MultiInput",
    ),
]


@pytest.mark.parametrize("algorithm", [*HOSTS, "qrdqn"])
@pytest.mark.parametrize(("policy", "env", "message"), WRONG)
def test_the_wrong_policy_names_the_right_one(algorithm, policy, env, message):
    small = {"buffer_size": 10} if algorithm in ALGORITHMS else {"n_steps": 8}
    with pytest.raises(ValueError, match=message) as caught:
        {**ALGORITHMS, **ON_POLICY}[algorithm](policy, env(), **small)
    assert "\n" not in str(caught.value)


BAD = [
    (
        {"shared": True},
        {},
        TypeError,
        "ResNetMultiInputPolicy has no argument 'shared': write it in features_extractor_kwa",
    ),
    ({}, {"dropout": 0.1}, TypeError, "ResNetCombinedExtractor has no argument 'dropout': write it in policy_kwargs"),
    ({}, {"poling": "avg"}, TypeError, "ResNetCombinedExtractor has no argument 'poling'; did you mean 'pooling'"),
    (
        {"features_extractor_class": sb3_resnet.ResNetExtractor},
        {},
        TypeError,
        "must be ResNetCombinedExtractor or a sub",
    ),
    ({"features_extractor_class": nn.Linear}, {}, TypeError, "must be ResNetCombinedExtractor or a subclass"),
    ({"normalize_images": False}, {}, ValueError, "leave uint8 images at 0..255"),
    ({"lr_backbone": -1}, {}, ValueError, "lr_backbone must be"),
]


@pytest.mark.parametrize(("policy_kwargs", "extractor", "error", "message"), BAD, ids=[str(bad[:2]) for bad in BAD])
def test_wrong_arguments_say_what_to_write(policy_kwargs, extractor, error, message):
    with pytest.raises(error, match=message):
        make_dict_model("ppo", policy_kwargs=policy_kwargs, extractor=extractor)


@pytest.mark.parametrize(
    ("algorithm", "policy", "message"),
    [
        (
            PPO,
            sb3_resnet.ResNetMultiInputPolicy,
            "For PPO and A2C write its name as a string, 'ResNetMultiInputPolicy'",
        ),
        (DQN, sb3_resnet.ResNetMultiInputActorCriticPolicy, "as a string, 'ResNetMultiInputPolicy'"),
    ],
)
def test_the_class_of_another_algorithm_is_refused(algorithm, policy, message):
    eyes = {"features_extractor_kwargs": {"backbone": "resnet_mini"}}
    small = {"buffer_size": 10} if algorithm is DQN else {"n_steps": 8, "batch_size": 8}
    with pytest.raises(TypeError, match=message):
        algorithm(policy, DictGame(), policy_kwargs=eyes, **small)


@pytest.mark.parametrize("algorithm", HOSTS)
def test_the_groups_of_a_file_are_those_of_the_model(tmp_path, algorithm):
    by_key = {"depth": {"train_adapter": True}}
    model = make_dict_model(algorithm, None, {"lr_decay_per_stage": 0.5}, {"by_key": by_key, "vector_arch": [4]})
    model.policy.set_freeze_boundary("layer3")
    model.save(tmp_path / "model")
    assert saved_groups(tmp_path / "model") == sb3_resnet.param_group_summary(model, show=False)
    with pytest.raises(
        ValueError, match=r"^m sees a Dict with ResNetCombinedExtractor, and this command works with one"
    ):
        extractor_of(model, "m")


def test_commands_that_work_with_one_image_say_so(tmp_path, dict_id):
    seen = "sees a Dict with ResNetCombinedExtractor, and this command works with one image: give a model of "
    seen += "ResNetCnnPolicy (sb3-resnet groups, doctor, plot, check, explain and watch work with a Dict)"
    make_dict_model("ppo").save(tmp_path / "model.zip")
    watch = ["watch", tmp_path / "model.zip", "--env", dict_id]
    for command in (["export", tmp_path / "model.zip"], [*watch, "--gradcam"]):
        status, _, error = run_command(*command)
        assert status == 1
        assert error == f"Error: {tmp_path / 'model.zip'} {seen}\n"
    status, _, error = run_command("probe", "--env", dict_id)
    assert status == 1
    assert "This looks at one image, not at a Dict" in " ".join(error.split())


class Masked(DictGame):
    def action_masks(self):
        return np.array([True, False, True])


def test_maskable_ppo_has_the_policy_too(tmp_path):
    eyes = {"backbone": "resnet_mini", "freeze_backbone": False}
    small = {"n_steps": 8, "batch_size": 4, "n_epochs": 1, "policy_kwargs": {"features_extractor_kwargs": eyes}}
    model = MaskablePPO("ResNetMultiInputPolicy", Masked(), device="cpu", **small)
    before = [snapshot(extractor) for extractor in trunks(model)]
    model.learn(16)
    for extractor, state in zip(trunks(model), before, strict=True):
        assert not th.equal(extractor.backbone.conv1.weight, state["backbone.conv1.weight"])
    model.save(tmp_path / "model")
    loaded = MaskablePPO.load(tmp_path / "model", device="cpu")
    assert th.equal(scores(model, dict_observations(model)), scores(loaded, dict_observations(model)))


def test_findings_are_those_of_all_images():
    model = make_dict_model(extractor={"micro_batch_size": 8})
    assert [finding.code for finding in static_findings(model)] == ["frozen_random_backbone", "micro_batch"]
    model = make_dict_model(extractor={"freeze_backbone": False})
    assert static_findings(model) == []
    # Of two images one has an adapter, and the phase that names it trains all of both.
    phases = [UnfreezeCallback([{"at_timestep": 10, "unfreeze_from": stage}]) for stage in ("adapter", "layer1")]
    model = make_dict_model()
    assert static_findings(model, 100, phases[0]) == []
    (found,) = static_findings(model, 100, phases[1])
    assert found.seen.startswith("The stages stem are frozen")


@pytest.mark.parametrize("algorithm", ["dqn", "ppo"])
@pytest.mark.parametrize("shared", [False, True])
def test_dead_features_are_those_of_images(algorithm, shared):
    """Neither a one-hot that seldom changes nor a vector of large numbers is a feature of the backbone."""

    class Large(DictGame):
        def _observe(self):
            return {**super()._observe(), "ticks": (self.np_random.normal(size=5) * 1e6).astype(np.float32)}

    image = spaces.Box(0, 255, (3, 32, 32), np.uint8)
    ticks = spaces.Box(-np.inf, np.inf, (5,), np.float32)
    env = Large(left=image, right=image, ticks=ticks, cell=spaces.Discrete(400))
    extractor = {"shared": shared, "standardize_vectors": False, "pooling": "flatten"}
    model = make_dict_model(algorithm, env, extractor=extractor)
    seen = []
    monitor = MonitorCallback(every=1)
    monitor._probe._sink = lambda values: seen.append(values["monitor/dead_features"])
    model.learn(40, callback=monitor)
    assert seen
    assert max(seen) < 0.5
