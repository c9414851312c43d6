"""CUDA graphs: captured for the shapes in use, equal to plain calls."""

import pytest
import torch as th
from torch import nn

from sb3_resnet.nn import graphs
from sb3_resnet.nn.graphs import GraphedFunction

needs_gpu = pytest.mark.skipif(not th.cuda.is_available(), reason="needs a GPU")


class OnGpu(th.Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True


def on_gpu(*shape):
    return th.zeros(*shape).as_subclass(OnGpu)


def test_on_a_cpu_nothing_is_captured(monkeypatch):
    monkeypatch.setattr(graphs, "capture", None)
    double = GraphedFunction(lambda x: 2 * x)
    assert all(th.equal(double(th.ones(2)), th.full((2,), 2.0)) for _ in range(3))


def test_shapes_that_come_again_are_captured_once_and_only_so_many(monkeypatch):
    captured, replayed = [], []
    replay = lambda kind: lambda x: replayed.append(kind)  # noqa: E731
    monkeypatch.setattr(graphs, "capture", lambda function, x: captured.append(tuple(x.shape)) or replay(x.shape))
    plain = []
    graphed = GraphedFunction(lambda x: plain.append(tuple(x.shape)))
    for _ in range(4):
        for size in range(1, 20):
            graphed(on_gpu(size, 3))
    assert captured == [(size, 3) for size in range(1, 17)]
    assert len(replayed) == 3 * 16
    assert len(plain) == 16 + 4 * 3


def test_where_capturing_fails_there_is_a_warning_and_the_function_itself(monkeypatch):
    def refuse(function, x):
        raise RuntimeError("capture is not permitted")

    monkeypatch.setattr(graphs, "capture", refuse)
    graphed = GraphedFunction(lambda x: "plain")
    graphed(on_gpu(2))
    with pytest.warns(UserWarning, match="No CUDA graph could be captured .capture is not permitted"):
        assert graphed(on_gpu(2)) == "plain"
    assert graphed(on_gpu(2)) == "plain"


@needs_gpu
def test_replays_equal_calls_and_leave_earlier_results_alone():
    net = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)).cuda()
    graphed = GraphedFunction(net)
    with th.inference_mode():
        inputs = [th.rand(5, 4, 16, 16, device="cuda") for _ in range(4)]
        results = [graphed(x) for x in inputs]
        assert all(th.allclose(result, net(x), atol=1e-5) for result, x in zip(results, inputs, strict=True))
