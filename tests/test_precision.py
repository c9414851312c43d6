"""The loss scale and the loan of precision, without a model around them."""

import copy
import pickle

import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st

from sb3_resnet.nn.precision import MIN_SCALE, LossScaler, MixedPrecision, autocast, resolve_dtype


def parameter(gradient):
    value = th.nn.Parameter(th.ones(3))
    value.grad = th.tensor([1.0, gradient, 2.0])
    return value


@settings(deadline=None, max_examples=40)
@given(
    overflows=st.lists(st.booleans(), max_size=25),
    growth=st.sampled_from([1.5, 2.0, 4.0]),
    backoff=st.sampled_from([0.25, 0.5, 0.9]),
    interval=st.integers(1, 4),
)
def test_the_scale_moves_as_grad_scalers_does(overflows, growth, backoff, interval):
    options = {"growth_factor": growth, "backoff_factor": backoff, "growth_interval": interval}
    mine, torchs = LossScaler(2.0**40, **options), th.amp.GradScaler("cpu", init_scale=2.0**40, **options)
    torchs.scale(th.ones(()))
    for overflow in overflows:
        gradient = float("inf") if overflow else 1.0
        ours, theirs = (th.optim.SGD([parameter(gradient)], lr=0.1) for _ in range(2))
        mine.is_used = True
        assert mine.before_step(ours) is not overflow
        assert (ours.param_groups[0]["params"][0].grad is None) == overflow
        torchs.unscale_(theirs)
        torchs.step(theirs)
        torchs.update()
        assert (mine.scale, mine.growth_tracker) == (torchs.get_scale(), torchs._get_growth_tracker())
    assert mine.skipped == sum(overflows)


def test_no_scale_is_smaller_than_what_could_still_help():
    scaler = LossScaler(MIN_SCALE)
    with pytest.raises(ValueError, match="so the scale is not the cause"):
        scaler.before_step(th.optim.SGD([parameter(float("nan"))], lr=0.1))
    assert scaler.skipped == 1


def test_the_state_is_plain_numbers_and_goes_on():
    scaler = LossScaler(growth_interval=2)
    scaler.is_used = True
    scaler.before_step(th.optim.SGD([parameter(1.0)], lr=0.1))
    other = LossScaler(growth_interval=2)
    other.state = pickle.loads(pickle.dumps(scaler.state))
    assert other.state == scaler.state == {"scale": 65536.0, "growth_tracker": 1, "skipped": 0}
    other.is_used = True
    other.before_step(th.optim.SGD([parameter(1.0)], lr=0.1))
    assert other.scale == 2 * 65536.0


def test_an_update_in_which_nothing_was_scaled_is_no_proof_of_the_scale():
    scaler = LossScaler(growth_interval=1)
    for _ in range(3):
        assert scaler.before_step(th.optim.SGD([parameter(1.0)], lr=0.1))
    assert scaler.state == LossScaler().state


def test_a_loan_is_neither_copied_nor_pickled():
    precision = MixedPrecision(th.bfloat16)
    assert copy.deepcopy({"loan": precision}) == {"loan": None}
    assert pickle.loads(pickle.dumps([precision])) == [None]


def test_autocast_is_for_the_device_and_off_without_a_loan():
    x = th.ones(2, 2)
    with autocast(None, x.device):
        assert (x @ x).dtype == th.float32
    for dtype in (th.bfloat16, th.float16):
        with autocast(MixedPrecision(dtype), x.device):
            assert (x @ x).dtype == dtype


@pytest.mark.parametrize(
    ("name", "dtype"), [("float16", th.float16), ("bfloat16", th.bfloat16), ("float32", th.float32)]
)
def test_a_named_type_is_taken_as_it_is(name, dtype):
    assert resolve_dtype(name, "cpu") == resolve_dtype(name, "cuda") == dtype
