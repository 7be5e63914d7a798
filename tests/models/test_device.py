"""Devices are refused by name and field before anything is loaded onto them; the dtype is the faster one there."""

from __future__ import annotations

import pytest
import torch

from models import device
from models.device import fast_dtype, pick_device

NO_GPU, ONE_GPU = (False, 0), (True, 1)


@pytest.fixture
def gpus(monkeypatch):
    def have(available: bool, count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return have


@pytest.mark.parametrize(
    ("machine", "name", "device"),
    [
        (NO_GPU, "auto", "cpu"),
        (ONE_GPU, "auto", "cuda"),
        (NO_GPU, "cpu", "cpu"),
        (ONE_GPU, "cuda", "cuda"),
        (ONE_GPU, "cuda:0", "cuda:0"),
    ],
)
def test_what_is_there(gpus, machine, name, device):
    gpus(*machine)
    assert pick_device(name) == torch.device(device)


@pytest.mark.parametrize(
    ("machine", "name", "message"),
    [
        (ONE_GPU, "gpu", "encode.device=gpu must be auto, cpu or cuda"),
        (ONE_GPU, "cuda:", "encode.device=cuda: must be auto, cpu or cuda"),
        (ONE_GPU, "cuda:one", "encode.device=cuda:one must be"),
        (ONE_GPU, "meta", "encode.device=meta must be"),
        (NO_GPU, "cuda", "encode.device=cuda, but this machine has no CUDA device; use encode.device=cpu or auto"),
        (ONE_GPU, "cuda:1", r"encode.device=cuda:1, but this machine has 1 CUDA device\(s\)"),
    ],
)
def test_what_is_not(gpus, machine, name, message):
    gpus(*machine)
    with pytest.raises(ValueError, match=message):
        pick_device(name, "encode.device")


@pytest.mark.parametrize(
    ("features", "name"),
    [
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, "float32"),
        ({"avx512_bf16": True, "amx_bf16": False}, "bfloat16"),
        ({"avx512_bf16": True, "amx_bf16": True}, "bfloat16"),
        ({}, "float32"),  # a torch that does not tell
    ],
)
def test_the_faster_dtype_of_a_processor(monkeypatch, features, name):
    monkeypatch.setattr(device, "cpu_features", lambda: features)
    assert fast_dtype(torch.device("cpu")) == name


@pytest.mark.parametrize(("has_products", "name"), [(True, "bfloat16"), (False, "float32")])
def test_the_faster_dtype_of_a_gpu(monkeypatch, has_products, name):
    def is_supported(including_emulation: bool = True) -> bool:
        return has_products or including_emulation  # cards before Ampere emulate it, slowly

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert fast_dtype(torch.device("cuda")) == name
