"""The fast encoder computes what the plain frozen part computes."""

import copy
import pickle

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.utils import polyak_update

from sb3_resnet.cache.batch import EncodedBatch
from sb3_resnet.common import host
from sb3_resnet.extractor import ResNetExtractor
from sb3_resnet.nn.encoder import rounding_error
from sb3_resnet.nn.precision import resolve_dtype
from tests.helpers import slowly  # the module registers resnet_tiny

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


def encode(extractor, observations):
    return extractor.encode(extractor.scale_raw(observations))


@th.no_grad()
def plain(extractor, observations):
    return extractor.frozen_part(extractor.preprocess(extractor.scale_raw(observations)))


@pytest.mark.parametrize("boundary", [None, "layer4", "layer2"])
@pytest.mark.parametrize("case", CASES)
def test_float32_equals_the_plain_module(case, boundary):
    extractor = make(*CASES[case])
    extractor.set_freeze_boundary(boundary)
    observations = images(extractor)
    encoded, expected = encode(extractor, observations), plain(extractor, observations)
    assert encoded.dtype == th.float32
    assert encoded.shape == expected.shape
    assert th.allclose(encoded, expected, rtol=1e-3, atol=1e-4)
    features = extractor(extractor.scale_raw(observations))
    assert th.allclose(features, extractor.plain_features(extractor.scale_raw(observations)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_real_trunks(backbone):
    extractor = make((4, 32, 32), UINT8, {"backbone": backbone})
    observations = images(extractor, 2)
    assert th.allclose(encode(extractor, observations), plain(extractor, observations), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("dtype", "limit"), [("bfloat16", 0.1), ("float16", 0.02)])
@pytest.mark.parametrize("boundary", [None, "layer4", *slowly("layer1")])
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(((4, 32, 32), UINT8, {}), id="four frames"),
        pytest.param(((3, 20, 20), UINT8, {"image_size": 36, "use_imagenet_norm": True}), id="resized"),
        pytest.param(((4, 32, 32), UINT8, {"adapter": "per_frame", "use_imagenet_norm": True}), id="frame by frame"),
        pytest.param(((1, 32, 32), UINT8, {"use_imagenet_norm": True}), id="one grey channel"),
        pytest.param(((4, 32, 32), UINT8, {"norm": "group"}), id="GroupNorm"),
    ],
)
def test_reduced_precision_is_small_against_the_spread_over_observations(case, boundary, dtype, limit):
    extractor = make(case[0], case[1], {**case[2], "frozen_dtype": dtype})
    extractor.set_freeze_boundary(boundary)
    observations = images(extractor, 32)
    encoded, expected = encode(extractor, observations), plain(extractor, observations)
    assert encoded.dtype == (th.float32 if boundary is None else getattr(th, dtype))
    error = (encoded - expected).square().mean().sqrt()
    assert 0 < error < limit * expected.std(dim=0).square().mean().sqrt()
    assert 0 < rounding_error(extractor.encoder, observations) < limit


def test_the_rounding_error_is_that_of_the_typical_observation():
    extractor = make((4, 32, 32), UINT8, {"frozen_dtype": "bfloat16"})
    observations = th.full((32, 4, 32, 32), 100, dtype=th.uint8)
    observations[:, :, 3, 3] += th.arange(32, dtype=th.uint8)[:, None]  # hardly anything distinguishes them,
    alike = rounding_error(extractor.encoder, observations)
    observations[:4] = images(extractor, 4)  # but for a few
    assert rounding_error(extractor.encoder, observations) > 0.3 * alike
    extractor.set_frozen_dtype("float32")
    assert rounding_error(extractor.encoder, observations) < 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("boundary", [None, "layer3"])
def test_an_image_alone_is_encoded_as_in_a_batch_up_to_the_order_of_sums(dtype, boundary):
    extractor = make((4, 48, 48), UINT8, {"frozen_dtype": dtype, "adapter": "per_frame"})
    extractor.set_freeze_boundary(boundary)
    observations = images(extractor, 8)
    together = encode(extractor, observations).float()
    alone = th.cat([encode(extractor, one[None]) for one in observations]).float()
    limit = 1e-5 if dtype == "float32" else 0.01
    assert (alone - together).abs().max() <= limit * together.abs().max()


def test_the_order_of_packed_weights_does_not_depend_on_the_batch_that_came_first(monkeypatch):
    if not host.can_pack_convolutions(th.float32):
        pytest.skip("this build has no oneDNN")
    asked = []
    pack = host.pack_convolution
    monkeypatch.setattr(host, "pack_convolution", lambda *given: asked.append(given[-1]) or pack(*given))
    orders = []
    for count in (1, 16):
        asked.clear()
        extractor = make((4, 32, 32), UINT8, {})
        encode(extractor, images(extractor, count))
        orders.append([*asked])
    assert orders[0]
    assert orders[0] == orders[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_without_instructions_the_same_is_computed_with_one_warning(monkeypatch, dtype):
    extractor = make((4, 64, 64), UINT8, {"frozen_dtype": dtype})
    observations = images(extractor, 8)
    expected = encode(extractor, observations)
    other = copy.deepcopy(extractor)
    monkeypatch.setattr(host, "cpu_has_bfloat16", lambda: False)
    with pytest.warns(UserWarning, match=f"no instructions for {dtype}.*set_frozen_dtype") as caught:
        got = [encode(other, observations) for _ in range(3)][-1]
    assert len(caught) == 1
    error = (got - expected).square().mean().sqrt()
    assert error < 0.3 * (expected - plain(extractor, observations)).square().mean().sqrt()


@pytest.mark.parametrize("boundary", [None, "layer4"])
def test_what_float16_cannot_hold_is_refused_with_a_way_out(boundary):
    extractor = make((4, 32, 32), UINT8, {"frozen_dtype": "float16"})
    extractor.set_freeze_boundary(boundary)
    observations = images(extractor)
    assert encode(extractor, observations).isfinite().all()
    with th.no_grad():
        extractor.backbone.layer3[0].bn2.weight.mul_(1e6)
    with pytest.raises(ValueError, match=r"exceed 65504.*frozen_dtype='bfloat16'.*set_frozen_dtype"):
        encode(extractor, observations)
    extractor.set_frozen_dtype("bfloat16")
    assert encode(extractor, observations).isfinite().all()


def test_hooks_of_frozen_modules_are_called():
    extractor = make((4, 32, 32), UINT8, {})
    observations, seen = images(extractor), []
    expected = extractor(extractor.scale_raw(observations))
    handle = extractor.backbone.layer2.register_forward_hook(lambda module, given, out: seen.append(out.shape))
    assert th.allclose(extractor(extractor.scale_raw(observations)), expected, rtol=1e-3, atol=1e-4)
    handle.remove()
    extractor(extractor.scale_raw(observations))
    assert seen == [(6, 64, 4, 4)]


def test_gradients_of_the_image_cross_frozen_stages_in_plain_features_and_reach_it_where_none_is_frozen():
    extractor = make((4, 32, 32), UINT8, {"frozen_dtype": "bfloat16"})
    observations = extractor.scale_raw(images(extractor)).requires_grad_()
    extractor.plain_features(observations).sum().backward()
    assert observations.grad.abs().sum() > 0
    observations.grad = None
    extractor.set_freeze_boundary("all")
    extractor(observations).sum().backward()
    assert observations.grad.abs().sum() > 0


def test_it_draws_no_random_numbers():
    extractor = make((4, 32, 32), UINT8, {})
    state = th.random.get_rng_state()
    encode(extractor, images(extractor))
    assert th.equal(th.random.get_rng_state(), state)


def test_a_trunk_in_training_mode_is_encoded_as_frozen():
    extractor = make((4, 32, 32), UINT8, {})
    observations = images(extractor)
    expected = plain(extractor, observations)
    for module in extractor.backbone.modules():
        module.training = True  # as a host's own walk over the modules leaves it
    assert th.allclose(encode(extractor, observations), expected, rtol=1e-3, atol=1e-4)


def test_weights_written_without_a_trace_are_found_by_value():
    extractor = make((4, 32, 32), UINT8, {})
    observations = images(extractor)
    encode(extractor, observations)
    for tensor in (extractor.backbone.layer1[0].conv1.weight, extractor.backbone.bn1.running_mean):
        tensor.data.mul_(-1.0)  # as SB3's polyak_update writes
        assert not extractor.encoder.refresh()  # PyTorch counts no such change
        assert th.allclose(encode(extractor, observations), plain(extractor, observations), rtol=1e-3, atol=1e-4)


def test_a_target_network_that_is_rounded_anew_at_each_update_stays_encoded():
    extractor = make((4, 32, 32), UINT8, {})
    online = [tensor.detach().clone() for tensor in extractor.parameters()]
    encode(extractor, images(extractor))
    version = extractor.encoder.version
    for _ in range(50):
        polyak_update(online, extractor.parameters(), 0.01)
        encode(extractor, images(extractor))
    assert extractor.encoder.version == version


def test_it_is_built_anew_for_what_the_entries_depend_on_and_nothing_else():
    extractor = make((4, 32, 32), UINT8, {"features_dim": 5})
    extractor.set_freeze_boundary("layer4")
    observations = images(extractor)
    encode(extractor, observations)
    with th.no_grad():
        extractor.projection.weight.mul_(2.0)
        extractor.backbone.layer4[0].conv1.weight.mul_(2.0)
    assert not extractor.encoder.refresh()
    for change in (
        lambda: extractor.load_state_dict(extractor.state_dict()),
        lambda: extractor.backbone.bn1.running_mean.add_(1.0),
        lambda: extractor.input_mean.add_(1.0),
        lambda: extractor.adapter.weight.mul_(0.5),
        lambda: extractor.set_freeze_boundary("layer3"),
        lambda: extractor.set_frozen_dtype("bfloat16"),
        lambda: extractor.set_frozen_dtype("float32"),
    ):
        version = extractor.encoder.version
        with th.no_grad():
            change()
        assert extractor.encoder.refresh()
        assert extractor.encoder.version == version + 1
        if extractor.frozen_dtype == "float32":
            assert th.allclose(encode(extractor, observations), plain(extractor, observations), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda extractor: pickle.loads(pickle.dumps(extractor))])
def test_a_copy_has_an_encoder_of_its_own_weights(clone):
    extractor = make((4, 32, 32), UINT8, {"use_imagenet_norm": True})
    observations = images(extractor)
    expected = encode(extractor, observations)
    twin = clone(extractor)
    assert th.equal(encode(twin, observations), expected)
    with th.no_grad():
        twin.backbone.conv1.weight.mul_(2.0)
        twin.input_mean.add_(0.1)
    assert th.allclose(encode(twin, observations), plain(twin, observations), rtol=1e-3, atol=1e-4)
    assert th.equal(encode(extractor, observations), expected)
    assert twin.trunk.boundary is twin.boundary


def test_an_extractor_that_computes_the_stages_its_own_way_is_not_passed_over():
    class Doubled(ResNetExtractor):
        def run_stages(self, x, stages):
            return 2.0 * super().run_stages(x, stages)

    space = spaces.Box(shape=(4, 32, 32), **UINT8)
    th.manual_seed(0)
    extractor = Doubled(space, backbone="resnet_tiny")
    observations = images(extractor)
    doubled = extractor(extractor.scale_raw(observations))
    th.manual_seed(0)
    usual = ResNetExtractor(space, backbone="resnet_tiny")
    assert th.allclose(doubled, 2.0 * usual(usual.scale_raw(observations)), rtol=1e-3, atol=1e-4)
    for attempt in (
        lambda: Doubled(space, backbone="resnet_tiny", frozen_dtype="bfloat16"),
        lambda: extractor.set_frozen_dtype("bfloat16"),
    ):
        with pytest.raises(ValueError, match=r"Doubled overrides run_stages.*write frozen_dtype='float32'"):
            attempt()


@pytest.mark.parametrize("dtype", [th.float32, th.bfloat16, th.float16])
def test_encoded_batches_move_to_a_device_as_they_are_and_give_features_in_float32(dtype):
    batch = EncodedBatch(th.randn(3, 5).to(dtype))
    assert th.equal(batch.to(th.device("cpu")).entries, batch.entries)
    moved = batch.to(th.device("meta")).entries
    assert (moved.device.type, moved.dtype) == ("meta", dtype)
    assert batch.features.dtype == th.float32
    assert th.equal(batch.features, batch.entries.float())


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
