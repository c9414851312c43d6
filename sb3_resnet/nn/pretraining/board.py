"""What a pretraining logs to TensorBoard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sb3_resnet.common.arguments import path_of
from sb3_resnet.nn.pretraining.run import Log


@contextmanager
def tensorboard(folder: str | Path | None, update: int | None) -> Iterator[Log]:
    """
    :param folder: of the log; ``None``: nothing is logged
    :param update: the first that will be logged, where an earlier attempt may have logged it and more
    :return: a context with the function that logs
    :raises ImportError: if TensorBoard is missing
    """
    if folder is None:
        yield lambda name, value, update: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("tensorboard_log needs TensorBoard: pip install 'sb3_resnet[tensorboard]'") from error
    writer: Any = SummaryWriter(str(path_of("tensorboard_log", folder)), purge_step=update)
    try:
        yield lambda name, value, update: writer.add_scalar(f"pretrain/{name}", value, update)
    finally:
        writer.close()
