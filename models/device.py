"""The device and the dtype that a configuration names; a device is checked before anything is loaded onto it."""

from __future__ import annotations

import re

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
