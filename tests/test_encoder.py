"""The fast encoder computes what the plain frozen part computes."""

import copy

import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_resnet import encoder as encoder_module
from sb3_resnet.encoder import EncodedBatch, FrozenEncoder, fingerprint
from sb3_resnet.extractor import ResNetExtractor
from sb3_resnet.precision import resolve_dtype
from tests import helpers  # noqa: F401  # registers resnet_tiny

UINT8 = {"low": 0, "high": 255, "dtype": np.uint8}
CASES = {
    "four frames": ((4, 32, 32), UINT8, {}),
    "RGB, ImageNet statistics": ((3, 32, 32), UINT8, {"use_imagenet_norm": True}),
    "frame by frame": ((4, 40, 32), UINT8, {"adapter": "per_frame", "use_imagenet_norm": True}),
    "flattened": ((2, 48, 40), UINT8, {"pooling": "flatten"}),
    "spatial softmax": ((4, 48, 48), UINT8, {"pooling": "spatial_softmax"}),
    "resized": ((4, 20, 20), UINT8, {"image_size": 36}),
    "projected": ((4, 32, 32), UINT8, {"features_dim": 5}),
    "GroupNorm": ((4, 32, 32), UINT8, {"norm": "group"}),
    "float 0..255": ((4, 32, 32), {"low": 0, "high": 255, "dtype": np.float32}, {}),
    "float 0..1": ((4, 32, 32), {"low": 0, "high": 1, "dtype": np.float32}, {}),
}


def make(shape, space, options, statistics=True):
    th.manual_seed(0)
    extractor = ResNetExtractor(spaces.Box(shape=shape, **space), **{"backbone": "resnet_tiny", **options})
    if statistics:  # else BatchNorm is the identity, and folding it proves nothing
        for module in extractor.modules():
            if isinstance(module, th.nn.BatchNorm2d):
                module.running_mean.normal_(0.0, 0.2)
                module.running_var.uniform_(0.5, 2.0)
                with th.no_grad():
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_(0.0, 0.2)
    return extractor


def images(extractor, n=6):
    space = extractor._observation_space
    scale = 256 if space.dtype == np.uint8 else float(space.high.max())
    values = np.random.default_rng(0).random((n, *space.shape)) * scale
    return th.as_tensor(values.astype(space.dtype))


def plain(extractor, observations):
    return extractor.frozen_part(extractor.preprocess(extractor.scale_raw(observations)))


@pytest.mark.parametrize("boundary", [None, "layer4", "layer2", "stem"])
@pytest.mark.parametrize("case", CASES)
def test_float32_equals_the_plain_module(case, boundary):
    extractor = make(*CASES[case])
    extractor.set_freeze_boundary(boundary)
    observations = images(extractor)
    encoded = FrozenEncoder(extractor, "float32")(observations)
    expected = plain(extractor, observations)
    assert encoded.dtype == th.float32
    assert encoded.shape == expected.shape
    assert th.allclose(encoded, expected, rtol=1e-3, atol=1e-4)
    with th.no_grad():
        assert th.allclose(
            extractor.live_part(encoded), extractor(extractor.scale_raw(observations)), rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_real_trunks(backbone):
    extractor = make((4, 32, 32), UINT8, {"backbone": backbone})
    observations = images(extractor, 2)
    assert th.allclose(
        FrozenEncoder(extractor, "float32")(observations), plain(extractor, observations), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize(("dtype", "limit"), [("bfloat16", 0.1), ("float16", 0.02)])
def test_reduced_precision_is_small_against_the_spread_over_observations(dtype, limit):
    extractor = make((4, 32, 32), UINT8, {})
    observations = images(extractor, 32)
    encoder = FrozenEncoder(extractor, dtype)
    encoded, expected = encoder(observations), plain(extractor, observations)
    assert encoded.dtype == th.float16
    assert encoder.dtype == getattr(th, dtype)
    assert (encoded.float() - expected).square().mean().sqrt() < limit * expected.std(dim=0).square().mean().sqrt()


def test_too_low_a_precision_ends_in_float32_with_a_warning(monkeypatch):
    monkeypatch.setattr(encoder_module, "MAX_ERROR", 1e-4)
    extractor = make((4, 32, 32), UINT8, {})
    observations = images(extractor, 32)
    encoder = FrozenEncoder(extractor, "bfloat16")
    assert encoder(observations[:10]).dtype == th.float16  # too few to judge
    with pytest.warns(UserWarning, match=r"errs by .* of the spread .* going on in float32"):
        encoded = encoder(observations[10:])
    assert encoder.dtype == th.float32
    assert th.allclose(encoded.float(), plain(extractor, observations[10:]), rtol=1e-3, atol=1e-4)


def test_the_fingerprint_notices_what_the_entries_depend_on_and_nothing_else():
    extractor = make((4, 32, 32), UINT8, {"features_dim": 5})
    extractor.set_freeze_boundary("layer4")
    before = fingerprint(extractor)
    with th.no_grad():
        extractor.projection.weight.mul_(2.0)
        extractor.backbone.layer4[0].conv1.weight.mul_(2.0)
    assert fingerprint(extractor) == before
    for change in (
        lambda: extractor.load_state_dict(extractor.state_dict()),
        lambda: extractor.backbone.bn1.running_mean.add_(1.0),
        lambda: extractor.input_mean.add_(1.0),
        lambda: extractor.set_freeze_boundary("layer3"),
    ):
        before = fingerprint(extractor)
        change()
        assert fingerprint(extractor) != before


def test_a_stale_encoder_is_built_anew():
    extractor = make((4, 32, 32), UINT8, {})
    encoder = FrozenEncoder(extractor, "float32")
    observations = images(extractor)
    assert not encoder.refresh()
    with th.no_grad():
        extractor.backbone.layer1[0].conv1.weight.mul_(2.0)
    assert encoder.refresh()
    assert th.allclose(encoder(observations), plain(extractor, observations), rtol=1e-4, atol=1e-5)


def test_encoded_batches_have_a_length_and_are_not_copied():
    batch = EncodedBatch(th.zeros(3, 2))
    assert len(batch) == 3
    assert copy.deepcopy(batch) is batch


@pytest.mark.parametrize(
    ("bfloat16", "expected"), [((True, False), th.bfloat16), ((False, True), th.bfloat16), ((False, False), th.float32)]
)
def test_auto_takes_bfloat16_only_where_the_processor_has_it(monkeypatch, bfloat16, expected):
    for name, value in zip(("_is_avx512_bf16_supported", "_is_amx_tile_supported"), bfloat16, strict=True):
        monkeypatch.setattr(th.cpu, name, lambda value=value: value, raising=False)
    assert resolve_dtype("auto", "cpu") == expected


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), th.float16), ((9, 0), th.bfloat16)])
def test_auto_on_a_gpu(monkeypatch, capability, expected):
    monkeypatch.setattr(th.cuda, "get_device_capability", lambda device: capability)
    assert resolve_dtype("auto", "cuda") == expected


def test_unknown_precisions_are_refused():
    with pytest.raises(ValueError, match="did you mean 'float16'"):
        resolve_dtype("flaot16", "cpu")
