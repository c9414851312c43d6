"""GradientClipCallback: head and backbone are clipped apart."""

import pytest
import torch as th

from sb3_resnet.callbacks import GradientClipCallback
from sb3_resnet.optim import is_part
from tests.helpers import fill, make_model
from tests.test_unfreeze_callback import start


def norms(optimizer):
    parts = {}
    for part in ("head", "backbone"):
        grads = [
            p.grad.norm() for g in optimizer.param_groups if is_part(g, part) for p in g["params"] if p.grad is not None
        ]
        parts[part] = th.stack(grads).norm().item()
    return parts


def used_norms(max_grad_norm, callback=None):
    model = fill(make_model(extractor={"freeze_backbone": False}, max_grad_norm=max_grad_norm))
    if callback is not None:
        start(model, callback)
    seen = {}
    model.policy.optimizer.register_step_post_hook(lambda optimizer, args, kwargs: seen.update(norms(optimizer)))
    model.train(1, 8)
    if callback is not None:
        callback.on_training_end()
        assert len(model.policy.optimizer._optimizer_step_pre_hooks) == 1
    return seen


def test_each_part_keeps_its_own_norm():
    free = used_norms(1e9)
    limit = 0.5 * min(free.values())
    assert used_norms(1e9, GradientClipCallback(limit)) == pytest.approx({"head": limit, "backbone": limit}, rel=1e-4)
    joint = used_norms(limit)
    assert joint["head"] < 0.99 * limit  # SB3's joint norm takes the backbone's share from the head


def test_norms_below_the_limit_are_left_alone():
    assert used_norms(1e9, GradientClipCallback(1e6)) == pytest.approx(used_norms(1e9))


@pytest.mark.parametrize(("value", "error"), [(0.0, ValueError), (-1, ValueError), ("much", TypeError)])
def test_bad_norms_are_refused(value, error):
    with pytest.raises(error, match="max_norm must be"):
        GradientClipCallback(value)
    with pytest.raises(TypeError, match="did you mean 'max_norm'"):
        GradientClipCallback(maxnorm=1.0)
