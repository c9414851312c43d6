"""A state dict whose tensors that two networks have in common take their place in a file once."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch as th
from torch import nn

from sb3_resnet.common import host


class _Twin(th.Tensor):
    """
    A tensor that is pickled as another one where both hold the same values.

    ``torch.save`` writes a storage that several tensors share once. In memory the two stay apart, since SB3's target
    update writes into the target network in place.
    """

    # As in nn.Parameter: what is computed from it is a plain tensor.
    __torch_function__ = host.torch_function_of_plain_results()

    twin: th.Tensor

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Compared now and not earlier: a state dict refers to weights that training may have changed since.
        mine = self.as_subclass(th.Tensor)
        same = mine.dtype == self.twin.dtype and mine.device == self.twin.device and th.equal(mine, self.twin)
        return (self.twin if same else mine).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]  # PyTorch's

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # untyped there
        return repr(self.as_subclass(th.Tensor))

    def __deepcopy__(self, memo: dict[int, Any]) -> th.Tensor:
        return copy.deepcopy(self.as_subclass(th.Tensor), memo)


def store_shared_once(policy: nn.Module, network: str) -> None:
    """
    Let ``torch.save`` write what the target network has in common with the online network once.

    While the trunk is frozen that is the whole trunk. Keys and values of the state dict stay as they are, and so does
    what loading gives. With ``tau < 1`` SB3 rounds the target's frozen weights at each update (by about 4e-7): they
    differ then, and the file holds both, so that a resumed run equals the one that was not stopped.

    :param policy: a policy with both networks
    :param network: name of the online network; the target's is ``<network>_target``
    """
    # Without a closure, so that the policy can be pickled.
    policy.register_state_dict_post_hook(partial(_mark_twins, network=network))  # type: ignore[no-untyped-call]  # PyTorch


def _mark_twins(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any, *, network: str) -> None:
    target = f"{prefix}{network}_target."
    for key, value in [*state.items()]:
        twin = state.get(f"{prefix}{network}.{key.removeprefix(target)}") if key.startswith(target) else None
        if twin is not None and not isinstance(value, nn.Parameter):  # these are asked for with keep_vars=True
            state[key] = marked = value.as_subclass(_Twin)
            marked.twin = twin
