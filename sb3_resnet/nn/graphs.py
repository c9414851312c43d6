"""On a GPU, a function of one tensor as captured CUDA graphs: one launch for all kernels."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch as th

_MAX_GRAPHS = 16  # each keeps its activations: the batch sizes of acting and sampling are few, remainders many


class GraphedFunction:
    """
    Captures a graph for each shape that comes a second time, and replays it from then on; on a CPU just calls.

    :param function: without gradients, branches on values or anything else that waits for the device
    """

    def __init__(self, function: Callable[[th.Tensor], th.Tensor]) -> None:
        self._function = function
        self._replays: dict[Any, Callable[[th.Tensor], th.Tensor] | None] = {}

    def __call__(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: of any shape
        :return: the function's result, in memory of its own
        """
        if not x.is_cuda:
            return self._function(x)
        kind = (x.shape, x.dtype)
        if kind not in self._replays:
            if len(self._replays) < _MAX_GRAPHS:
                self._replays[kind] = None
            return self._function(x)
        replay = self._replays[kind]
        if replay is None:
            replay = self._replays[kind] = self._captured(x)
        return replay(x)

    def _captured(self, x: th.Tensor) -> Callable[[th.Tensor], th.Tensor]:
        try:
            return capture(self._function, x)
        except RuntimeError as error:
            warnings.warn(f"No CUDA graph could be captured ({error}): encoding without, more slowly.", stacklevel=2)
            return self._function


def capture(function: Callable[[th.Tensor], th.Tensor], x: th.Tensor) -> Callable[[th.Tensor], th.Tensor]:
    """
    :param function: as in :class:`GraphedFunction`
    :param x: an input on a GPU
    :return: the function for inputs of that shape and type
    """
    given = x.clone()
    stream = th.cuda.Stream(x.device)  # type: ignore[no-untyped-call]  # PyTorch
    stream.wait_stream(th.cuda.current_stream(x.device))
    with th.cuda.stream(stream):  # libraries choose kernels and allocate on the first calls, which a graph cannot hold
        for _ in range(3):
            function(given)
    th.cuda.current_stream(x.device).wait_stream(stream)
    graph = th.cuda.CUDAGraph()
    with th.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        result = function(given)

    def replay(x: th.Tensor) -> th.Tensor:
        given.copy_(x)
        graph.replay()
        return result.clone()

    return replay
