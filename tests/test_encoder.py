"""The fast encoder computes what the plain frozen part computes."""

import copy
import warnings

import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_resnet.cache.batch import EncodedBatch
from sb3_resnet.extractor import ResNetExtractor
from sb3_resnet.nn import encoder as encoder_module
from sb3_resnet.nn.encoder import FrozenEncoder, fingerprint
from sb3_resnet.nn.precision import resolve_dtype
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
    "LayerNorm": ((4, 32, 32), UINT8, {"norm": "layer"}),
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


def features(encoder, observations):
    entries = encoder(observations)  # may choose the centre, so before it is asked for
    return EncodedBatch(entries, encoder.centre).features


def plain(extractor, observations):
    return extractor.frozen_part(extractor.preprocess(extractor.scale_raw(observations)))


@pytest.mark.parametrize("boundary", [None, "layer4", "layer2", "stem"])
@pytest.mark.parametrize("case", CASES)
def test_float32_equals_the_plain_module(case, boundary):
    extractor = make(*CASES[case])
    extractor.set_freeze_boundary(boundary)
    observations = images(extractor)
    encoded = FrozenEncoder(extractor.trunk, "float32")(observations)
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
        FrozenEncoder(extractor.trunk, "float32")(observations), plain(extractor, observations), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize(("dtype", "limit"), [("bfloat16", 0.1), ("float16", 0.02)])
def test_reduced_precision_is_small_against_the_spread_over_observations(dtype, limit):
    extractor = make((4, 32, 32), UINT8, {})
    observations = images(extractor, 32)
    encoder = FrozenEncoder(extractor.trunk, dtype)
    encoded, expected = encoder(observations), plain(extractor, observations)
    assert encoded.dtype == th.float16
    assert encoder.dtype == getattr(th, dtype)
    got = EncodedBatch(encoded, encoder.centre).features
    assert (got - expected).square().mean().sqrt() < limit * expected.std(dim=0).square().mean().sqrt()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("boundary", [None, "layer4", "layer1"])
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(((3, 20, 20), UINT8, {"image_size": 36, "use_imagenet_norm": True}), id="resized"),
        pytest.param(((4, 32, 32), UINT8, {"adapter": "per_frame", "use_imagenet_norm": True}), id="frame by frame"),
        pytest.param(((1, 32, 32), UINT8, {"use_imagenet_norm": True}), id="one grey channel"),
    ],
)
def test_reduced_precision_where_the_input_is_normalised_by_itself(case, boundary, dtype):
    extractor = make(*case)
    extractor.set_freeze_boundary(boundary)
    encoder, observations = FrozenEncoder(extractor.trunk, dtype), images(extractor, 16)
    expected = plain(extractor, observations)
    assert (features(encoder, observations) - expected).square().mean().sqrt() < 0.05 * expected.std()


@pytest.fixture
def few_checked(monkeypatch):
    monkeypatch.setattr(encoder_module, "_CHECKED", 32)


def error(encoder, observations):
    """Of the entries, relative to the distance of the typical observation from the median one."""
    expected = encoder._plain(observations).flatten(1)
    spread = (expected - expected.median(dim=0).values).square().mean(dim=1).sqrt().median()
    return (features(encoder, observations).flatten(1) - expected).square().mean().sqrt() / spread


def scale_last_block(stage, factor):
    for norm in (stage[-1].bn2, *([stage[0].downsample[1]] if stage[0].downsample else [])):
        with th.no_grad():
            norm.weight.mul_(factor)
            norm.bias.mul_(factor)


def test_too_low_a_precision_ends_in_float32_with_a_warning(few_checked, monkeypatch):
    monkeypatch.setattr(encoder_module, "MAX_ERROR", 0.008)  # bfloat16 errs by more, float16 entries by much less
    extractor = make((4, 32, 32), UINT8, {})
    observations = images(extractor, 32)
    encoder = FrozenEncoder(extractor.trunk, "bfloat16")
    assert encoder(observations[:10]).dtype == th.float16  # too few to judge
    version = encoder.version
    with pytest.warns(UserWarning, match=r"Encoding in bfloat16 errs by .* of the spread .* going on in float32"):
        encoded = encoder(observations[10:])
    assert encoder.version > version
    assert encoder.dtype == th.float32
    assert encoded.dtype == th.float16
    assert error(encoder, observations[10:]) < 0.001


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
@pytest.mark.parametrize("factor", [1e-8, 1e6])
def test_entries_that_float16_cannot_hold_end_in_float32(few_checked, dtype, factor):
    extractor = make((4, 32, 32), UINT8, {})
    scale_last_block(extractor.backbone.layer4, factor)
    encoder, observations = FrozenEncoder(extractor.trunk, dtype), images(extractor, 32)
    with pytest.warns(UserWarning, match="Keeping entries in float16 errs by .* keeping them in float32"):
        encoder(observations)
    assert encoder.entry_dtype == th.float32
    assert error(encoder, observations) < 1e-3


def test_entries_of_two_bytes_are_rounded_relative_to_what_distinguishes_observations(few_checked):
    extractor = make((4, 32, 32), UINT8, {})
    observations = th.full((32, 4, 32, 32), 100, dtype=th.uint8)
    observations[:, :, 8:16, 3] += th.arange(32, dtype=th.uint8)[:, None, None]
    encoder = FrozenEncoder(extractor.trunk, "auto")
    expected = plain(extractor, observations)
    spread = (expected - expected.median(dim=0).values).square().mean(dim=1).sqrt().median()
    assert (expected.half().float() - expected).square().mean().sqrt() > 0.005 * spread, "else this proves nothing"
    assert error(encoder, observations) < 0.001
    assert encoder(observations).dtype == th.float16


def test_the_typical_observation_decides_and_not_odd_ones(few_checked):
    extractor = make((4, 32, 32), UINT8, {})
    observations = th.full((32, 4, 32, 32), 100, dtype=th.uint8)
    observations[:, :, 3, 3] += th.arange(32, dtype=th.uint8)[:, None]  # hardly anything distinguishes them,
    observations[:4] = images(extractor, 4)  # but for a few
    encoder = FrozenEncoder(extractor.trunk, "bfloat16")
    with pytest.warns(UserWarning, match="bfloat16 errs"):
        encoder(observations)
    assert error(encoder, observations[4:]) < encoder_module.MAX_ERROR


def test_repeated_observations_judge_nothing(few_checked):
    extractor = make((4, 32, 32), UINT8, {})
    encoder = FrozenEncoder(extractor.trunk, "float16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            encoder(images(extractor, 1).expand(40, -1, -1, -1))
        encoder(images(extractor, 40))
    assert encoder.dtype == th.float16


def test_another_boundary_and_other_weights_are_judged_too(few_checked):
    extractor = make((4, 32, 32), UINT8, {})
    observations = images(extractor, 40)
    encoder = FrozenEncoder(extractor.trunk, "float16")
    encoder(observations[:10])
    extractor.set_freeze_boundary("layer4")  # before the first judgement
    assert encoder.refresh()
    encoder(observations[10:])
    scale_last_block(extractor.backbone.layer3, 1e6)
    assert encoder.refresh()
    with pytest.warns(UserWarning, match="keeping them in float32"):
        encoder(observations[:1])
    assert error(encoder, observations) < 1e-3


def test_it_draws_no_random_numbers():
    extractor = make((4, 32, 32), UINT8, {})
    state = th.random.get_rng_state()
    FrozenEncoder(extractor.trunk)(images(extractor))
    assert th.equal(th.random.get_rng_state(), state)


def test_a_trunk_in_training_mode_is_encoded_as_frozen():
    extractor = make((4, 32, 32), UINT8, {})
    observations = images(extractor)
    expected = plain(extractor, observations)
    for module in extractor.backbone.modules():
        module.training = True  # as a host's own walk over the modules leaves it
    assert th.allclose(FrozenEncoder(extractor.trunk, "float32")(observations), expected, rtol=1e-3, atol=1e-4)


def test_weights_written_without_a_trace_are_found_by_value():
    extractor = make((4, 32, 32), UINT8, {})
    encoder = FrozenEncoder(extractor.trunk)
    assert encoder.holds()
    extractor.backbone.layer1[0].conv1.weight.data.mul_(-1.0)
    assert not encoder.refresh()  # PyTorch counts no such change
    assert not encoder.holds()


def test_entries_are_shared_only_below_equal_weights():
    extractor, twin = make((4, 32, 32), UINT8, {}), make((4, 32, 32), UINT8, {})
    encoder = FrozenEncoder(extractor.trunk, shared_by=[twin.trunk])
    with th.no_grad():
        extractor.backbone.layer4[0].conv1.weight.mul_(2.0)
    with pytest.raises(ValueError, match="Online and target network differ below the freeze boundary"):
        encoder.refresh()
    for each in (extractor, twin):
        each.set_freeze_boundary("layer4")
    assert encoder.refresh()


def test_the_fingerprint_notices_what_the_entries_depend_on_and_nothing_else():
    extractor = make((4, 32, 32), UINT8, {"features_dim": 5})
    extractor.set_freeze_boundary("layer4")
    before = fingerprint(extractor.trunk)
    with th.no_grad():
        extractor.projection.weight.mul_(2.0)
        extractor.backbone.layer4[0].conv1.weight.mul_(2.0)
    assert fingerprint(extractor.trunk) == before
    for change in (
        lambda: extractor.load_state_dict(extractor.state_dict()),
        lambda: extractor.backbone.bn1.running_mean.add_(1.0),
        lambda: extractor.input_mean.add_(1.0),
        lambda: extractor.set_freeze_boundary("layer3"),
    ):
        before = fingerprint(extractor.trunk)
        change()
        assert fingerprint(extractor.trunk) != before


def test_a_stale_encoder_is_built_anew():
    extractor = make((4, 32, 32), UINT8, {})
    encoder = FrozenEncoder(extractor.trunk, "float32")
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
