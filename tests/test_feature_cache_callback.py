"""FeatureCacheCallback: the same training, fewer passes through the trunk (invariants 8 to 11)."""

import copy
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_resnet.buffers import FrameReplayBuffer
from sb3_resnet.cache.batch import EncodedBatch
from sb3_resnet.cache.entries import EntryCache
from sb3_resnet.callbacks import AMPCallback, FeatureCacheCallback, UnfreezeCallback
from sb3_resnet.common.sampling import unwatch_samples, watch_samples
from sb3_resnet.extractor import ResNetExtractor
from tests.helpers import ALGORITHMS, TinyGame, fill, make_model, observations, q_values, start


def train(algorithm, optimizer, n_steps, cached, updates):
    """Updates on the same transitions, across a phase transition."""
    options = {"optimizer_class": optimizer, "lr_backbone": 1e-5}
    model = fill(make_model(algorithm, learning_rate=1e-4, n_steps=n_steps, buffer_size=30, policy_kwargs=options), 30)
    phases = [{"at_update": updates * 4 // 5, "unfreeze_from": "layer4"}]
    callbacks = [UnfreezeCallback(phases, verbose=0), *([FeatureCacheCallback()] if cached else [])]
    start(model, *callbacks)
    np.random.seed(0)
    th.manual_seed(0)
    for _ in range(updates // 20):
        for callback in callbacks:
            callback.on_rollout_end()
        model.train(20, 2)
        model._n_calls = model.target_update_interval - 1
        model._on_step()
    assert model.policy.freeze_boundary == "layer4"
    return model


@pytest.mark.parametrize(("optimizer", "tolerance"), [("SGD", 1e-5), ("AdamW", 1e-3)])
@pytest.mark.parametrize(("n_steps", "updates"), [(3, 100), pytest.param(1, 500, marks=pytest.mark.slow)])
def test_with_and_without_the_cache_training_gives_the_same_parameters(optimizer, tolerance, n_steps, updates):
    plain, cached = (train("dqn", optimizer, n_steps, cached, updates) for cached in (False, True))
    for (name, expected), got in zip(plain.q_net.named_parameters(), cached.q_net.parameters(), strict=True):
        assert (got - expected).norm() <= tolerance * expected.norm(), name


@pytest.mark.slow
def test_qrdqn_trains_the_same_too():
    plain, cached = (train("qrdqn", "SGD", 1, cached, updates=100) for cached in (False, True))
    # All together: where a quantile's error is zero its loss has a kink, which rounding moves biases across.
    expected, got = (th.cat([p.flatten() for p in model.policy.online.parameters()]) for model in (plain, cached))
    assert (got - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("boundary", [None, "layer4"])
def test_entries_are_what_the_network_computes_without_the_cache(dtype, boundary):
    model = fill(make_model(extractor={"frozen_dtype": dtype, "adapter": "per_frame", "backbone": "resnet_mini"}))
    model.policy.set_freeze_boundary(boundary)
    np.random.seed(0)
    pixels = model.replay_buffer.sample(16)
    with th.no_grad():
        expected = [model.q_net(pixels.observations), model.q_net_target(pixels.next_observations)]
    start(model, FeatureCacheCallback())
    np.random.seed(0)
    encoded = model.replay_buffer.sample(16)
    assert isinstance(encoded.observations, EncodedBatch)
    with th.no_grad():
        got = [model.q_net(encoded.observations), model.q_net_target(encoded.next_observations)]
    limit = 1e-4 if dtype == "float32" else 2e-3  # features are standardised, which multiplies differences
    for one, other in zip(got, expected, strict=True):
        assert (one - other).abs().max() <= limit * other.abs().max()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_learn_encodes_each_observation_once(algorithm):
    model = make_model(algorithm, learning_starts=40, exploration_fraction=0.01, exploration_final_eps=0.0)
    seen = {}

    class Watch(FeatureCacheCallback):
        def _on_rollout_end(self):
            super()._on_rollout_end()
            seen["cache"] = self._cache

    model.learn(200, callback=[Watch(), EvalCallback(TinyGame(), eval_freq=70, n_eval_episodes=1)])
    cache = seen["cache"]
    evaluated = 2 * 13  # steps of two evaluated episodes
    assert cache.encoder.images <= 200 + 200 // 13 + 1 + evaluated
    assert cache.hits > 0
    assert isinstance(model.replay_buffer, FrameReplayBuffer)
    assert not model.replay_buffer.shared.encodes
    assert model.policy.encoding is None


def test_a_second_learn_finds_the_entries_again():
    model = make_model()
    model.learn(40, callback=FeatureCacheCallback())
    cache = model.replay_buffer.shared.cache
    images = cache.encoder.images
    assert isinstance(model.replay_buffer.sample(4).observations, th.Tensor)
    start(model, FeatureCacheCallback())
    assert model.replay_buffer.shared.cache is cache
    assert isinstance(model.replay_buffer.sample(4).observations, EncodedBatch)
    assert cache.encoder.images <= images + 4
    start(model, FeatureCacheCallback(max_bytes=10**6))
    assert model.replay_buffer.shared.cache is not cache


def test_the_cache_follows_the_boundary_down_and_ends_where_no_stage_is_frozen():
    model = fill(make_model(learning_rate=1e-3))
    phases = [{"at_update": n, "unfreeze_from": s} for n, s in ((4, "layer4"), (8, "layer2"), (12, "adapter"))]
    callbacks = start(model, FeatureCacheCallback(), UnfreezeCallback(phases, verbose=0))
    shapes = []
    for _ in range(8):
        for callback in callbacks:
            callback.on_rollout_end()
        sampled = model.replay_buffer.sample(3).observations
        shapes.append(tuple(sampled.features.shape if isinstance(sampled, EncodedBatch) else sampled.shape))
        model.train(2, 4)
    assert shapes == ([(3, 256)] * 2 + [(3, 1, 128, 2, 2)] * 2 + [(3, 1, 32, 8, 8)] * 2 + [(3, 4, 32, 32)] * 2)
    assert model.replay_buffer.shared.cache.nbytes == 0
    pixels = observations(model, 4)
    assert th.equal(q_values(model, pixels), q_values(copy.deepcopy(model), pixels))  # a copy acts without the cache


def test_loading_other_weights_drops_the_entries(tmp_path):
    other = make_model(seed=9)
    other.save(tmp_path / "other")
    model = fill(make_model())
    start(model, FeatureCacheCallback())
    np.random.seed(0)
    before = model.replay_buffer.sample(4).observations.features
    model.set_parameters(tmp_path / "other", device="cpu")
    np.random.seed(0)
    after = model.replay_buffer.sample(4).observations.features
    assert not th.allclose(before, after)
    pixels = th.as_tensor(observations(model, 4))
    assert th.allclose(q_values(model, pixels), q_values(other, pixels), atol=1e-5)


def test_buffers_saved_and_loaded_go_on(tmp_path):
    model = make_model()
    model.learn(40, callback=FeatureCacheCallback())
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    loaded = DQN.load(tmp_path / "model", env=TinyGame(), device="cpu")
    loaded.load_replay_buffer(tmp_path / "buffer.pkl")
    batches = []
    for buffer in (model.replay_buffer, loaded.replay_buffer):
        np.random.seed(0)
        batches.append(buffer.sample(4).observations)
    assert th.equal(*batches)
    loaded.learn(20, callback=FeatureCacheCallback(), reset_num_timesteps=False)
    plain = make_model()
    plain.load_replay_buffer(tmp_path / "buffer.pkl")
    plain.learn(20)  # without the callback it is a buffer like any other


def test_invariant_7_golden_resume_with_the_cache(tmp_path):
    phases = [{"at_update": 6, "unfreeze_from": "layer4", "ramp": 4}]

    def drive(model, rounds, save_after=None):
        callbacks = start(model, FeatureCacheCallback(), UnfreezeCallback(phases, verbose=0))
        for done in range(rounds):
            if done == save_after:
                model.save(tmp_path / "middle")
                (tmp_path / "random.pkl").write_bytes(pickle.dumps(np.random.get_state()))
            for callback in callbacks:
                callback.on_rollout_end()
            model.train(2, 4)

    whole = fill(make_model(learning_rate=1e-3, target_update_interval=100))
    whole.save_replay_buffer(tmp_path / "buffer.pkl")
    np.random.seed(0)
    drive(whole, 12, save_after=6)
    resumed = DQN.load(tmp_path / "middle", env=TinyGame(), device="cpu")
    resumed.load_replay_buffer(tmp_path / "buffer.pkl")
    resumed._setup_learn(1, None)
    np.random.set_state(pickle.loads((tmp_path / "random.pkl").read_bytes()))
    drive(resumed, 6)
    assert resumed.policy.freeze_boundary == "layer4"
    for (name, expected), got in zip(whole.policy.named_parameters(), resumed.policy.parameters(), strict=True):
        assert th.equal(got, expected), name


def test_a_stock_buffer_that_is_full_already_is_taken_over():
    model = make_model(buffer_size=30)
    model.learn(50)
    stock = model.replay_buffer
    np.random.seed(0)
    expected = stock.sample(16)
    assert type(stock) is ReplayBuffer
    start(model, FeatureCacheCallback())
    np.random.seed(0)
    got = model.replay_buffer.sample(16)
    extractor = model.q_net.features_extractor
    plain = extractor.frozen_part(extractor.preprocess(expected.observations.float() / 255))
    assert th.allclose(got.observations.features, plain, atol=1e-5)
    assert th.equal(got.rewards, expected.rewards)


@pytest.mark.parametrize(("adapter", "images"), [("conv1x1", "observations"), ("per_frame", "frames")])
def test_the_summary_at_the_end_names_what_it_counts(adapter, images, capsys):
    callback = FeatureCacheCallback(verbose=1)
    make_model(extractor={"adapter": adapter}).learn(40, callback=callback)
    callback.on_training_end()  # as RL-Zoo does
    assert capsys.readouterr().out.count(f"sampled {images} were encoded before") == 1


def test_invariant_10_what_would_not_be_exact_is_refused_with_the_reason():
    def attempt(message, error=ValueError, **kwargs):
        with pytest.raises(error, match=message):
            make_model(**kwargs).learn(4, callback=FeatureCacheCallback())

    attempt("train_adapter=True changes", extractor={"train_adapter": True})
    attempt("norm='batch' makes an entry depend", extractor={"norm": "batch"})
    attempt("norm='sync' makes an entry depend", extractor={"norm": "sync"})
    normalized = VecNormalize(make_vec_env(TinyGame), norm_obs=True)
    normalized.observation_space = TinyGame().observation_space  # with its own, the extractor refuses it already
    attempt("write norm_obs=False", env=normalized)
    make_model(env=VecNormalize(make_vec_env(TinyGame), norm_obs=False)).learn(12, callback=FeatureCacheCallback())

    class Other(ReplayBuffer):
        pass

    attempt("Other cannot be cached", replay_buffer_class=Other)
    model = make_model()
    with th.no_grad():
        model.q_net_target.features_extractor.backbone.conv1.weight.mul_(2.0)
    with pytest.raises(ValueError, match="differ below the freeze boundary"):
        model.learn(4, callback=FeatureCacheCallback())
    for plain in (PPO("MlpPolicy", "CartPole-v1", device="cpu"), DQN("MlpPolicy", "CartPole-v1", device="cpu")):
        with pytest.raises(ValueError, match="needs ResNetCnnPolicy and a replay buffer"):
            plain.learn(4, callback=FeatureCacheCallback())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtype": "bfloat16"}, TypeError, "unexpected keyword argument 'dtype'"),
        ({"max_bytes": 0}, ValueError, "max_bytes must be finite and >= 1"),
        ({"device": "gpu"}, ValueError, "device must be 'auto', 'cpu' or 'cuda', got 'gpu'"),
        ({"device": None}, ValueError, "device must be 'auto', 'cpu' or 'cuda', got None"),
    ],
)
def test_bad_arguments_are_refused_at_construction(arguments, error, message):
    with pytest.raises(error, match=message):
        FeatureCacheCallback(**arguments)


def test_a_gpu_that_is_not_there_is_refused_at_construction(monkeypatch):
    monkeypatch.setattr(th.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="PyTorch finds no GPU: write device='auto' or 'cpu'"):
        FeatureCacheCallback(device="cuda:1")


def test_an_extractor_that_computes_something_else_is_refused():
    class Doubled(ResNetExtractor):
        def forward(self, observations):
            return 2.0 * super().forward(observations)

    model = make_model(policy_kwargs={"features_extractor_class": Doubled})
    with pytest.raises(ValueError, match="Doubled overrides forward, which the encoder would pass over"):
        model.learn(4, callback=FeatureCacheCallback())


def test_what_it_refuses_it_refuses_before_other_callbacks_begin():
    model = make_model(extractor={"train_adapter": True})
    with pytest.raises(ValueError, match="train_adapter=True changes"):
        model.learn(4, callback=[AMPCallback("bfloat16", verbose=0), FeatureCacheCallback()])
    assert model.q_net.features_extractor.precision is None


def test_weights_written_without_a_trace_make_new_entries_in_the_next_learn():
    model = fill(make_model())
    callback = start(model, FeatureCacheCallback())
    before = model.replay_buffer.shared.batch(np.arange(4)).features
    callback.on_training_end()
    for network in (model.q_net, model.q_net_target):
        network.features_extractor.backbone.layer1[0].conv1.weight.data.mul_(-1.0)
    start(model, FeatureCacheCallback())
    assert not th.allclose(model.replay_buffer.shared.batch(np.arange(4)).features, before, rtol=1e-2)


@pytest.mark.parametrize("learns_before", [False, True])
def test_twins_that_differ_are_refused_at_the_start_of_each_learn(learns_before):
    """Not first by a batch: entries of an earlier ``learn()`` would serve the target without another look."""
    model = make_model(extractor={"backbone": "resnet_mini"})
    if learns_before:
        model.learn(20, callback=FeatureCacheCallback())
    with th.no_grad():
        model.q_net_target.features_extractor.backbone.conv1.weight.mul_(-1.0)
    steps = model.num_timesteps
    with pytest.raises(ValueError, match="Online and target network differ below the freeze boundary"):
        model.learn(20, callback=FeatureCacheCallback(), reset_num_timesteps=False)
    assert model.num_timesteps == steps


def test_freezing_again_needs_an_equal_target():
    model = fill(make_model(learning_rate=1e-2))
    model.policy.set_freeze_boundary("layer4")
    start(model, FeatureCacheCallback())
    model.train(3, 4)
    model.policy.set_freeze_boundary(None)
    with pytest.raises(ValueError, match=r"q_net_target\.load_state_dict"):
        model.replay_buffer.sample(4)
    model.q_net_target.load_state_dict(model.q_net.state_dict())
    model.train(2, 4)


@pytest.mark.parametrize("stock", [True, False])
def test_a_buffer_that_is_loaded_in_the_middle_of_training_is_encoded_too(tmp_path, stock):
    model = make_model()
    model.learn(30, callback=None if stock else FeatureCacheCallback())
    model.save_replay_buffer(tmp_path / "buffer.pkl")

    seen = []

    class Load(BaseCallback):
        def _on_step(self):
            if self.n_calls == 10:
                self.model.load_replay_buffer(tmp_path / "buffer.pkl")
            if self.n_calls == 30:
                watch_samples(self.model.replay_buffer, "test", seen.append)
                assert isinstance(self.model.replay_buffer.sample(2).observations, th.Tensor)  # not train() asks
                del seen[:]
            return True

    model.learn(40, callback=[Load(), FeatureCacheCallback()])
    assert seen
    assert all(isinstance(batch.observations, EncodedBatch) for batch in seen)
    unwatch_samples(model.replay_buffer, "test")
    assert isinstance(model.replay_buffer, FrameReplayBuffer)
    assert isinstance(model.replay_buffer.sample(2).observations, th.Tensor)


def test_too_little_memory_ends_the_cache_before_linux_ends_the_process(monkeypatch):
    model = fill(make_model())
    start(model, FeatureCacheCallback())
    monkeypatch.setattr("sb3_resnet.cache.table.available_bytes", lambda: 100e6)
    with pytest.warns(UserWarning, match=r"only 100 MB are left\): going on without the cache"):
        model.train(2, 4)
    assert isinstance(model.replay_buffer.sample(2).observations, th.Tensor)


def test_other_errors_that_speak_of_memory_are_raised(monkeypatch):
    model = fill(make_model())
    start(model, FeatureCacheCallback())
    error = RuntimeError("unsupported memory format")
    monkeypatch.setattr("sb3_resnet.cache.entries.EntryCache.get", lambda *args: (_ for _ in ()).throw(error))
    with pytest.raises(RuntimeError, match="unsupported memory format"):
        model.train(1, 4)


def test_out_of_memory_loses_nothing(monkeypatch):
    model = fill(make_model())
    start(model, FeatureCacheCallback())
    assert isinstance(model.replay_buffer.sample(2).observations, EncodedBatch)
    model.replay_buffer.shared.cache.clear(model.replay_buffer.shared.store)
    monkeypatch.setattr("sb3_resnet.cache.table.EntryTable._grow", lambda *args: (_ for _ in ()).throw(MemoryError))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.train(4, 4)
    assert len([w for w in caught if "going on without the cache" in str(w.message)]) == 1
    assert isinstance(model.replay_buffer.sample(2).observations, th.Tensor)


def test_infinite_rewards_are_named():
    model = fill(make_model())
    callback = start(model, FeatureCacheCallback())
    callback.on_rollout_end()
    model.replay_buffer.rewards[5] = np.inf
    callback = start(model, FeatureCacheCallback())
    with pytest.raises(ValueError, match="rewards hold NaN or inf"):
        callback.on_rollout_end()


@pytest.mark.parametrize("shape", [(4, 32, 32), (6, 32, 32), (1, 32, 32)])
def test_a_step_encodes_one_frame_per_environment(shape):
    env = make_vec_env(lambda: TinyGame(shape, length=10**6), n_envs=3)
    model = make_model(env=env, learning_starts=0, exploration_fraction=1e-9, extractor={"adapter": "per_frame"})
    model.exploration_initial_eps = model.exploration_final_eps = 0.0
    model.learn(3 * 40, callback=FeatureCacheCallback())
    frames = shape[0] // (3 if shape[0] % 3 == 0 else 1)
    fresh = frames if shape[0] % 3 == 0 else 1  # TinyGame moves on by a grey frame, so RGB frames are all new
    first = fresh if fresh > 1 else min(frames, 2)  # of a stack that begins with empty frames
    images = model.q_net.features_extractor.encoder.images
    assert images <= 3 * (first + 40 * fresh)
    assert images >= 3 * 39 * fresh


def test_memory_per_transition_of_small_grey_frames():
    """84x84 frames, 256 numbers a frame: pixels 7,056 bytes, entry 1,024, and what finds them."""
    space = spaces.Box(0, 255, (4, 84, 84), np.uint8)
    buffer = FrameReplayBuffer(3000, space, spaces.Discrete(6), "cpu")
    options = {"adapter": "per_frame", "last_stage": "layer2", "pooling": "spatial_softmax"}
    extractor = ResNetExtractor(space, backbone="resnet18", **options)
    cache = EntryCache(extractor.encoder, "cpu", expected=3750)
    buffer.shared.encode_with(cache)
    frame = np.zeros((1, 84, 84), np.uint8)
    stack = np.zeros((4, 84, 84), np.uint8)
    for step in range(1000):
        frame.fill(step % 251)
        following = np.concatenate([stack[1:], frame])
        buffer.add(stack[None], following[None], np.zeros((1, 1)), np.zeros(1), np.zeros(1), [{}])
        stack = following
    store = buffer.shared.store
    cache.put(store.frame_ids(), th.zeros(len(store.frame_ids()), 256))
    pixels = store.n_planes * 84 * 84
    found_by = buffer.observations.obs_ids[:1000].nbytes * 2 + len(store) * (4 * 8 + 4) + store.n_planes * (4 + 8 + 8)
    rest = 1000 * (8 + 3 * 4)
    assert pixels + cache.nbytes + found_by + rest <= 1001 * 8500


def save_and_predict(model, folder):
    """Saved, loaded in a second process, its Q-values there."""
    model.save(folder / "model")
    obs = observations(model, 8)
    np.save(folder / "obs.npy", obs)
    code = (
        "import sys, numpy as np, torch as th; from tests.helpers import DQN, q_values; folder = sys.argv[1]; "
        "model = DQN.load(folder + '/model', device='cpu'); obs = np.load(folder + '/obs.npy'); "
        "np.save(folder + '/q.npy', q_values(model, obs).numpy()); "
        "print(model.q_net.features_extractor.frozen_dtype, *model.predict(obs, deterministic=True)[0])"
    )
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(folder)], check=True, capture_output=True, text=True
    ).stdout
    name, *actions = out.split()
    return name, [int(action) for action in actions], np.load(folder / "q.npy")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_second_process_predicts_the_same(dtype, cached, tmp_path):
    model = make_model(learning_rate=1e-3, extractor={"frozen_dtype": dtype})
    model.learn(60, callback=FeatureCacheCallback() if cached else None)
    start(model, *([FeatureCacheCallback()] if cached else []))
    obs = observations(model, 8)
    expected, chosen = q_values(model, obs), model.predict(obs, deterministic=True)[0]
    name, actions, values = save_and_predict(model, tmp_path)
    assert name == dtype
    assert np.allclose(values, expected, rtol=1e-5, atol=1e-6)
    assert actions == chosen.tolist()
