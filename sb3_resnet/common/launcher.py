"""What the launcher of several processes says, and what each of them uses."""

from __future__ import annotations

import os
import socket

import torch as th


def launched() -> tuple[int, int]:
    """
    What the launcher says: ``torchrun``, ``accelerate launch`` and others by ``RANK`` and ``WORLD_SIZE``, ``srun`` by
    ``SLURM_PROCID`` and ``SLURM_STEP_NUM_TASKS``.

    :return: number of this process, and how many there are; 0 and 1 where nothing says so
    :raises ValueError: if a part is missing or makes no sense
    """
    # A batch script of SLURM has SLURM_PROCID too; only what srun starts has the number of the step's tasks.
    pairs = [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")]
    names = next((pair for pair in pairs if all(name in os.environ for name in pair)), None)
    if names is None:
        if "WORLD_SIZE" in os.environ and os.environ["WORLD_SIZE"] != "1":
            raise ValueError("WORLD_SIZE is set, but RANK is not: start the script with torchrun")
        return 0, 1
    try:
        rank, size = (int(os.environ[name]) for name in names)
    except ValueError:
        rank, size = 0, 0
    if not 0 <= rank < size:
        said = ", ".join(f"{name}={os.environ[name]}" for name in names)
        raise ValueError(f"{said}: the first must be a whole number below the second")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if size > 1 and missing:
        raise ValueError(
            f"{' and '.join(missing)} must say where rank 0 waits for the others. torchrun sets them; with srun write "
            'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) MASTER_PORT=29500'
        )
    return rank, size


def backend_for(device: th.device) -> str:
    """
    :param device: of a model
    :return: PyTorch's name of the backends that carry tensors of the device, and of the CPU
    """
    return "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl"


def address_of(device: th.device) -> str | None:
    """
    :param device: of a model
    :return: which GPU of which machine it is; ``None`` for a CPU, which ranks may share
    """
    if device.type != "cuda":
        return None
    index = th.cuda.current_device() if device.index is None else device.index
    return f"{socket.gethostname()}, GPU {getattr(th.cuda.get_device_properties(index), 'uuid', index)}"
