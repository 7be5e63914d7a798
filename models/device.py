"""The device and the dtype that a configuration names, checked before anything is loaded, and the cores there are."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device(name: str, field: str = "device") -> torch.device:
    """ "auto" is the accelerator if there is one; else cpu, cuda, or one of several as cuda:1.

    Raises ValueError, naming the field, for another name and for a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"{field}={name} must be auto, cpu or cuda (cuda:1 for the second)")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{field}={name}, but this machine has no CUDA device; use {field}=cpu or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"{field}={name}, but this machine has {torch.cuda.device_count()} CUDA device(s), from cuda:0"
        )
    return device


def fast_dtype(device: torch.device) -> str:
    """What dtype=auto means: "bfloat16" where the device has products of it, else "float32".

    Of processors those with AVX-512 BF16 or AMX have; on the others bfloat16 takes twenty times as long as float32.
    """
    if device.type == "cuda":
        has_products = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_products = any(cpu_features().get(name) for name in ("avx512_bf16", "amx_bf16"))
    return "bfloat16" if has_products else "float32"


def usable_cores() -> int:
    """CPU cores that this process may run on: under Slurm its share of the node's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_features() -> Mapping[str, Any]:
    """What torch knows of this CPU; empty where it is too old to say."""
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
