"""Split attention is attention over the joined keys, and its gradient is that of the current part."""

from __future__ import annotations

import pytest
import torch
from test_kv_cache import CHUNK, CONFIG, GRID, NOISY, WINDOWS, chunks_of
from wan_reference import make_condition, make_latents, perturbed_dit, rng

from models.wan import split_attention as module
from models.wan.blocks import AttentionTaps
from models.wan.cache import CacheSpec, KVCache, ReadOnlyContext
from models.wan.static_cache import StaticKVCache


def heads(tokens: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 3, tokens, 8, generator=rng(seed)).to(dtype)


@pytest.mark.parametrize("score_bytes", [1, 4096, 8 << 20])  # one query at a time, some, all
@pytest.mark.parametrize("lengths", [(), (5,), (7, 4)])
def test_equals_attention_over_joined_keys(lengths: tuple[int, ...], score_bytes: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(module.SCORE_BYTES, "cpu", score_bytes)
    past = [(heads(length, 10 + length), heads(length, 20 + length)) for length in lengths]
    weight, results = heads(6, 4), []
    for split in (True, False):
        q, k, v = (heads(6, seed).requires_grad_() for seed in (1, 2, 3))
        if split:
            out = module.split_attention(q, k, v, past)
        else:
            joined = [torch.cat([*(pair[i] for pair in past), x], dim=2) for i, x in enumerate((k, v))]
            out = torch.nn.functional.scaled_dot_product_attention(q, *joined)
        (out * weight).sum().backward()
        results.append((out, q.grad, k.grad, v.grad))
    for ours, reference in zip(*results):
        torch.testing.assert_close(ours, reference, atol=1e-6, rtol=1e-5)


def test_gradient_in_float64_matches_finite_differences():
    past = [(heads(5, 1).double(), heads(5, 2).double())]
    inputs = tuple(heads(4, seed, torch.float64).requires_grad_() for seed in (3, 4, 5))
    assert torch.autograd.gradcheck(lambda q, k, v: module.split_attention(q, k, v, past), inputs)


def test_the_past_is_kept_as_a_view_and_gets_no_gradient():
    keys, values = (heads(50, seed).requires_grad_() for seed in (1, 2))
    q, k, v = (heads(3, seed).requires_grad_() for seed in (3, 4, 5))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda kept: kept):
        out = module.split_attention(q, k, v, [(keys[:, :, 10:40], values[:, :, 10:40])])
    out.sum().backward()
    assert keys.grad is None and values.grad is None and q.grad is not None
    own = {keys.untyped_storage().data_ptr(), values.untyped_storage().data_ptr()}
    copied = [t for t in saved if t.untyped_storage().data_ptr() not in own and t.numel() > 3 * q.numel()]
    assert not copied


@pytest.mark.parametrize(("sinks", "window"), WINDOWS)
@pytest.mark.parametrize("kind", [KVCache, StaticKVCache])
def test_a_read_only_context_is_the_context(kind: type, sinks: int, window: int):
    model, latents = perturbed_dit(CONFIG), make_latents(CONFIG, frames=6 * CHUNK)
    condition, cache = make_condition(CONFIG), kind.empty(CacheSpec(CHUNK, sinks, window), CONFIG.num_layers)
    with torch.no_grad():
        for chunk in chunks_of(latents):
            context, at = cache.context(GRID), torch.tensor([NOISY])
            split = model(chunk + 1, at, condition, attention=ReadOnlyContext(context))
            expected = model(chunk, at, condition, attention=context)
            again = model(chunk, at, condition, attention=ReadOnlyContext(context))
            assert (again - expected).abs().max() < 4e-6
            assert (split - expected).abs().max() > 1e-3
            cache = cache.append(model.cache_pass(chunk, condition, context))
            # At the boundary the finished chunk's context can still be read.
            later = model(chunk, at, condition, attention=ReadOnlyContext(context))
            assert (later - expected).abs().max() < 4e-6


@torch.no_grad()
def test_a_ring_that_has_moved_on_refuses_an_old_context():
    model, latents = perturbed_dit(CONFIG), make_latents(CONFIG, frames=2 * CHUNK)
    condition, cache = make_condition(CONFIG), StaticKVCache.empty(CacheSpec(CHUNK, 1, 1), CONFIG.num_layers)
    old = cache.context(GRID)
    cache = cache.append(model.cache_pass(chunks_of(latents)[0], condition, old))
    cache.context(GRID)
    with pytest.raises(RuntimeError, match="context of chunk 0 is gone"):
        model(chunks_of(latents)[0], torch.zeros(1), condition, attention=ReadOnlyContext(old))


@pytest.mark.parametrize("recompute", [False, True])
def test_taps_stop_at_the_last_layer_and_carry_the_gradient_to_the_latents(recompute: bool):
    model, condition = perturbed_dit(CONFIG).requires_grad_(False), make_condition(CONFIG)
    latents = make_latents(CONFIG, frames=CHUNK).requires_grad_()
    whole, part = AttentionTaps([0, 1]), AttentionTaps([1])
    model(latents, torch.tensor([NOISY]), condition, taps=whole)
    expected = torch.autograd.grad(whole.seen[1].output.square().sum(), latents)[0]

    model.head.register_forward_pre_hook(lambda *_: pytest.fail("the head ran"))
    model.blocks[1].ffn.register_forward_pre_hook(lambda *_: pytest.fail("the last block ran to its end"))
    model.tap_attention(latents, torch.tensor([NOISY]), condition, part, recompute=recompute)
    assert set(part.seen) == {1} and torch.equal(part.seen[1].output, whole.seen[1].output)
    found = torch.autograd.grad(part.seen[1].output.square().sum(), latents)[0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_taps_name_a_layer_that_is_not_there():
    with pytest.raises(ValueError, match=r"layers=\[0, 12\] must be in 0..1"):
        perturbed_dit(CONFIG).tap_attention(
            make_latents(CONFIG, frames=1), torch.zeros(1), make_condition(CONFIG), AttentionTaps([0, 12])
        )
