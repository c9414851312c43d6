"""How ranks find each other, and what travels between them."""

import pytest
import torch as th
from torch import nn

from sb3_resnet.common.buckets import GradientAverage, in_buckets, share_from_first
from sb3_resnet.common.launcher import address_of, backend_for, launched
from sb3_resnet.common.ranks import LostRankError, Place, connect
from sb3_resnet.nn.backbones import FreezableSyncBatchNorm
from sb3_resnet.nn.heads import FeatureStandardizer
from sb3_resnet.nn.sync_norm import synchronized_batch_norm
from tests.ranks import in_threads, results

pytestmark = pytest.mark.filterwarnings("ignore:You are using a Backend")
NAMES = ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "MASTER_ADDR", "MASTER_PORT")
WHERE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def say(monkeypatch, values):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "3", **WHERE}, (2, 3)),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", **WHERE}, (1, 4)),
        ({"SLURM_PROCID": "0"}, (0, 1)),  # a batch script, outside of srun
        ({"RANK": "0", "WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", **WHERE}, (0, 2)),
    ],
)
def test_the_launcher_says_who_this_process_is(values, expected, monkeypatch):
    say(monkeypatch, values)
    assert launched() == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is not: start the script with torchrun"),
        ({"RANK": "2", "WORLD_SIZE": "2", **WHERE}, "RANK=2, WORLD_SIZE=2: the first must be a whole number below"),
        ({"RANK": "x", "WORLD_SIZE": "2", **WHERE}, "RANK=x, WORLD_SIZE=2: the first must be a whole number below"),
        (
            {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"},
            "MASTER_ADDR and MASTER_PORT must say .* write export",
        ),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x"}, "^MASTER_PORT must say where rank 0 waits"),
    ],
)
def test_half_of_what_a_launcher_says_is_refused(values, message, monkeypatch):
    say(monkeypatch, values)
    with pytest.raises(ValueError, match=message):
        launched()


def test_a_process_without_a_launcher_is_by_itself(monkeypatch):
    say(monkeypatch, {})
    ranks = connect(th.device("cpu"), 1.0)
    assert (ranks.rank, ranks.size, ranks.is_first) == (0, 1, True)
    assert ranks.meet(Place.ROLLOUT_END, stop=True)
    assert ranks.any(True)
    assert not ranks.any(False)
    assert ranks.gather("x") == ["x"]
    assert ranks.tell("x") == "x"
    tensor = th.ones(2)
    ranks.sum_(tensor)
    ranks.send_(tensor)
    assert tensor.tolist() == [1.0, 1.0]
    ranks.close()


def test_others_that_do_not_come_are_an_error(monkeypatch):
    say(monkeypatch, {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"})
    with pytest.raises(LostRankError, match=r"Rank 1 has lost another rank: .* within 0\.1 seconds"):
        connect(th.device("cpu"), 0.1)


def test_devices_have_the_backends_that_carry_them():
    assert backend_for(th.device("cpu")) == "gloo"
    assert backend_for(th.device("cuda", 1)) == "cpu:gloo,cuda:nccl"
    assert address_of(th.device("cpu")) is None


def act_as(monkeypatch, act, size=2):
    """Run ``act(ranks)`` on each rank."""
    return in_threads(monkeypatch, lambda rank: act(connect_patched()), size)


def connect_patched():
    from sb3_resnet.common import ranks

    return ranks.connect(th.device("cpu"), 10.0)


def test_ranks_tell_each_other(monkeypatch):
    def act(ranks):
        mine = th.full((3,), float(ranks.rank + 1))
        ranks.sum_(mine)
        sent = th.full((2,), float(ranks.rank + 5))
        ranks.send_(sent)
        stop = ranks.meet(Place.ROLLOUT_END, stop=ranks.rank == 1)
        told = ranks.gather(ranks.rank), ranks.tell({"from": ranks.rank}), ranks.tell(ranks.rank, rank=2)
        return mine.tolist(), sent.tolist(), stop, ranks.any(ranks.rank == 2), told, ranks.bytes_summed

    done = results(act_as(monkeypatch, act, size=3))
    assert done == [([6.0] * 3, [5.0] * 2, True, True, ([0, 1, 2], {"from": 0}, 2), 12)] * 3


def test_ranks_that_meet_at_different_places_are_told_so(monkeypatch):
    places = (Place.ROLLOUT_END, Place.EVALUATION)
    errors = act_as(monkeypatch, lambda ranks: ranks.meet(places[ranks.rank]))
    assert all(isinstance(error, LostRankError) for error in errors)
    assert all("not in step: they wait for each other at ROLLOUT_END and EVALUATION" in str(error) for error in errors)


@pytest.mark.parametrize("limit", [4, 12, 40, 1000])
def test_messages_are_as_large_as_allowed_and_change_every_value_once(limit):
    tensors = [th.arange(float(size)) for size in (1, 0, 7, 3, 20)]
    sizes = []

    def act(message):
        sizes.append(message.nbytes)
        message += 100

    in_buckets(tensors, limit, act)
    assert max(sizes) <= limit
    assert sum(sizes) == 4 * 31
    assert len(sizes) == -(-4 * 31 // limit)
    assert all(th.equal(tensor, th.arange(float(len(tensor))) + 100) for tensor in tensors)


def test_a_tree_of_tensors_arrives_as_it_was_sent(monkeypatch):
    tree = {"a": [th.ones(2, 3), 1.5], "b": {"n": th.tensor(7), "f": th.tensor([True]), "t": (th.zeros(0), "x")}}

    def act(ranks):
        return share_from_first(ranks, tree if ranks.is_first else None, th.device("cpu"), bucket_bytes=8)

    _, second = results(act_as(monkeypatch, act))
    assert th.equal(second["a"][0], tree["a"][0])
    assert second["a"][1] == 1.5
    assert second["b"]["n"] == 7
    assert second["b"]["n"].dtype == th.int64
    assert second["b"]["f"].tolist() == [True]
    assert second["b"]["t"][0].shape == (0,)
    assert second["b"]["t"][1] == "x"


class Branches(nn.Module):
    """Rank 1 alone uses ``second``, and nobody uses ``third``."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(3, 1) for _ in range(3))
        self.frozen = nn.Linear(3, 1).requires_grad_(False)
        self.norm = nn.BatchNorm1d(3)


@pytest.mark.parametrize("bucket_bytes", [4, 16, 2**20])
def test_gradients_are_averaged_before_backward_returns_whoever_has_them(bucket_bytes, monkeypatch):
    def act(ranks):
        module = Branches()
        with th.no_grad():
            for parameter in module.parameters():
                parameter.fill_(1.0)
        optimizer = th.optim.SGD(module.parameters(), lr=0.1)
        average = GradientAverage(ranks, optimizer, module, bucket_bytes)
        average.follow()
        average.follow()
        seen = []
        ranks.after_average.append(lambda: seen.append(ranks.rank))
        x = th.full((2, 3), float(ranks.rank + 1)) + th.tensor([[0.5], [-0.5]])

        def loss():
            out = module.first(module.norm(x) * 0 + x).sum()
            return out + module.second(x).sum() if ranks.rank == 1 else out

        loss().backward()  # not an update: nothing travels
        local = module.first.weight.grad.clone()
        average.active = True
        optimizer.zero_grad()
        module.norm.running_mean.fill_(0)
        loss().backward()
        found = [module.first.weight.grad, module.second.weight.grad, module.norm.running_mean]
        assert module.third.weight.grad is None
        assert module.frozen.weight.grad is None
        assert seen == [ranks.rank]
        # Three layers and the norm's scale and shift, its statistics, and for each parameter whether it has a gradient.
        assert average.latest_bytes == 4 * (3 * 4 + 6 + 6 + 8)
        average.release()
        loss().backward()  # and from here on nothing travels
        return [local.tolist(), *[one.tolist() for one in found[:2]], float(found[2][0])]

    first, second = results(act_as(monkeypatch, act))
    assert first[0] == [[2.0] * 3]
    assert second[0] == [[4.0] * 3]
    # Read after the last backward pass, which has added this rank's own gradient.
    assert first[1] == [[3.0 + 2.0] * 3]
    assert second[1] == [[3.0 + 4.0] * 3]
    assert first[2] == [[2.0] * 3]
    assert second[2] == [[2.0 + 4.0] * 3]


def test_statistics_of_features_are_those_of_the_batches_of_all_ranks(monkeypatch):
    data = th.randn(3, 8, 5, generator=th.Generator().manual_seed(0)) * 0.05 + 7.0
    joint = FeatureStandardizer(5).train()
    expected = joint(th.cat([*data]))

    def act(ranks):
        own = FeatureStandardizer(5).train()
        own.join = ranks.joint_moments
        return own(data[ranks.rank]), own

    done = results(act_as(monkeypatch, act, size=3))
    th.testing.assert_close(th.cat([out for out, _ in done]), expected, atol=1e-4, rtol=0)
    for _, own in done:
        assert th.equal(own.running_mean, done[0][1].running_mean)
        assert th.equal(own.running_var, done[0][1].running_var)
        assert own.running_count == 24
        th.testing.assert_close(own.running_var, joint.running_var, rtol=1e-4, atol=0)


def test_sync_norm_on_cpus_is_batch_norm_of_all_batches_with_its_gradient(monkeypatch):
    generator = th.Generator().manual_seed(0)
    data = [th.randn(size, 3, 4, 4, generator=generator) for size in (2, 3)]  # of different sizes
    weights = th.randn(5, 3, 4, 4, generator=generator)

    def run(layer, forward, x, weight):
        x = x.clone().requires_grad_()
        out = forward(x)
        (out * weight).sum().backward()
        return out.detach(), x.grad, layer.weight.grad, layer.running_mean, layer.running_var

    batch = nn.BatchNorm2d(3)
    expected = run(batch, batch, th.cat(data), weights)

    def act(ranks):
        layer = FreezableSyncBatchNorm(3, process_group=ranks.group)
        mine = slice(0, 2) if ranks.is_first else slice(2, 5)
        return run(layer, lambda x: synchronized_batch_norm(x, layer), data[ranks.rank], weights[mine])

    first, second = results(act_as(monkeypatch, act))
    th.testing.assert_close(th.cat([first[0], second[0]]), expected[0])
    th.testing.assert_close(th.cat([first[1], second[1]]), expected[1])
    th.testing.assert_close(first[2] + second[2], expected[2])
    for one in (first, second):
        th.testing.assert_close(one[3], expected[3])
        th.testing.assert_close(one[4], expected[4])
