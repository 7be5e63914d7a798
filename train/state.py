"""Whole states of sharded things: a checkpoint does not depend on how many processes wrote it.

Under FSDP2 parameters, optimizer moments and EMA values are DTensors, each knowing its mesh and placement.
They are gathered one tensor at a time for saving, kept by the process that writes them only, and cut again by the
loading process's own placement.
(Saving the plain local shards under one name would let one process's values replace another's.)

Left out: DeepSpeed, whose optimizer state only DeepSpeed can save (`accelerator.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor: a view, the tensor itself where it is not sharded."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole tensor on the CPU. A collective where it is sharded: call on all processes, in the same
    order.
    """
    from torch.distributed.tensor import DTensor

    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().to("cpu", copy=True)


def take_part(tensor: Tensor) -> None:
    """What another process's `full` needs of this one: the collective where it is sharded, else nothing."""
    from torch.distributed.tensor import DTensor

    if isinstance(tensor, DTensor):
        tensor.full_tensor()


@torch.no_grad()
def fill(target: Tensor, whole: Tensor) -> None:
    """Write a whole tensor into `target`, keeping this process's part where `target` is sharded."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    whole = whole.to(target.device, target.dtype)
    if isinstance(target, DTensor):
        part = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(part.to_local())
    else:
        target.copy_(whole)


def full_state(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """Whole CPU copies by name. keep=False takes part in the gathering, holds one tensor at a time and returns {}."""
    if keep:
        return {name: full(tensor) for name, tensor in tensors.items()}
    for tensor in tensors.values():
        take_part(tensor)
    return {}


def fill_state(targets: Mapping[str, Tensor], whole: Mapping[str, Tensor], owner: str) -> None:
    """Write whole tensors into `targets`. Raises ValueError where names or shapes differ."""
    missing, surplus = sorted(set(targets) - set(whole)), sorted(set(whole) - set(targets))
    if missing or surplus:
        raise ValueError(
            f"{owner}: the checkpoint lacks {missing[:3]} and has unknown {surplus[:3]}; it belongs to "
            "another model: use another output_dir"
        )
    for name, target in targets.items():
        if target.shape != whole[name].shape:
            raise ValueError(
                f"{owner}: {name} is {tuple(whole[name].shape)} in the checkpoint and "
                f"{tuple(target.shape)} here; use another output_dir"
            )
        fill(target, whole[name])


def optimizer_state(
    module: nn.Module, optimizer: torch.optim.Optimizer, keep: bool = True
) -> dict[str, dict[str, Tensor]]:
    """Moments and step counts by parameter name, without those never stepped; keep as in `full_state`."""
    return {
        name: full_state(optimizer.state[parameter], keep)
        for name, parameter in module.named_parameters()
        if parameter in optimizer.state
    }


def fill_optimizer(
    module: nn.Module, optimizer: torch.optim.Optimizer, whole: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Inverse of `optimizer_state`, for an optimizer over the same parameters."""
    optimizer.state.clear()
    parameters = dict(module.named_parameters())
    for name, moments in whole.items():
        parameter = parameters[name]
        step_device = local(parameter).device if optimizer.defaults.get("fused") else torch.device("cpu")
        optimizer.state[parameter] = {
            # copies: a view of what was read would keep the checkpoint's file mapped
            key: value.to(step_device, copy=True) if value.ndim == 0 else _moment_like(parameter, value)
            for key, value in moments.items()
        }


def _moment_like(parameter: Tensor, value: Tensor) -> Tensor:
    moment = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
    fill(moment, value)
    return moment


def plain(value: Any, keep: bool = True) -> Any:
    """A state made of tensors, numbers, strings, lists and dicts, with tensors whole and on the CPU.

    keep=False takes part in the gathering and has None in their place.
    """
    if isinstance(value, Tensor):
        if keep:
            return full(value)
        take_part(value)
        return None
    if isinstance(value, Mapping):
        return {key: plain(item, keep) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, keep) for item in value]
    return value
