"""Streaming with a cache is the same function as attention with the mask, and both caches are the same
function.

References: diffusers' transformer with a dense mask, or with a plain list of raw keys that is rotated anew
each chunk.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_chunk_attention import dense_mask
from torch import Tensor
from wan_reference import diffusers_twin, make_condition, make_latents, perturbed_dit, rng

from models.wan.attention import ChunkMask
from models.wan.blocks import AttentionTaps
from models.wan.cache import CacheSpec, KVCache, LayerKV
from models.wan.config import WanConfig
from models.wan.dit import WanDiT
from models.wan.static_cache import StaticKVCache

CHUNK, GRID, TOKENS = 3, (2, 3), 3 * 2 * 3  # latent frames, token grid and tokens of a chunk
CONFIG = WanConfig.tiny(text_len=512)
WINDOWS = [(1, 1), (0, 2), (2, 1), (1, 3)]  # (S, W)
NOISY = 700.0


class PlainAttention:
    """diffusers' self-attention with its arithmetic spelled out; subclasses choose what is attended to."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        q, k = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, attn.to_v(hidden_states)))
        out = self.attention(q, k, v, rotary_emb).transpose(1, 2).flatten(2)
        return attn.to_out[0](out)


class MaskedAttention(PlainAttention):
    """Absolute positions and a dense mask over the whole clip."""

    def __init__(self, mask: Tensor, detached_tokens: int = 0):
        self.mask, self.detached_tokens = mask, detached_tokens

    def attention(self, q: Tensor, k: Tensor, v: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        past = self.detached_tokens
        k, v = (torch.cat([x[:, :past].detach(), x[:, past:]], dim=1) for x in (rotate(k, rotation), v))
        heads = (x.transpose(1, 2) for x in (rotate(q, rotation), k, v))
        return F.scaled_dot_product_attention(*heads, self.mask)


class SlotAttention(PlainAttention):
    """One chunk per call; keeps every chunk's raw keys and numbers the visible chunks 0, 1, 2, ... ."""

    def __init__(self, visible: Callable[[int], list[int]], rotation: tuple[Tensor, Tensor]):
        self.visible, self.rotation = visible, rotation
        self.stored: list[tuple[Tensor, Tensor]] = []
        self.storing = False

    def attention(self, q: Tensor, k: Tensor, v: Tensor, _: tuple[Tensor, Tensor]) -> Tensor:
        past = [self.stored[chunk] for chunk in self.visible(len(self.stored))[:-1]]
        if self.storing:
            self.stored.append((k, v))
        keys, values = (torch.cat(parts, dim=1) for parts in zip(*past, (k, v)))
        end = keys.shape[1]
        q = rotate(q, [part[:, end - TOKENS : end] for part in self.rotation])
        keys = rotate(keys, [part[:, :end] for part in self.rotation])
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, keys, values)))


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotation[0][..., ::2], rotation[1][..., 1::2]
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def set_attention(twin: WanTransformer3DModel, make: Callable[[], PlainAttention]) -> None:
    for block in twin.blocks:
        block.attn1.set_processor(make())


def chunks_of(latents: Tensor) -> tuple[Tensor, ...]:
    return latents.split(CHUNK, dim=2)


@torch.no_grad()
def stream(
    model: WanDiT, cache: KVCache | StaticKVCache, latents: Tensor, timesteps: tuple[float, ...]
) -> list[Tensor]:
    """Velocity of every chunk at the last of ``timesteps``; the context is the clean chunks before it."""
    prepared, outputs = model.prepare(make_condition(model.config, latents.shape[0])), []
    modulations = [model.modulation(timestep) for timestep in timesteps]
    for chunk in chunks_of(latents):
        context = cache.context(GRID)
        for modulation in modulations:  # earlier passes of a chunk must leave no trace
            noisy = chunk + 0.1 * len(outputs) if modulation is not modulations[-1] else chunk
            velocity = model(noisy, modulation, prepared, attention=context)
        outputs.append(velocity)
        cache = cache.append(model.cache_pass(chunk, prepared, context))
    return outputs


def absolute_reference(model: WanDiT, latents: Tensor, sinks: int, window: int | None) -> Tensor:
    """diffusers with a dense mask: clean chunks at t = 0, the last at t = 700; velocity of the last."""
    num_chunks = latents.shape[2] // CHUNK
    twin, condition = diffusers_twin(model), make_condition(model.config)
    set_attention(twin, lambda: MaskedAttention(dense_mask(sinks, window, num_chunks, TOKENS)))
    timestep = torch.zeros(1, num_chunks * TOKENS)
    timestep[:, -TOKENS:] = NOISY
    return twin(latents, timestep, condition.prompt_embeds).sample[:, :, -CHUNK:]


@pytest.mark.parametrize(("sinks", "window"), [*WINDOWS, (0, None), (1, 0)])
@torch.no_grad()
def test_cache_and_chunk_mask_equal_dense_mask(sinks: int, window: int | None):
    model, latents = perturbed_dit(CONFIG), make_latents(CONFIG, frames=6 * CHUNK)
    expected = absolute_reference(model, latents, sinks, window)

    spec = CacheSpec(CHUNK, sinks, window, "absolute")
    streamed = stream(model, KVCache.empty(spec, CONFIG.num_layers), latents, (NOISY,))[-1]
    assert (streamed - expected).abs().max() < 4e-6

    timestep = torch.zeros(1, 6 * CHUNK)
    timestep[:, -CHUNK:] = NOISY
    masked = model(latents, timestep, make_condition(CONFIG), attention=ChunkMask(CHUNK, sinks, window))
    assert (masked[:, :, -CHUNK:] - expected).abs().max() < 4e-6

    wrong = stream(model, KVCache.empty(CacheSpec(CHUNK, sinks + 1, 0, "absolute"), 2), latents, (NOISY,))[-1]
    assert (wrong - expected).abs().max() > 1e-4, "the comparison must notice another context"


@pytest.mark.parametrize(("sinks", "window"), WINDOWS)
@torch.no_grad()
def test_slots_equal_rotating_all_keys_anew(sinks: int, window: int):
    model, latents = perturbed_dit(CONFIG), make_latents(CONFIG, frames=6 * CHUNK)
    twin, condition = diffusers_twin(model), make_condition(CONFIG)
    spec = CacheSpec(CHUNK, sinks, window, "slot")
    rotation = twin.rope(latents)
    set_attention(twin, lambda: SlotAttention(spec.mask.visible_to, rotation))

    def plain_pass(chunk: Tensor, timestep: float, storing: bool) -> Tensor:
        for block in twin.blocks:
            block.attn1.processor.storing = storing
        return twin(chunk, torch.tensor([timestep]), condition.prompt_embeds).sample

    ours = stream(model, KVCache.empty(spec, CONFIG.num_layers), latents, (NOISY,))
    for chunk, velocity in zip(chunks_of(latents), ours):
        assert (velocity - plain_pass(chunk, NOISY, storing=False)).abs().max() < 4e-6
        plain_pass(chunk, 0.0, storing=True)


@pytest.mark.parametrize("window", [1, 2])
@torch.no_grad()
def test_slot_is_absolute_without_sinks_only(window: int):
    model, latents = perturbed_dit(CONFIG), make_latents(CONFIG, frames=6 * CHUNK)

    def difference(sinks: int) -> float:
        outputs = [
            stream(model, KVCache.empty(CacheSpec(CHUNK, sinks, window, positions), 2), latents, (NOISY,))[-1]
            for positions in ("slot", "absolute")
        ]
        return (outputs[0] - outputs[1]).abs().max().item()

    assert difference(sinks=0) < 4e-6
    assert difference(sinks=1) > 1e-4


@pytest.mark.parametrize("positions", ["slot", "absolute"])
@pytest.mark.parametrize(("sinks", "window"), [*WINDOWS, (0, 1), (1, 2), (1, 0), (0, 0), (1, None)])
@torch.no_grad()
def test_static_cache_equals_immutable_cache(sinks: int, window: int | None, positions: str):
    model, latents = perturbed_dit(CONFIG), make_latents(CONFIG, frames=13 * CHUNK, batch=2)
    spec = CacheSpec(CHUNK, sinks, window, positions)
    static = StaticKVCache.empty(spec, CONFIG.num_layers, max_chunks=13)
    expected = stream(model, KVCache.empty(spec, CONFIG.num_layers), latents, (900.0, 400.0))
    for ours, reference in zip(stream(model, static, latents, (900.0, 400.0)), expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=5e-6)


@torch.no_grad()
def test_static_cache_never_moves():
    model, latents = perturbed_dit(CONFIG), make_latents(CONFIG, frames=6 * CHUNK)
    cache = StaticKVCache.empty(CacheSpec(CHUNK, 1, 2), CONFIG.num_layers)
    prepared, addresses = model.prepare(make_condition(CONFIG)), set()
    for chunk in chunks_of(latents):
        context = cache.context(GRID)
        model(chunk, torch.tensor([NOISY]), prepared, attention=context)
        addresses.add(context.extend(0, *[torch.zeros(1, 2, TOKENS, 40)] * 2)[0].data_ptr())
        cache.append(model.cache_pass(chunk, prepared, context))
    assert len(addresses) == 1


@pytest.mark.parametrize("make", [KVCache.empty, StaticKVCache.empty])
@torch.no_grad()
def test_snapshot_replays_the_same_stream(make: Callable[..., KVCache | StaticKVCache]):
    model, latents = perturbed_dit(CONFIG), make_latents(CONFIG, frames=7 * CHUNK)
    prepared, cache = model.prepare(make_condition(CONFIG)), make(CacheSpec(CHUNK, 1, 2), CONFIG.num_layers)
    chunks = chunks_of(latents)

    def run(
        cache: KVCache | StaticKVCache, first: int, last: int, offset: float
    ) -> tuple[KVCache | StaticKVCache, Tensor]:
        for chunk in chunks[first:last]:
            context = cache.context(GRID)
            velocity = model(chunk + offset, torch.tensor([NOISY]), prepared, attention=context)
            cache = cache.append(model.cache_pass(chunk + offset, prepared, context))
        return cache, velocity

    cache, _ = run(cache, 0, 4, 0.0)
    snapshot = cache.snapshot()
    cache, first = run(cache, 4, 7, 0.0)
    cache, _ = run(cache.restore(snapshot), 4, 6, 1.0)
    cache, again = run(cache.restore(snapshot), 4, 7, 0.0)
    assert torch.equal(first, again) and cache.chunk_index == 7


def test_gradient_stops_at_the_cache():
    """Four chunks in one graph give the gradient of diffusers chunk by chunk with constant past keys."""
    model, latents = perturbed_dit(CONFIG), make_latents(CONFIG, frames=4 * CHUNK)
    condition, twin = make_condition(CONFIG), diffusers_twin(model)
    weight = torch.randn(chunks_of(latents)[0].shape, generator=rng(9))
    cache = KVCache.empty(CacheSpec(CHUNK, 1, 1, "absolute"), CONFIG.num_layers)
    inputs, total = [chunk.clone().requires_grad_() for chunk in chunks_of(latents)], 0.0
    for chunk in inputs:
        context = cache.context(GRID)
        loss = (model(chunk, torch.tensor([NOISY]), condition, attention=context) * weight).sum()
        total = total + loss
        cache = cache.append(model.cache_pass(chunk, condition, context))
    assert torch.autograd.grad(loss, inputs[0], retain_graph=True, allow_unused=True) == (None,)
    total.backward()

    for chunk in range(4):
        frames, tokens = (chunk + 1) * CHUNK, (chunk + 1) * TOKENS
        mask = dense_mask(1, 1, chunk + 1, TOKENS)
        set_attention(twin, lambda mask=mask, past=chunk * TOKENS: MaskedAttention(mask, past))
        timestep = torch.zeros(1, tokens)
        timestep[:, -TOKENS:] = NOISY
        velocity = twin(latents[:, :, :frames], timestep, condition.prompt_embeds).sample[:, :, -CHUNK:]
        (velocity * weight).sum().backward()
    for ours, theirs in (
        (model.blocks[0].self_attn.k.weight, twin.blocks[0].attn1.to_k.weight),
        (model.blocks[1].cross_attn.v.weight, twin.blocks[1].attn2.to_v.weight),
        (model.text_embedding[0].weight, twin.condition_embedder.text_embedder.linear_1.weight),
        (model.time_embedding[0].weight, twin.condition_embedder.time_embedder.linear_1.weight),
    ):
        error = (ours.grad - theirs.grad).norm() / theirs.grad.norm()
        assert error < 1e-5, error


def test_cache_pass_gives_the_keys_that_forward_uses():
    model, latents = perturbed_dit(CONFIG), make_latents(CONFIG, frames=CHUNK)
    condition, taps = make_condition(CONFIG), AttentionTaps(range(CONFIG.num_layers))
    model(latents, torch.zeros(1), condition, taps=taps)
    layers = model.cache_pass(latents, condition, KVCache.empty(CacheSpec(CHUNK, 1, 1), 2).context(GRID))
    context = KVCache.empty(CacheSpec(CHUNK, 1, 1), 2).append(layers).context(GRID)
    assert len(taps.seen) == CONFIG.num_layers
    for layer, tap in taps.seen.items():
        assert not layers[layer].key.requires_grad
        torch.testing.assert_close(context.layers[layer].key, tap.key)
        torch.testing.assert_close(context.layers[layer].value, tap.value)


def test_what_is_appended_is_detached():
    layer = LayerKV(*(torch.zeros(1, 2, TOKENS, 40, requires_grad=True) * 2.0 for _ in range(2)))
    context = KVCache.empty(CacheSpec(CHUNK, 1, 1), 1).append([layer]).context(GRID)
    assert not context.layers[0].key.requires_grad and not context.layers[0].value.requires_grad


@torch.no_grad()
def test_growing_cache_ends_at_its_capacity():
    model, latents = perturbed_dit(CONFIG), make_latents(CONFIG, frames=3 * CHUNK)
    with pytest.raises(ValueError, match="chunk 2 exceeds max_chunks=2"):
        stream(model, StaticKVCache.empty(CacheSpec(CHUNK, 0, None), 2, max_chunks=2), latents, (NOISY,))


def test_misuse_is_refused():
    spec = CacheSpec(CHUNK, 1, 1)
    with pytest.raises(ValueError, match="max_chunks"):
        StaticKVCache.empty(CacheSpec(CHUNK, 0, None), 2)
    with pytest.raises(ValueError, match="positions='ring'"):
        CacheSpec(CHUNK, 1, 1, "ring")
    with pytest.raises(ValueError, match="1 layers"):
        KVCache.empty(spec, 2).append([LayerKV(torch.zeros(1, 2, 18, 40), torch.zeros(1, 2, 18, 40))])
    model, condition = perturbed_dit(CONFIG), make_condition(CONFIG)
    static = StaticKVCache.empty(spec, 2)
    with pytest.raises(RuntimeError, match="cannot carry gradients"):
        model(make_latents(CONFIG, CHUNK), torch.zeros(1), condition, attention=static.context(GRID))
    with pytest.raises(ValueError, match=r"2 latent frames .* 3 frames"):
        model(make_latents(CONFIG, 2), torch.zeros(1), condition, attention=static.context(GRID))
    with torch.no_grad():
        context = static.context(GRID)
        layers = model.cache_pass(make_latents(CONFIG, CHUNK), condition, context)
        static.append(layers)
        with pytest.raises(RuntimeError, match="of chunk 0, but the cache is at chunk 1"):
            model(make_latents(CONFIG, CHUNK), torch.zeros(1), condition, attention=context)
        with pytest.raises(ValueError, match="another size"):
            model(
                make_latents(CONFIG, CHUNK, height=8),
                torch.zeros(1),
                condition,
                attention=static.context((4, 3)),
            )


def random_layers(seed: int) -> list[LayerKV]:
    parts = torch.randn(2, 2, 1, 2, TOKENS, 40, generator=rng(seed))
    return [LayerKV(key, value) for key, value in parts]


def run_chunk(cache: StaticKVCache, seed: int) -> list[Tensor]:
    """One chunk of random keys; returns all that it saw."""
    context, layers = cache.context(GRID), random_layers(seed)
    seen = [t.clone() for n, kv in enumerate(layers) for t in context.extend(n, kv.key + 1, kv.value + 1)]
    cache.append(layers)
    return seen


@settings(max_examples=60, deadline=None)
@given(
    sinks=st.integers(0, 2), window=st.integers(0, 3), positions=st.sampled_from(["slot", "absolute"]),
    history=st.integers(1, 4), done=st.integers(1, 9), back=st.integers(0, 9), begin=st.booleans(),
)  # fmt: skip
@example(sinks=0, window=2, positions="slot", history=1, done=2, back=1, begin=False)
@example(sinks=1, window=1, positions="slot", history=4, done=9, back=4, begin=False)  # two of them in one slot
def test_rewinding_repeats_the_stream_bit_for_bit(
    sinks: int, window: int, positions: str, history: int, done: int, back: int, begin: bool
):
    cache = StaticKVCache.empty(CacheSpec(CHUNK, sinks, window, positions), 2, history_chunks=history)
    first = [run_chunk(cache, seed) for seed in range(done)]
    if begin:  # a chunk that was given up half way
        cache.context(GRID).extend(0, *[torch.ones(1, 2, TOKENS, 40)] * 2)
    target = done - back
    if target < 0 or back + begin > history:
        with pytest.raises(ValueError, match="must be in"):
            cache.rewind(target)
        return
    cache.rewind(target)
    again = [run_chunk(cache, seed) for seed in range(target, done)]
    for expected, found in zip(first[target:], again):
        assert all(torch.equal(a, b) for a, b in zip(expected, found))


@pytest.mark.parametrize("positions", ["slot", "absolute"])
def test_after_rewinding_the_chunk_before_can_still_read_its_context(positions: str):
    cache = StaticKVCache.empty(CacheSpec(CHUNK, 1, 2, positions), 2, history_chunks=4)
    seen = []
    for seed in range(9):
        run_chunk(cache, seed)
        seen.append([t.clone() for kv in cache.past(1, seed) for t in (kv.key, kv.value)])
    cache.rewind(6)
    for expected, found in zip(seen[5], [t for kv in cache.past(1, 5) for t in (kv.key, kv.value)]):
        assert torch.equal(expected, found)
    cache.rewind(5)  # as far as it goes: what chunk 4 saw was overwritten by chunk 5
    with pytest.raises(RuntimeError, match="context of chunk 4 is gone"):
        cache.past(1, 4)


def test_a_context_is_current_until_its_chunk_is_finished_or_taken_back():
    cache = StaticKVCache.empty(CacheSpec(CHUNK, 1, 1), 2, history_chunks=4)
    run_chunk(cache, 0)
    context = cache.context(GRID)
    assert context.is_current
    cache.append(random_layers(1))
    assert not context.is_current
    cache.rewind(1)  # its slot may hold what the chunk before needs
    assert not context.is_current
    with pytest.raises(RuntimeError, match="call cache.context"):
        context.extend(0, *[torch.ones(1, 2, TOKENS, 40)] * 2)
    assert cache.context(GRID).is_current


def test_the_latest_chunk_of_a_snapshot_can_be_taken_back_in_another_cache():
    spec = CacheSpec(CHUNK, 1, 2)
    first, other = StaticKVCache.empty(spec, 2), StaticKVCache.empty(spec, 2)
    seen = [run_chunk(first, seed) for seed in range(7)]
    other.restore(first.snapshot()).rewind(6)
    assert all(torch.equal(a, b) for a, b in zip(seen[6], run_chunk(other, 6)))


def test_what_a_cache_remembered_before_it_was_restored_is_forgotten():
    spec = CacheSpec(CHUNK, 1, 2)
    cache, other = (StaticKVCache.empty(spec, 2, history_chunks=4) for _ in range(2))
    for seed in range(9):
        run_chunk(cache, seed)
        if seed < 8:
            run_chunk(other, seed + 100)
    cache.restore(other.snapshot()).rewind(7)
    with pytest.raises(RuntimeError, match="context of chunk 6 is gone"):
        cache.past(0, 6)
