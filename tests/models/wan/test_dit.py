"""Behaviour of the transformer at its boundaries: conditioning, time, precision, gradients, errors."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from wan_reference import make_condition, make_latents, perturbed_dit, rng

from models.wan.attention import ChunkMask
from models.wan.cache import CacheSpec, KVCache
from models.wan.config import WanConfig
from models.wan.dit import WanDiT, timestep_encoding

CONFIG = WanConfig.tiny()
TRACKED = WanConfig.tiny(track_channels=4, image_conditioning="fun_control")
FIRST_FRAME = WanConfig.tiny(image_conditioning="first_frame", track_channels=3)
T500 = torch.tensor([500.0])


def track_map(config: WanConfig, num_frames: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, config.track_id_dim, num_frames, 4, 6, generator=rng(7))


def test_fresh_model_predicts_zero_and_ignores_tracks():
    model, latents = WanDiT(TRACKED, rng()), make_latents(TRACKED, 3)
    condition = make_condition(TRACKED, track_map=track_map(TRACKED, 9))
    assert model(latents, T500, condition).abs().max() == 0  # zero head
    model.head.head.weight.data.normal_(generator=rng())
    with_tracks = model(latents, T500, condition)
    assert with_tracks.abs().max() > 0
    assert torch.equal(with_tracks, model(latents, T500, condition.drop("motion")))  # zero track head


def test_same_generator_same_weights():
    first, second = WanDiT(FIRST_FRAME, rng(3)).state_dict(), WanDiT(FIRST_FRAME, rng(3)).state_dict()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_chunk_of_the_condition_equals_that_part_of_the_clip():
    """No token sees another chunk under an S = W = 0 mask; positions and conditions must then line up."""
    model, latents = perturbed_dit(TRACKED), make_latents(TRACKED, 6)
    image = make_latents(TRACKED, 1, seed=5)
    condition = make_condition(TRACKED, track_map=track_map(TRACKED, 21), image_latents=image)
    whole = model(latents, T500, condition, attention=ChunkMask(3, 0, 0))
    for first in (0, 3):
        part = model(latents[:, :, first : first + 3], T500, condition.chunk(first, 3), start_frame=first)
        torch.testing.assert_close(part, whole[:, :, first : first + 3], rtol=0, atol=3e-6)


def test_batch_entries_do_not_mix_and_prepared_inputs_change_nothing():
    model, latents = perturbed_dit(TRACKED), make_latents(TRACKED, 3, batch=2)
    image = make_latents(TRACKED, 1, batch=2, seed=5)
    condition = make_condition(TRACKED, 2, track_map=track_map(TRACKED, 9, 2), image_latents=image)
    timestep = torch.tensor([[100.0, 200.0, 937.5], [0.0, 857.14, 3.0]])
    velocity = model(latents, timestep, condition)
    prepared, modulation = model.prepare(condition), model.modulation(timestep)
    torch.testing.assert_close(model(latents, modulation, prepared), velocity, rtol=0, atol=2e-6)
    alone = replace(
        condition,
        prompt_embeds=condition.prompt_embeds[1:],
        track_map=condition.track_map[1:],
        image_latents=image[1:],
    )
    torch.testing.assert_close(model(latents[1:], timestep[1:], alone), velocity[1:], rtol=0, atol=2e-6)
    shared = model.modulation(500.0)
    torch.testing.assert_close(
        model(latents, shared, prepared), model(latents, T500.expand(2), condition), rtol=0, atol=2e-6
    )


@torch.no_grad()
def test_fused_projections_change_nothing_and_follow_their_weights():
    model, latents, condition = perturbed_dit(CONFIG), make_latents(CONFIG, 3), make_condition(CONFIG)
    weights, expected = deepcopy(model.state_dict()), model(latents, T500, condition)
    model.fuse_projections()
    products = []
    model.blocks[0].self_attn.k.register_forward_hook(lambda *_: products.append(1))
    torch.testing.assert_close(model(latents, T500, condition), expected, rtol=0, atol=2e-6)
    assert products == []
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    model.blocks[0].self_attn.k.weight.zero_()
    unfused = perturbed_dit(CONFIG)
    unfused.blocks[0].self_attn.k.weight.data.zero_()
    changed = model(latents, T500, condition)
    torch.testing.assert_close(changed, unfused(latents, T500, condition), rtol=0, atol=2e-6)
    assert (changed - expected).abs().max() > 1e-3
    assert products == []
    torch.testing.assert_close(model.double().float()(latents, T500, condition), changed, rtol=0, atol=2e-6)
    assert products == [1]  # moved apart: three products again


def test_fused_projections_step_aside_where_gradients_are_wanted():
    model, latents, condition = perturbed_dit(CONFIG), make_latents(CONFIG, 3), make_condition(CONFIG)
    model.fuse_projections()
    model(latents, T500, condition).square().sum().backward()
    attention = model.blocks[0].self_attn
    assert all(layer.weight.grad.abs().max() > 0 for layer in (attention.q, attention.k, attention.v))


@torch.no_grad()
def test_adapters_are_not_fused_away():
    class Adapter(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1.0

    model, latents, condition = perturbed_dit(CONFIG), make_latents(CONFIG, 3), make_condition(CONFIG)
    model.blocks[0].self_attn.v.__class__ = Adapter
    expected = model(latents, T500, condition)
    model.fuse_projections()
    torch.testing.assert_close(model(latents, T500, condition), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("time", [T500, T500.expand(1, 3), "modulation"])
def test_first_frame_is_clean_for_every_caller(time: torch.Tensor | str):
    model, latents = perturbed_dit(FIRST_FRAME), make_latents(FIRST_FRAME, 3)
    condition = make_condition(
        FIRST_FRAME, track_map=track_map(FIRST_FRAME, 9), image_latents=make_latents(FIRST_FRAME, 1, seed=5)
    )
    time = model.modulation(500.0) if isinstance(time, str) else time
    velocity = model(latents, time, condition)
    clean = torch.cat([condition.image_latents, latents[:, :, 1:]], dim=2)
    by_hand = model(clean, torch.tensor([[0.0, 500.0, 500.0]]), replace(condition, image_latents=None))
    torch.testing.assert_close(velocity, by_hand, rtol=0, atol=2e-6)
    other_noise = torch.cat([latents[:, :, :1] + 9.0, latents[:, :, 1:]], dim=2)
    torch.testing.assert_close(model(other_noise, time, condition), velocity, rtol=0, atol=0)
    assert model.generated_frames(condition, 3).tolist() == [False, True, True]
    assert model.generated_frames(replace(condition, image_latents=None), 3).all()


def test_predict_x0():
    model, latents = perturbed_dit(FIRST_FRAME), make_latents(FIRST_FRAME, 3, batch=2)
    condition = make_condition(FIRST_FRAME, 2, track_map=track_map(FIRST_FRAME, 9, 2))
    expected = latents - 0.25 * model(latents, torch.full((2,), 250.0), condition)
    for sigma in (0.25, torch.tensor(0.25), torch.full((2,), 0.25), torch.full((2, 3), 0.25)):
        torch.testing.assert_close(model.predict_x0(latents, sigma, condition), expected, rtol=0, atol=2e-6)
    precomputed = model.predict_x0(latents, 0.25, condition, modulation=model.modulation(250.0))
    torch.testing.assert_close(precomputed, expected, rtol=0, atol=2e-6)
    image = make_latents(FIRST_FRAME, 1, batch=2, seed=5)
    clamped = model.predict_x0(latents, 0.25, replace(condition, image_latents=image))
    assert torch.equal(clamped[:, :, :1], image)


def test_first_frame_holds_in_the_cache_pass():
    model, latents = perturbed_dit(FIRST_FRAME), make_latents(FIRST_FRAME, 3)
    image = make_latents(FIRST_FRAME, 1, seed=5)
    condition = make_condition(FIRST_FRAME, track_map=track_map(FIRST_FRAME, 9), image_latents=image)
    context = KVCache.empty(CacheSpec(3, 1, 1), 2).context((2, 3))
    noisy = model.cache_pass(latents, condition, context, timestep=20.0)
    clean = torch.cat([image, latents[:, :, 1:]], dim=2)
    by_hand = model.cache_pass(
        clean, replace(condition, image_latents=None), context, timestep=torch.tensor([[0.0, 20.0, 20.0]])
    )
    for ours, expected in zip(noisy, by_hand, strict=True):
        torch.testing.assert_close(ours.key, expected.key, rtol=0, atol=2e-6)
        torch.testing.assert_close(ours.value, expected.value, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", ["bidirectional", "mask", "cache"])
def test_activation_checkpointing_changes_no_gradient(kind: str):
    latents, timestep = make_latents(TRACKED, 3, batch=2), torch.tensor([300.0, 800.0])
    condition = make_condition(TRACKED, 2, track_map=track_map(TRACKED, 9, 2))

    def gradients(recompute: bool) -> dict[str, torch.Tensor]:
        model = perturbed_dit(WanConfig.from_dict(TRACKED.to_dict() | {"activation_checkpointing": recompute}))
        attention = {"bidirectional": None, "mask": ChunkMask(1, 1, 1)}.get(kind)
        if kind == "cache":
            cache = KVCache.empty(CacheSpec(3, 1, 1), 2)
            for _ in range(3):  # into the steady state, where a rolling cache could be recomputed wrongly
                cache = cache.append(model.cache_pass(latents, condition, cache.context((2, 3))))
            attention = cache.context((2, 3))
        model(latents, timestep, condition, attention=attention).square().sum().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    plain, recomputed = gradients(False), gradients(True)
    for name, gradient in plain.items():
        assert gradient is not None and gradient.norm() > 0, name
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-6, atol=1e-7)


def test_text_prepared_without_grad_is_constant_and_condition_is_not():
    model, latents, condition = perturbed_dit(CONFIG), make_latents(CONFIG, 3), make_condition(CONFIG)
    with torch.no_grad():
        prepared = model.prepare(condition)
    model(latents, T500, prepared).square().sum().backward()
    assert model.text_embedding[0].weight.grad is None and model.blocks[0].cross_attn.q.weight.grad is not None
    model(latents, T500, condition).square().sum().backward()
    assert model.text_embedding[0].weight.grad is not None


def test_timestep_is_read_in_full_precision():
    encoding = timestep_encoding(torch.tensor([927.27]), 32)
    frequencies = 10_000.0 ** -(torch.arange(16, dtype=torch.float64) / 16)
    angles = torch.tensor([927.27]).double().unsqueeze(-1) * frequencies
    torch.testing.assert_close(encoding, torch.cat([angles.cos(), angles.sin()], -1).float(), rtol=0, atol=0)
    model, condition = perturbed_dit(CONFIG), make_condition(CONFIG)
    with pytest.raises(ValueError, match=r"bfloat16, which cannot hold 927\.27"):
        model(make_latents(CONFIG, 3), T500.bfloat16(), condition)


def test_bfloat16_keeps_time_and_output_in_float32():
    model, latents, condition = perturbed_dit(CONFIG), make_latents(CONFIG, 3), make_condition(CONFIG)
    exact = model(latents, T500, condition)
    expected_table = model.modulation(torch.tensor([927.27])).layers[0]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(latents, T500, condition)
        torch.testing.assert_close(model.modulation(torch.tensor([927.27])).layers[0], expected_table)
    half = model.bfloat16()(latents, T500, condition)
    for output in (mixed, half):
        assert output.dtype == torch.float32
        assert (output - exact).norm() / exact.norm() < 2e-2
    assert model.modulation(500.0).layers[0].dtype == torch.float32


def test_autocast_keeps_the_residual_stream_and_the_head_in_float32():
    model, seen = perturbed_dit(CONFIG), []
    for block in (*model.blocks, model.head.head):
        block.register_forward_hook(lambda module, args, output: seen.append((args[0].dtype, output.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        model(make_latents(CONFIG, 3), T500, make_condition(CONFIG))
    assert set(seen) == {(torch.float32, torch.float32)}


def test_per_frame_modulation_is_never_spread_over_tokens():
    model = perturbed_dit(CONFIG)
    assert model.modulation(torch.zeros(2, 3)).layers[0].shape == (2, 3, 6, CONFIG.dim)
    assert model.modulation(torch.zeros(2)).layers[0].shape == (2, 1, 6, CONFIG.dim)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(1, 5, 3, 4, 6)}, r"\[B, 4, F, H, W\]"),
        (
            {"latents": torch.zeros(2, 4, 3, 4, 6)},
            "the condition has batch 1, the latents have 2",
        ),
        ({"timestep": torch.zeros(1, 2)}, r"timestep has shape \(1, 2\); it must be \[1\] or \[1, 3\]"),
        ({"track_map": None}, "track_map=None, but this model has track_channels=4"),
        ({"track_map": track_map(TRACKED, 13)}, r"the tracks cover .*\(1, 4, 4, 4, 6\), the latents need"),
        (
            {"prompt_embeds": torch.zeros(1, 7, 24), "null_prompt_embeds": torch.zeros(1, 7, 24)},
            "zero-padded",
        ),
        ({"image_latents": torch.zeros(1, 4, 1, 2, 2)}, r"image_latents have shape \(1, 4, 1, 2, 2\)"),
        ({"attention": ChunkMask(2, 1, 1)}, r"3 latent frames .* chunk_frames=2"),
    ],
)
def test_errors_name_what_is_wrong(change: dict, message: str):
    change = dict(change)
    latents = change.pop("latents", make_latents(TRACKED, 3))
    timestep, attention = change.pop("timestep", T500), change.pop("attention", None)
    condition = replace(make_condition(TRACKED, track_map=track_map(TRACKED, 9)), **change)
    with pytest.raises(ValueError, match=message):
        perturbed_dit(TRACKED)(latents, timestep, condition, attention=attention)


def test_inputs_that_the_model_cannot_read_are_refused():
    latents = make_latents(CONFIG, 3)
    with pytest.raises(ValueError, match="4 x 5 must be a multiple of the patch 2 x 2"):
        perturbed_dit(CONFIG)(latents[..., :5], T500, make_condition(CONFIG))
    with pytest.raises(ValueError, match="image_conditioning='none'"):
        perturbed_dit(CONFIG)(latents, T500, make_condition(CONFIG, image_latents=latents[:, :, :1]))
    with pytest.raises(ValueError, match="a model without tracks"):
        perturbed_dit(CONFIG)(latents, T500, make_condition(CONFIG, track_map=track_map(CONFIG, 9)))
    clip = WanConfig.tiny(clip_dim=16)
    with pytest.raises(ValueError, match="clip_embeds=None, but this model attends to CLIP"):
        perturbed_dit(clip)(latents, T500, make_condition(CONFIG))
