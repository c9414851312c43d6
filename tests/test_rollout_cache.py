"""FeatureCacheCallback with PPO, A2C and MaskablePPO: the same training, one pass of each observation."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib import MaskablePPO
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize

from sb3_resnet.buffers import LentRolloutBuffer, give_rollout_buffer_back, lend_rollout_buffer
from sb3_resnet.cache.batch import EncodedBatch
from sb3_resnet.callbacks import AMPCallback, FeatureCacheCallback, MonitorCallback, UnfreezeCallback
from sb3_resnet.extractor import ResNetExtractor, extractors_in
from tests.helpers import (
    CutError,
    TinyGame,
    assert_same,
    make_actor_critic,
    observations,
    probabilities_and_values,
    slowly,
    snapshot,
)

# A2C has PPO's policy and buffer.
algorithms = pytest.mark.parametrize("algorithm", ["ppo"])  # whose buffer A2C has
SGD = {"optimizer_class": "SGD"}
ALL = [{"at_timestep": 32, "unfreeze_from": "all"}]
MOVES = [{"at_timestep": 48, "unfreeze_from": "layer4"}, {"at_timestep": 96, "unfreeze_from": "layer3"}]


class Steering(TinyGame):
    def __init__(self):
        super().__init__(length=5)
        self.action_space = spaces.Box(-1, 1, (2,), np.float32)

    def step(self, action):
        return super().step(round(float(action[0]) + 1))


class Masked(TinyGame):
    def action_masks(self):
        return np.array([True, False, True])


class Watch(BaseCallback):
    """Counts episodes that are cut off, and looks at the model while a rollout is collected and before each update."""

    def __init__(self):
        super().__init__()
        self.cut_off, self.batches, self.buffers = 0, [], []

    def _on_training_start(self):
        policy, evaluate = self.model.policy, self.model.policy.evaluate_actions
        policy.evaluate_actions = lambda obs, *args, **kwargs: (
            self.batches.append(type(obs)),
            evaluate(obs, *args, **kwargs),
        )[1]

    def _on_step(self):
        self.cut_off += sum(info.get("TimeLimit.truncated", False) for info in self.locals["infos"])
        self.buffers.append((type(self.model.rollout_buffer), self.cut_off))
        return True

    def _on_training_end(self):
        del self.model.policy.evaluate_actions


def build(algorithm="ppo", n_envs=2, shared=True, game=lambda: TinyGame(length=5), policy_kwargs=SGD, **kwargs):
    env = make_vec_env(game, n_envs=n_envs, seed=0)
    policy_kwargs = {"share_features_extractor": shared, **policy_kwargs}
    return make_actor_critic(algorithm, env, policy_kwargs, **{"learning_rate": 1e-2, **kwargs})


def pair(callbacks=list, steps=160, **kwargs):
    """The same model trained without and with the cache."""
    models = []
    for own in ([], [FeatureCacheCallback()]):
        models.append(build(**kwargs))
        models[-1].learn(steps, callback=[*own, *callbacks()])
    return models


def assert_equal_training(plain, cached, tolerance=1e-5):
    """Each was built right before it learned, since they draw from one random generator."""
    for (name, expected), got in zip(plain.policy.named_parameters(), cached.policy.parameters(), strict=True):
        assert (got - expected).norm() <= tolerance * expected.norm(), name
    start = build().policy.state_dict()["value_net.weight"]
    assert not th.equal(plain.policy.value_net.weight, start)  # else this would prove nothing


def images(model):
    return sum(extractor.encoder.images for extractor in extractors_in(model.policy))


def phases():
    return [UnfreezeCallback(MOVES, verbose=0)]


EQUAL = {
    "two phases": {"callbacks": phases},
    "two phases, two ResNets": {"callbacks": phases, "shared": False},
    "a2c, two phases": {"algorithm": "a2c", "callbacks": phases},
    "a2c, two ResNets": {"algorithm": "a2c", "shared": False},
    "frames": {"extractor": {"adapter": "per_frame"}, "callbacks": phases},
    "RGB frames": {"extractor": {"adapter": "per_frame"}, "game": lambda: TinyGame((6, 32, 32), 5)},
    "bfloat16": {"extractor": {"frozen_dtype": "bfloat16"}, "callbacks": phases},
    "one environment": {"n_envs": 1},
    "gSDE": {"game": Steering, "use_sde": True, "sde_sample_freq": 3},
    "AdamW": {"policy_kwargs": {}, "learning_rate": 1e-3},
}


FAST = ("two phases", "a2c, two phases")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in EQUAL])
def test_ten_rollouts_with_and_without_the_cache_give_the_same_parameters(name):
    settings = {"steps": 80 if name == "one environment" else 160, **EQUAL[name]}
    plain, cached = pair(**settings)
    assert plain.num_timesteps == cached.num_timesteps == 10 * plain.n_steps * plain.n_envs
    assert images(cached) < 0.65 * images(plain)
    assert_equal_training(plain, cached, tolerance=1e-3 if name in ("bfloat16", "AdamW") else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("frozen_dtype", ["float32", "bfloat16"])
def test_a_larger_network_and_larger_batches_train_the_same_too(frozen_dtype):
    extractor = {"backbone": "resnet_tiny", "frozen_dtype": frozen_dtype}
    options = {"n_steps": 16, "batch_size": 16, "n_epochs": 3, "steps": 160, "learning_rate": 1e-3}
    plain, cached = pair(extractor=extractor, callbacks=phases, **options)
    assert_equal_training(plain, cached, tolerance=1e-5 if frozen_dtype == "float32" else 1e-3)


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("shared", [True, False])
@algorithms
def test_each_observation_passes_the_frozen_stages_once(algorithm, shared, n_envs):
    model, watch = build(algorithm, n_envs, shared), Watch()
    steps = 6 * model.n_steps * n_envs
    model.learn(steps, callback=[FeatureCacheCallback(), watch])
    # Acting; the last observations of episodes that were cut off; those after the last rollout.
    assert watch.cut_off > 3
    assert images(model) == steps + watch.cut_off + n_envs
    assert {*watch.batches} == {EncodedBatch}


@pytest.mark.parametrize("shape", [(4, 32, 32), (6, 32, 32)])
def test_a_step_encodes_one_frame_per_environment(shape):
    model = build(n_envs=3, game=lambda: TinyGame(shape, length=10**6), extractor={"adapter": "per_frame"})
    model.learn(3 * 40, callback=FeatureCacheCallback())
    fresh, first = (1, 2) if shape[0] == 4 else (2, 2)  # TinyGame moves on by a grey frame, so RGB frames are all new
    assert images(model) == 3 * (first + 40 * fresh)


def test_an_evaluation_costs_its_own_steps_and_no_others():
    model, watch = build(), Watch()
    evaluation = EvalCallback(make_vec_env(lambda: TinyGame(length=5)), eval_freq=3, n_eval_episodes=1, warn=False)
    model.learn(64, callback=[FeatureCacheCallback(), watch, evaluation])
    assert images(model) == 64 + watch.cut_off + 2 + 5 * (32 // 3)


@pytest.mark.parametrize("shared", [True, False])
def test_a_move_of_the_boundary_encodes_the_rollout_once_more(shared):
    model, watch = build(shared=shared), Watch()
    model.learn(64, callback=[FeatureCacheCallback(), watch, UnfreezeCallback(MOVES[:1], verbose=0)])
    assert model.policy.freeze_boundary == "layer4"
    # The rollout of 16 steps, and what follows it, as it is acted upon next.
    assert images(model) == 64 + watch.cut_off + 2 + 16 + 2


def test_where_no_stage_is_frozen_any_more_pixels_are_trained_on():
    model, watch = build(), Watch()
    model.learn(64, callback=[FeatureCacheCallback(), watch, UnfreezeCallback(ALL, verbose=0)])
    assert watch.batches == [EncodedBatch] * 8 + [th.Tensor] * 24
    assert images(model) == 32 + watch.buffers[15][1] + 2


@algorithms
def test_after_learn_the_buffer_is_sb3s_own_again(algorithm):
    model, watch = build(algorithm), Watch()
    plain = build(algorithm)
    plain.learn(32)
    buffer = model.rollout_buffer
    model.learn(32, callback=[FeatureCacheCallback(), watch])
    assert {kind.__name__ for kind, _ in watch.buffers} == {"LentRolloutBuffer"}
    assert model.rollout_buffer is buffer
    assert type(buffer) is RolloutBuffer
    assert {*vars(buffer)} == {*vars(plain.rollout_buffer)}
    assert np.array_equal(buffer.observations, plain.rollout_buffer.observations)
    assert model.policy.encoding is None
    before = images(model)
    model.learn(16, reset_num_timesteps=False)
    assert images(model) > before + 2 * 16


def test_a_refusal_leaves_the_buffer_alone():
    model = build(shared=False)
    with th.no_grad():
        model.policy.vf_features_extractor.backbone.conv1.weight.mul_(-1.0)
    with pytest.raises(
        ValueError, match=r"Actor's and critic's ResNet differ below .*vf_features_extractor\.load_state_dict"
    ):
        model.learn(16, callback=FeatureCacheCallback())
    assert type(model.rollout_buffer) is RolloutBuffer
    model.policy.vf_features_extractor.load_state_dict(model.policy.pi_features_extractor.state_dict())
    model.learn(16, callback=FeatureCacheCallback())


def test_a_learn_that_was_interrupted_goes_on_in_the_next():
    class Cut(BaseCallback):
        def _on_step(self):
            if self.n_calls == 13:
                raise CutError
            return True

    models = []
    for own in ([], [FeatureCacheCallback()]):
        models.append(build())
        with pytest.raises(CutError):
            models[-1].learn(64, callback=[*own, Cut()])
        assert isinstance(models[-1].rollout_buffer, LentRolloutBuffer) == bool(own)
        models[-1].learn(32, callback=own)
        assert type(models[-1].rollout_buffer) is RolloutBuffer
    assert_equal_training(*models)


def test_a_copy_made_while_the_cache_is_at_work_learns_alone():
    model, copies = build(), []

    class Copy(BaseCallback):
        def _on_step(self):
            if self.n_calls == 11:
                copies.append(copy.deepcopy(self.model))
            return True

    model.learn(32, callback=[FeatureCacheCallback(), Copy()])
    before = snapshot(model.policy)
    (clone,) = copies
    count = images(model)
    clone.learn(32)
    clone.learn(16, callback=FeatureCacheCallback())
    assert type(clone.rollout_buffer) is RolloutBuffer
    assert images(model) == count
    assert_same(before, model.policy.state_dict())
    assert not th.equal(before["value_net.weight"], clone.policy.value_net.weight)


def test_it_is_in_no_checkpoint(tmp_path):
    model = build()

    class Save(BaseCallback):
        def _on_step(self):
            if self.n_calls == 11:
                assert self.model.policy.encoding is not None
                assert pickle.loads(pickle.dumps(self.model.policy)).encoding is None
                self.model.save(tmp_path / "model")
            return True

    model.learn(32, callback=[FeatureCacheCallback(), Save()])
    loaded = PPO.load(tmp_path / "model", env=model.get_env(), device="cpu")
    assert type(loaded.rollout_buffer) is RolloutBuffer
    plain = PPO.load(tmp_path / "model", env=build().get_env(), device="cpu")
    for one, callback in ((loaded, FeatureCacheCallback()), (plain, None)):
        one.get_env().seed(0)
        one.set_random_seed(0)
        one.learn(32, callback=callback)
    assert_equal_training(plain, loaded)


def test_weights_that_are_loaded_make_new_entries(tmp_path):
    other = build(seed=9)
    other.save(tmp_path / "other")

    class Load(BaseCallback):
        def _on_step(self):
            if self.n_calls == 12:
                self.model.set_parameters(tmp_path / "other", device="cpu")
            return True

    plain, cached = pair(callbacks=lambda: [Load()], steps=64)
    assert_equal_training(plain, cached)
    assert_same(other.policy.features_extractor.state_dict(), cached.policy.features_extractor.state_dict())


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("boundary", [None, "layer4"])
def test_the_policy_says_the_same_of_entries_as_of_pixels(shared, boundary):
    model = build(shared=shared)
    model.policy.set_freeze_boundary(boundary)
    obs = observations(model)
    expected = probabilities_and_values(model, obs)
    extractor = model.policy.pi_features_extractor
    encoded = EncodedBatch(extractor.encode(th.as_tensor(obs) / 255))
    policy = model.policy
    with th.no_grad():
        got = th.cat([policy.get_distribution(encoded).distribution.probs, policy.predict_values(encoded)], dim=1)
        actions = th.zeros(len(obs), dtype=th.long)
        values, log_prob, _ = policy.evaluate_actions(encoded, actions)
    assert th.allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert th.allclose(values, expected[:, -1:], rtol=1e-5, atol=1e-6)
    assert th.allclose(log_prob.exp(), expected[:, 0], rtol=1e-5, atol=1e-6)
    assert len(encoded[::2]) == 4
    assert th.equal(encoded[::2].entries, encoded.entries[::2])


@pytest.mark.parametrize("n_envs", [1, 3])
def test_minibatches_are_those_of_the_stock_buffer(n_envs):
    space = spaces.Box(0, 255, (4, 32, 32), np.uint8)
    stock, lent = (RolloutBuffer(7, space, spaces.Discrete(3), "cpu", n_envs=n_envs) for _ in range(2))
    assert lend_rollout_buffer(lent) is lent
    assert lend_rollout_buffer(lent) is lent
    rng = np.random.default_rng(0)
    for _ in range(3):
        for buffer in (stock, lent):
            buffer.reset()
        for _ in range(7):
            obs = rng.integers(0, 256, (n_envs, 4, 32, 32), dtype=np.uint8)
            row = [rng.integers(3, size=(n_envs, 1)), *rng.normal(size=(2, n_envs)), *th.randn(2, n_envs)]
            for buffer in (stock, lent):
                buffer.add(obs, *row)
        assert np.array_equal(np.asarray(lent.observations), stock.observations)
        for size in (4, None):
            batches = []
            for buffer in (stock, lent):
                np.random.seed(0)
                batches.append([*buffer.get(size)])
            for one, other in zip(*batches, strict=True):
                assert all(th.equal(a, b) for a, b in zip(one, other, strict=True))
        assert len(lent.shared.store) == 7 * n_envs
        assert np.array_equal(np.asarray(lent.observations), stock.observations)
    assert lend_rollout_buffer(lent, frame_channels=2).shared.store.frame_channels == 2
    give_rollout_buffer_back(lent)
    give_rollout_buffer_back(lent)
    assert type(lent) is RolloutBuffer
    assert np.array_equal(lent.observations, stock.observations)


@pytest.mark.parametrize("n_envs", [*slowly(1), 2])
def test_questions_of_others_while_a_rollout_is_collected_change_nothing(n_envs):
    """Such as a callback's, which asks for actions and values of observations of its own."""

    class Ask(BaseCallback):
        def _on_step(self):
            state = th.get_rng_state()
            with th.no_grad():
                for count in (n_envs, 5):
                    obs = th.as_tensor(observations(self.model, count))
                    expected = probabilities_and_values(self.model, obs)[:, -1:]
                    self.model.policy.predict_values(obs)
                    assert th.allclose(self.model.policy(obs)[1], expected, rtol=1e-4, atol=1e-5)
            th.set_rng_state(state)
            return True

    plain, cached = pair(n_envs=n_envs, callbacks=lambda: [Ask()], steps=16 * n_envs)
    assert_equal_training(plain, cached)


def masked(shared):
    policy_kwargs = {"features_extractor_kwargs": {"backbone": "resnet_mini"}, "share_features_extractor": shared}
    options = {"n_steps": 8, "batch_size": 4, "n_epochs": 2, "learning_rate": 1e-2, "seed": 0, "device": "cpu"}
    env = make_vec_env(lambda: Masked(length=5), n_envs=2, seed=0)
    return MaskablePPO("ResNetCnnPolicy", env, policy_kwargs={**policy_kwargs, **SGD}, **options)


@pytest.mark.parametrize("shared", [True, *slowly(False)])
def test_maskable_ppo_trains_the_same_too(shared):
    plain, watch = masked(shared), Watch()
    plain.learn(64, callback=phases())
    cached = masked(shared)
    kind = type(cached.rollout_buffer)
    cached.learn(64, callback=[FeatureCacheCallback(), watch, *phases()])
    assert type(cached.rollout_buffer) is kind
    assert {*watch.batches} == {EncodedBatch}
    assert images(cached) < 0.6 * images(plain)
    assert_equal_training(plain, cached)


class Doubled(ResNetExtractor):
    def forward(self, observations):
        return 2.0 * super().forward(observations)


class Other(RolloutBuffer):
    pass


REFUSED = {
    "train_adapter=True changes": {"extractor": {"train_adapter": True}},
    "norm='batch' makes an entry depend": {"extractor": {"norm": "batch"}},
    "norm='sync' makes an entry depend": {"extractor": {"norm": "sync"}},
    "augment changes an observation": {"extractor": {"augment": ["random_shift"]}},
    "Doubled overrides forward": {"policy_kwargs": {"features_extractor_class": Doubled}},
    "Other cannot be cached, only RolloutBuffer, MaskableRolloutBuffer can": {"rollout_buffer_class": Other},
}


@algorithms
@pytest.mark.parametrize("message", REFUSED)
def test_what_would_not_be_exact_is_refused_before_other_callbacks_begin(algorithm, message):
    model = build(algorithm, **REFUSED[message])
    kind = type(model.rollout_buffer)
    with pytest.raises(ValueError, match=message):
        model.learn(16, callback=[AMPCallback("bfloat16", verbose=0), FeatureCacheCallback()])
    assert model.num_timesteps == 0
    assert model.policy.features_extractor.precision is None
    assert model.policy.encoding is None
    assert type(model.rollout_buffer) is kind


def test_normalised_observations_are_refused_and_rewards_are_not():
    def normalized(**kwargs):
        return VecNormalize(make_vec_env(lambda: TinyGame(length=5), seed=0), **kwargs)

    env = normalized(norm_obs=True)
    env.observation_space = TinyGame().observation_space  # with its own, the extractor refuses it already
    with pytest.raises(ValueError, match="write norm_obs=False"):
        make_actor_critic(env=env).learn(16, callback=FeatureCacheCallback())
    models = []
    for callback in (None, FeatureCacheCallback()):
        models.append(make_actor_critic(env=normalized(norm_obs=False), policy_kwargs=SGD))
        models[-1].learn(32, callback=callback)
    assert_equal_training(*models)


@pytest.mark.parametrize("copies", [1, 3])
def test_augmented_copies_are_trained_on_and_true_images_acted_upon(copies):
    model, watch = build(extractor={"augment": ["random_shift"]}), Watch()
    model.learn(48, callback=[FeatureCacheCallback(augment_copies=copies), watch])
    assert {*watch.batches} == {EncodedBatch}
    acted = 48 + watch.cut_off + 3 * 2
    assert acted + 48 <= images(model) <= acted + 48 * copies
    assert images(model) > acted + 48 * min(copies, 2) * 0.7


class Broken(TinyGame):
    def step(self, action):
        observation, _, *rest = super().step(action)
        return observation, float("inf"), *rest


@algorithms
def test_infinite_rewards_are_named(algorithm):
    model = make_actor_critic(algorithm, env=Broken())
    with pytest.raises(ValueError, match="rewards hold NaN or inf"):
        model.learn(16, callback=FeatureCacheCallback())


def test_a_lack_of_memory_ends_the_cache_and_loses_nothing(monkeypatch):
    plain = build()
    plain.learn(64)
    cached, watch = build(), Watch()
    monkeypatch.setattr("sb3_resnet.cache.table.available_bytes", lambda: 100e6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cached.learn(64, callback=[FeatureCacheCallback(), watch])
    assert len([w for w in caught if "going on without the cache" in str(w.message)]) == 1
    assert {*watch.batches} == {th.Tensor}
    assert_equal_training(plain, cached)


def test_with_little_memory_it_encodes_more_and_trains_the_same():
    plain = build()
    plain.learn(64)
    cached = build()
    entry = extractors_in(cached.policy)[0].features_dim * 4
    cached.learn(64, callback=FeatureCacheCallback(max_bytes=5 * entry))
    assert_equal_training(plain, cached)


def test_the_log_and_the_summary(capsys):
    model = build()
    model.learn(48, callback=[FeatureCacheCallback(verbose=1), MonitorCallback(every=1)])
    logged = model.logger.name_to_value
    assert logged["monitor/cache_hits"] == 1.0
    assert logged["monitor/cache_mb"] > 0
    assert "FeatureCache: 100.0% of 96 sampled observations were encoded before" in capsys.readouterr().out


def test_a_second_learn_goes_on():
    models = []
    for callback in (None, FeatureCacheCallback()):
        models.append(build())
        for reset in (True, False, True):
            models[-1].learn(16, callback=callback, reset_num_timesteps=reset)
    assert_equal_training(*models)


@pytest.mark.slow
@algorithms
def test_environments_in_processes(algorithm):
    plain = build(algorithm, game=TinyGame)
    plain.learn(64)
    processes = {"vec_env_cls": SubprocVecEnv, "vec_env_kwargs": {"start_method": "forkserver"}}
    env = make_vec_env(TinyGame, n_envs=2, seed=0, **processes)
    cached = make_actor_critic(algorithm, env, SGD, learning_rate=1e-2)
    cached.learn(64, callback=FeatureCacheCallback())
    env.close()
    assert_equal_training(plain, cached)
