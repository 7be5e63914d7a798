"""A CUDA device streams, drags and measures what the CPU does: `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from drag_sessions import LEFT, advance, drag, tracked_session

from eval.benchmarks.context import EvalContext
from eval.benchmarks.latency import Latency, LatencyConfig
from models.assemble import load_role
from models.wan.attention import ChunkMask, chunk_causal_attention
from stream.codecs import Codecs
from stream.provenance import extra_peak_bytes
from stream.session import StreamSession

pytestmark = pytest.mark.gpu
MIB = 2**20


@pytest.fixture(scope="module")
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def products_in_float32() -> Iterator[None]:
    """Not in TF32, which the CPU has not."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield
    for backend, allowed in zip(backends, before):
        backend.allow_tf32 = allowed


def open_on(tiny_weights, device: torch.device) -> StreamSession:
    student = load_role(tiny_weights.model_cfg, "student").eval().requires_grad_(False).to(device)
    return tracked_session((student, Codecs.load(tiny_weights.model_cfg, device=device)))


def test_a_stream_is_that_of_the_cpu(tiny_weights, gpu) -> None:
    devices = (torch.device("cpu"), gpu)
    here, there = (np.concatenate(advance(open_on(tiny_weights, device), 6)) for device in devices)
    assert here.std() > 5
    assert np.abs(here.astype(int) - there.astype(int)).max() <= 1  # rounding of float differences


def test_undo_after_a_drag_repeats_the_stream_bit_for_bit(tiny_weights, gpu) -> None:
    plain, session = advance(open_on(tiny_weights, gpu), 4), open_on(tiny_weights, gpu)
    advance(session, 3)
    assert (session.drag(drag("edit", LEFT)).frames != plain[2]).any()
    session.undo()
    np.testing.assert_array_equal(advance(session, 2), plain[2:])


@pytest.mark.parametrize("backend", ["sdpa", "matmul", "flex"])
def test_attention_under_a_chunk_mask_is_that_of_the_cpu(gpu, backend: str) -> None:
    mask, chunks, rng = ChunkMask(3, 1, 1), 4, torch.Generator().manual_seed(0)
    q, k, v, weight = (torch.randn(2, 2, chunks * 128, 64, generator=rng) for _ in range(4))
    expected, grads = attended(mask, chunks, weight, "sdpa", q, k, v)
    found, found_grads = attended(mask, chunks, weight.to(gpu), backend, *(x.to(gpu) for x in (q, k, v)))
    for one, other in zip((expected, *grads), (found, *found_grads)):
        torch.testing.assert_close(other.cpu(), one, atol=1e-4, rtol=1e-3)


def attended(
    mask: ChunkMask, chunks: int, weight: torch.Tensor, backend: str, *qkv: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The output, and the gradients of its weighted sum."""
    inputs = [x.clone().requires_grad_() for x in qkv]
    out = chunk_causal_attention(*inputs, mask, chunks, backend)
    (out * weight).sum().backward()
    return out.detach(), [x.grad for x in inputs if x.grad is not None]


def test_the_memory_of_a_stream_does_not_grow(tiny_weights, gpu, tmp_path: Path) -> None:
    codecs = Codecs.load(tiny_weights.model_cfg, device=gpu)
    context = EvalContext(tiny_weights.model_cfg, codecs, gpu, 0, tmp_path)
    figures = Latency(LatencyConfig(num_chunks=60)).run(context).results.values
    assert figures["student.peak_device_mib"] > 0
    assert abs(figures["student.device_growth_mib"]) < 0.1


def test_memory_is_weighed_at_its_peak(gpu) -> None:
    def make(mib: int) -> int:
        return len(torch.empty(mib * MIB, dtype=torch.uint8, device=gpu))

    assert 4 * MIB <= extra_peak_bytes(lambda: make(8), lambda: make(4), gpu) <= 5 * MIB
