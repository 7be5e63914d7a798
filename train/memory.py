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


def state_bytes(modules: Mapping[str, nn.Module], optim: OptimConfig, mode: str, world: int) -> int:
    """Bytes of weights, gradients, moments and EMA on each of `world` processes in a launch mode.

    fsdp shards everything; deepspeed (ZeRO-2) gradients and moments; the other modes hold all of it.
    """
    kept, exchanged = 0, 0
    for module_name, module in modules.items():
        settings = optim.of(module_name)
        for name, parameter in module.named_parameters():
            size = parameter.numel() * parameter.element_size()
            kept += size
            if parameter.requires_grad:
                moments = 1 if settings.kind == "muon" and is_hidden_matrix(name, parameter) else 2
                exchanged += (1 + moments) * size
                kept += size if settings.ema_decay > 0 else 0
    if mode == "fsdp":
        return (kept + exchanged) // world
    return kept + exchanged // (world if mode == "deepspeed" else 1)


def require_memory(
    modules: Mapping[str, nn.Module], optim: OptimConfig, mode: str, world: int, device_bytes: int
) -> None:
    """Raises ValueError where the training state alone does not fit on a device of `device_bytes`."""
    needed = state_bytes(modules, optim, mode, world)
    if needed <= device_bytes:
        return
    processes = math.ceil(state_bytes(modules, optim, "fsdp", 1) / device_bytes)
    launch = "" if mode == "fsdp" else "launch=fsdp (conf/launch/fsdp.yaml; LAUNCH=fsdp under Slurm) and "
    raise ValueError(
        f"launch={mode} on {world} process(es) puts {needed / GB:.0f} GB of weights, gradients, moments and EMA on "
        f"each GPU, which has {device_bytes / GB:.0f} GB; use {launch}{processes} or more GPUs; activations come on top"
    )
