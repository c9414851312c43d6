"""The target network's live part runs from a fast copy, which is never stale."""

import copy
import pickle

import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_resnet import ResNetExtractor
from sb3_resnet.cache.target import FastTrunk
from sb3_resnet.callbacks import FeatureCacheCallback
from tests.helpers import fill, make_model

SPACE = spaces.Box(0, 255, (4, 32, 32), np.uint8)


@pytest.fixture(params=["conv1x1", "per_frame"])
def extractor(request):
    extractor = ResNetExtractor(SPACE, backbone="resnet_tiny", adapter=request.param)
    extractor.set_freeze_boundary("layer3")
    return extractor


def entries(extractor):
    th.manual_seed(0)
    with th.no_grad():
        return extractor.frozen_part(extractor.preprocess(th.rand(5, *SPACE.shape)))


def same(extractor, fast, maps):
    with th.no_grad():
        return th.allclose(fast(maps), extractor.live_trunk(maps), rtol=1e-4, atol=1e-5)


def test_it_equals_the_plain_trunk_whatever_changes(extractor):
    fast, maps = FastTrunk(extractor), entries(extractor)
    assert same(extractor, fast, maps)
    assert fast._stages
    block = extractor.backbone.layer4[0]
    for tensor in (block.bn1.running_mean, block.bn2.weight, block.conv1.weight):
        tensor.data.mul_(1.1).add_(0.1)  # as SB3's polyak_update does
        assert same(extractor, fast, maps)
        assert same(extractor, fast, maps)
        assert fast._stages
    extractor.set_freeze_boundary("layer4")
    maps = entries(extractor)
    for _ in range(3):
        assert same(extractor, fast, maps)


def test_the_first_time_computes_as_all_others_to_the_bit(extractor):
    fast, maps = FastTrunk(extractor), entries(extractor)
    with th.no_grad():
        assert th.equal(fast(maps), fast(maps))


@pytest.mark.parametrize("options", [{"tau": 0.01}, {"target_update_interval": 4}])
def test_a_network_that_changes_all_the_time_is_never_copied(options):
    model = fill(make_model(buffer_size=30, **options), 30)
    callback = FeatureCacheCallback("float32")
    callback.init_callback(model)
    callback.on_training_start({}, {})
    assert model.q_net_target.features_extractor.fast_trunk is None


def test_a_boundary_below_the_stem_is_left_to_the_extractor(extractor):
    extractor.set_freeze_boundary("all")
    fast, maps = FastTrunk(extractor), entries(extractor)
    for _ in range(3):
        assert same(extractor, fast, maps)
    assert not fast._stages


def test_the_callback_gives_it_to_the_target_network_alone_and_takes_it_back():
    model = fill(make_model(learning_rate=1e-3, target_update_interval=100, buffer_size=30), 30)
    model.policy.set_freeze_boundary("layer4")
    callback = FeatureCacheCallback("float32")
    callback.init_callback(model)
    callback.on_training_start({}, {})
    online, target = (net.features_extractor for net in (model.q_net, model.q_net_target))
    assert online.fast_trunk is None
    model.train(3, 4)
    assert target.fast_trunk._stages
    obs = model.replay_buffer.sample(4).observations
    with th.no_grad():
        fast = model.q_net_target(obs)
        callback.on_training_end()
        assert th.allclose(model.q_net_target(obs), fast, rtol=1e-4, atol=1e-5)
    assert target.fast_trunk is None


def test_copies_of_a_policy_do_without(extractor):
    extractor.fast_trunk = FastTrunk(extractor)
    assert copy.deepcopy(extractor).fast_trunk is None
    assert pickle.loads(pickle.dumps(extractor)).fast_trunk is None
    assert isinstance(extractor.fast_trunk, FastTrunk)
