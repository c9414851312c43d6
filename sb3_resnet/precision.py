"""Which floating-point type a device computes fast in."""

from __future__ import annotations

import torch as th

from sb3_resnet.checks import choice

DTYPES = {"float32": th.float32, "float16": th.float16, "bfloat16": th.bfloat16}


def resolve_dtype(name: str, device: th.device | str) -> th.dtype:
    """
    :param name: ``"float32"``, ``"float16"``, ``"bfloat16"``, or ``"auto"``: bfloat16 where the device has it in
        hardware, float16 on older GPUs, float32 elsewhere
    :param device: where the computation runs
    :return: the type
    :raises ValueError: for an unknown name
    """
    choice("dtype", name, ["auto", *DTYPES])
    if name != "auto":
        return DTYPES[name]
    if th.device(device).type == "cuda":
        return th.bfloat16 if th.cuda.get_device_capability(device) >= (8, 0) else th.float16
    return th.bfloat16 if _cpu_has_bfloat16() else th.float32


def _cpu_has_bfloat16() -> bool:
    """Emulated bfloat16 is several times slower than float32, so ask for the instructions and not for support."""
    supported = [getattr(th.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return any(check() for check in supported if check is not None)
