"""augment_copies: what is sampled is one of K augmented copies, encoded exactly, and drawn the same again."""

import pickle

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import DQN

from sb3_resnet.cache import sizes
from sb3_resnet.cache.batch import EncodedBatch
from sb3_resnet.cache.copies import AugmentedCopies
from sb3_resnet.callbacks import FeatureCacheCallback
from tests.helpers import TinyGame, fill, make_model, observations, q_values, slowly

AUGMENT = [{"random_shift": {"padding": 4}}, {"color_jitter": {"brightness": 0.3}}]


def cached_model(copies=3, n=24, max_bytes=None, extractor=None, seed=0, **kwargs):
    """A model with a filled buffer whose batches come from augmented copies."""
    extractor = {"backbone": "resnet_mini", "augment": AUGMENT, **(extractor or {})}
    model = fill(make_model(extractor=extractor, seed=seed, **kwargs), n)
    start(model, copies, max_bytes)
    return model


def start(model, copies=3, max_bytes=None):
    callback = FeatureCacheCallback(augment_copies=copies, max_bytes=max_bytes)
    callback.init_callback(model)
    callback.on_training_start({}, {})


@pytest.fixture
def chosen(monkeypatch):
    """Ids of the sampled observations, and numbers of their copies; SB3 reads the next observations first."""
    found, sample = [], AugmentedCopies.sample

    def watched(self, obs_ids):
        image_ids = sample(self, obs_ids)
        assert (image_ids // self.images == obs_ids[:, None]).all()
        found.append((obs_ids, image_ids[:, 0] // self.preprocessing.n_frames % self.count))
        return image_ids

    monkeypatch.setattr(AugmentedCopies, "sample", watched)
    return found


def augmented(model, obs_ids, copies):
    """The copies of some observations, made by hand: float images in 0..1, as SB3 hands them over."""
    shared, extractor = model.replay_buffer.shared, model.q_net.features_extractor
    pixels = extractor.scale_raw(th.as_tensor(shared.store.pixels(obs_ids)))
    seeds = [
        int(np.random.SeedSequence([model.seed, *key]).generate_state(1, np.uint64)[0])
        for key in zip(obs_ids.tolist(), shared.store.uses(obs_ids).tolist(), copies.tolist(), strict=True)
    ]
    images = []
    for image, seed in zip(pixels, seeds, strict=True):
        before = th.get_rng_state()
        th.manual_seed(seed)
        images.append(extractor.augmentation(image[None])[0])
        th.set_rng_state(before)
    return th.stack(images)


def plain_entries(model, images):
    """What the plain float32 modules make of images that are augmented already."""
    extractor = model.q_net.features_extractor
    extractor.eval()
    with th.no_grad():
        return extractor.frozen_part(extractor.preprocess(images))


def assert_exact(model, chosen, size=12):
    """A sampled batch holds what the plain module makes of images augmented with the same draws."""
    chosen.clear()
    batch = model.replay_buffer.sample(size)
    assert len(chosen) == 2
    for encoded, (obs_ids, copies) in zip((batch.next_observations, batch.observations), chosen, strict=True):
        assert isinstance(encoded, EncodedBatch)
        expected = plain_entries(model, augmented(model, obs_ids, copies))
        assert encoded.entries.shape == expected.shape
        th.testing.assert_close(encoded.features, expected, rtol=1e-4, atol=1e-5)
        unchanged = plain_entries(model, th.as_tensor(model.replay_buffer.shared.store.pixels(obs_ids)).float() / 255)
        assert not th.allclose(encoded.features, unchanged, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("boundary", [None, *slowly("layer4")])
@pytest.mark.parametrize(
    ("shape", "extractor"),
    [
        ((4, 32, 32), {}),
        ((4, 32, 32), {"adapter": "per_frame"}),
        ((6, 32, 32), {"adapter": "per_frame"}),
        ((3, 32, 32), {"image_size": 40}),
    ],
    ids=str,
)
def test_batches_are_what_the_plain_module_makes_of_the_same_draws(shape, extractor, boundary, chosen):
    model = cached_model(env=TinyGame(shape), extractor=extractor)
    model.policy.set_freeze_boundary(boundary)
    for _ in range(4):
        assert_exact(model, chosen)


def test_draws_are_the_same_after_a_move_of_the_boundary_a_lack_of_memory_and_a_resume(chosen):
    model = cached_model(max_bytes=5 * 64 * 4)
    for boundary in (None, "layer4", "layer2", None):
        model.policy.set_freeze_boundary(boundary)
        assert_exact(model, chosen)
    assert len(model.replay_buffer.shared.cache) == 5
    model.replay_buffer = pickle.loads(pickle.dumps(model.replay_buffer))
    start(model)
    assert_exact(model, chosen)


def test_draws_are_the_same_while_observations_come_and_go(chosen):
    model = cached_model(n=5, buffer_size=10)
    for seed in range(6):
        assert_exact(model, chosen)
        fill(model, 3, seed=seed)
    cache, store = model.replay_buffer.shared.cache, model.replay_buffer.shared.store
    assert len(cache) <= 3 * len(store), "entries of observations that are gone are gone too"
    assert store.uses(store.obs_ids()).max() > 1


def test_a_later_observation_under_the_same_id_is_drawn_anew():
    model = cached_model(n=4, buffer_size=3)
    shared = model.replay_buffer.shared
    seen = {}
    for step in range(30):
        obs_ids = shared.store.obs_ids()
        for obs_id, seed in zip(obs_ids.tolist(), shared.cache.copies.seeds(obs_ids * 3, shared.store), strict=True):
            seen.setdefault(obs_id, set()).add(seed)
        fill(model, 1, seed=step)
    assert max(map(len, seen.values())) > 3
    assert sum(map(len, seen.values())) == len(set.union(*seen.values()))


@pytest.mark.parametrize(("extractor", "frames"), [({}, 1), ({"adapter": "per_frame"}, 4)], ids=str)
def test_an_observation_has_as_many_copies_as_were_asked_for_each_encoded_once(extractor, frames, chosen):
    model = cached_model(copies=3, n=6, extractor=extractor)
    shared = model.replay_buffer.shared
    encoder = shared.cache.encoder
    encoder.images = 0
    entries = {}
    for _ in range(40):
        batch = model.replay_buffer.sample(16)
        for encoded, (obs_ids, copies) in zip((batch.next_observations, batch.observations), chosen[-2:], strict=True):
            for obs_id, copy, entry in zip(obs_ids.tolist(), copies.tolist(), encoded.features, strict=True):
                assert th.equal(entries.setdefault((obs_id, copy), entry), entry)
    assert len(entries) == 3 * 12  # six transitions, whose observations all differ
    assert encoder.images == len(shared.cache) == 36 * frames
    assert len({tuple(entry.tolist()) for entry in entries.values()}) == 36
    assert shared.cache.nbytes == 12 * sizes.entry_bytes(model.q_net.features_extractor, 3)


def test_only_copies_that_were_sampled_are_encoded(chosen):
    model = cached_model(copies=3, n=20)
    fill(model, 20, seed=1)
    cache = model.replay_buffer.shared.cache
    cache.encoder.images = 0
    model.replay_buffer.sample(2)
    wanted = {pair for pairs in chosen for pair in zip(*(ids.tolist() for ids in pairs), strict=True)}
    assert cache.encoder.images == len(cache) == len(wanted) <= 4


def test_online_and_target_network_get_copies_of_their_own(chosen):
    model = cached_model(copies=4, n=64)
    model.replay_buffer.sample(64)
    (_, target), (_, online) = chosen
    assert (online != target).any()
    assert {*online.tolist()} == {*target.tolist()} == {0, 1, 2, 3}


def test_training_equals_that_of_the_network_with_the_same_draws(chosen):
    cached, plain = (make_model(extractor={"backbone": "resnet_mini", "augment": AUGMENT}) for _ in range(2))
    for model in (cached, plain):
        fill(model, 30)
    start(cached)
    for update in range(20):
        chosen.clear()
        np.random.seed(update)
        th.manual_seed(update)
        cached.train(1, 8)
        expected = [augmented(cached, *pair) for pair in chosen]
        for network, images in zip((plain.q_net_target, plain.q_net), expected, strict=True):
            network.features_extractor.augmentation = lambda _, images=images: images
        np.random.seed(update)
        th.manual_seed(update)
        plain.train(1, 8)
    before = make_model(extractor={"backbone": "resnet_mini"})
    for (name, want), got, first in zip(
        plain.q_net.named_parameters(), cached.q_net.parameters(), before.q_net.parameters(), strict=True
    ):
        assert (got - want).norm() <= 1e-3 * want.norm(), name
        assert th.equal(want, first) != name.startswith("q_net"), "the head alone has learnt"


def test_the_global_generator_of_pytorch_is_left_alone():
    model = cached_model()
    before = th.get_rng_state()
    model.replay_buffer.sample(16)
    assert th.equal(th.get_rng_state(), before)


def test_draws_depend_on_the_seed_of_the_run():
    batches = []
    for seed in (0, 0, 1):
        model = cached_model(seed=seed)
        batches.append(model.replay_buffer.shared.cache.copies.seeds(np.arange(9), model.replay_buffer.shared.store))
    assert batches[0] == batches[1]
    assert not {*batches[0]} & {*batches[2]}


def test_the_agent_acts_on_true_images():
    model = cached_model()
    pixels = observations(model, 1)
    expected = q_values(make_model(extractor={"backbone": "resnet_mini"}), pixels)
    entries = len(model.replay_buffer.shared.cache)
    for _ in range(3):
        model.policy.set_training_mode(True)
        assert model.predict(pixels, deterministic=True)[0] == expected.argmax()
        assert th.allclose(q_values(model, pixels), expected, atol=1e-5)
    assert len(model.replay_buffer.shared.cache) == entries
    assert model.replay_buffer.shared.acted is None


@pytest.mark.parametrize("n_steps", [1, 3])
def test_learn_trains_on_copies_and_evicts_with_the_buffer(n_steps, chosen):
    model = make_model(extractor={"backbone": "resnet_mini", "augment": AUGMENT}, buffer_size=40, n_steps=n_steps)
    model.learn(120, callback=FeatureCacheCallback(augment_copies=2))
    assert len(chosen) == 2 * model._n_updates > 0
    assert model.policy.encoding is None
    shared = model.replay_buffer.shared
    assert 0 < len(shared.cache) <= 2 * len(shared.store)


def test_when_everything_trains_each_sample_is_drawn_anew(chosen):
    model = cached_model()
    model.replay_buffer.sample(4)
    model.policy.set_freeze_boundary("all")
    chosen.clear()
    assert isinstance(model.replay_buffer.sample(4).observations, th.Tensor)
    assert not chosen
    assert model.q_net.features_extractor.augmentation is not None


def test_a_resumed_run_equals_the_one_that_did_not_stop(tmp_path):
    whole = cached_model(n=40, learning_rate=1e-3)
    np.random.seed(0)
    whole.train(6, 8)
    whole.save(tmp_path / "model")
    whole.save_replay_buffer(tmp_path / "buffer.pkl")
    state = np.random.get_state()
    whole.train(6, 8)
    resumed = DQN.load(tmp_path / "model", env=TinyGame(), device="cpu")
    resumed.load_replay_buffer(tmp_path / "buffer.pkl")
    resumed._setup_learn(1, None)
    start(resumed)
    np.random.set_state(state)
    resumed.train(6, 8)
    for (name, expected), got in zip(whole.policy.named_parameters(), resumed.policy.parameters(), strict=True):
        assert (got - expected).norm() <= 1e-5 * expected.norm(), name


def test_memory_is_that_of_all_copies():
    for adapter, frames in (("conv1x1", 1), ("per_frame", 4)):
        model = cached_model(copies=5, n=1, extractor={"adapter": adapter})
        one = 64 * 4
        assert sizes.entry_bytes(model.q_net.features_extractor) == one
        assert sizes.entry_bytes(model.q_net.features_extractor, 5) == 5 * frames * one
        start(model, 1)
        single = sizes.growth_bytes(model)
        start(model, 5)
        difference = sizes.growth_bytes(model) - single
        assert difference == pytest.approx(299 * 4 * frames * one, abs=2)
    model.policy.set_freeze_boundary("all")
    assert sizes.entry_bytes(model.q_net.features_extractor, 5) == 0


def test_a_second_learn_finds_the_entries_again_unless_other_copies_are_asked_for():
    model = cached_model(copies=3)
    cache = model.replay_buffer.shared.cache
    start(model, 3)
    assert model.replay_buffer.shared.cache is cache
    start(model, 2)
    assert model.replay_buffer.shared.cache is not cache


@pytest.mark.parametrize(
    ("copies", "augment", "message"),
    [
        (None, AUGMENT, r"no entry would be exact: write FeatureCacheCallback\(augment_copies=4\)"),
        (3, None, r"augment_copies=3 has no effect, since the extractor has no augment: write augment="),
        (3, [], r"augment_copies=3 has no effect"),
        (3, lambda images: images, r"draws that can be made again.*write augment as a list of names"),
    ],
    ids=["not asked for", "nothing", "empty", "callable"],
)
def test_what_cannot_be_copied_is_refused(copies, augment, message):
    model = make_model(extractor={"backbone": "resnet_mini", "augment": augment})
    with pytest.raises(ValueError, match=message):
        model.learn(4, callback=FeatureCacheCallback(augment_copies=copies))


@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-1, ValueError), (1.5, ValueError), ("many", TypeError), (True, TypeError)]
)
def test_the_number_of_copies_is_a_whole_number_above_zero(value, error):
    with pytest.raises(error, match="augment_copies must be"):
        FeatureCacheCallback(augment_copies=value)


def test_numpys_numbers_are_numbers():
    assert FeatureCacheCallback(augment_copies=np.int64(2)).augment_copies == 2


def test_float_images_are_augmented_on_their_own_scale(chosen):
    class FloatGame(TinyGame):
        def __init__(self):
            super().__init__()
            self.observation_space = spaces.Box(0.0, 1.0, (4, 32, 32), np.float32)

    model = make_model(env=FloatGame(), extractor={"backbone": "resnet_mini", "augment": AUGMENT})
    rng = np.random.default_rng(0)
    for _ in range(20):
        obs, following = (rng.random((1, 4, 32, 32), np.float32) for _ in range(2))
        model.replay_buffer.add(obs, following, np.zeros((1, 1)), np.zeros(1), np.zeros(1), [{}])
    start(model)
    encoded = model.replay_buffer.sample(8).next_observations
    obs_ids, copies = chosen[0]
    expected = plain_entries(model, augmented(model, obs_ids, copies))
    th.testing.assert_close(encoded.features, expected, rtol=1e-4, atol=1e-5)
