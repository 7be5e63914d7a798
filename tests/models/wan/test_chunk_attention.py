"""Block-causal attention: equal to a dense mask for every (S, W), forward and backward, and cheaper."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from wan_reference import rng

from models.wan import attention
from models.wan.attention import ChunkMask, attend, chunk_causal_attention

CHUNKS = st.integers(1, 7)
SINKS = st.integers(0, 4)
WINDOWS = st.one_of(st.none(), st.integers(0, 5))
TOKENS = 3


def dense_mask(sinks: int, window: int | None, num_chunks: int, tokens: int = TOKENS) -> torch.Tensor:
    """The rule of the paper, entry by entry."""
    rows = [
        [j == i or (j < i and (j < sinks or window is None or j >= i - window)) for j in range(num_chunks)]
        for i in range(num_chunks)
    ]
    return torch.tensor(rows).repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)


def qkv(tokens: int, batch: int = 2, key_tokens: int | None = None) -> list[torch.Tensor]:
    shapes = [(batch, length, 2, 8) for length in (tokens, key_tokens or tokens, key_tokens or tokens)]
    generator = rng(3)
    return [torch.randn(shape, generator=generator).transpose(1, 2).requires_grad_() for shape in shapes]


@settings(max_examples=60, deadline=None)
@given(num_chunks=CHUNKS, sinks=SINKS, window=WINDOWS, backend=st.sampled_from(["sdpa", "matmul"]))
def test_equals_dense_mask(num_chunks: int, sinks: int, window: int | None, backend: str):
    q, k, v = qkv(num_chunks * TOKENS)
    ours = chunk_causal_attention(q, k, v, ChunkMask(3, sinks, window), num_chunks, backend)
    dense = F.scaled_dot_product_attention(q, k, v, dense_mask(sinks, window, num_chunks))
    torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-6)
    weight = torch.randn(ours.shape, generator=rng(4))
    for mine, reference in zip(
        torch.autograd.grad((ours * weight).sum(), (q, k, v)),
        torch.autograd.grad((dense * weight).sum(), (q, k, v)),
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("sinks", "window"), [(1, 1), (0, 2), (2, None)])
@torch.no_grad()
def test_flex_equals_dense_mask(sinks: int, window: int | None):
    q, k, v = (x.detach() for x in qkv(5 * 32))
    ours = chunk_causal_attention(q, k, v, ChunkMask(3, sinks, window), 5, "flex")
    dense = F.scaled_dot_product_attention(q, k, v, dense_mask(sinks, window, 5, tokens=32))
    torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-5)


def test_flex_on_cpu_refuses_training():
    with pytest.raises(ValueError, match="no backward pass on CPU"):
        attend(*qkv(8), backend="flex")


def test_regular_band_is_one_call(monkeypatch: pytest.MonkeyPatch):
    calls = []

    def counting(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        calls.append((q.shape[0], k.shape[2] // TOKENS))
        return F.scaled_dot_product_attention(q, k, v)

    monkeypatch.setitem(attention._BACKENDS, "sdpa", counting)
    chunk_causal_attention(*qkv(7 * TOKENS, batch=2), ChunkMask(3, 1, 1), 7)
    assert calls == [(2, 1), (2, 2), (2 * 5, 3)]  # (batch, chunks of keys): chunks 2..6 are one dense problem


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("score_bytes", [1, 1 << 12, 1 << 30])
def test_matmul_equals_sdpa_however_it_is_split(batch: int, score_bytes: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "SCORE_BYTES", score_bytes)
    q, k, v = qkv(10, batch, key_tokens=14)
    torch.testing.assert_close(attend(q, k, v, "matmul"), attend(q, k, v, "sdpa"), rtol=1e-5, atol=1e-6)


def test_matmul_in_bfloat16_is_as_exact_as_sdpa_in_bfloat16():
    exact = attend(*qkv(24), backend="sdpa")
    halves = [x.bfloat16() for x in qkv(24)]
    errors = [(attend(*halves, backend=name).float() - exact).norm() / exact.norm() for name in ("matmul", "sdpa")]
    assert errors[0] < 1e-2 and errors[0] < 2 * errors[1] + 1e-3


@pytest.mark.parametrize("has_amx", [False, True])
@torch.no_grad()
def test_without_gradients_matmul_takes_the_faster_kernel_of_the_cpu(has_amx: bool, monkeypatch: pytest.MonkeyPatch):
    features = {"avx512_bf16": True, "amx_bf16": has_amx}
    monkeypatch.setattr(attention, "cpu_features", lambda: features)
    fused_calls, fused = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *qkv: fused_calls.append(qkv) or fused(*qkv))
    exact, halves = qkv(24, batch=5, key_tokens=40), [x.bfloat16() for x in qkv(24, batch=5, key_tokens=40)]

    ours = attend(*halves, backend="matmul")
    assert len(fused_calls) == has_amx  # without AMX the fused kernel multiplies bfloat16 slowly
    torch.testing.assert_close(ours.float(), attend(*exact, backend="sdpa"), rtol=2e-2, atol=2e-2)

    fused_calls.clear()
    attend(*exact, backend="matmul")
    assert len(fused_calls) == 1, "float32 gains nothing"
    fused_calls.clear()
    monkeypatch.setattr(attention, "SCORE_BYTES", 2 * 24 * 40 * 2 - 1)
    attend(*halves, backend="matmul")
    assert len(fused_calls) == 1, "the scores of one sample would leave the cache"


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash_attn is installed")
def test_flash_says_how_to_get_it():
    with pytest.raises(ImportError, match="flash_attn"):
        attend(*qkv(4), backend="flash")


def test_visible_chunks():
    assert ChunkMask(3, 1, 1).visible(5) == [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4]]
    assert ChunkMask(3, 0, 2).visible(4) == [[0], [0, 1], [0, 1, 2], [1, 2, 3]]
    assert ChunkMask(3, 0, 0).visible(3) == [[0], [1], [2]]
    assert ChunkMask(3, 2, None).visible(3) == [[0], [0, 1], [0, 1, 2]]


def test_frames_must_be_whole_chunks():
    assert ChunkMask(3, 1, 1).num_chunks(9) == 3
    with pytest.raises(ValueError, match=r"10 latent frames .* chunk_frames=3"):
        ChunkMask(3, 1, 1).num_chunks(10)
    with pytest.raises(ValueError, match="num_chunks=4"):
        chunk_causal_attention(*qkv(9), ChunkMask(3, 1, 1), 4)
    with pytest.raises(ValueError, match="window_chunks=-1"):
        ChunkMask(3, 1, -1)
