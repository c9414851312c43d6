"""Argument checks: what they take from Python and from YAML, and what they say."""

import json
import math
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from sb3_resnet import ResNetExtractor
from sb3_resnet.common.arguments import choice, flag, integer, nearest, no_unknown, number, path_of, shown, text
from sb3_resnet.nn.preprocessing import read_image_size
from tests import helpers  # noqa: F401  # "resnet_tiny"


@given(st.floats(0, allow_infinity=False))
def test_number_reads_what_python_and_yaml_write(value):
    assert number("lr", value) == value
    assert number("lr", repr(value)) == value


@pytest.mark.parametrize(
    ("value", "expected"), [("1e-5", 1e-5), (0, 0.0), (np.float64(0.5), 0.5), (np.float32(0.5), 0.5), (np.int64(3), 3)]
)
def test_number_reads_numbers_of_every_kind(value, expected):
    result = number("lr", value)
    assert result == expected
    assert type(result) is float


@pytest.mark.parametrize("value", [True, np.bool_(True), None, "fast", "", [1.0], {"lr": 1.0}, 1j])
def test_number_refuses_what_is_no_number(value):
    with pytest.raises(TypeError, match="lr must be a number, got ") as caught:
        number("lr", value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("value", "bounds", "says"),
    [
        (-1, {}, "lr must be finite and >= 0, got -1"),
        ("-1", {}, "lr must be finite and >= 0, got '-1'"),
        (math.nan, {}, "got nan"),
        ("nan", {}, "got 'nan'"),
        (math.inf, {}, "lr must be finite and >= 0, got inf"),
        (0, {"above": True}, "lr must be finite and > 0, got 0"),
        (1.01, {"maximum": 1.0}, "lr must be finite and >= 0 and <= 1, got 1.01"),
        (0.5, {"minimum": 0.5, "maximum": 1.0, "above": True}, "> 0.5 and <= 1, got 0.5"),
    ],
)
def test_number_refuses_what_is_out_of_range(value, bounds, says):
    with pytest.raises(ValueError, match="lr must be finite") as caught:
        number("lr", value, **bounds)
    assert str(caught.value).endswith(says)


@pytest.mark.parametrize("value", [10**400, -(10**400)])
def test_whole_numbers_beyond_any_float_are_refused(value):
    with pytest.raises(ValueError, match="lr must be finite"):
        integer("lr", value)


@pytest.mark.parametrize(("value", "bounds"), [(0.5, {"minimum": 0.5}), (1, {"maximum": 1.0}), (1e-9, {"above": True})])
def test_number_takes_its_bounds(value, bounds):
    assert number("lr", value, **bounds) == value


@pytest.mark.parametrize(
    ("value", "expected"), [(3, 3), (1e6, 1_000_000), ("1e6", 1_000_000), ("84", 84), (2.0, 2), (np.int64(3), 3)]
)
def test_integer_reads_whole_numbers(value, expected):
    result = integer("steps", value)
    assert result == expected
    assert type(result) is int


@pytest.mark.parametrize(
    ("value", "error", "says"),
    [
        (2.5, ValueError, "steps must be a whole number, got 2.5"),
        ("2.5", ValueError, "steps must be a whole number, got '2.5'"),
        (0, ValueError, "steps must be finite and >= 1, got 0"),
        (math.inf, ValueError, "steps must be finite"),
        (True, TypeError, "steps must be a number, got True"),
        (None, TypeError, "steps must be a number, got None"),
    ],
)
def test_integer_refuses_the_rest(value, error, says):
    with pytest.raises(error, match=says):
        integer("steps", value, 1)


@pytest.mark.parametrize("value", [2**53 + 1, np.int64(2**53 + 1), np.uint8(200), np.int32(-3)])
def test_integer_keeps_every_digit_of_whole_numbers(value):
    result = integer("steps", value, -3)
    assert result == int(value)
    assert type(result) is int


@pytest.mark.parametrize("value", [True, False, np.bool_(True), np.bool_(False)])
def test_flag_reads_booleans(value):
    assert flag("show", value) is bool(value)


@pytest.mark.parametrize("value", ["False", "true", 0, 1, None, []])
def test_flag_refuses_what_only_looks_like_a_boolean(value):
    with pytest.raises(TypeError, match="show must be true or false, got "):
        flag("show", value)


def test_choice_takes_what_is_allowed():
    assert choice("norm", "group", ("batch", "group")) == "group"
    assert choice("norm", np.str_("group"), ("batch", "group")) == "group"


@pytest.mark.parametrize("value", [np.array(["group", "batch"]), ["group"], {"group": 1}])
def test_choice_refuses_lists_of_names(value):
    with pytest.raises(ValueError, match="norm must be one of 'batch', 'group', got "):
        choice("norm", value, ("batch", "group"))


def test_a_path_may_begin_with_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("~/runs", Path("~/runs"), tmp_path / "runs"):
        assert path_of("save_path", value) == tmp_path / "runs"


@pytest.mark.parametrize(
    ("value", "error", "says"),
    [
        (1, TypeError, "save_path must be a string or a path, got 1"),
        (["a"], TypeError, "got \\['a'\\]"),
        (b"runs", TypeError, "got b'runs'"),
        (None, TypeError, "got None"),
        ("", ValueError, "save_path must not be empty"),
        ("~nobody_of_this_name/x", ValueError, "save_path='~nobody_of_this_name/x'"),
    ],
)
def test_what_is_no_path_is_refused(value, error, says):
    with pytest.raises(error, match=says):
        path_of("save_path", value)


class Unprintable:
    def __repr__(self):
        raise RuntimeError("no")


HUGE = {
    "a state dict": OrderedDict((f"layer{index}.weight", th.ones(30, 30)) for index in range(100)),
    "a dict of lists": {f"key {index}": [*range(1000)] for index in range(1000)},
    "an array": np.arange(100_000).reshape(100, 10, 100),
    "a text": "x" * 200_000,
    "a list of texts": ["x" * 1000] * 1000,
    "a number": 10**4000,
    "a number beyond printing": 10**6000,
    "unprintable": Unprintable(),
}


@pytest.mark.parametrize("value", HUGE.values(), ids=HUGE)
def test_errors_show_the_beginning_of_large_values_in_one_line(value):
    assert 2 < len(shown(value)) <= 300
    assert "\n" not in shown(value)
    for check in (number, flag, text, path_of, lambda name, value: choice(name, value, ("a", "b"))):
        try:
            check("name", value)
        except (TypeError, ValueError) as error:
            assert len(str(error)) < 500  # noqa: PT017  # some of them are numbers, texts and paths


@pytest.mark.parametrize("value", [1.5, "two\nlines", None, [1, 2], {"a": (1, 2)}, np.float32(0.5), Path("x")], ids=str)
def test_small_values_are_shown_as_they_are(value):
    assert shown(value) == repr(value)


def test_unknown_names_are_shortened_too():
    with pytest.raises(TypeError) as caught:
        no_unknown("Adam", ["x" * 100_000], ["lr"])
    assert len(str(caught.value)) < 500


def test_json_and_numpy_values_build_the_same_extractor():
    space = spaces.Box(0, 255, (4, 64, 64), np.uint8)
    given = {
        "image_size": (np.int64(48), np.int32(48)),
        "features_dim": np.int64(5),
        "freeze_backbone": np.bool_(False),
        "input_mean": tuple(json.loads("[0.5, 0.5, 0.5]")),
        "input_std": np.array([0.2, 0.2, 0.2], np.float32),
        "micro_batch_size": np.int16(2),
        "augment": ({"random_resized_crop": {"scale": (np.float32(0.5), 1)}},),
    }
    built = ResNetExtractor(space, backbone=np.str_("resnet_tiny"), **given)
    assert (built.image_size, built.features_dim, built.micro_batch_size) == ((48, 48), 5, 2)
    assert built.freeze_boundary == "adapter"
    assert built(th.rand(2, 4, 64, 64)).shape == (2, 5)
    one = ResNetExtractor(space, backbone="resnet_tiny", image_size=np.int64(40))
    assert one.image_size == (40, 40)


@pytest.mark.parametrize("value", [5j, [1], [1, 2, 3], object()])
def test_sizes_of_other_kinds_are_refused(value):
    with pytest.raises(ValueError, match="image_size must be one number or \\[height, width\\]"):
        read_image_size(value)


@pytest.mark.parametrize(
    ("value", "hint"),
    [("grup", "got 'grup'; did you mean 'group'?"), ("x", "got 'x'"), (None, "got None"), (3, "got 3")],
)
def test_choice_lists_the_names_and_the_nearest(value, hint):
    with pytest.raises(ValueError, match="norm must be one of 'batch', 'group', got ") as caught:
        choice("norm", value, ("batch", "group"))
    assert str(caught.value).endswith(hint)


@pytest.mark.parametrize("given_names", [[], ["lr"], {"lr": 1, "eps": 2}])
def test_no_unknown_lets_known_names_pass(given_names):
    no_unknown("Adam", given_names, iter(["lr", "eps"]))


@pytest.mark.parametrize(("name", "hint"), [("leps", "; did you mean 'eps'?"), ("zzz", "")])
def test_no_unknown_names_the_nearest_and_all(name, hint):
    with pytest.raises(TypeError) as caught:
        no_unknown("Adam", ["lr", name], ["lr", "eps"])
    assert str(caught.value) == f"Adam has no argument {name!r}{hint}. It takes: eps, lr"


def test_no_unknown_sends_a_name_to_the_place_that_takes_it():
    no_unknown("Policy", ["dropout"], ["dropout"], ["dropout", "backbone"], "features_extractor_kwargs")
    with pytest.raises(TypeError, match=r"^Policy has no argument 'backbone': write it in features_extractor_kwargs$"):
        no_unknown("Policy", ["backbone"], ["lr_backbone"], ["backbone"], "features_extractor_kwargs")


@pytest.mark.parametrize(("value", "expected"), [("resnet-18", "; did you mean 'resnet18'?"), ("vgg", ""), (None, "")])
def test_nearest_is_silent_where_nothing_is_near(value, expected):
    assert nearest(value, iter(["resnet18", "resnet50"])) == expected
