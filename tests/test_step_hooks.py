"""Hooks of an optimizer's steps: in order, replaced by key, gone without a trace."""

import copy
import gc
import weakref

import pytest
import torch as th
from torch import nn

from sb3_resnet.common.step_hooks import after_step, before_step


def optimizer():
    made = th.optim.SGD([nn.Parameter(th.ones(1))], lr=1.0)
    made.param_groups[0]["params"][0].grad = th.ones(1)
    return made


def test_hooks_run_in_order_before_and_after_the_step():
    one, seen = optimizer(), []
    weight = one.param_groups[0]["params"][0]

    def note(name):
        return lambda given: seen.append((name, given is one, weight.item()))

    before_step(one).add("a", note("a"))
    before_step(one).add("b", note("b"))
    before_step(one).add("c", note("c"), first=True)
    after_step(one).add("d", note("d"))
    one.step()
    assert seen == [("c", True, 1.0), ("a", True, 1.0), ("b", True, 1.0), ("d", True, 0.0)]
    assert (before_step(one).keys, after_step(one).keys) == (["c", "a", "b"], ["d"])


def test_a_key_is_there_once_and_moves_to_the_front_where_asked():
    one, seen = optimizer(), []
    hooks = before_step(one)
    hooks.add("a", lambda given: seen.append("old"))
    hooks.add("b", lambda given: seen.append("b"))
    hooks.add("a", lambda given: seen.append("a"))
    one.step()
    hooks.add("b", lambda given: seen.append("first"), first=True)
    one.step()
    assert seen == ["a", "b", "first", "a"]


def test_removing_leaves_what_another_has_put_in_the_place():
    one, seen = optimizer(), []

    def mine(given):
        seen.append("mine")

    def theirs(given):
        seen.append("theirs")

    hooks = before_step(one)
    hooks.add("key", mine)
    hooks.add("key", theirs)
    hooks.remove("key", mine)
    one.step()
    assert seen == ["theirs"]
    hooks.remove("key", theirs)
    hooks.remove("key")
    one.step()
    assert seen == ["theirs"]
    assert not one._optimizer_step_pre_hooks
    hooks.add("key", mine)  # and again
    one.step()
    assert seen == ["theirs", "mine"]
    assert len(one._optimizer_step_pre_hooks) == 1


def test_an_error_prevents_the_step():
    one = optimizer()

    def refuse(given):
        raise ValueError("no")

    before_step(one).add("key", refuse)
    with pytest.raises(ValueError, match="no"):
        one.step()
    assert one.param_groups[0]["params"][0].item() == 1.0


def test_a_copy_has_hooks_of_its_own():
    one = optimizer()
    before_step(one).add("key", lambda given: None)
    other = copy.deepcopy(one)
    assert before_step(other).keys == []
    assert before_step(one).keys == ["key"]


def test_hooks_that_lead_to_the_optimizer_keep_it_alive_no_longer_than_it_would_be():
    one = optimizer()
    before_step(one).add("key", lambda given, held=one: None)
    after_step(one).add("key", one.zero_grad)
    gone = weakref.ref(one)
    del one
    gc.collect()
    assert gone() is None
