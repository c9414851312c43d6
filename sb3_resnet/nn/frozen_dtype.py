"""The precision of the frozen stages: part of the model, saved with it."""

from __future__ import annotations

from typing import Any

import torch as th
from torch import nn

from sb3_resnet.common.arguments import choice
from sb3_resnet.nn.precision import DTYPES, resolve_dtype

_NAMES = tuple(DTYPES)


class FrozenDtype(nn.Module):
    """
    Holds the precision as a buffer, so that a model computes in it wherever it is loaded.

    :param name: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``: what the hardware is fast in, decided
        once. A model is built on the CPU and then moved: a move to another kind of device decides anew, until the
        stages have computed or other weights were loaded
    :raises ValueError: for another name
    """

    index: th.Tensor

    def __init__(self, name: str) -> None:
        super().__init__()
        choice("frozen_dtype", name, [*_NAMES, "auto"])
        self._is_open = name == "auto"
        self.register_buffer("index", th.tensor(0.0))  # a float, as all that SB3's own policies save
        self._set(self._resolved() if self._is_open else name)

    @property
    def name(self) -> str:
        """Name of the precision."""
        return self._name

    @property
    def dtype(self) -> th.dtype:
        """The precision."""
        return DTYPES[self._name]

    def settle(self) -> None:
        """From here on the precision stays, wherever the model is moved."""
        self._is_open = False

    def convert(self, name: str) -> None:
        """
        :param name: as at construction; ``"auto"`` for what the hardware of this machine is fast in
        :raises ValueError: for another name
        """
        choice("frozen_dtype", name, [*_NAMES, "auto"])
        self._set(self._resolved() if name == "auto" else name)
        self.settle()

    def _resolved(self) -> str:
        dtype = resolve_dtype("auto", self.index.device)
        return next(name for name, value in DTYPES.items() if value == dtype)

    def _set(self, name: str) -> None:
        self.index.fill_(_NAMES.index(name))
        self._name = name  # on the Python side too: reading the buffer on a GPU would wait for the device

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = self.index.device.type
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # nn.Module's own hook
        if self._is_open and self.index.device.type != before:
            self._set(self._resolved())
        return result

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]  # nn.Module's own hook
        # Models saved before there was a choice keep what they were built with.
        state_dict.setdefault(f"{prefix}index", self.index.clone())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._name = _NAMES[int(self.index)]
        self.settle()
