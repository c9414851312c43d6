"""Argument checks: what they take from Python and from YAML, and what they say."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sb3_resnet.common.arguments import choice, flag, integer, nearest, no_unknown, number


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


@pytest.mark.parametrize("value", [True, None, "fast", "", [1.0], {"lr": 1.0}, 1j])
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


@pytest.mark.parametrize("value", [True, False])
def test_flag_reads_booleans(value):
    assert flag("show", value) is value


@pytest.mark.parametrize("value", ["False", "true", 0, 1, None, []])
def test_flag_refuses_what_only_looks_like_a_boolean(value):
    with pytest.raises(TypeError, match="show must be true or false, got "):
        flag("show", value)


def test_choice_takes_what_is_allowed():
    assert choice("norm", "group", ("batch", "group")) == "group"


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
