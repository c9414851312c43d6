"""Images are what their space says, or an error says otherwise."""

import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import SimpleMultiObsEnv
from stable_baselines3.common.vec_env import VecNormalize, VecTransposeImage

from sb3_resnet import ResNetExtractor
from sb3_resnet.buffers import FrameReplayBuffer
from sb3_resnet.callbacks import FeatureCacheCallback
from sb3_resnet.common.vec_normalize import check_vec_normalize
from sb3_resnet.nn.encoder import FrozenEncoder
from tests.helpers import make_model

INSTEAD = r"write norm_obs=False: VecNormalize\(VecTransposeImage\(env\), norm_obs=False\)"


def build(space, **kwargs):
    return ResNetExtractor(space, **{"backbone": "resnet_tiny", **kwargs})


def box(*shape, high=1.0, dtype=np.float32):
    return spaces.Box(0, high, shape, dtype)


class Screens(gym.Env):
    """Random images of a space; those of float spaces are in 0..1 times its upper bound."""

    action_space = spaces.Discrete(2)

    def __init__(self, space):
        self.observation_space = space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._image(), {}

    def step(self, action):
        return self._image(), 0.0, False, self.np_random.random() < 0.1, {}

    def _image(self):
        image = self.np_random.random(self.observation_space.shape) * float(self.observation_space.high.max())
        return image.astype(self.observation_space.dtype)


# --------------------------------------------------------------------------------------- batches and their space


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize(
    ("high", "values", "says"),
    [
        (1, (0, 255), "go from 0 to 255, but their space says 0..1. Declare"),
        (1, (0, 1.5), "go from 0 to 1.5, but their space says 0..1"),
        (1, (-0.5, 1), "go from -0.5 to 1, but their space says 0..1. Negative values are what VecNormalize makes"),
        (255, (-3, 4), "go from -3 to 255, but their space says 0..255. Negative .*VecNormalize"),
        (255, (0, 300), "go from 0 to 300, but their space says 0..255"),
    ],
)
def test_floats_outside_their_space_are_refused(high, values, says, dtype):
    extractor = build(box(3, 32, 32, high=high, dtype=dtype))
    good = th.as_tensor(np.linspace(0, high, 3 * 32 * 32).reshape(1, 3, 32, 32).astype(dtype))
    for _ in range(20):  # also later than in the first batches
        assert extractor(good).isfinite().all()
    bad = good.clone()
    bad[0, 1, 2, :2] = th.tensor(values, dtype=bad.dtype)
    encoder = FrozenEncoder(extractor.trunk, "float32")
    for refuse in (extractor, encoder):
        with pytest.raises(ValueError, match=says) as caught:
            refuse(bad)
        assert "norm_obs=False" in str(caught.value)


@pytest.mark.parametrize(("high", "value"), [(1, 1.0005), (1, -0.0005), (255, 255.1)])
def test_rounding_is_no_error(high, value):
    extractor = build(box(3, 32, 32, high=high))
    assert extractor(th.full((2, 3, 32, 32), value)).isfinite().all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_keep_their_own_words(value):
    extractor = build(box(3, 32, 32))
    observations = th.rand(2, 3, 32, 32)
    observations[1, 2, 3, 4] = value
    with pytest.raises(ValueError, match="The observations hold NaN or inf"):
        extractor(observations)


def test_an_empty_batch_has_nothing_outside():
    extractor = build(box(3, 32, 32))
    assert extractor.preprocess(th.empty(0, 3, 32, 32)).shape == (0, 3, 32, 32)


# --------------------------------------------------------------------------------------------------------- spaces


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_bounds_which_differ_between_channels_name_the_channels(dtype):
    high = np.full((4, 32, 32), 255, dtype)
    high[3] = 100
    with pytest.raises(
        ValueError, match=r"the same in all channels; .*By channel: channels 0, 1, 2: 0..255;"
    ) as caught:
        build(spaces.Box(np.zeros_like(high), high, dtype=dtype))
    assert "channel 3: 0..100." in str(caught.value)


def test_bounds_which_differ_inside_a_channel_say_so():
    high = np.full((3, 32, 32), 255, np.uint8)
    high[1, 5:] = 7
    with pytest.raises(ValueError, match=r"channels 0, 2: 0..255; channel 1: 0..255 that differ between pixels"):
        build(spaces.Box(np.zeros_like(high), high, dtype=np.uint8))


@pytest.mark.parametrize("shape", [(40, 64, 32), (24, 33, 20), (48, 32, 40)])
def test_more_channels_than_columns_are_no_error(shape):
    extractor = build(box(*shape, high=255, dtype=np.uint8), adapter="inflate")
    assert extractor.backbone.conv1.in_channels == shape[0]
    with th.no_grad():
        assert extractor(th.rand(2, *shape)).isfinite().all()


def test_floats_with_more_channels_than_columns_warn_with_both_readings():
    with pytest.warns(UserWarning, match=r"read as 40 channels of 64x32 pixels.*to \(32, 40, 64\)"):
        build(box(40, 64, 32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(box(32, 64, 40), freeze_backbone=False)


def test_few_columns_are_refused_with_both_readings():
    with pytest.raises(
        ValueError, match=r"channels first.*\(12, 40, 64\). If they are 40 channels of 64x12 pixels.*17"
    ):
        build(box(40, 64, 12))
    with pytest.raises(ValueError, match=r"channels first.*to \(3, 40, 64\)\.$"):
        build(box(40, 64, 3))


# --------------------------------------------------------------------------------------------------- VecNormalize


def vec_env(space):
    return make_vec_env(lambda: Screens(space))


def policy(algorithm):
    kwargs = {"features_extractor_kwargs": {"backbone": "resnet_tiny"}}
    if algorithm is DQN:
        return "ResNetCnnPolicy", {"policy_kwargs": kwargs, "buffer_size": 20, "learning_starts": 2}
    options = {"batch_size": 4} if algorithm is PPO else {}
    return "CnnPolicy", {
        "policy_kwargs": {"features_extractor_class": ResNetExtractor, **kwargs},
        "n_steps": 4,
        **options,
    }


@pytest.mark.parametrize("algorithm", [DQN, PPO, A2C])
@pytest.mark.parametrize(
    "space",
    [
        box(4, 32, 32),
        box(4, 32, 32, high=255),
        box(4, 32, 32, high=255, dtype=np.uint8),
        box(32, 32, 4, high=255, dtype=np.uint8),
    ],
    ids=str,
)
def test_normalised_images_are_refused_with_what_to_write(space, algorithm):
    """By the space, which VecNormalize changes for uint8, or by the first images that are outside of it."""
    name, options = policy(algorithm)
    with pytest.raises(ValueError, match=INSTEAD):
        algorithm(name, VecNormalize(vec_env(space)), **options).learn(16)


@pytest.mark.parametrize("shape", [(4, 32, 32), (32, 32, 4)])
def test_the_space_of_normalised_images_names_vecnormalize_without_a_model(shape):
    space = VecNormalize(vec_env(box(*shape, high=255, dtype=np.uint8)), clip_obs=5.0).observation_space
    with pytest.raises(ValueError, match=f"got float32 -5..5. These are the bounds of VecNormalize: {INSTEAD}"):
        build(space)


@pytest.mark.parametrize("callback", [None, FeatureCacheCallback])
def test_vecnormalize_below_the_transposition_is_refused_before_the_first_step(callback):
    """By the cache, or by a buffer of this package: SB3's own hands over what comes before it is transposed."""
    name, options = policy(DQN)
    env = VecNormalize(vec_env(box(32, 40, 4, high=255, dtype=np.uint8)), norm_obs=False)
    if callback is None:
        options["replay_buffer_class"] = FrameReplayBuffer
    model = DQN(name, env, **options)
    with pytest.raises(ValueError, match=INSTEAD) as caught:
        model.learn(8, callback=None if callback is None else callback())
    assert "32, 40, 4)" in str(caught.value)


@pytest.mark.parametrize("callback", [None, FeatureCacheCallback])
def test_the_advice_on_vecnormalize_works(callback):
    name, options = policy(DQN)
    space = box(32, 40, 4, high=255, dtype=np.uint8)
    model = DQN(name, VecNormalize(VecTransposeImage(vec_env(space)), norm_obs=False), **options)
    model.learn(12, callback=None if callback is None else callback())
    assert model.replay_buffer.observations[0].shape == (1, 4, 32, 40)
    assert model.num_timesteps == 12


@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_on_policy_algorithms_may_have_vecnormalize_below_the_transposition(algorithm):
    name, options = policy(algorithm)
    env = VecNormalize(vec_env(box(32, 40, 4, high=255, dtype=np.uint8)), norm_obs=False)
    assert algorithm(name, env, **options).learn(4).num_timesteps == 4


def test_vectors_beside_images_may_be_normalised():
    env = VecNormalize(make_vec_env(SimpleMultiObsEnv), norm_obs_keys=["vec"])
    model = PPO("MultiInputPolicy", env, n_steps=4, batch_size=4)
    assert model.get_vec_normalize_env().norm_obs
    check_vec_normalize(model)


def test_rewards_alone_may_be_normalised():
    name, options = policy(DQN)
    assert DQN(name, VecNormalize(vec_env(box(4, 32, 32)), norm_obs=False), **options).learn(8).num_timesteps == 8


def test_a_policy_may_be_saved_and_loaded_below_vecnormalize(tmp_path):
    model = make_model(env=VecNormalize(vec_env(box(4, 32, 32, high=255, dtype=np.uint8)), norm_obs=False))
    model.save(tmp_path / "model")
    bad = VecNormalize(vec_env(box(32, 32, 4, high=255, dtype=np.uint8)), norm_obs=False)
    assert DQN.load(tmp_path / "model").observation_space.shape == (4, 32, 32)
    loaded = DQN.load(tmp_path / "model", env=bad)
    with pytest.raises(ValueError, match=INSTEAD):
        loaded.learn(8, callback=FeatureCacheCallback())
