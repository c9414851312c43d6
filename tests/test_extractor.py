"""ResNetExtractor: how images reach the trunk, what comes out, and what stays frozen."""

import copy
import re
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import torchvision.models as tvm
from gymnasium import spaces
from stable_baselines3 import A2C, DQN, PPO, SAC
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.preprocessing import preprocess_obs
from torch import nn
from torch.nn import functional as F

from sb3_resnet import ResNetExtractor
from sb3_resnet.nn import backbones
from sb3_resnet.nn.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from tests import helpers  # noqa: F401  # registers "resnet_tiny"

FROZEN_RANDOM = "The backbone is frozen with random weights"


def box(*shape, low=0, high=255, dtype=np.uint8):
    return spaces.Box(low, high, shape, dtype)


def images(*shape, batch=2, seed=0):
    return th.randint(256, (batch, *shape), generator=th.Generator().manual_seed(seed), dtype=th.uint8)


def build(*shape, seed=0, **kwargs):
    """An extractor of uint8 images with a tiny ResNet; the same seed gives the same weights."""
    th.manual_seed(seed)
    return ResNetExtractor(box(*(shape or (3, 32, 32))), **{"backbone": "resnet_tiny", **kwargs})


@th.no_grad()
def features(extractor, observations, space=None):
    """Features of raw observations, through SB3's preprocessing."""
    return extractor(preprocess_obs(observations, space or extractor._observation_space))


@th.no_grad()
def stem_input(extractor, observations):
    """What the first layer of the trunk gets."""
    seen = []
    handle = extractor.backbone.conv1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    features(extractor, observations)
    handle.remove()
    return seen[0]


def trunk_of(extractor):
    return {key: value.clone() for key, value in extractor.backbone.state_dict().items()}


def changed(extractor, before):
    """Names of what differs from an earlier :func:`trunk_of`."""
    return [key for key, value in extractor.backbone.state_dict().items() if not th.equal(value, before[key])]


def batch_norms(module):
    return [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]


@pytest.fixture(scope="module")
def rgb():
    """A frozen extractor of RGB images; not to be changed."""
    return build(3, 32, 32)


@pytest.fixture(scope="module")
def trunk_file(tmp_path_factory):
    """A weights file, and the state dict in it."""
    th.manual_seed(5)
    state = backbones.build("resnet_tiny").state_dict()
    path = tmp_path_factory.mktemp("weights") / "resnet_tiny.pth"
    th.save(state, path)
    return path, state


def test_the_default_is_a_frozen_resnet18():
    with pytest.warns(UserWarning, match=FROZEN_RANDOM):
        extractor = ResNetExtractor(box(3, 40, 32))
    trunk = tvm.resnet18()
    trunk.load_state_dict(extractor.backbone.state_dict(), strict=False)
    trunk.fc = nn.Identity()
    observations = images(3, 40, 32)
    with th.no_grad():
        expected = trunk.eval()(observations / 255)
    assert extractor.features_dim == 512
    assert extractor.freeze_boundary is None
    assert extractor.input_std.flatten().tolist() == [1.0, 1.0, 1.0]
    assert not any(parameter.requires_grad for parameter in extractor.parameters())
    th.testing.assert_close(features(extractor, observations), expected)


# ------------------------------------------------------------------------------------------------ scaling by space


@pytest.mark.parametrize("largest", [1, 2, 100, 255])
@pytest.mark.parametrize(
    ("high", "dtype"), [(255, np.float32), (255, np.float64), (1, np.float32), (1, np.float64), (1, np.float16)]
)
def test_the_same_image_gives_the_same_features_in_every_space(high, dtype, largest, rgb):
    image = images(3, 32, 32).clamp(max=largest)  # a dark frame is scaled like a bright one
    space = box(3, 32, 32, high=high, dtype=dtype)
    extractor = ResNetExtractor(space, backbone="resnet_tiny")
    extractor.load_state_dict(rgb.state_dict())
    raw = th.as_tensor((image.double() * (high / 255)).numpy().astype(dtype))
    tolerance = 1e-6 if dtype != np.float16 else 1e-2
    th.testing.assert_close(features(extractor, raw, space), features(rgb, image), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("space", [box(3, 32, 32), box(3, 32, 32, dtype=np.float32)], ids=str)
def test_scale_raw_is_what_sb3_hands_over(space):
    raw = th.as_tensor(np.stack([space.sample(), space.sample()]))
    extractor = ResNetExtractor(space, backbone="resnet_tiny")
    assert th.equal(extractor.scale_raw(raw), preprocess_obs(raw, space))


def test_uint8_images_reach_the_stem_as_0_to_1(rgb):
    image = images(3, 32, 32)
    image[0, 0, 0, :2] = th.tensor([0, 255])
    x = stem_input(rgb, image)
    assert x.dtype == th.float32
    assert x[0, 0, 0, :2].tolist() == [0.0, 1.0]
    th.testing.assert_close(x, image / 255)


@pytest.mark.parametrize(
    "space",
    [
        box(3, 32, 32, high=254),
        box(3, 32, 32, high=1),
        box(3, 32, 32, low=1),
        box(3, 32, 32, high=255, dtype=np.int32),
        box(3, 32, 32, high=1, dtype=np.int64),
        box(3, 32, 32, low=-1, high=1, dtype=np.float32),
        box(3, 32, 32, high=2, dtype=np.float32),
        box(3, 32, 32, low=-np.inf, high=np.inf, dtype=np.float32),
        spaces.Box(np.zeros((3, 32, 32), np.float32), np.linspace(1, 255, 3072, dtype=np.float32).reshape(3, 32, 32)),
    ],
    ids=str,
)
def test_other_bounds_are_refused_by_name(space):
    with pytest.raises(ValueError, match=r"Image bounds must be .*normalize_images") as caught:
        ResNetExtractor(space)
    assert f"got {space.dtype} {space.low.min():g}..{space.high.max():g}." in str(caught.value)


@pytest.mark.parametrize("adapter", ["conv1x1", "per_frame", "inflate"])
@pytest.mark.parametrize("kind", [np.float32, np.uint8])
def test_values_of_other_bounds_are_taken_as_they_are_where_that_is_said(adapter, kind):
    space = box(4, 36, 36, low=0 if kind == np.uint8 else -10, high=10, dtype=kind)
    extractor = ResNetExtractor(space, backbone="resnet_tiny", adapter=adapter, normalized_image=True)
    values = th.as_tensor(np.stack([space.sample() for _ in range(3)])).float()
    images = extractor.preprocess(values)
    assert th.equal(images[:, :1].reshape(values.shape) if adapter == "per_frame" else images, values)
    th.testing.assert_close(extractor(values), extractor.plain_features(values))
    assert extractor(20 * values).isfinite().all()  # VecNormalize may clip elsewhere than the space says
    with pytest.raises(ValueError, match="The observations hold NaN or inf"):
        extractor(values.index_fill(0, th.tensor([1]), float("nan")))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_images_are_not_taken_as_they_are(dtype):
    says = "normalized_image=True would leave images at 0..255, and their space says .* 0..255: leave it out"
    with pytest.raises(ValueError, match=says):
        ResNetExtractor(box(3, 32, 32, dtype=dtype), normalized_image=True)


def test_what_is_made_for_images_does_not_meet_other_values(hub_weights):
    space = box(3, 36, 36, low=-1, high=1, dtype=np.float32)
    with pytest.raises(ValueError, match=r"augment changes images in 0\.\.1, and normalized_image=True takes other"):
        ResNetExtractor(space, normalized_image=True, augment=["random_shift"])
    assert ResNetExtractor(space, normalized_image=True, pretrained=True).input_std.unique().tolist() == [1.0]
    stated = ResNetExtractor(space, normalized_image=True, pretrained=True, use_imagenet_norm=True)
    assert len(stated.input_std.unique()) == 3


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(4),
        box(8, dtype=np.float32),
        box(32, 32),
        box(2, 3, 32, 32),
        spaces.Dict(image=box(3, 32, 32)),
        spaces.MultiBinary((3, 32, 32)),
    ],
    ids=lambda space: type(space).__name__ + str(space.shape),
)
def test_spaces_without_images_are_refused(space):
    with pytest.raises(ValueError, match=r"needs images, a Box of shape \(channels, height, width\).*MlpPolicy.*Dict"):
        ResNetExtractor(space)


@pytest.mark.parametrize(
    ("space", "shape"),
    [
        (box(32, 40, 3, high=1, dtype=np.float32), "(3, 32, 40)"),
        (box(32, 40, 4, high=255, dtype=np.float32), "(4, 32, 40)"),
        (box(32, 40, 1), "(1, 32, 40)"),
    ],
    ids=str,
)
def test_channels_last_is_refused_with_the_right_shape(space, shape):
    with pytest.raises(ValueError, match="channels first") as caught:
        ResNetExtractor(space)
    assert shape in str(caught.value)


def own_policy_kwargs(**kwargs):
    return {"net_arch": [8], "features_extractor_kwargs": {"backbone": "resnet_tiny", **kwargs}}


class Slides(gym.Env):
    """Shows one given image."""

    action_space = spaces.Discrete(2)

    def __init__(self, image):
        self.image = image
        self.observation_space = box(*image.shape)

    def reset(self, *, seed=None, options=None):
        return self.image, {}

    def step(self, action):
        return self.image, 0.0, False, False, {}


def test_channels_last_through_sb3_equals_channels_first():
    image = images(3, 32, 40)[0].numpy()
    values = []
    for env in (Slides(image), Slides(np.ascontiguousarray(image.transpose(1, 2, 0)))):
        model = DQN("ResNetCnnPolicy", env, buffer_size=2, policy_kwargs=own_policy_kwargs(), seed=0)
        assert model.observation_space.shape == (3, 32, 40)
        from_env = model.policy.obs_to_tensor(model.get_env().reset())[0]
        from_predict = model.policy.obs_to_tensor(env.image)[0]
        with th.no_grad():
            values += [model.q_net(from_env), model.q_net(from_predict)]
    assert values[0].std() > 0
    assert all(th.equal(value, values[0]) for value in values)


def test_channels_last_float_through_sb3_is_refused():
    env = Slides(np.zeros((32, 32, 3), np.uint8))
    env.observation_space = box(32, 32, 3, high=1, dtype=np.float32)
    with pytest.raises(ValueError, match="transpose others in a wrapper"):
        DQN("ResNetCnnPolicy", env, buffer_size=2)


# ------------------------------------------------------------------------------------------------- channels


@pytest.mark.parametrize(
    ("channels", "rows"),
    [
        (1, [{0: 1.0}] * 3),
        (2, [{1: 1.0}, {1: 1.0}, {0: 1.0}]),
        (4, [{3: 1.0}, {1: 1 / 2, 2: 1 / 2}, {0: 1.0}]),
        (5, [{4: 1.0}, dict.fromkeys(range(1, 4), 1 / 3), {0: 1.0}]),
        (6, [{3: 1 / 3, 4: 1 / 3, 5: 1 / 3}, {3: 1 / 3, 4: 1 / 3, 5: 1 / 3}, {0: 1 / 3, 1: 1 / 3, 2: 1 / 3}]),
        (12, [dict.fromkeys(range(9, 12), 1 / 3), dict.fromkeys(range(3, 9), 1 / 6), dict.fromkeys(range(3), 1 / 3)]),
    ],
)
def test_invariant_4_the_adapter_begins_as_newest_middle_and_oldest_frame(channels, rows):
    extractor = build(channels, 32, 32)
    weight = extractor.adapter.weight.detach()
    assert isinstance(extractor.adapter, nn.Conv2d)
    assert weight.shape == (3, channels, 1, 1)
    expected = th.zeros(3, channels)
    for row, entries in enumerate(rows):
        for column, value in entries.items():
            expected[row, column] = value
    th.testing.assert_close(weight.flatten(1), expected)
    th.testing.assert_close(weight.sum(dim=(1, 2, 3)), th.ones(3))
    assert weight.min() >= 0
    assert not extractor.adapter.bias.any()
    assert extractor.stages == ("adapter", "stem", "layer1", "layer2", "layer3", "layer4")

    x = stem_input(extractor, images(channels, 32, 32))
    assert 0 <= x.min() < x.max() <= 1 + 1e-6
    th.testing.assert_close(x[:, 0], sum(value * images(channels, 32, 32)[:, i] / 255 for i, value in rows[0].items()))


def test_three_channels_need_no_adapter(rgb):
    for extractor in (rgb, build(3, 32, 32, frame_channels=3)):
        assert extractor.adapter is None
        assert extractor.stages == ("stem", "layer1", "layer2", "layer3", "layer4")
        assert extractor.features_dim == 256


@pytest.mark.parametrize("pooling", ["avg", "flatten"])
@pytest.mark.parametrize(("channels", "frames"), [(1, 1), (4, 4), (6, 2)])
def test_per_frame_is_each_frame_alone(channels, frames, pooling):
    observations = images(channels, 32, 40)
    extractor = build(channels, 32, 40, adapter="per_frame", pooling=pooling)
    alone = build(3, 32, 40, pooling=pooling)
    alone.load_state_dict(extractor.state_dict())
    size = channels // frames
    parts = [features(alone, frame.expand(-1, 3, -1, -1)) for frame in observations.split(size, dim=1)]
    assert extractor.adapter is None
    assert extractor.features_dim == frames * alone.features_dim
    th.testing.assert_close(features(extractor, observations), th.cat(parts, dim=1), rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------------------- pooling and size


@pytest.mark.parametrize(
    ("pooling", "dim"),
    [("avg", 256), ("flatten", 256 * 2 * 3), ("spatial_softmax", 512)],
    ids=str,
)
def test_pooling_gives_its_numbers(pooling, dim):
    observations = images(3, 64, 70)
    extractor = build(3, 64, 70, pooling=pooling)
    with th.no_grad():
        x = extractor.run_stages(observations / 255, extractor.stages)
    assert x.shape == (2, 256, 2, 3)
    probability = x.flatten(2).softmax(2).reshape(x.shape)
    rows, columns = probability.sum(3) @ th.tensor([-1.0, 1.0]), probability.sum(2) @ th.tensor([-1.0, 0.0, 1.0])
    expected = {"avg": x.mean((2, 3)), "flatten": x.reshape(2, -1), "spatial_softmax": th.cat([rows, columns], 1)}
    result = features(extractor, observations)
    assert extractor.features_dim == dim == result.shape[1]
    assert result.dtype == th.float32
    th.testing.assert_close(result, expected[pooling])


@pytest.mark.parametrize(
    ("shape", "image_size", "size"),
    [
        ((3, 64, 64), 32, (32, 32)),
        ((3, 64, 64), "48", (48, 48)),
        ((3, 60, 80), [33, 47], (33, 47)),
        ((3, 20, 30), (40, 44), (40, 44)),
        ((4, 16, 64), 32, (32, 32)),
    ],
)
def test_image_size_is_an_antialiased_resize(shape, image_size, size):
    observations = images(*shape)
    extractor = build(*shape, image_size=image_size)
    expected = F.interpolate(observations / 255, size, mode="bilinear", antialias=True, align_corners=False)
    with th.no_grad():
        expected = expected if extractor.adapter is None else extractor.adapter(expected)
    x = stem_input(extractor, observations)
    assert x.shape == (2, 3, *size)
    th.testing.assert_close(x, expected)
    if shape == (3, 64, 64):
        plain = F.interpolate(observations / 255, size, mode="bilinear", align_corners=False)
        assert (x - plain).abs().max() > 0.1


def test_image_size_decides_the_size_of_the_features(rgb):
    assert build(3, 64, 64, image_size=32, pooling="flatten").features_dim == 256
    same = build(3, 32, 32, image_size=32)
    assert th.equal(features(same, images(3, 32, 32)), features(rgb, images(3, 32, 32)))


@pytest.mark.parametrize(
    ("value", "error", "says"),
    [
        ([32], ValueError, r"image_size must be one number or \[height, width\], got \[32\]"),
        ([32, 32, 3], ValueError, r"image_size must be one number or \[height, width\]"),
        (0, ValueError, "image_size must be finite and >= 1, got 0"),
        (32.5, ValueError, "image_size must be a whole number, got 32.5"),
        ("big", TypeError, "image_size must be a number, got 'big'"),
        (True, TypeError, "image_size must be a number, got True"),
        ([32, None], TypeError, "image_size must be a number, got None"),
    ],
)
def test_image_size_refuses_what_is_no_size(value, error, says):
    with pytest.raises(error, match=says):
        build(image_size=value)


@pytest.mark.parametrize(
    ("shape", "kwargs"),
    [
        ((3, 16, 16), {}),
        ((3, 84, 10), {}),
        ((4, 10, 84), {"pooling": "flatten"}),
        ((3, 84, 84), {"image_size": 8}),
        ((3, 32, 84), {"pooling": "spatial_softmax"}),
        ((1, 84, 84), {"pooling": "spatial_softmax", "image_size": [84, 20], "adapter": "per_frame"}),
    ],
    ids=str,
)
def test_too_small_images_name_the_smallest_size_which_works(shape, kwargs):
    with pytest.raises(ValueError, match="too small for a ResNet") as caught:
        build(*shape, **kwargs)
    size = int(re.search(r"smallest size that works is (\d+)x\1: write image_size=\1", str(caught.value)).group(1))
    extractor = build(*shape, **{**kwargs, "image_size": size})
    result = features(extractor, images(*shape))
    assert result.isfinite().all()
    assert result.std(dim=0).max() > 0
    with pytest.raises(ValueError, match="too small"):
        build(*shape, **{**kwargs, "image_size": size - 1})


def test_features_dim_is_a_linear_projection(rgb):
    extractor = build(features_dim=7)
    extractor.load_state_dict(rgb.state_dict(), strict=False)
    pooled, layer = features(rgb, images(3, 32, 32)), extractor.projection
    assert extractor.features_dim == 7
    with th.no_grad():
        expected = pooled @ layer.weight.T + layer.bias
    th.testing.assert_close(features(extractor, images(3, 32, 32)), expected)
    assert all(parameter.requires_grad for parameter in layer.parameters())  # part of the head, never frozen


# ------------------------------------------------------------------------------------------------- normalisation


@pytest.mark.parametrize(
    ("channels", "kwargs", "mean", "std"),
    [
        (3, {"use_imagenet_norm": True}, IMAGENET_MEAN, IMAGENET_STD),
        (1, {"use_imagenet_norm": True}, IMAGENET_MEAN, IMAGENET_STD),
        (3, {"use_imagenet_norm": False}, (0.0,) * 3, (1.0,) * 3),
        (3, {}, (0.0,) * 3, (1.0,) * 3),
        (3, {"input_mean": [0.1, 0.2, 0.3], "input_std": (0.5, 2, "1e-1")}, (0.1, 0.2, 0.3), (0.5, 2.0, 0.1)),
        (1, {"input_mean": np.array([0.1, -0.2, 0.3]), "input_std": np.ones(3)}, (0.1, -0.2, 0.3), (1.0,) * 3),
        (3, {"input_mean": np.float32([0.5, 0.5, 0.5]), "input_std": np.float32([1, 1, 1])}, (0.5,) * 3, (1.0,) * 3),
        (3, {"input_mean": [0, 0, 0], "input_std": [2, 2, 2], "use_imagenet_norm": False}, (0.0,) * 3, (2.0,) * 3),
    ],
    ids=str,
)
def test_the_trunk_gets_normalised_images(channels, kwargs, mean, std):
    observations = images(channels, 32, 32)
    extractor = build(channels, 32, 32, **kwargs)
    mean, std = (th.tensor(value).reshape(3, 1, 1) for value in (mean, std))
    th.testing.assert_close(stem_input(extractor, observations), (observations / 255 - mean) / std)
    state = extractor.state_dict()
    th.testing.assert_close(state["input_mean"], mean)
    th.testing.assert_close(state["input_std"], std)


def test_imagenet_statistics_are_those_of_torchvision():
    transform = tvm.ResNet18_Weights.DEFAULT.transforms()
    assert list(IMAGENET_MEAN) == transform.mean
    assert list(IMAGENET_STD) == transform.std


@pytest.mark.parametrize(("kwargs", "normalised"), [({}, True), ({"use_imagenet_norm": False}, False)], ids=str)
def test_weights_bring_their_statistics(kwargs, normalised, trunk_file):
    extractor = build(weights=trunk_file[0], **kwargs)
    assert extractor.input_mean.flatten().tolist() == pytest.approx(IMAGENET_MEAN if normalised else (0.0,) * 3)
    black = (-th.tensor(IMAGENET_MEAN) / th.tensor(IMAGENET_STD)).reshape(3, 1, 1) if normalised else th.zeros(3, 1, 1)
    th.testing.assert_close(stem_input(extractor, th.zeros(1, 3, 32, 32)), black.expand(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("kwargs", "error", "says"),
    [
        ({"input_mean": [0.5, 0.5, 0.5]}, ValueError, "input_mean and input_std go together"),
        ({"input_std": [0.5, 0.5, 0.5]}, ValueError, "input_mean and input_std go together"),
        ({"input_mean": [0.5], "input_std": [1, 1, 1]}, ValueError, r"input_mean must be three numbers.*got \[0.5\]"),
        ({"input_mean": [0.5] * 3, "input_std": [1] * 4}, ValueError, "input_std must be three numbers"),
        ({"input_mean": 0.5, "input_std": 1.0}, ValueError, "input_mean must be three numbers.*got 0.5"),
        ({"input_mean": "0.5", "input_std": [1, 1, 1]}, ValueError, "input_mean must be three numbers"),
        ({"input_mean": [0.5] * 3, "input_std": [1, 0, 1]}, ValueError, "input_std must be finite and > 0, got 0"),
        ({"input_mean": [0.5] * 3, "input_std": [1, -1, 1]}, ValueError, "input_std must be finite and > 0, got -1"),
        ({"input_mean": [np.nan] * 3, "input_std": [1] * 3}, ValueError, "input_mean must be finite"),
        ({"input_mean": [None] * 3, "input_std": [1] * 3}, TypeError, "input_mean must be a number, got None"),
        (
            {"input_mean": [123.675, 116.28, 103.53], "input_std": [58.395, 57.12, 57.375]},
            ValueError,
            "by 255: .0.485,",
        ),
        ({"input_mean": [0.5] * 3, "input_std": [58.395] * 3}, ValueError, "input_std=.*divide .* by 255: .0.229,"),
        ({"input_mean": [0.5] * 3, "input_std": [1, 1e-300, 1]}, ValueError, "cannot be on the scale of 0..1: write"),
        ({"input_mean": [-104, -117, -124], "input_std": [1] * 3}, ValueError, "cannot be on the scale of 0..1"),
        (
            {"input_mean": [0.5] * 3, "input_std": [1] * 3, "use_imagenet_norm": True},
            ValueError,
            "no effect beside",
        ),
        ({"use_imagenet_norm": "yes"}, TypeError, "use_imagenet_norm must be true or false, got 'yes'"),
    ],
    ids=str,
)
def test_wrong_statistics_say_what_to_write(kwargs, error, says):
    with pytest.raises(error, match=says):
        build(**kwargs)


# ------------------------------------------------------------------------------------------------ wrong arguments


@pytest.mark.parametrize(
    ("kwargs", "error", "says"),
    [
        (
            {"pool": "avg"},
            TypeError,
            "unexpected keyword argument 'pool'",
        ),
        ({"freeze": True}, TypeError, "unexpected keyword argument 'freeze'"),
        ({"backbone": "resnet81"}, ValueError, "did you mean 'resnet18'"),
        (
            {"pooling": "mean"},
            ValueError,
            "pooling must be one of 'avg', 'flatten', 'spatial_softmax', 'grid', got 'mean'",
        ),
        ({"adapter": "conv"}, ValueError, "adapter must be one of 'conv1x1', 'per_frame'"),
        ({"norm": "instance"}, ValueError, "norm must be one of 'frozen', 'batch', 'group', 'sync'"),
        ({"norm": "group", "pretrained": True}, ValueError, "norm='group' has no pretrained weights: write norm="),
        ({"norm": "group", "weights": "x.pth"}, ValueError, "norm='group' has no pretrained weights"),
        ({"norm": "layer", "pretrained": True}, ValueError, "norm='layer' has no pretrained weights: write norm="),
        ({"pretrained": "False"}, TypeError, "pretrained must be true or false, got 'False'"),
        ({"freeze_backbone": 1}, TypeError, "freeze_backbone must be true or false, got 1"),
        ({"train_adapter": "no"}, TypeError, "train_adapter must be true or false"),
        ({"train_adapter": True}, ValueError, "train_adapter=True needs an adapter"),
        ({"features_dim": 0}, ValueError, "features_dim must be finite and >= 1"),
        ({"features_dim": 2.5}, ValueError, "features_dim must be a whole number"),
    ],
    ids=str,
)
def test_a_wrong_argument_says_what_to_write(kwargs, error, says):
    with pytest.raises(error, match=says):
        build(**kwargs)


def test_train_adapter_is_refused_where_each_frame_goes_alone():
    with pytest.raises(ValueError, match="train_adapter=True needs an adapter: adapter='conv1x1'"):
        build(4, 32, 32, adapter="per_frame", train_adapter=True)


# ------------------------------------------------------------------------------------------------------- freezing


def loss_of(extractor, observations):
    return extractor(observations / 255).square().mean()


def test_invariant_5_frozen_means_frozen_whatever_train_is_called():
    extractor = build(4, 32, 32, features_dim=4)
    before = copy.deepcopy(extractor.state_dict())
    for step in range(20):
        extractor.train()
        extractor.backbone.train()
        extractor.boundary.train()
        assert not any(layer.training for layer in batch_norms(extractor))
        loss_of(extractor, images(4, 32, 32, seed=step)).backward()
    after = extractor.state_dict()
    assert [key for key in after if not th.equal(after[key], before[key])] == []
    assert {name for name, parameter in extractor.named_parameters() if parameter.grad is not None} == {
        "projection.weight",
        "projection.bias",
    }
    assert th.equal(features(extractor, images(4, 32, 32)), features(extractor.eval(), images(4, 32, 32)))


@pytest.mark.parametrize(
    ("stage", "live"),
    [
        (None, []),
        ("layer4", ["layer4"]),
        ("layer3", ["layer3", "layer4"]),
        ("all", ["bn1", "layer1", "layer2", "layer3", "layer4"]),
    ],
)
@pytest.mark.parametrize("norm", ["frozen", "batch", "sync"])
def test_batch_norm_follows_train_above_the_boundary_only(norm, stage, live):
    extractor = build(4, 32, 32, norm=norm)
    extractor.set_freeze_boundary(stage)
    before = trunk_of(extractor)
    extractor.train()
    features(extractor, images(4, 32, 32, batch=4))
    expected = live if norm in ("batch", "sync") else []
    assert sorted({key.split(".")[0] for key in changed(extractor, before)}) == expected
    assert all("running" in key or "tracked" in key for key in changed(extractor, before))

    before = trunk_of(extractor.eval())
    features(extractor, images(4, 32, 32, batch=4))
    assert changed(extractor, before) == []
    # Frozen again, also in the middle of training.
    extractor.train()
    extractor.set_freeze_boundary(None)
    features(extractor, images(4, 32, 32, batch=4))
    assert changed(extractor, before) == []


def test_gradients_reach_what_is_above_the_boundary():
    extractor = build(4, 32, 32, freeze_backbone=False)
    assert extractor.freeze_boundary == "adapter"
    loss_of(extractor, images(4, 32, 32)).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in extractor.parameters())
    extractor.zero_grad()
    extractor.set_freeze_boundary("layer4", at_update=7)
    assert extractor.boundary.moved_at == 7
    loss_of(extractor, images(4, 32, 32)).backward()
    reached = {name for name, parameter in extractor.named_parameters() if parameter.grad is not None}
    assert reached == {f"backbone.layer4.{name}" for name, _ in extractor.backbone.layer4.named_parameters()}


@pytest.mark.parametrize("stage", [None, "layer4", "stem"])
def test_the_frozen_part_runs_without_a_graph(stage):
    extractor = build(4, 32, 32)
    extractor.set_freeze_boundary(stage)
    x = th.rand(2, 4, 32, 32, requires_grad=True)
    result = extractor(x)
    assert result.requires_grad == (stage is not None)
    if stage is not None:
        result.sum().backward()
    assert x.grad is None


def test_train_adapter_trains_it_below_a_frozen_trunk():
    extractor = build(4, 32, 32, train_adapter=True)
    loss_of(extractor, images(4, 32, 32)).backward()
    assert {name for name, parameter in extractor.named_parameters() if parameter.grad is not None} == {
        "adapter.weight",
        "adapter.bias",
    }
    assert extractor.adapter.weight.grad.abs().sum() > 0


def test_a_copy_has_a_boundary_of_its_own():
    extractor = build(4, 32, 32, norm="batch")
    twin = copy.deepcopy(extractor)
    twin.set_freeze_boundary("layer4", at_update=3)
    assert (extractor.freeze_boundary, twin.freeze_boundary) == (None, "layer4")
    assert (int(extractor.boundary.moved_at), int(twin.boundary.moved_at)) == (0, 3)
    assert not any(parameter.requires_grad for parameter in extractor.parameters())
    assert twin.backbone.layer4[0].conv1.weight.requires_grad

    before, twin_before = trunk_of(extractor), trunk_of(twin)
    for each in (extractor.train(), twin.train()):
        features(each, images(4, 32, 32, batch=4))
    assert changed(extractor, before) == []
    assert {key.split(".")[0] for key in changed(twin, twin_before)} == {"layer4"}
    loss_of(twin, images(4, 32, 32)).backward()
    assert extractor.backbone.layer4[0].conv1.weight.grad is None
    assert twin.backbone.layer4[0].conv1.weight.grad.abs().sum() > 0


def test_apply_reaches_every_module(rgb):
    seen = []
    rgb.apply(seen.append)
    assert {*map(id, seen)} == {*map(id, rgb.modules())}


# --------------------------------------------------------------------------------- in Stable-Baselines3's algorithms


def image_env(**kwargs):
    return FakeImageEnv(screen_height=32, screen_width=32, n_channels=4, channel_first=True, **kwargs)


def host_policy_kwargs(**kwargs):
    return {"features_extractor_class": ResNetExtractor, **own_policy_kwargs(**kwargs)}


@pytest.mark.parametrize(("algorithm", "options"), [(PPO, {"batch_size": 4, "n_epochs": 1}), (A2C, {})])
def test_on_policy_algorithms_keep_the_weights_and_learn(algorithm, options, trunk_file):
    path, weights = trunk_file
    kwargs = host_policy_kwargs(weights=path, features_dim=16, freeze_backbone=False)
    model = algorithm("CnnPolicy", image_env(), n_steps=4, policy_kwargs=kwargs, seed=0, **options)
    extractor = model.policy.features_extractor
    assert model.policy.ortho_init
    assert changed(extractor, weights) == []
    assert extractor.adapter.weight.flatten(1).tolist() == [[0, 0, 0, 1], [0, 0.5, 0.5, 0], [1, 0, 0, 0]]
    # The projection is SB3's to initialise: orthogonal rows of length sqrt(2).
    projection = extractor.projection.weight.detach()
    th.testing.assert_close(projection @ projection.T, 2 * th.eye(16), rtol=1e-4, atol=1e-4)

    model.learn(4)
    moved = changed(extractor, weights)
    assert "conv1.weight" in moved
    assert not any("running" in key for key in moved)
    assert all(parameter.isfinite().all() for parameter in model.policy.parameters())


def test_sac_trains_on_frozen_features(trunk_file):
    path, weights = trunk_file
    model = SAC(
        "CnnPolicy",
        image_env(discrete=False),
        buffer_size=20,
        learning_starts=3,
        batch_size=4,
        policy_kwargs=host_policy_kwargs(weights=path),
        seed=0,
    )
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    model.learn(6)
    for network in (model.actor, model.critic):
        assert changed(network.features_extractor, weights) == []
    after = model.policy.state_dict()
    moved = [name for name in after if not th.equal(after[name], before[name])]
    assert {"actor.mu.weight", "critic.qf0.0.weight", "critic_target.qf0.0.weight"} <= {*moved}
    assert all(value.isfinite().all() for value in after.values())


@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_images_that_sb3_does_not_scale_are_refused(algorithm):
    options = {"n_steps": 4, "policy_kwargs": {**host_policy_kwargs(), "normalize_images": False}}
    with pytest.raises(ValueError, match="leave normalize_images=False out"):
        algorithm("CnnPolicy", image_env(), **options).learn(4)


def test_black_images_do_not_tell_whether_sb3_scales():
    extractor, images = build(3, 32, 32), th.zeros(2, 3, 32, 32)
    extractor(images)
    with pytest.raises(ValueError, match="leave normalize_images=False out"):
        extractor(images + 255.0)
    assert extractor(images + 1.0).isfinite().all()


def frozen_random_warnings(function):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function()
    return result, [str(warning.message) for warning in caught if FROZEN_RANDOM in str(warning.message)]


@pytest.mark.parametrize("name", ["DQN", "QRDQN", "PPO", "A2C"])
def test_a_frozen_random_backbone_warns_once_and_not_at_load(name, tmp_path):
    own = name in ("DQN", "QRDQN")
    algorithm = pytest.importorskip("sb3_contrib").QRDQN if name == "QRDQN" else globals()[name]
    policy, kwargs = ("ResNetCnnPolicy", own_policy_kwargs()) if own else ("CnnPolicy", host_policy_kwargs())
    options = {"buffer_size": 4} if own else {"n_steps": 4}
    model, messages = frozen_random_warnings(lambda: algorithm(policy, image_env(), policy_kwargs=kwargs, **options))
    assert len(messages) == 1
    assert "pretrained=True" in messages[0]
    assert "freeze_backbone=False" in messages[0]
    assert "with ResNetCnnPolicy an UnfreezeCallback" in messages[0]  # which refuses PPO's and A2C's policies
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy.pth")
    assert frozen_random_warnings(lambda: algorithm.load(tmp_path / "model"))[1] == []
    assert frozen_random_warnings(lambda: type(model.policy).load(tmp_path / "policy.pth"))[1] == []


def test_a_grid_above_the_map_warns_once_and_not_at_load(tmp_path):
    def caught(function):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            result = function()
        return result, [str(warning.message) for warning in found if "repeats values" in str(warning.message)]

    def model_of(**extractor):
        kwargs = own_policy_kwargs()
        kwargs["features_extractor_kwargs"] |= {"pooling": "grid", **extractor}
        env = FakeImageEnv(screen_height=84, screen_width=84, n_channels=1, channel_first=True)
        return DQN("ResNetCnnPolicy", env, buffer_size=4, policy_kwargs=kwargs)

    model, (message,) = caught(model_of)
    assert message.startswith("pooling='grid' with grid_size=4 repeats values: the map of layer4 is 3x3.")
    assert "Write grid_size=3 or less, pooling='flatten', or a lower last_stage" in message
    model.save(tmp_path / "model")
    assert caught(lambda: DQN.load(tmp_path / "model"))[1] == []
    for fits in ({"grid_size": 3}, {"last_stage": "layer3"}):
        assert caught(lambda fits=fits: model_of(**fits))[1] == []
    assert "is 1x1. Write pooling='avg'," in caught(lambda: build(pooling="grid", grid_size=2))[1][0]


def test_what_learns_does_not_warn(trunk_file):
    for kwargs in ({"weights": trunk_file[0]}, {"freeze_backbone": False}):
        assert frozen_random_warnings(lambda kwargs=kwargs: build(**kwargs))[1] == []
    assert len(frozen_random_warnings(build)[1]) == 1
