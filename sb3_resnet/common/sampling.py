"""Look at the batches that a replay buffer gives to SB3's ``train()``, which hands them to nobody."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

Watcher = Callable[[Any], None]


class WatchedSample:
    """
    Takes the place of ``buffer.sample`` and shows each batch to its watchers.

    It is an attribute of the buffer itself, which SB3 may save meanwhile: a pickled or copied buffer gets the method of
    its class in the place, so that nothing of this package is in the file.

    :param buffer: a replay buffer
    """

    def __init__(self, buffer: Any) -> None:
        self.watchers: dict[Hashable, Watcher] = {}
        self._buffer = buffer
        #: What the buffer had of its own, if anything.
        self.replaced = vars(buffer).get("sample")
        self._sample = buffer.sample

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        batch = self._sample(*args, **kwargs)
        for see in [*self.watchers.values()]:
            see(batch)
        return batch

    def __reduce__(self) -> Any:
        # While a buffer is unpickled its attributes are not there yet, so this finds the method of its class.
        return getattr, (self._buffer, "sample")


def watch_samples(buffer: Any, key: Hashable, see: Watcher) -> None:
    """
    Show each sampled batch to a function.

    :param buffer: a replay buffer of SB3, of any class
    :param key: takes the place of the watcher that has the same key
    :param see: called with the batch, such as SB3's ``ReplayBufferSamples``; an error of it goes to the sampler
    """
    sample = buffer.sample
    if not isinstance(sample, WatchedSample):
        buffer.sample = sample = WatchedSample(buffer)
    sample.watchers[key] = see


def unwatch_samples(buffer: Any, key: Hashable) -> None:
    """
    Stop watching. May be called again, and for a buffer that is not watched.

    :param buffer: a replay buffer, or ``None``
    :param key: as given to :func:`watch_samples`
    """
    sample = getattr(buffer, "sample", None)
    if not isinstance(sample, WatchedSample):
        return
    sample.watchers.pop(key, None)
    if not sample.watchers:
        if sample.replaced is None:
            del buffer.sample
        else:
            buffer.sample = sample.replaced
