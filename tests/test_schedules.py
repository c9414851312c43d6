"""Learning-rate factors against their definitions and against torch's schedulers."""

import math

import pytest
import torch as th
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from sb3_resnet.optim import schedules

COUNT = st.integers(0, 10**7)
LENGTH = st.integers(1, 10**6)
FINAL = st.floats(0, 1)


def torch_factors(make, n):
    """The rates of ``n`` updates under one of torch's schedulers, at a rate of 1."""
    optimizer = th.optim.SGD([th.zeros(1)], lr=1.0)
    scheduler = make(optimizer)
    factors = []
    for _ in range(n):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return factors


@given(n=COUNT, steps=st.integers(0, 10**6))
def test_warmup_rises_to_one_and_stays(n, steps):
    assert 0 < schedules.warmup(n, steps) <= schedules.warmup(n + 1, steps) <= 1
    assert (schedules.warmup(n, steps) == 1) == (n >= steps - 1)


@given(steps=LENGTH)
@example(steps=49)  # 1 / 49 * 49 is not 1
def test_warmup_reaches_exactly_one_at_its_last_update(steps):
    assert schedules.warmup(steps - 1, steps) == 1.0
    assert schedules.warmup(0, steps) == 1 / steps


def test_warmup_is_torchs_linear_rise():
    expected = torch_factors(lambda optimizer: lr_scheduler.LinearLR(optimizer, 1 / 10, 1.0, 9), 15)
    assert [schedules.warmup(n, 10) for n in range(15)] == pytest.approx(expected)


@pytest.mark.parametrize("decay", [schedules.linear, schedules.cosine])
@given(n=COUNT, total=LENGTH, final=FINAL)
def test_decays_fall_from_one_to_their_final_factor(decay, n, total, final):
    assert final - 1e-12 <= decay(n + 1, total, final) <= decay(n, total, final) + 1e-12 <= 1 + 2e-12
    assert decay(0, total, final) == 1
    assert decay(total + n, total, final) == pytest.approx(final, abs=1e-12)


@pytest.mark.parametrize("decay", [schedules.linear, schedules.cosine])
def test_a_decay_of_no_length_is_over(decay):
    assert decay(0, 0, 0.25) == 0.25


@settings(deadline=None, max_examples=40)
@given(total=st.integers(1, 60), final=FINAL)
def test_linear_is_torchs(total, final):
    expected = torch_factors(lambda optimizer: lr_scheduler.LinearLR(optimizer, 1.0, final, total), total + 5)
    assert [schedules.linear(n, total, final) for n in range(total + 5)] == pytest.approx(expected, abs=1e-9)


@settings(deadline=None, max_examples=40)
@given(total=st.integers(1, 60), final=FINAL)
def test_cosine_is_torchs(total, final):
    expected = torch_factors(lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, total, final), total + 1)
    assert [schedules.cosine(n, total, final) for n in range(total + 1)] == pytest.approx(expected, abs=1e-9)


def test_decays_at_half_way():
    assert schedules.linear(50, 100) == 0.5
    assert schedules.linear(25, 100, 0.2) == pytest.approx(0.8)
    assert schedules.cosine(50, 100) == pytest.approx(0.5)
    assert schedules.cosine(25, 100) == pytest.approx(0.5 * (1 + math.sqrt(0.5)))


@settings(deadline=None, max_examples=40)
@given(step_size=st.integers(1, 20), gamma=st.floats(0.01, 1), n=st.integers(1, 60))
def test_step_is_torchs(step_size, gamma, n):
    expected = torch_factors(lambda optimizer: lr_scheduler.StepLR(optimizer, step_size, gamma), n)
    assert [schedules.step(i, step_size, gamma) for i in range(n)] == pytest.approx(expected)


@given(n=COUNT, step_size=LENGTH)
def test_step_falls_and_stays_in_range(n, step_size):
    assert 0 <= schedules.step(n + 1, step_size) <= schedules.step(n, step_size) <= 1
    assert schedules.step(step_size - 1, step_size) == 1
    assert schedules.step(step_size, step_size) == 0.1


@given(n=COUNT, start=COUNT, steps=st.integers(0, 10**6))
def test_ramp_rises_from_its_start(n, start, steps):
    assert 0 <= schedules.ramp(n, start, steps) <= schedules.ramp(n + 1, start, steps) <= 1
    assert schedules.ramp(start + steps, start, steps) == 1
    if steps > 0:
        assert schedules.ramp(min(n, start), start, steps) == 0


def test_ramp_in_numbers():
    assert [schedules.ramp(n, 10, 4) for n in (9, 10, 11, 12, 13, 14, 99)] == [0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert [schedules.ramp(n, 10, 0) for n in (9, 10, 11)] == [1, 1, 1]  # no ramp: at once


def plateau_factors(rewards, **kwargs):
    state, factors = schedules.plateau_start(), []
    for reward in rewards:
        state = schedules.plateau(state, reward, **kwargs)
        factors.append(state["factor"])
    return factors


@settings(deadline=None, max_examples=150)
@given(
    rewards=st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0, 3.0, math.nan]) | st.floats(-5, 5), max_size=40),
    patience=st.integers(0, 4),
    min_delta=st.sampled_from([0.0, 0.5]),
    gamma=st.sampled_from([0.1, 0.5, 0.9]),
    final=st.sampled_from([0.0, 0.2]),
)
def test_plateau_is_torchs(rewards, patience, min_delta, gamma, final):
    optimizer = th.optim.SGD([th.zeros(1)], lr=1.0)
    scheduler = lr_scheduler.ReduceLROnPlateau(
        optimizer, "max", gamma, patience, threshold=min_delta, threshold_mode="abs", min_lr=final, eps=0.0
    )
    expected = []
    for reward in rewards:
        scheduler.step(reward)
        expected.append(optimizer.param_groups[0]["lr"])
    factors = plateau_factors(rewards, patience=patience, min_delta=min_delta, gamma=gamma, final=final)
    assert factors == pytest.approx(expected)


def test_plateau_in_numbers():
    rewards = [1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    assert plateau_factors(rewards, patience=1, gamma=0.5) == [1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.125]
    assert plateau_factors([0.0] * 4, patience=0, gamma=0.1, final=0.05) == [1, 0.1, 0.05, 0.05]


def test_a_gain_below_min_delta_is_no_improvement():
    climbing = [0.0, 0.5, 1.0, 1.5, 2.0]
    assert plateau_factors(climbing, patience=0) == [1] * 5
    assert plateau_factors(climbing, patience=0, min_delta=0.5) == pytest.approx([1, 0.1, 0.1, 0.01, 0.01])


def test_a_nan_reward_counts_as_one_that_did_not_improve():
    assert plateau_factors([math.nan, math.nan, 1.0], patience=1) == [1, 0.1, 0.1]
    state = schedules.plateau(schedules.plateau_start(), math.nan, patience=1)
    assert state == {"best": -math.inf, "bad": 1, "factor": 1.0}


def test_the_state_of_a_plateau_is_plain_and_not_changed_in_place():
    start = schedules.plateau_start()
    state = schedules.plateau(start, 1.0, patience=3)
    assert start == {"best": -math.inf, "bad": 0, "factor": 1.0}
    assert state == {"best": 1.0, "bad": 0, "factor": 1.0}
    assert schedules.plateau(state, 1.0, patience=3) == {"best": 1.0, "bad": 1, "factor": 1.0}
    assert {type(value) for value in state.values()} == {float, int}
