"""augment: sampled images are changed at random, all frames of an observation alike, never those acted upon."""

import warnings

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.env_util import make_vec_env
from torchvision.transforms import v2

from sb3_resnet import ResNetExtractor
from sb3_resnet.callbacks import FeatureCacheCallback
from sb3_resnet.nn.augment import read_augment
from tests.helpers import TinyGame, assert_same, fill, make_model, observations, q_values

SHIFT = [{"random_shift": {"padding": 4}}]
ALL = [
    "random_shift",
    {"random_resized_crop": {"scale": [0.7, 0.9]}},
    {"color_jitter": {"brightness": 0.3, "contrast": [0.8, 1.2]}},
]


def build(value, channels=4, size=(12, 16), frame_channels=1):
    return read_augment(value, size, frame_channels), th.rand(6, channels, *size)


def same_frames(batch=6, frames=4, channels=1, size=(12, 16)):
    """Observations whose frames are all equal, so that a change that differs between frames shows."""
    return th.rand(batch, 1, channels, *size).expand(-1, frames, -1, -1, -1).reshape(batch, -1, *size)


@pytest.mark.parametrize("step", [*ALL, "horizontal_flip"], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.filterwarnings("ignore:horizontal_flip")
def test_all_frames_of_an_observation_change_alike_and_observations_differently(step, channels):
    augmentation = read_augment([step], (12, 16), channels)
    one = same_frames(1, 4, channels)
    images = one.expand(24, -1, -1, -1)
    th.manual_seed(0)
    changed = augmentation(images)
    assert changed.shape == images.shape
    assert changed.dtype == th.float32
    assert changed.min() >= 0.0
    assert changed.max() <= 1.0
    frames = changed.unflatten(1, (4, channels))
    th.testing.assert_close(frames, frames[:, :1].expand_as(frames), rtol=0, atol=1e-6)
    different = {tuple(image.flatten().tolist()) for image in frames[:, 0]}
    assert len(different) > (1 if step == "horizontal_flip" else 12)


def test_a_shift_moves_by_at_most_its_padding_and_repeats_the_edge():
    augmentation, images = build([{"random_shift": {"padding": 2}}], size=(8, 8))
    th.manual_seed(0)
    seen = set()
    for _ in range(20):
        for image, changed in zip(images, augmentation(images), strict=True):
            padded = th.nn.functional.pad(image[None], [2] * 4, mode="replicate")[0]
            found = [
                (top, left)
                for top in range(5)
                for left in range(5)
                if th.equal(padded[:, top : top + 8, left : left + 8], changed)
            ]
            assert len(found) == 1
            seen.update(found)
    assert len(seen) == 25


@pytest.mark.filterwarnings("ignore:horizontal_flip")
def test_a_flip_is_a_flip_or_nothing():
    augmentation, images = build([{"horizontal_flip": {"p": 0.5}}])
    th.manual_seed(0)
    changed = augmentation(images)
    kinds = [th.equal(c, i.flip(-1)) - th.equal(c, i) for i, c in zip(images, changed, strict=True)]
    assert {*kinds} == {-1, 1}


def test_jitter_is_torchvisions():
    augmentation, images = build([{"color_jitter": {"brightness": 0.4}}], channels=3, frame_channels=3)
    th.manual_seed(0)
    changed = augmentation(images)
    th.manual_seed(0)
    expected = th.stack([v2.ColorJitter(brightness=0.4)(image) for image in images])
    assert th.equal(changed, expected)


def test_the_global_generator_decides():
    augmentation, images = build(ALL)
    th.manual_seed(1)
    first = augmentation(images)
    assert not th.equal(augmentation(images), first)
    th.manual_seed(1)
    assert th.equal(augmentation(images), first)


class Seen:
    """A callable that notes what it is given and blackens it."""

    def __init__(self):
        self.shapes = []

    def __call__(self, images):
        self.shapes.append(tuple(images.shape))
        return th.zeros_like(images)


@pytest.mark.parametrize("algorithm", ["dqn", "qrdqn"])
def test_only_sampled_batches_of_both_networks_are_changed(algorithm):
    transform = Seen()
    model = fill(make_model(algorithm, extractor={"augment": transform}))
    model.train(1, 4)
    assert transform.shapes == [(4, 4, 1, 32, 32)] * 2  # one for each network
    model.predict(observations(model))
    model.policy.set_training_mode(False)
    obs = th.as_tensor(observations(model, 1))
    with th.no_grad():
        black = model.policy.target(th.zeros_like(obs))
        assert not th.equal(model.policy.target(obs), black)
        assert len(transform.shapes) == 2
        model.policy.set_training_mode(True)
        assert th.equal(model.policy.target(obs), black)


def test_online_and_target_draw_independently():
    model = fill(make_model(extractor={"augment": SHIFT}))
    seen = []
    for network in (model.q_net, model.q_net_target):
        conv = network.features_extractor.adapter
        conv.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.replay_buffer.next_observations[:] = model.replay_buffer.observations
    model.train(1, 16)
    assert not th.equal(*seen)
    seen.clear()
    model.q_net.features_extractor.augmentation = model.q_net_target.features_extractor.augmentation = None
    model.train(1, 16)
    assert th.equal(*seen)


def test_learning_with_it_acts_on_true_images():
    transform = Seen()
    model = make_model(extractor={"augment": transform})
    model.learn(20)
    assert model._n_updates > 0
    assert transform.shapes == [(4, 4, 1, 32, 32)] * 2 * model._n_updates


@pytest.mark.parametrize(
    "kwargs",
    [{"adapter": "per_frame"}, {"image_size": 40}, {"image_size": 40, "adapter": "per_frame", "micro_batch_size": 2}],
    ids=str,
)
def test_it_goes_before_resizing_and_frames(kwargs):
    space = spaces.Box(0, 255, (4, 32, 32), np.uint8)
    th.manual_seed(0)
    extractor = ResNetExtractor(space, backbone="resnet_tiny", augment=SHIFT, freeze_backbone=False, **kwargs)
    images = th.rand(5, 4, 32, 32)
    extractor.train()
    th.manual_seed(3)
    changed = extractor(images)
    th.manual_seed(3)
    by_hand = extractor.augmentation(images)
    extractor.eval()
    th.testing.assert_close(changed, extractor(by_hand))
    assert not th.allclose(changed, extractor(images))


def test_float_images_are_changed_on_the_scale_of_0_to_1():
    seen = []
    space = spaces.Box(0, 255, (3, 32, 32), np.float32)
    extractor = ResNetExtractor(space, backbone="resnet_tiny", augment=lambda images: (seen.append(images), images)[1])
    extractor.train()
    extractor(th.full((2, 3, 32, 32), 255.0))
    assert seen[0].shape == (2, 1, 3, 32, 32)
    assert seen[0].unique().item() == pytest.approx(1.0)


def test_ppo_changes_what_it_trains_on():
    transform = Seen()
    model = PPO(
        "CnnPolicy",
        make_vec_env(TinyGame, 2),
        n_steps=4,
        batch_size=8,
        n_epochs=2,
        device="cpu",
        policy_kwargs={
            "features_extractor_class": ResNetExtractor,
            "features_extractor_kwargs": {"backbone": "resnet_mini", "augment": transform},
        },
    )
    model.learn(8)
    assert transform.shapes == [(8, 4, 1, 32, 32)] * 2


@pytest.mark.filterwarnings("ignore:horizontal_flip")
def test_it_is_saved_with_the_arguments_and_not_with_the_weights(tmp_path):
    augment = [*ALL, {"horizontal_flip": None}]
    model = make_model(extractor={"augment": augment})
    assert_same(model.policy.state_dict(), make_model().policy.state_dict())
    model.save(tmp_path / "model.zip")
    loaded = DQN.load(tmp_path / "model.zip")
    assert repr(loaded.q_net.features_extractor.augmentation.transform) == repr(
        model.q_net.features_extractor.augmentation.transform
    )
    obs = observations(model)
    assert th.equal(q_values(loaded, obs), q_values(model, obs))


def test_the_cache_refuses_it_with_the_reason():
    with pytest.raises(ValueError, match=r"no entry would be exact: write FeatureCacheCallback\(augment_copies=4\)"):
        make_model(extractor={"augment": SHIFT}).learn(4, callback=FeatureCacheCallback())


def test_the_warnings_come_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_model(extractor={"augment": ["horizontal_flip", {"color_jitter": {"hue": 0.1, "brightness": 0.1}}]})
    texts = [str(warning.message) for warning in caught]
    assert len([text for text in texts if "horizontal_flip changes what left and right mean" in text]) == 1
    assert len([text for text in texts if "grey frames have no hue: leave it out" in text]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(ALL)
        build([{"color_jitter": {"hue": [-0.1, 0.1], "saturation": 0.5}}], 3, frame_channels=3)


def test_nothing_to_do_is_nothing():
    assert read_augment(None, (8, 8), 1) is None
    assert read_augment([], (8, 8), 1) is None


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("random_shift", TypeError, r"augment must be a list such as \[\{'random_shift'"),
        (3, TypeError, "augment must be a list"),
        ([3], TypeError, r"augment\[0\] must be a name or"),
        ([{"random_shift": 4}], TypeError, r"augment\[0\] must be a name or"),
        ([{"random_shift": {}, "horizontal_flip": {}}], TypeError, r"augment\[0\] must be a name or"),
        (["random_shift", "random_shfit"], ValueError, r"augment\[1\] must be one of .*did you mean 'random_shift'"),
        ([{"random_shift": {"paddings": 4}}], TypeError, "random_shift has no argument 'paddings'; did you mean"),
        ([{"random_shift": {"padding": 0}}], ValueError, "random_shift: padding must be finite and >= 1"),
        ([{"random_shift": {"padding": 1.5}}], ValueError, "padding must be a whole number"),
        ([{"random_shift": {"padding": 99}}], ValueError, "padding must be finite and >= 1 and <= 12"),
        ([{"random_resized_crop": {"scale": 0.5}}], ValueError, "scale must be two numbers"),
        ([{"random_resized_crop": {"scale": [0.5, 1.5]}}], ValueError, "scale is a part of the area"),
        ([{"random_resized_crop": {"ratio": [2, 1]}}], ValueError, "ratio must be smallest and largest"),
        (["color_jitter"], ValueError, "color_jitter does nothing without one of brightness, contrast"),
        ([{"color_jitter": {"hue": 0.7}}], ValueError, "color_jitter: hue values should be between"),
        ([{"color_jitter": {"contrast": [1.2, 0.8]}}], ValueError, "color_jitter: contrast values should be"),
        ([{"color_jitter": {"brightness": "much"}}], TypeError, "color_jitter: brightness must be a number"),
        ([{"horizontal_flip": {"p": 2}}], ValueError, "horizontal_flip: p must be finite and >= 0 and <= 1"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_with_what_to_write(value, error, message):
    with pytest.raises(error, match=message):
        build(value)


def test_a_callable_must_keep_the_shape():
    augmentation, images = build(lambda images: images[..., 1:])
    with pytest.raises(ValueError, match=r"augment must keep the shape .* = \(6, 4, 1, 12, 16\), but returned"):
        augmentation(images)


@pytest.mark.parametrize("high", [1.0, 255.0])
def test_a_callable_may_leave_the_space_as_long_as_observations_do_not(high):
    def brighter(images):
        return images * 1.5 - 0.25

    options = {"backbone": "resnet_mini", "pooling": "flatten"}
    space = spaces.Box(0.0, high, (3, 32, 32), np.float32)
    th.manual_seed(0)
    frozen = ResNetExtractor(space, augment=brighter, **options)
    live = ResNetExtractor(space, augment=brighter, **options)
    live.load_state_dict(frozen.state_dict())
    live.set_freeze_boundary("all")
    observations = high * th.rand(3, 3, 32, 32)
    th.testing.assert_close(frozen(observations), live(observations), rtol=1e-4, atol=1e-5)
    for extractor in (frozen, live, frozen.eval()):
        with pytest.raises(ValueError, match="Negative values are what VecNormalize makes"):
            extractor(observations - 0.5 * high)
