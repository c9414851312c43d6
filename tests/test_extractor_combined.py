"""Features of a Dict: which keys are images, what becomes of the others, and what is refused."""

import warnings

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.torch_layers import CombinedExtractor

from sb3_resnet import ResNetCombinedExtractor
from sb3_resnet.extractor import extractors_in
from tests.helpers import DictGame, assert_same, draw, snapshot

GREY = spaces.Box(0, 255, (1, 32, 32), np.uint8)
RGB = spaces.Box(0, 255, (3, 40, 36), np.uint8)
UNIT = spaces.Box(0.0, 1.0, (2, 33, 33), np.float32)
FLOAT = spaces.Box(0.0, 255.0, (3, 32, 32), np.float32)
VECTOR = spaces.Box(-np.inf, np.inf, (2, 3), np.float32)
ALL = {
    "b_rgb": RGB,
    "a_vector": VECTOR,
    "c_unit": UNIT,
    "d_count": spaces.Discrete(4),
    "e_grey": GREY,
    "f_parts": spaces.MultiDiscrete([2, 3]),
    "g_flags": spaces.MultiBinary(3),
    "h_float": FLOAT,
    "i_age": spaces.Box(0, 100, (), np.int64),
}


def build(parts=None, **kwargs):
    space = spaces.Dict(ALL if parts is None else parts)
    return ResNetCombinedExtractor(space, **{"backbone": "resnet_mini", **kwargs})


def batch(extractor, n=5, seed=0):
    """:return: observations as SB3 hands them over"""
    rng, space = np.random.default_rng(seed), extractor._observation_space
    raw = {key: th.as_tensor(np.stack([draw(part, rng) for _ in range(n)])) for key, part in space.spaces.items()}
    return preprocess_obs(raw, space)


def test_each_key_goes_where_it_belongs():
    extractor = build(pooling="grid", grid_size=1, standardize_vectors=False).eval()
    observations = batch(extractor)
    features = extractor(observations)
    assert features.shape == (5, extractor.features_dim)
    assert extractor.features_dim == 4 * 64 + 7 + (4 + 5 + 3)
    assert [*extractor.resnets] == ["b_rgb", "c_unit", "e_grey", "h_float"]
    parts = [extractor.resnets[key](observations[key]) for key in extractor.resnets]
    parts += [
        observations[key].float().reshape(5, -1) for key in ("a_vector", "i_age", "d_count", "f_parts", "g_flags")
    ]
    assert th.allclose(features, th.cat(parts, dim=1))
    # What is no image comes as from SB3's own extractor, which has another order and takes no space without axes.
    others = {key: ALL[key] for key in ("a_vector", "d_count", "f_parts", "g_flags")}
    theirs = CombinedExtractor(spaces.Dict(others))({key: observations[key] for key in others})
    ours = th.cat([features[:, 256:262], features[:, 263:]], dim=1)
    assert th.equal(ours, theirs)


def test_a_flattened_space_of_integers_has_one_number():
    assert build({"image": GREY, "age": ALL["i_age"]}).features_dim == 64 + 1


def test_each_image_has_a_resnet_of_its_own_or_all_share_one():
    parts = {"left": GREY, "right": GREY, "speed": VECTOR}
    own, shared = build(parts), build(parts, shared=True)
    assert len(extractors_in(own)) == 2
    assert len(extractors_in(shared)) == 1
    assert shared.resnets["left"] is shared.resnets["right"]
    assert {key.split(".")[1] for key in shared.state_dict() if key.startswith("extractors.")} == {"shared"}
    observations = batch(shared)
    for extractor in (own.eval(), shared.eval()):
        features = extractor(observations)
        each = [extractor.resnets[key](observations[key]) for key in ("left", "right")]
        assert th.allclose(features[:, :128], th.cat(each, dim=1), atol=1e-6)
    assert not th.allclose(features[:, :64], features[:, 64:128])


def test_images_that_differ_cannot_share():
    message = (
        r"shared=True needs images .*'left' \(uint8 \(1, 32, 32\) 0..255\), 'right' \(float32 \(1, 32, 32\) 0..1\)"
    )
    with pytest.raises(ValueError, match=message):
        build({"left": GREY, "right": spaces.Box(0.0, 1.0, (1, 32, 32), np.float32)}, shared=True)
    with pytest.raises(ValueError, match=r"'a' .*'b' .*write shared=False"):
        build({"a": GREY, "b": spaces.Box(0, 255, (1, 34, 32), np.uint8)}, shared=True)


def test_arguments_by_key_go_before_those_for_all():
    by_key = {"b_rgb": {"pooling": "flatten", "last_stage": "layer2"}, "e_grey": {"features_dim": 7}}
    extractor = build(by_key=by_key, pooling="grid")
    images = extractor.resnets
    assert images["b_rgb"].pooling == "flatten"
    assert images["b_rgb"].stages == ("stem", "layer1", "layer2")
    assert images["c_unit"].pooling == "grid"
    assert images["e_grey"].features_dim == 7
    assert extractor.stages == ("adapter", "stem", "layer1", "layer2", "layer3", "layer4")


def test_sb3s_name_of_the_size_of_an_images_features():
    extractor = build({"a": GREY, "b": RGB, "c": VECTOR}, cnn_output_dim=16)
    assert extractor.features_dim == 2 * 16 + 6
    with pytest.raises(ValueError, match="two names of one number"):
        build({"a": GREY}, cnn_output_dim=16, features_dim=16)


def test_image_keys_say_what_is_an_image():
    parts = {"map": spaces.Box(0, 255, (3, 4, 4), np.uint8), "image": GREY}
    with pytest.raises(ValueError, match=r"^Image 'map': .*image_keys=\[\.\.\.\] without 'map': it is flattened then"):
        build(parts)
    extractor = build(parts, image_keys=["image"])
    assert extractor.features_dim == 64 + 48
    with pytest.raises(TypeError, match="image_keys has no argument 'imgae'; did you mean 'image'"):
        build(parts, image_keys=["imgae"])
    with pytest.raises(ValueError, match="Image 'speed': ResNetExtractor needs images"):
        build({"speed": VECTOR, "image": GREY}, image_keys=["speed", "image"])
    with pytest.raises(TypeError, match="image_keys must be a list"):
        build(parts, image_keys="image")


def test_what_has_the_shape_of_an_image_and_is_none_is_told():
    parts = {"heat": spaces.Box(-1.0, 1.0, (3, 32, 32), np.float32), "image": GREY}
    with pytest.warns(
        UserWarning, match=r"'heat' has the shape of an image, and is none.*got float32 -1..1.*flattened"
    ):
        assert build(parts, freeze_backbone=False).features_dim == 64 + 3072
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(parts, image_keys=["image"], freeze_backbone=False)
    with pytest.raises(ValueError, match=r"no image.*MultiInputPolicy.*'heat' has the shape of an image"):
        build({"heat": parts["heat"]})


BAD = [
    (GREY, {}, ValueError, "needs a Dict, got Box.*ResNetExtractor, or policy='ResNetCnnPolicy'"),
    (
        {"speed": VECTOR},
        {},
        ValueError,
        "^The Dict has no image, its keys are 'speed': write policy='MultiInputPolicy'",
    ),
    ({"a": GREY}, {"image_keys": []}, ValueError, "The Dict has no image"),
    (
        {"a": GREY},
        {"backbnoe": "x"},
        TypeError,
        "ResNetCombinedExtractor has no argument 'backbnoe'; did you mean 'backb",
    ),
    ({"a": GREY}, {"by_key": {"b": {}}}, TypeError, "by_key has no argument 'b'.*It takes: a"),
    ({"a": GREY}, {"by_key": {"a": {"poling": "avg"}}}, TypeError, r"by_key\['a'\] has no argument 'poling'; did you"),
    ({"a": GREY}, {"by_key": {"a": {"freeze_backbone": True}}}, ValueError, "one value for all images"),
    ({"a": GREY}, {"by_key": {"a": {"frozen_dtype": "float16"}}}, ValueError, "one value for all images"),
    (
        {"a": GREY},
        {"by_key": ["a"]},
        TypeError,
        "by_key must be a dict of dicts, such as {'a': {'pooling': 'flatten'}}",
    ),
    ({"a": GREY}, {"by_key": {"a": 3}}, TypeError, "by_key must be a dict of dicts"),
    ({"a": GREY}, {"by_key": {"a": {}}, "shared": True}, ValueError, "no effect with shared=True"),
    ({"a": GREY}, {"shared": "yes"}, TypeError, "shared must be true or false"),
    ({"a": GREY}, {"standardize_vectors": 1}, TypeError, "standardize_vectors must be true or false"),
    ({"a": GREY}, {"vector_arch": [8]}, ValueError, "no effect, since the Dict has no vectors"),
    ({"a": GREY, "v": VECTOR}, {"vector_arch": 8}, TypeError, "vector_arch must be a list of layer widths"),
    ({"a": GREY, "v": VECTOR}, {"vector_arch": [0]}, ValueError, "vector_arch must be"),
    ({"a": GREY}, {"pooling": "max"}, ValueError, "^Image 'a': pooling must be one of"),
    ({"a": GREY}, {"features_dim": "x"}, TypeError, "^Image 'a': features_dim must be a number"),
    ({"a": spaces.Box(0.0, 1.0, (36, 36, 3), np.float32)}, {}, ValueError, "^Image 'a': .*channels first"),
    ({"a.b": GREY, "a_b": GREY}, {}, ValueError, "'a.b' and 'a_b' differ by a dot alone"),
    ({"a": GREY}, {"weights": "nowhere.pth"}, FileNotFoundError, "no such file"),
]


@pytest.mark.parametrize(("parts", "kwargs", "error", "message"), BAD, ids=[str(bad[1:3]) for bad in BAD])
def test_wrong_arguments_say_what_to_write(parts, kwargs, error, message):
    space = spaces.Dict(parts) if isinstance(parts, dict) else parts
    with pytest.raises(error, match=message) as caught:
        ResNetCombinedExtractor(space, **{"backbone": "resnet_mini", **kwargs})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["robot.camera", "training", "items", "", "left eye"])
def test_a_key_may_have_any_name(key):
    extractor = build({key: GREY, "speed": VECTOR})
    assert [*extractor.resnets] == [key]
    other = build({key: GREY, "speed": VECTOR})
    other.load_state_dict(extractor.state_dict())
    assert th.equal(other(batch(extractor)), extractor(batch(extractor)))


def test_the_boundary_moves_in_all_resnets_at_once():
    extractor = build({"grey": GREY, "rgb": RGB}, by_key={"rgb": {"last_stage": "layer3"}})
    images = extractor.resnets
    assert extractor.freeze_boundary is None
    for stage, grey, rgb, lowest in [
        ("layer4", "layer4", None, "layer4"),
        ("layer2", "layer2", "layer2", "layer2"),
        ("adapter", "adapter", "stem", "adapter"),
        ("all", "adapter", "stem", "adapter"),
        (None, None, None, None),
    ]:
        extractor.set_freeze_boundary(stage, at_update=5)
        assert [images[key].freeze_boundary for key in ("grey", "rgb")] == [grey, rgb]
        assert extractor.freeze_boundary == lowest
        assert extractor.boundary.moved_at_update == 5
    with pytest.raises(
        ValueError, match=r"unfreeze_from must be one of 'adapter', 'stem', .*, 'layer4', 'all', got 'l4'"
    ):
        extractor.set_freeze_boundary("l4")
    rgb = build({"rgb": RGB})
    with pytest.raises(ValueError, match="unfreeze_from must be one of 'stem'"):
        rgb.set_freeze_boundary("adapter")


def test_vectors_are_standardised_by_what_was_trained_on():
    extractor = build({"image": GREY, "speed": VECTOR})
    assert extractor.vectors[0].running_count == 0
    observations = batch(extractor, 40)
    observations["speed"] = observations["speed"] * 100 + 7
    before = snapshot(extractor)
    extractor.eval()
    extractor(observations)
    extractor.train()
    with th.no_grad():
        extractor(observations)
    assert_same(before, extractor.state_dict())  # acting and evaluation move nothing
    extractor(observations)
    assert extractor.vectors[0].running_count == 40
    standardised = extractor.eval()(observations)[:, 64:]
    assert standardised.mean(dim=0).abs().max() < 1e-4
    assert (standardised.std(dim=0, unbiased=False) - 1).abs().max() < 1e-3
    other = build({"image": GREY, "speed": VECTOR}).eval()
    other.load_state_dict(extractor.state_dict())
    assert th.equal(other(observations), extractor(observations))


def test_statistics_under_an_mlp_move_in_updates_only():
    extractor = build({"image": GREY, "speed": VECTOR}, vector_arch=[8, 6]).train()
    assert extractor.features_dim == 64 + 6
    features = extractor(batch(extractor))
    assert extractor.vectors[0].running_count == 0  # looked at, and not trained on
    features.sum().backward()
    assert extractor.vectors[0].running_count == 5
    assert all(layer.weight.grad.abs().sum() > 0 for layer in (extractor.vectors[1], extractor.vectors[3]))
    assert (extractor(batch(extractor))[:, 64:] >= 0).all()


def test_augmentation_changes_all_images_in_training_alone():
    extractor = build({"a": GREY, "b": GREY}, augment=["random_shift"]).eval()
    observations = batch(extractor)
    still = extractor(observations)
    assert th.equal(still, extractor(observations))
    extractor.augments = True
    assert all(resnet.augments for resnet in extractor.resnets.values())
    assert extractor.augments
    moved = extractor(observations)
    assert all(not th.allclose(still[:, part], moved[:, part]) for part in (slice(64), slice(64, 128)))
    extractor.augments = False
    assert th.equal(still, extractor(observations))


def test_the_precision_is_that_of_all_resnets():
    extractor = build({"a": GREY, "b": RGB}, frozen_dtype="bfloat16")
    assert extractor.frozen_dtype == "bfloat16"
    extractor.set_frozen_dtype("float32")
    assert [resnet.frozen_dtype for resnet in extractor.resnets.values()] == ["float32"] * 2


class Steering(DictGame):
    def __init__(self):
        super().__init__()
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def step(self, action):
        return super().step(0)


def test_sac_trains_with_it():
    eyes = {"features_extractor_class": ResNetCombinedExtractor, "net_arch": [8]}
    eyes["features_extractor_kwargs"] = {"backbone": "resnet_mini"}
    model = SAC("MultiInputPolicy", Steering(), buffer_size=20, learning_starts=4, batch_size=4, policy_kwargs=eyes)
    actor, critic, target = (
        getattr(model.policy, name).features_extractor for name in ("actor", "critic", "critic_target")
    )
    before = [snapshot(one.resnets["camera"]) for one in (actor, critic)]
    model.learn(8)
    for one, state in zip((actor, critic), before, strict=True):
        assert_same(state, one.resnets["camera"].state_dict())
        assert one.vectors[0].running_count > 0
    # SB3 copies such statistics to the target.
    assert th.equal(target.vectors[0].running_mean, critic.vectors[0].running_mean)
