"""A CUDA device streams, drags and measures what the CPU does: `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.benchmarks.context import EvalContext
from eval.benchmarks.latency import Latency, LatencyConfig
from models.assemble import load_role
from models.motion.tracks import Tracks
from models.wan.attention import ChunkMask, chunk_causal_attention
from stream.codecs import Codecs
from stream.dragstream.config import DragConfig
from stream.dragstream.drag import Drag, Handle, Pose
from stream.provenance import extra_peak_bytes
from stream.session import StreamSession

pytestmark = pytest.mark.gpu
SIZE = 16  # px, of conf/model/tiny.yaml
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


def open_session(tiny_weights, device: torch.device, **options) -> StreamSession:
    student = load_role(tiny_weights.model_cfg, "student").eval().requires_grad_(False).to(device)
    time = np.arange(33, dtype=np.float32)[:, None]
    points = np.stack([2 + 0.3 * time, 3 + 0 * time], axis=-1)
    return StreamSession(
        student, Codecs.load(tiny_weights.model_cfg, device=device), prompt="a red striped disc on a blue background",
        first_frame=np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8),
        tracks=Tracks.from_arrays(points, np.ones((33, 1), bool), SIZE, SIZE), **options,
    )  # fmt: skip


def advance(session: StreamSession, chunks: int) -> np.ndarray:
    return np.concatenate([session.next_chunk() for _ in range(chunks)])


def leftwards() -> Drag:
    mask = np.zeros((SIZE, SIZE), bool)
    mask[4:10, 4:10] = True
    return Drag("edit", (Handle(mask, (7.0, 7.0), (Pose(dx=-4.0),), (7.0, 7.0)),))


def test_a_stream_is_that_of_the_cpu(tiny_weights, gpu) -> None:
    here, there = (advance(open_session(tiny_weights, device), 6) for device in (torch.device("cpu"), gpu))
    assert here.std() > 5
    assert np.abs(here.astype(int) - there.astype(int)).max() <= 1  # rounding of float differences


def test_undo_after_a_drag_repeats_the_stream_bit_for_bit(tiny_weights, gpu) -> None:
    plain = advance(open_session(tiny_weights, gpu), 4)
    session = open_session(tiny_weights, gpu, undo_chunks=2, drag=DragConfig(iterations=4))
    advance(session, 3)
    dragged = session.drag(leftwards()).frames
    assert (dragged != plain[21:33]).any()
    session.undo()
    np.testing.assert_array_equal(advance(session, 2), plain[21:])


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
