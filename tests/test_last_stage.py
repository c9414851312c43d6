"""A trunk up to a stage: nothing above it is built, and all that knows stages follows."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_resnet import ResNetExtractor, param_group_summary
from sb3_resnet.callbacks import FeatureCacheCallback
from sb3_resnet.cli.explain import default_layer
from sb3_resnet.nn import backbones
from tests.helpers import TinyGame, assert_same, fill, make_model, observations, q_values, snapshot

CHANNELS = {"stem": 64, "layer1": 32, "layer2": 64, "layer3": 128, "layer4": 256}  # of resnet_tiny


def build(last_stage, size=64, **options):
    th.manual_seed(0)
    space = spaces.Box(0, 255, (4, size, size), np.uint8)
    return ResNetExtractor(space, **{"backbone": "resnet_tiny", "last_stage": last_stage, **options})


@pytest.mark.parametrize("last_stage", backbones.STAGES)
def test_nothing_above_it_is_built(last_stage):
    whole, cut = build("layer4"), build(last_stage)
    kept = backbones.STAGES[: backbones.STAGES.index(last_stage) + 1]
    above = tuple(f"backbone.{stage}." for stage in backbones.STAGES[len(kept) :])
    assert cut.stages == ("adapter", *kept)
    assert [*cut.state_dict()] == [key for key in whole.state_dict() if not key.startswith(above)]
    assert cut.features_dim == CHANNELS[last_stage]
    cut.load_state_dict({key: value for key, value in whole.state_dict().items() if not key.startswith(above)})
    x = th.rand(2, 4, 64, 64)
    expected = whole.run_stages(x, whole.stages[: len(cut.stages)]).mean((2, 3))
    assert th.allclose(cut(x), expected, rtol=1e-3, atol=1e-4)
    assert cut.backbone(cut.adapter(x)).shape == (2, CHANNELS[last_stage])  # it still is a torchvision ResNet


@pytest.mark.parametrize(("name", "channels"), [("resnet18", 128), ("resnet50", 512), ("resnext50_32x4d", 512)])
@pytest.mark.parametrize("pooling", ["avg", "flatten", "spatial_softmax", "grid"])
def test_dimensions_of_real_trunks(name, channels, pooling):
    extractor = build("layer2", backbone=name, pooling=pooling, adapter="per_frame")
    per_channel = {"avg": 1, "flatten": 64, "spatial_softmax": 2, "grid": 16}[pooling]
    assert extractor.features_dim == 4 * channels * per_channel
    assert extractor(th.rand(2, 4, 64, 64)).shape == (2, extractor.features_dim)


@pytest.mark.parametrize(
    ("last_stage", "pooling", "smallest"),
    [
        ("layer4", "avg", 17),
        ("layer4", "spatial_softmax", 33),
        ("layer3", "avg", 9),
        ("layer3", "spatial_softmax", 17),
        ("layer2", "grid", 5),
        ("layer2", "spatial_softmax", 9),
        ("layer1", "spatial_softmax", 5),
        ("stem", "flatten", 5),
    ],
)
def test_the_smallest_image_follows(last_stage, pooling, smallest):
    extractor = build(last_stage, smallest, pooling=pooling)
    x = th.rand(2, 4, smallest, smallest)
    assert extractor(x).isfinite().all()
    if pooling == "spatial_softmax":
        assert min(extractor.run_stages(x, extractor.stages).shape[-2:]) == 2
    with pytest.raises(ValueError, match=f"up to {last_stage} .* smallest size that works is {smallest}x{smallest}"):
        build(last_stage, smallest - 1, pooling=pooling)


@pytest.mark.parametrize("size", [(84, 84), (33, 50), (224, 160)])
@pytest.mark.parametrize("stage", backbones.STAGES)
def test_map_size_is_that_of_a_forward_pass(size, stage):
    trunk = backbones.build("resnet_tiny", last_stage=stage)
    x = th.zeros(1, 3, *size)
    for module in (m for name in backbones.stages_up_to(stage) for m in backbones.stage_modules(trunk, name)):
        x = module(x)
    assert x.shape == (1, trunk.out_channels, *backbones.map_size(*size, stage))


def test_boundaries_phases_and_groups_follow():
    model = fill(
        make_model(
            env=TinyGame((4, 64, 64)),
            learning_rate=1e-3,
            extractor={"last_stage": "layer2"},
            policy_kwargs={"lr_decay_per_stage": 0.5, "lr_backbone": 1e-3},
        ),
        30,
    )
    assert model.policy.freeze_boundary is None
    with pytest.raises(ValueError, match="unfreeze_from must be one of 'adapter', 'stem', 'layer1', 'layer2', 'all'"):
        model.policy.set_freeze_boundary("layer3")
    names = {row["name"].removesuffix("_no_decay") for row in param_group_summary(model, show=False)}
    assert names == {"head", *(f"backbone.{stage}" for stage in ("adapter", "stem", "layer1", "layer2"))}
    rates = {row["name"]: row["lr"] for row in param_group_summary(model, show=False)}
    assert rates["backbone.layer2"] == pytest.approx(1e-3)  # the highest stage there is
    assert rates["backbone.layer1"] == pytest.approx(5e-4)
    model.policy.set_freeze_boundary("layer2")
    before = snapshot(model.q_net.features_extractor.backbone)
    model.train(2, 4)
    after = model.q_net.features_extractor.backbone.state_dict()
    changed = {key.split(".")[0] for key in before if not th.equal(before[key], after[key])}
    assert changed == {"layer2"}


def test_it_is_saved_and_loaded_and_cached(tmp_path):
    options = {"last_stage": "layer1", "adapter": "per_frame", "pooling": "grid", "grid_size": 2}
    model = make_model(extractor=options)
    model.learn(40, callback=FeatureCacheCallback())
    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model", device="cpu")
    assert loaded.q_net.features_extractor.features_dim == 4 * 32 * 4
    assert_same(model.policy.state_dict(), loaded.policy.state_dict())
    obs = observations(model)
    assert th.equal(q_values(model, obs), q_values(loaded, obs))


@pytest.mark.parametrize("last_stage", ["stem", "layer2"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_keys_above_the_cut_are_left_out_of_weights_files_as_fc_is(last_stage, prefix, tmp_path):
    whole = build("layer4").backbone.state_dict()
    whole["layer4.0.conv1.weight"] = whole["layer4.0.conv1.weight"] * float("nan")  # nobody reads it
    th.save({f"{prefix}{key}": value for key, value in {**whole, "fc.weight": th.zeros(3)}.items()}, tmp_path / "w.pth")
    th.manual_seed(9)
    space = spaces.Box(0, 255, (4, 64, 64), np.uint8)
    cut = ResNetExtractor(space, backbone="resnet_tiny", last_stage=last_stage, weights=tmp_path / "w.pth")
    for key, value in cut.backbone.state_dict().items():
        assert th.equal(value, whole[key]), key
    th.save({"conv1.weight": whole["conv1.weight"]}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"missing: bn1\.weight"):
        ResNetExtractor(space, backbone="resnet_tiny", last_stage=last_stage, weights=tmp_path / "w.pth")


@pytest.mark.parametrize(("last_stage", "layer"), [("layer4", "layer3"), ("layer2", "layer2"), ("stem", "stem")])
def test_grad_cam_looks_at_a_stage_that_is_there(last_stage, layer):
    model = make_model(env=TinyGame((4, 84, 84)), buffer_size=1, extractor={"last_stage": last_stage})
    assert default_layer(model) == layer


def test_an_unknown_stage_is_refused():
    with pytest.raises(ValueError, match=r"last_stage must be one of 'stem'.*got 'layer5'; did you mean 'layer"):
        build("layer5")
