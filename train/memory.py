"""Does the training state fit? Its bytes on each process are known before the first step, unlike those of activations.

Left out: activations, frozen models beside the trained ones, the second copy of the weights while EMA stands in, and
that every process first holds whole modules on its GPU, in all launch modes: they are counted once they are there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from train.muon import is_hidden_matrix
from train.optim import OptimConfig

GB = 1e9  # bytes


def state_bytes(
    modules: Mapping[str, nn.Module], optim: OptimConfig, mode: str, world: int, accumulates: bool = False
) -> int:
    """Bytes of weights, gradients, moments and EMA on each of `world` processes in a launch mode.

    fsdp shards everything, but for the gradients of one module where an update `accumulates` several: they are
    exchanged after the last; deepspeed (ZeRO-2) gradients and moments; the other modes hold all of it.
    """
    kept, exchanged, gradients = 0, 0, [0]
    for module_name, module in modules.items():
        settings = optim.of(module_name)
        gradients.append(0)
        for name, parameter in module.named_parameters():
            size = parameter.numel() * parameter.element_size()
            kept += size
            if parameter.requires_grad:
                moments = 1 if settings.kind == "muon" and is_hidden_matrix(name, parameter) else 2
                exchanged += (1 + moments) * size
                gradients[-1] += size
                kept += size if settings.ema_decay > 0 else 0
    if mode == "fsdp":
        return (kept + exchanged) // world + (max(gradients) if accumulates else 0)
    return kept + exchanged // (world if mode == "deepspeed" else 1)


def require_memory(
    modules: Mapping[str, nn.Module],
    optim: OptimConfig,
    mode: str,
    world: int,
    device_bytes: int,
    accumulates: bool = False,
) -> None:
    """Raises ValueError where the training state alone does not fit on a device of `device_bytes`."""
    needed = state_bytes(modules, optim, mode, world, accumulates)
    if needed <= device_bytes:
        return
    sharded = state_bytes(modules, optim, "fsdp", 1)
    room = device_bytes - (state_bytes(modules, optim, "fsdp", 1, accumulates) - sharded)
    enough = f"{math.ceil(sharded / room)} or more GPUs" if room > 0 else "GPUs of more memory"
    launch = "" if mode == "fsdp" else "launch=fsdp (conf/launch/fsdp.yaml; LAUNCH=fsdp under Slurm) and "
    raise ValueError(
        f"launch={mode} on {world} process(es) puts {needed / GB:.0f} GB of weights, gradients, moments and EMA on "
        f"each GPU, which has {device_bytes / GB:.0f} GB; use {launch}{enough}; activations come on top"
    )
