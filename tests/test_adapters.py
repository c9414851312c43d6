"""How other than three channels reach the trunk, and what refuses to be said without effect."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import DQN

from sb3_resnet import ResNetExtractor
from sb3_resnet.nn import backbones
from sb3_resnet.nn.encoder import FrozenEncoder
from sb3_resnet.nn.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from tests.helpers import TinyGame, assert_same, make_model, observations, q_values


def build(channels, size=32, seed=0, dtype=np.uint8, **kwargs):
    th.manual_seed(seed)
    space = spaces.Box(0, 255, (channels, size, size), dtype)
    return ResNetExtractor(space, **{"backbone": "resnet_tiny", **kwargs})


def raw(channels, size=32, batch=4, seed=0):
    generator = th.Generator().manual_seed(seed)
    return th.randint(256, (batch, channels, size, size), generator=generator, dtype=th.uint8)


@th.no_grad()
def features(extractor, images):
    return extractor(images / 255)


@pytest.fixture(scope="module")
def rgb_file(tmp_path_factory):
    """A weights file of three channels, and the state dict in it."""
    th.manual_seed(5)
    state = backbones.build("resnet_tiny").state_dict()
    path = tmp_path_factory.mktemp("weights") / "rgb.pth"
    th.save(state, path)
    return path, state


# ------------------------------------------------------------------------------------------------------- conv1x1


@pytest.mark.parametrize(
    ("channels", "frame_channels"),
    [
        *((channels, None) for channels in range(1, 22) if channels != 3),
        *((channels, 1) for channels in range(1, 22)),
        *((channels, 3) for channels in range(6, 22, 3)),
    ],
)
def test_no_channel_starts_unseen(channels, frame_channels):
    extractor = build(channels, frame_channels=frame_channels)
    weight = extractor.adapter.weight.detach().flatten(1)
    assert weight.min() >= 0
    th.testing.assert_close(weight.sum(dim=1), th.ones(3))
    assert (weight.sum(dim=0) > 0).all()


@pytest.mark.parametrize(
    ("channels", "frame_channels", "rows"),
    [
        (3, 1, [[0, 0, 1], [0, 1, 0], [1, 0, 0]]),
        (6, 1, [[0, 0, 0, 0, 0, 1], [0, 0.25, 0.25, 0.25, 0.25, 0], [1, 0, 0, 0, 0, 0]]),
        (3, 1.0, [[0, 0, 1], [0, 1, 0], [1, 0, 0]]),
        (3, np.int64(1), [[0, 0, 1], [0, 1, 0], [1, 0, 0]]),
    ],
)
def test_frame_channels_says_what_a_frame_is(channels, frame_channels, rows):
    extractor = build(channels, frame_channels=frame_channels)
    assert extractor.stages[0] == "adapter"
    assert extractor.adapter.weight.flatten(1).tolist() == rows


def test_three_grey_frames_can_go_alone():
    extractor = build(3, adapter="per_frame", frame_channels=1)
    alone = build(3)
    alone.load_state_dict(extractor.state_dict())
    images = raw(3)
    parts = [features(alone, images[:, frame : frame + 1].expand(-1, 3, -1, -1)) for frame in range(3)]
    assert extractor.features_dim == 3 * alone.features_dim
    th.testing.assert_close(features(extractor, images), th.cat(parts, dim=1), rtol=1e-5, atol=1e-5)


def test_six_grey_frames_can_go_alone():
    assert build(6, adapter="per_frame").features_dim == 2 * 256
    assert build(6, adapter="per_frame", frame_channels=1).features_dim == 6 * 256


@pytest.mark.parametrize(
    ("channels", "kwargs", "error", "says"),
    [
        (3, {"adapter": "per_frame"}, ValueError, "no effect on three channels.*write frame_channels=1"),
        (3, {"adapter": "per_frame", "frame_channels": 3}, ValueError, "no effect on three channels"),
        (3, {"adapter": "inflate"}, ValueError, "adapter='inflate' has no effect on three channels"),
        (3, {"adapter": "inflate", "frame_channels": 1}, ValueError, "adapter='inflate' has no effect"),
        (4, {"frame_channels": 3}, ValueError, "needs a multiple of three channels, and the observations have 4"),
        (1, {"frame_channels": 3}, ValueError, "needs a multiple of three channels"),
        (4, {"frame_channels": 2}, ValueError, r"frame_channels must be 1 \(grey\) or 3 \(RGB\), got 2"),
        (4, {"frame_channels": 0}, ValueError, "frame_channels must be"),
        (4, {"frame_channels": "RGB"}, TypeError, "frame_channels must be a number"),
        (4, {"frame_channels": True}, TypeError, "frame_channels must be a number"),
        (3, {"train_adapter": True}, ValueError, "train_adapter=True needs an adapter"),
        (4, {"train_adapter": True, "adapter": "inflate"}, ValueError, "train_adapter=True needs an adapter"),
        (4, {"adapter": "inflates"}, ValueError, "did you mean 'inflate'"),
    ],
)
def test_an_argument_without_effect_is_refused(channels, kwargs, error, says):
    with pytest.raises(error, match=says):
        build(channels, **kwargs)


def test_train_adapter_trains_the_adapter_of_three_grey_frames():
    extractor = build(3, frame_channels=1, train_adapter=True)
    extractor(raw(3) / 255).square().mean().backward()
    assert extractor.adapter.weight.grad.abs().sum() > 0


# ------------------------------------------------------------------------------------------------------- inflate


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 6, 13])
def test_inflate_repeats_the_mean_of_pretrained_weights(channels, rgb_file):
    path, state = rgb_file
    extractor = build(channels, adapter="inflate", weights=path)
    weight = extractor.backbone.conv1.weight
    expected = state["conv1.weight"].mean(dim=1, keepdim=True).expand(-1, channels, -1, -1) * 3 / channels
    assert extractor.adapter is None
    assert extractor.stages == backbones.STAGES
    th.testing.assert_close(weight.detach(), expected)
    rest = {key: value for key, value in extractor.backbone.state_dict().items() if key != "conv1.weight"}
    assert_same(rest, {key: state[key] for key in rest})


@pytest.mark.parametrize("use_imagenet_norm", [True, False])
@pytest.mark.parametrize("channels", [1, 4, 13])
def test_inflated_activations_keep_their_size(channels, use_imagenet_norm, rgb_file):
    grey = raw(1) / 255
    arguments = {"weights": rgb_file[0], "use_imagenet_norm": use_imagenet_norm}
    inflated, plain = build(channels, adapter="inflate", **arguments), build(3, **arguments)
    with th.no_grad():
        got = inflated.backbone.conv1(inflated.trunk.normalize(grey.expand(-1, channels, -1, -1)))
        expected = plain.backbone.conv1(plain.trunk.normalize(grey.expand(-1, 3, -1, -1)))
    assert got.std().item() == pytest.approx(expected.std().item(), rel=0.1)
    if not use_imagenet_norm:  # nothing tells R, G and B apart but the weights, of which a grey image sees the sum
        th.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_inflate_lets_colours_keep_their_weights_where_frames_are_rgb(rgb_file):
    path, state = rgb_file
    extractor = build(6, adapter="inflate", frame_channels=3, weights=path)
    th.testing.assert_close(extractor.backbone.conv1.weight.detach(), state["conv1.weight"].repeat(1, 2, 1, 1) / 2)
    th.testing.assert_close(extractor.input_mean.flatten(), th.tensor(IMAGENET_MEAN * 2))
    images = raw(3)
    th.testing.assert_close(
        features(extractor, images.repeat(1, 2, 1, 1)), features(build(3, weights=path), images), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kind", [th.float16, th.float64])
def test_inflate_reads_other_floats(kind, rgb_file, tmp_path):
    state = {key: value.to(kind) if value.is_floating_point() else value for key, value in rgb_file[1].items()}
    th.save(state, tmp_path / "other.pth")
    weight = build(4, adapter="inflate", weights=tmp_path / "other.pth").backbone.conv1.weight
    expected = rgb_file[1]["conv1.weight"].mean(dim=1) * 0.75
    th.testing.assert_close(weight[:, 3].detach(), expected, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda weight: (weight * 100).int(), r"no floating point numbers: conv1.weight \(int32\)"),
        (lambda weight: weight.fill_(np.nan), "not finite: conv1.weight"),
        (lambda weight: weight[:, :2], r"of another shape: conv1.weight \(64, 2, 7, 7\) instead of \(64, 4, 7, 7\)"),
        (lambda weight: weight.to_sparse(), "not dense: conv1.weight"),
    ],
)
def test_inflate_refuses_broken_weights_as_other_trunks_do(change, says, rgb_file, tmp_path):
    state = {**rgb_file[1], "conv1.weight": change(rgb_file[1]["conv1.weight"].clone())}
    th.save(state, tmp_path / "broken.pth")
    with pytest.raises(ValueError, match=says):
        build(4, adapter="inflate", weights=tmp_path / "broken.pth")


def test_inflate_from_scratch_begins_as_torchvision_begins():
    extractor = build(5, adapter="inflate", freeze_backbone=False)
    conv = extractor.backbone.conv1
    assert conv.weight.shape == (64, 5, 7, 7)
    assert conv.weight.std().item() == pytest.approx((2 / (64 * 49)) ** 0.5, rel=0.05)
    assert extractor.freeze_boundary == "stem"
    extractor(raw(5) / 255).square().mean().backward()
    assert (conv.weight.grad.abs().sum(dim=(0, 2, 3)) > 0).all()


@pytest.mark.parametrize(
    ("given", "mean"),
    [
        ({"input_mean": [0.1, 0.2, 0.6], "input_std": [1, 1, 1]}, [0.3] * 4),
        ({"input_mean": [0.1, 0.2, 0.3, 0.4], "input_std": [1, 1, 1, 1]}, [0.1, 0.2, 0.3, 0.4]),
        ({"use_imagenet_norm": True}, [sum(IMAGENET_MEAN) / 3] * 4),
        ({}, [0.0] * 4),
    ],
)
def test_inflate_takes_statistics_of_three_or_of_all_channels(given, mean):
    extractor = build(4, adapter="inflate", **given)
    th.testing.assert_close(extractor.input_mean.flatten(), th.tensor(mean))
    assert extractor.input_std.shape == (4, 1, 1)
    if "use_imagenet_norm" in given:
        th.testing.assert_close(extractor.input_std.flatten(), th.full((4,), sum(IMAGENET_STD) / 3))
    with pytest.raises(ValueError, match=r"input_mean must be three numbers.*or 4, one per channel of an observation"):
        build(4, adapter="inflate", input_mean=[0.5] * 5, input_std=[0.5] * 5)


@pytest.mark.parametrize("stage", [None, "layer3"])
@pytest.mark.parametrize(
    "kwargs", [{"use_imagenet_norm": True}, {"use_imagenet_norm": True, "image_size": 40}], ids=str
)
def test_the_encoder_knows_the_inflated_convolution(kwargs, stage):
    extractor = build(5, adapter="inflate", **kwargs)
    extractor.set_freeze_boundary(stage)
    images = raw(5, batch=6)
    encoder = FrozenEncoder(extractor.trunk, "float32")
    with th.no_grad():
        expected = extractor.frozen_part(extractor.preprocess(images / 255))
    th.testing.assert_close(encoder(images), expected, rtol=1e-4, atol=1e-4)


def test_an_inflated_agent_comes_back_and_its_file_gives_weights(tmp_path, rgb_file):
    arguments = {"adapter": "inflate", "weights": str(rgb_file[0]), "freeze_backbone": False}
    model = make_model(env=TinyGame(shape=(4, 32, 32)), extractor=arguments)
    model.learn(24)
    model.save(tmp_path / "agent.zip")
    loaded = DQN.load(tmp_path / "agent.zip")
    assert_same(loaded.policy.state_dict(), model.policy.state_dict())
    assert th.equal(q_values(loaded, observations(model)), q_values(model, observations(model)))
    trained = model.q_net.features_extractor.backbone.state_dict()
    again = build(4, adapter="inflate", weights=tmp_path / "agent.zip")
    assert not th.equal(trained["conv1.weight"][:, 0], trained["conv1.weight"][:, 1])
    assert_same(again.backbone.state_dict(), trained)
