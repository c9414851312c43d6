"""torchvision's ResNets by name: their keys, their stages, and norm layers that stay frozen."""

import pytest
import torch as th
import torchvision.models as tvm
from torch import distributed as dist
from torch import nn

from sb3_resnet.nn import backbones
from tests.helpers import slowly  # registers "resnet_tiny" too

NAMES = [name for name in tvm.list_models(module=tvm) if name.startswith(("resnet", "resnext", "wide_resnet"))]


def images(*size, batch=2):
    return th.rand(batch, 3, *size, generator=th.Generator().manual_seed(0))


def batch_norms(module):
    return [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]


def state_of(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


@pytest.fixture(scope="module")
def resnet18():
    th.manual_seed(0)
    return backbones.build("resnet18")


def test_all_of_torchvision_is_available():
    assert {"resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"} <= {*NAMES}
    assert {*NAMES} <= {*backbones.available()}
    assert backbones.available() == sorted(backbones.available())


#: Built in more than half a second.
LARGE = ("resnet101", "resnet152", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet101_2")


@pytest.mark.parametrize("name", [*(name for name in NAMES if name not in LARGE), *slowly(*LARGE)])
def test_every_backbone_has_the_keys_and_shapes_of_torchvision(name):
    with th.device("meta"):
        built, original = backbones.build(name), getattr(tvm, name)()
    shapes = {key: value.shape for key, value in original.state_dict().items() if not key.startswith("fc.")}
    assert {key: value.shape for key, value in built.state_dict().items()} == shapes
    assert built.out_channels == original.fc.in_features
    assert isinstance(built.fc, nn.Identity)
    assert not built.training


def test_the_numbers_are_those_of_torchvision(resnet18):
    original = tvm.resnet18()
    original.fc = nn.Identity()
    original.load_state_dict(resnet18.state_dict())
    x = images(40, 32)
    with th.no_grad():
        expected = original.eval()(x)
        assert th.equal(resnet18(x), expected)
        for stage in backbones.STAGES:
            for module in backbones.stage_modules(resnet18, stage):
                x = module(x)
    th.testing.assert_close(x.mean(dim=(2, 3)), expected)


def test_every_parameter_is_in_one_stage(resnet18):
    modules = [module for stage in backbones.STAGES for module in backbones.stage_modules(resnet18, stage)]
    inside = [id(parameter) for module in modules for parameter in module.parameters()]
    assert len(inside) == len({*inside}) == 60
    assert {*inside} == {id(parameter) for parameter in resnet18.parameters()}
    assert backbones.stage_modules(resnet18, "stem")[0] is resnet18.conv1
    assert backbones.stage_modules(resnet18, "layer3") == (resnet18.layer3,)


@pytest.mark.parametrize("size", [(17, 17), (32, 32), (33, 64), (84, 84), (60, 97), (20, 130), (224, 225)])
def test_map_size_is_that_of_a_forward_pass(size):
    with th.device("meta"):  # sizes without the sums
        trunk, x = backbones.build("resnet18"), th.zeros(1, 3, *size)
    for stage in backbones.STAGES:
        for module in backbones.stage_modules(trunk, stage):
            x = module(x)
    assert x.shape == (1, 512, *backbones.map_size(*size))


@pytest.mark.parametrize(
    ("norm", "layer"),
    [
        ("frozen", backbones.FreezableBatchNorm2d),
        ("batch", backbones.FreezableBatchNorm2d),
        ("sync", backbones.FreezableSyncBatchNorm),
        ("group", nn.GroupNorm),
        ("layer", nn.GroupNorm),
    ],
)
def test_norm_chooses_the_layer(norm, layer):
    with th.device("meta"):
        trunk = backbones.build("resnet18", norm)
    norms = [module for module in trunk.modules() if isinstance(module, layer)]
    assert len(norms) == 20
    assert batch_norms(trunk) == ([] if norm in ("group", "layer") else norms)
    assert any("running_mean" in key for key in trunk.state_dict()) == (norm not in ("group", "layer"))


def test_group_norm_has_32_groups():
    layer = backbones.build("resnet_tiny", "group").bn1
    x = images(4, 4)[:, :1] * th.arange(1.0, 65.0).reshape(1, 64, 1, 1)
    grouped = x.reshape(2, 32, -1)
    expected = (grouped - grouped.mean(2, keepdim=True)) / (grouped.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
    th.testing.assert_close(layer(x), expected.reshape(x.shape))


def test_layer_norm_is_over_channels_and_space():
    layer = backbones.build("resnet_tiny", "layer").bn1
    x = images(4, 4)[:, :1] * th.arange(1.0, 65.0).reshape(1, 64, 1, 1)
    th.testing.assert_close(layer(x), th.nn.functional.layer_norm(x, (64, 4, 4)))
    assert [(name, value.shape) for name, value in layer.named_parameters()] == [("weight", (64,)), ("bias", (64,))]


@pytest.mark.parametrize("norm", ["frozen", "batch", "sync"])
def test_norms_stay_in_eval_mode_until_they_are_live(norm):
    trunk = backbones.build("resnet_tiny", norm)
    before, x = state_of(trunk), images(32, 32, batch=4)
    with th.no_grad():
        in_eval = trunk(x)
        for _ in range(3):
            trunk.train()
            assert trunk.training
            assert not any(layer.training for layer in batch_norms(trunk))
            assert th.equal(trunk(x), in_eval)
    assert all(th.equal(value, before[key]) for key, value in trunk.state_dict().items())

    trunk.bn1.live = True
    trunk.train()
    with th.no_grad():
        trunk(x)
        mean = trunk.conv1(x).mean(dim=(0, 2, 3))
    assert [layer for layer in batch_norms(trunk) if layer.training] == [trunk.bn1]
    th.testing.assert_close(trunk.bn1.running_mean, 0.1 * mean)  # momentum 0.1, from 0
    assert not trunk.eval().bn1.training


def test_live_sync_norm_is_batch_norm_in_a_single_process():
    x = images(5, 5)
    sync, batch = backbones.FreezableSyncBatchNorm(3), nn.BatchNorm2d(3)
    sync.live = True
    th.testing.assert_close(sync.train()(x), batch.train()(x))
    th.testing.assert_close(sync.running_var, batch.running_var)


@pytest.fixture
def process_group():
    """One process that has joined a group, as torchrun with a single worker does."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_live_sync_norm_is_batch_norm_in_a_group_of_one_process(process_group):
    test_live_sync_norm_is_batch_norm_in_a_single_process()


def test_live_sync_norm_on_a_cpu_asks_the_other_processes(process_group, monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    sums, all_reduce = [], dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda *args, **kwargs: (sums.append(1), all_reduce(*args, **kwargs)))
    test_live_sync_norm_is_batch_norm_in_a_single_process()
    assert len(sums) == 2  # of the mean and of the variance


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet-50", "resnet50"),
        ("ResNet18", "resnet18"),
        ("resnext50_32x4", "resnext50_32x4d"),
        ("resnet20", "resnet"),
    ],
)
def test_an_unknown_backbone_suggests_the_nearest(name, hint):
    with pytest.raises(ValueError, match=rf"backbone must be one of .*'resnet50'.*; did you mean '{hint}"):
        backbones.build(name)


@pytest.mark.parametrize(
    ("norm", "hint"), [("frozn", "; did you mean 'frozen'?"), ("batchnorm", "'batch'"), (None, "got None"), ("", "''")]
)
def test_an_unknown_norm_lists_the_known_ones(norm, hint):
    with pytest.raises(ValueError, match="norm must be one of 'frozen', 'batch', 'group', 'sync'") as caught:
        backbones.build("resnet18", norm)
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    ("name", "weights", "member"),
    [
        ("resnet18", None, "IMAGENET1K_V1"),
        ("resnet50", None, "IMAGENET1K_V2"),
        ("resnet50", "DEFAULT", "IMAGENET1K_V2"),
        ("resnet50", "IMAGENET1K_V1", "IMAGENET1K_V1"),
        ("resnet50", "ResNet50_Weights.IMAGENET1K_V1", "IMAGENET1K_V1"),
        ("wide_resnet50_2", "Wide_ResNet50_2_Weights.IMAGENET1K_V2", "IMAGENET1K_V2"),
    ],
)
def test_pretrained_source_is_the_url_of_the_enum(name, weights, member):
    assert backbones.pretrained_source(name, weights) == tvm.get_model_weights(name)[member].url


@pytest.mark.parametrize("weights", ["IMAGENET1K_V3", "ResNet50_Weights.IMAGENET1K_V2", "imagenet", "r3m.tar"])
def test_pretrained_source_refuses_what_the_enum_does_not_have(weights):
    with pytest.raises(ValueError, match=r"ResNet18_Weights: IMAGENET1K_V1, DEFAULT.*a \.pth, \.pt or \.safetensors"):
        backbones.pretrained_source("resnet18", weights)
