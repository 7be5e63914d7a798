"""The chunk loop: equal to masked attention, to itself under another cache, and exact in its gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models.condition import Condition, num_pixel_frames
from models.diffusion.noise import KeyedNoise
from models.diffusion.prediction import add_noise
from models.rollout import (
    Chunk,
    ChunkStart,
    GradientPolicy,
    Rollout,
    RolloutConfig,
    draw_exit_step,
    replay_exit_step,
    rollout,
)
from models.wan.config import WanConfig
from models.wan.dit import WanDiT

SHAPE = (4, 4, 6)  # C, h, w
IDS = [5, 77]
FRAMES = 2  # latent frames in a chunk


def student(num_layers: int = 2, **changes) -> WanDiT:
    torch.manual_seed(0)
    dit = WanDiT(WanConfig.tiny(num_layers=num_layers, track_channels=4, **changes))
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return dit


def config(**changes) -> RolloutConfig:
    return RolloutConfig(**({"chunk_frames": FRAMES} | changes))


def condition(num_chunks: int, image: bool = False) -> Condition:
    rng = torch.Generator().manual_seed(1)
    num_frames = num_pixel_frames(num_chunks * FRAMES)
    return Condition(
        prompt_embeds=torch.randn(2, 8, 24, generator=rng),
        null_prompt_embeds=torch.zeros(1, 8, 24),
        track_map=torch.randn(2, 8, num_frames, 4, 6, generator=rng),
        image_latents=torch.randn(2, 4, 1, 4, 6, generator=rng) if image else None,
    )


def start(dit: WanDiT, cfg: RolloutConfig, **changes) -> Rollout:
    arguments = {"noise": KeyedNoise(0), "sample_ids": IDS, "latent_shape": SHAPE}
    return Rollout(dit, cfg, **(arguments | changes))


def clip(dit: WanDiT, cfg: RolloutConfig, num_chunks: int, given: Condition | None = None, **changes) -> list[Chunk]:
    arguments = {"noise": KeyedNoise(0), "sample_ids": IDS, "latent_shape": SHAPE} | changes
    given = condition(num_chunks) if given is None else given
    return list(rollout(dit, given, cfg, num_chunks=num_chunks, **arguments))


def latents(chunks: list[Chunk]) -> torch.Tensor:
    return torch.cat([chunk.x0 for chunk in chunks], 2)


# --- configuration --------------------------------------------------------------------------------


def test_default_steps_are_those_of_motionstream():
    assert [round(1000 * sigma, 2) for sigma in RolloutConfig().sigmas] == [1000.0, 927.27, 771.43]
    assert RolloutConfig().validate_clip(21) == 7


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"step_indices": [16, 32]}, "step_indices"),
        ({"step_indices": [0, 32, 16]}, "step_indices"),
        ({"step_indices": [0, 50]}, "num_inference_steps=50"),
        ({"step_indices": []}, "step_indices"),
        ({"context_noise": 1.0}, "context_noise=1.0"),
        ({"context_noise": 0.1, "merged_cache": True}, "context_noise=0.1 must be 0"),
        ({"positions": "relative"}, "positions"),
        ({"chunk_frames": 0}, "chunk_frames=0"),
    ],
)
def test_contradictions_are_named(changes, match):
    with pytest.raises(ValueError, match=match):
        RolloutConfig(**changes)


def test_a_clip_that_is_not_whole_chunks_is_refused():
    with pytest.raises(ValueError, match=r"num_latents=31 must be a multiple.*valid: 30 \(117 frames\)"):
        RolloutConfig().validate_clip(31)


# --- the loop itself ------------------------------------------------------------------------------


def test_first_chunk_is_the_sampler_written_out():
    dit, cfg, given = student(), config(), condition(1)
    noise, shape, key = KeyedNoise(0), (4, FRAMES, 4, 6), ("rollout", 0)
    context = start(dit, cfg).cache.context((2, 3))
    with torch.no_grad():
        x = noise.normal(shape, IDS, *key, 0, "start")
        for step, sigma in enumerate(cfg.sigmas):
            if step:
                x = add_noise(x0, noise.normal(shape, IDS, *key, step, "renoise"), sigma)  # noqa: F821
            x0 = dit.predict_x0(x, sigma, given, attention=context)
    torch.testing.assert_close(clip(dit, cfg, 1)[0].x0, x0, atol=1e-5, rtol=1e-4)


def test_renoising_is_fresh_and_differs_between_chunks_steps_and_samples():
    drawn = []

    class Recorder(KeyedNoise):
        def normal(self, *args, **kwargs):
            drawn.append(super().normal(*args, **kwargs))
            return drawn[-1]

    clip(student(1), config(), 3, noise=Recorder(0))
    assert len(drawn) == 9  # three per chunk, none for the cache pass at sigma 0
    flat = torch.stack(drawn).flatten(2).flatten(0, 1)
    assert len(flat.unique(dim=0)) == len(flat)


def test_same_keys_same_clip_other_seed_or_key_another():
    dit, cfg = student(1), config()
    reference = latents(clip(dit, cfg, 2))
    torch.manual_seed(123)
    assert torch.equal(reference, latents(clip(dit, cfg, 2)))
    assert not torch.equal(reference, latents(clip(dit, cfg, 2, noise=KeyedNoise(1))))
    assert not torch.equal(reference, latents(clip(dit, cfg, 2, noise_key=("update", 1))))


def test_a_sample_does_not_depend_on_its_batch():
    dit, cfg, given = student(1), config(), condition(2)
    alone = Condition(given.prompt_embeds[1:], given.null_prompt_embeds, given.track_map[1:])
    chunks = clip(dit, cfg, 2, alone, sample_ids=IDS[1:])
    torch.testing.assert_close(latents(chunks)[0], latents(clip(dit, cfg, 2))[1], atol=1e-5, rtol=1e-4)


def test_a_chunk_depends_on_its_own_tracks_and_the_past_only():
    dit, cfg, given = student(1), config(), condition(3)
    later = given.track_map.clone()
    later[:, :, 5:13] += 1.0  # chunk 1: pixel frames 5..12
    changed = clip(dit, cfg, 3, replace(given, track_map=later))
    same = [torch.equal(a.x0, b.x0) for a, b in zip(clip(dit, cfg, 3, given), changed, strict=True)]
    assert same == [True, False, False]


@pytest.mark.parametrize(("sinks", "window"), [(1, 1), (0, 2), (2, 1), (1, 3), (0, None)])
def test_streaming_equals_attention_under_the_chunk_mask(sinks, window):
    dit, num_chunks = student(), 5
    cfg = config(sink_chunks=sinks, window_chunks=window, positions="absolute")
    given = condition(num_chunks)
    chunks = clip(dit, cfg, num_chunks, given, record=True)
    for last in (1, num_chunks - 1):
        record = chunks[last].record
        sequence = torch.cat([*[chunk.x0 for chunk in chunks[:last]], record.noisy_latents], 2)
        sigma = torch.zeros(2, sequence.shape[2])
        sigma[:, last * FRAMES :] = record.sigma
        part = replace(given, track_map=given.track_map[:, :, : num_pixel_frames(sequence.shape[2])])
        with torch.no_grad():
            masked = dit.predict_x0(sequence, sigma, part, attention=cfg.cache_spec.mask)
        torch.testing.assert_close(chunks[last].x0, masked[:, :, last * FRAMES :], atol=1e-5, rtol=1e-4)


def test_slots_equal_absolute_positions_without_a_sink_and_differ_with_one():
    dit = student()
    for sinks, equal in ((0, True), (1, False)):
        slot, absolute = (
            latents(clip(dit, config(sink_chunks=sinks, window_chunks=1, positions=positions), 5))
            for positions in ("slot", "absolute")
        )
        assert torch.allclose(slot, absolute, atol=1e-4) == equal


@pytest.mark.parametrize("positions", ["slot", "absolute"])
@pytest.mark.parametrize(("sinks", "window"), [(1, 1), (0, 2), (2, 3), (1, 0), (1, None)])
def test_static_cache_equals_immutable_cache(sinks, window, positions):
    dit = student()
    cfg = config(sink_chunks=sinks, window_chunks=window, positions=positions, step_indices=[0, 25])
    immutable, static = (latents(clip(dit, cfg, 6, cache=cache)) for cache in ("immutable", "static"))
    torch.testing.assert_close(static, immutable, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_compiled_blocks_stream_as_they_are():
    """The buffers that a compiled block asks for are written to by what is not compiled too."""
    dit, cfg = student(num_layers=1), config(window_chunks=2)
    expected = latents(clip(dit, cfg, 3, cache="static"))
    dit.blocks[0].compile(backend="aot_eager")
    torch.testing.assert_close(latents(clip(dit, cfg, 3, cache="static")), expected, atol=1e-5, rtol=0)


def test_context_noise_is_added_only_where_asked():
    dit = student(1)
    clean, noisy = clip(dit, config(), 2), clip(dit, config(context_noise=0.1), 2)
    assert torch.equal(clean[0].x0, noisy[0].x0) and not torch.equal(clean[1].x0, noisy[1].x0)


@pytest.mark.parametrize("image_conditioning", ["none", "first_frame"])
def test_a_merged_cache_is_that_of_the_last_pass_without_a_pass_of_its_own(image_conditioning, monkeypatch):
    """What is kept of the last pass equals the same pass run again, which is what gradients make necessary."""
    dit, cfg = student(image_conditioning=image_conditioning), config(merged_cache=True)
    given = condition(3, image=image_conditioning == "first_frame")
    run_again = latents(clip(dit, cfg, 3, given, gradient=GradientPolicy.EXIT_STEP)).detach()
    counts = count_calls(dit, monkeypatch, "predict_x0", "predict_x0_and_cache", "cache_pass")
    merged = latents(clip(dit, cfg, 3, given))
    assert counts == {"predict_x0": 7, "predict_x0_and_cache": 2, "cache_pass": 0}  # none is kept of the last chunk
    torch.testing.assert_close(merged, run_again, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(latents(clip(dit, cfg, 3, given, cache="static")), merged, atol=2e-5, rtol=1e-4)
    separate = latents(clip(dit, config(), 3, given))
    assert torch.equal(merged[:, :, :FRAMES], separate[:, :, :FRAMES])
    assert not torch.allclose(merged, separate, atol=1e-3)


def test_a_merged_cache_after_an_early_exit_is_as_noisy_as_after_a_late_one(monkeypatch):
    dit, cfg, levels = student(1), config(merged_cache=True), []
    cache_pass = dit.cache_pass
    monkeypatch.setattr(dit, "cache_pass", lambda *args: levels.append(args[0]) or cache_pass(*args))
    early = clip(dit, cfg, 2, exit_step=1)
    noise = KeyedNoise(0).normal((4, FRAMES, 4, 6), IDS, "rollout", 0, cfg.num_steps - 1, "renoise")
    assert torch.equal(levels[0], add_noise(early[0].x0, noise, cfg.sigmas[-1]))


# --- shared work ----------------------------------------------------------------------------------


def count_calls(dit: WanDiT, monkeypatch, *names: str) -> dict[str, int]:
    counts = dict.fromkeys(names, 0)
    for name in names:
        original = getattr(dit, name)

        def counted(*args, original=original, name=name, **kwargs):
            counts[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(dit, name, counted)
    return counts


def test_work_is_shared_between_passes(monkeypatch):
    dit = student(1)
    counts = count_calls(dit, monkeypatch, "prepare_text", "prepare", "modulation", "predict_x0", "cache_pass")
    clip(dit, config(), 3)
    # once per prompt; per chunk; three steps and the cache level; 3 x 3 passes; none after the last chunk
    expected = {"prepare_text": 1, "prepare": 3, "modulation": 4, "predict_x0": 9, "cache_pass": 2}
    assert counts == expected


def test_exit_step_stops_early_and_is_the_prediction_at_that_level(monkeypatch):
    dit, cfg = student(1), config()
    counts = count_calls(dit, monkeypatch, "predict_x0")
    chunk = clip(dit, cfg, 1, exit_step=1, record=True)[0]
    assert counts["predict_x0"] == 2
    assert chunk.record.sigma == cfg.sigmas[1]
    with torch.no_grad():
        torch.testing.assert_close(replay_exit_step(dit, chunk.record), chunk.x0, atol=1e-5, rtol=1e-4)
    full = clip(dit, cfg, 1)[0]
    assert torch.equal(clip(dit, cfg, 1, exit_step=2)[0].x0, full.x0)
    assert not torch.equal(chunk.x0, full.x0)


def test_exit_steps_come_from_the_key_and_cover_all_steps():
    steps = [draw_exit_step(KeyedNoise(4), RolloutConfig(), "update", step) for step in range(50)]
    assert set(steps) == {0, 1, 2}
    assert steps == [draw_exit_step(KeyedNoise(4), RolloutConfig(), "update", step) for step in range(50)]


# --- gradients ------------------------------------------------------------------------------------


def gradients(dit: WanDiT) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad for name, parameter in dit.named_parameters() if parameter.grad is not None}
    dit.zero_grad()
    return found


def loss_weights(num_chunks: int) -> torch.Tensor:
    shape = (num_chunks, 2, 4, FRAMES, 4, 6)
    return torch.randn(shape, generator=torch.Generator().manual_seed(9))


def one_pass(dit: WanDiT, cfg: RolloutConfig, given: Condition, exit_step: int) -> dict[str, torch.Tensor]:
    chunks = clip(dit, cfg, 3, given, exit_step=exit_step, gradient=GradientPolicy.EXIT_STEP)
    sum((chunk.x0 * weight).sum() for chunk, weight in zip(chunks, loss_weights(3), strict=True)).backward()
    return gradients(dit)


def two_pass(dit: WanDiT, cfg: RolloutConfig, given: Condition, exit_step: int) -> dict[str, torch.Tensor]:
    chunks = clip(dit, cfg, 3, given, exit_step=exit_step, record=True)
    assert not any(chunk.x0.requires_grad for chunk in chunks)
    for chunk, weight in zip(chunks, loss_weights(3), strict=True):
        (replay_exit_step(dit, chunk.record) * weight).sum().backward()
    return gradients(dit)


def relative_error(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    difference = sum((first[name] - second[name]).double().square().sum() for name in first)
    return (difference / sum(grad.double().square().sum() for grad in second.values())).sqrt().item()


@pytest.mark.parametrize("exit_step", [0, 2])
@pytest.mark.parametrize("image_conditioning", ["none", "first_frame"])
def test_two_pass_gradient_equals_one_pass_gradient(image_conditioning, exit_step):
    dit = student(image_conditioning=image_conditioning)
    given = condition(3, image=image_conditioning == "first_frame")
    single, double = (run(dit, config(), given, exit_step) for run in (one_pass, two_pass))
    assert relative_error(double, single) < 1e-5
    reached = {name for name, grad in single.items() if grad.abs().sum() > 0}
    assert reached == {name for name, _ in dit.named_parameters()}  # text and track weights learn too


def test_activation_checkpointing_does_not_change_the_gradient():
    plain, checkpointed = (student(activation_checkpointing=on) for on in (False, True))
    assert relative_error(*(one_pass(dit, config(), condition(3), 1) for dit in (checkpointed, plain))) < 1e-5


def test_no_gradient_leaks_into_earlier_chunks():
    dit, given = student(), condition(3)
    track_map = given.track_map.clone().requires_grad_(True)
    chunks = clip(dit, config(), 3, replace(given, track_map=track_map), gradient=GradientPolicy.EXIT_STEP)
    chunks[2].x0.sum().backward()
    assert not track_map.grad[:, :, :13].any() and track_map.grad[:, :, 13:].any()


def test_gradient_survives_autocast_around_the_whole_step():
    dit, given = student(), condition(3)
    exact = two_pass(dit, config(), given, 1)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = two_pass(dit, config(), given, 1)
    assert relative_error(mixed, exact) < 0.1


def test_records_share_what_is_cached():
    dit = student(1)
    chunks = clip(dit, config(), 3, record=True)
    keys = [id(layers[0].key) for chunk in chunks for _, layers in chunk.record.cache.kept]
    assert len(keys) == 3 and len(set(keys)) == 2  # records share the context: chunk 0 is stored once


# --- clean first frame ----------------------------------------------------------------------------


@pytest.mark.parametrize("context_noise", [0.0, 0.2])
def test_clean_first_frame_stays_clean_in_every_pass(context_noise, monkeypatch):
    dit, given = student(image_conditioning="first_frame"), condition(2, image=True)
    passes = []

    def edit(shown):
        passes.append(shown.noisy_latents)
        return shown.noisy_latents + 0.1  # of the given frame too

    cached = []
    original = dit.cache_pass
    monkeypatch.setattr(dit, "cache_pass", lambda x, *a, **k: cached.append(x) or original(x, *a, **k))
    video = start(dit, config(context_noise=context_noise))
    first = video.next_chunk(given.chunk(0, FRAMES), record=True, edit=edit)
    for seen in (*passes, *cached, first.x0, first.record.noisy_latents):
        assert torch.equal(seen[:, :, :1], given.image_latents)
    second = video.next_chunk(given.chunk(FRAMES, FRAMES), edit=edit)
    assert len(passes) == 6 and len(cached) == 2
    assert not torch.equal(second.x0[:, :, :1], given.image_latents)


def test_first_frame_static_equals_immutable():
    dit, given = student(image_conditioning="first_frame"), condition(4, image=True)
    immutable, static = (latents(clip(dit, config(), 4, given, cache=cache)) for cache in ("immutable", "static"))
    torch.testing.assert_close(static, immutable, atol=2e-5, rtol=1e-4)


# --- sessions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["immutable", "static"])
@pytest.mark.parametrize("window", [1, 2])
def test_restoring_a_boundary_repeats_the_chunks_bit_for_bit(cache, window):
    dit, given = student(), condition(6)
    parts = [given.chunk(index * FRAMES, FRAMES) for index in range(6)]
    video = start(dit, config(window_chunks=window), cache=cache)
    for part in parts[:3]:
        video.next_chunk(part)
    boundary = video.snapshot()
    first = [video.next_chunk(part).x0 for part in parts[3:]]
    video.restore(boundary)
    assert video.chunk_index == 3
    assert all(torch.equal(x0, video.next_chunk(part).x0) for x0, part in zip(first, parts[3:], strict=True))
    video.restore(boundary)
    other = video.next_chunk(parts[3].drop("motion")).x0
    assert not torch.equal(other, first[0])


def test_a_boundary_whose_context_is_gone_takes_back_nothing():
    """A chunk that was begun and dropped has overwritten what the one before it saw."""

    def fail(prediction: object) -> None:
        raise KeyboardInterrupt

    dit, given = student(), condition(7)
    parts = [given.chunk(index * FRAMES, FRAMES) for index in range(7)]
    video = start(dit, config(), cache="static")
    for part in parts[:6]:
        video.next_chunk(part)
    with pytest.raises(KeyboardInterrupt):
        video.next_chunk(parts[6], edit=fail)
    video.rewind(6)
    video.restore(video.snapshot())
    assert video.earliest_boundary == 6
    with pytest.raises(ValueError, match=r"chunk=5 must be in 6\.\.6"):
        video.rewind(5)


@pytest.mark.parametrize("cache", ["immutable", "static"])
def test_restoring_the_very_start(cache):
    dit, given = student(1), condition(2)
    video = start(dit, config(), cache=cache)
    boundary = video.snapshot()
    first = video.next_chunk(given.chunk(0, FRAMES)).x0
    video.restore(boundary)
    assert torch.equal(first, video.next_chunk(given.chunk(0, FRAMES)).x0)


def test_a_new_prompt_takes_effect_at_the_next_chunk():
    dit, given = student(), condition(3)
    parts = [given.chunk(index * FRAMES, FRAMES) for index in range(3)]
    prompt = torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(8))
    plain, video = start(dit, config()), start(dit, config())
    reference = [plain.next_chunk(part).x0 for part in parts]
    assert torch.equal(video.next_chunk(parts[0]).x0, reference[0])
    boundary = video.snapshot()
    assert not torch.equal(video.next_chunk(replace(parts[1], prompt_embeds=prompt)).x0, reference[1])
    video.restore(boundary)
    assert torch.equal(video.next_chunk(parts[1]).x0, reference[1])


def test_a_new_image_beside_the_same_prompt_takes_effect_at_the_next_chunk():
    dit, rng = student(clip_dim=12), torch.Generator().manual_seed(2)
    first, second = (torch.randn(2, 257, 12, generator=rng) for _ in range(2))
    part = replace(condition(1).chunk(0, FRAMES), clip_embeds=first)
    found = []
    for clip_embeds in (first, second):
        video = start(dit, config())
        video.next_chunk(part)
        found.append(video.next_chunk(replace(condition(2).chunk(FRAMES, FRAMES), prompt_embeds=part.prompt_embeds,
                                              clip_embeds=clip_embeds)).x0)  # fmt: skip
    assert not torch.equal(*found)


@pytest.mark.parametrize("cache", ["immutable", "static"])
def test_an_edit_that_changes_nothing_reproduces_the_chunk_bit_for_bit(cache):
    dit, part = student(), condition(1).chunk(0, FRAMES)
    plain = start(dit, config(), cache=cache).next_chunk(part).x0
    seen = []

    def keep(shown):
        seen.append((shown.chunk, shown.step, round(1000 * shown.sigma, 2)))
        return shown.noisy_latents

    assert torch.equal(start(dit, config(), cache=cache).next_chunk(part, edit=keep).x0, plain)
    assert seen == [(0, 0, 1000.0), (0, 1, 927.27), (0, 2, 771.43)]
    shifted = start(dit, config(), cache=cache).next_chunk(part, edit=lambda shown: shown.noisy_latents + 0.1)
    assert not torch.equal(shifted.x0, plain)


def test_no_gradient_of_a_replay_reaches_an_edit():
    dit, part, weight = student(1), condition(1).chunk(0, FRAMES), torch.ones((), requires_grad=True)

    def scaled(shown):
        with torch.enable_grad():
            return shown.noisy_latents * weight

    chunk = start(dit, config()).next_chunk(part, edit=scaled, record=True)
    replay_exit_step(dit, chunk.record).sum().backward()
    assert weight.grad is None


@pytest.mark.parametrize("merged", [False, True])
def test_what_each_step_predicts_may_be_changed_the_last_included(merged):
    dit, part = student(), condition(1).chunk(0, FRAMES)
    plain, seen = [], []
    expected = start(dit, config(merged_cache=merged)).next_chunk(part, edit_x0=lambda x0: plain.append(x0) or x0)
    assert torch.equal(expected.x0, start(dit, config(merged_cache=merged)).next_chunk(part).x0)
    found = start(dit, config(merged_cache=merged)).next_chunk(part, edit_x0=lambda x0: seen.append(x0) or x0 / 2)
    assert torch.equal(expected.x0, plain[-1]) and torch.equal(found.x0, seen[-1] / 2)
    assert [torch.equal(a, b) for a, b in zip(plain, seen, strict=True)] == [True, False, False]


@pytest.mark.parametrize("merged", [False, True])
def test_what_passes_without_gradients_leave_behind_can_be_part_of_a_graph(merged):
    dit, part, weight = student(), condition(3), torch.ones((), requires_grad=True)
    video, left = start(dit, config(merged_cache=merged), cache="static"), []

    def keep(shown):
        past = shown.context.past(0)
        left.extend([shown.noisy_latents, *(kv.key for kv in past), *(kv.value for kv in past)])
        return shown.noisy_latents

    for number in range(3):
        left.append(video.next_chunk(part.chunk(number * FRAMES, FRAMES), edit=keep).x0)
    torch.stack([(x * weight).sum() for x in left]).sum().backward()  # an inference tensor would refuse
    assert weight.grad is not None and torch.isfinite(weight.grad)


def test_a_video_goes_on_past_any_training_length():
    dit, part = student(1), condition(2)
    video = start(dit, config(step_indices=[0]), cache="static")
    video.next_chunk(part.chunk(0, FRAMES))
    for _ in range(40):
        chunk = video.next_chunk(part.chunk(FRAMES, FRAMES))
    assert chunk.index == 40 and torch.isfinite(chunk.x0).all()


# --- refusals -------------------------------------------------------------------------------------


def test_bad_requests_are_named():
    dit, part = student(1), condition(1).chunk(0, FRAMES)
    with pytest.raises(ValueError, match="cache='ring' must be one of"):
        start(dit, config(), cache="ring")
    with pytest.raises(ValueError, match=r"exit_step=3 must be in 0\.\.2"):
        start(dit, config()).next_chunk(part, exit_step=3)
    for step, exit_step, steps in ((3, None, "0..2"), (-1, None, "0..2"), (2, 1, "0..1")):
        begun = ChunkStart(step, torch.zeros(1))
        with pytest.raises(ValueError, match=f"start.step={step} must be in {steps}"):
            start(dit, config()).next_chunk(part, start=begun, exit_step=exit_step)
    with pytest.raises(ValueError, match="condition has batch 2, but there are 1"):
        start(dit, config(), sample_ids=[1]).next_chunk(part)
    static = start(dit, config(), cache="static")
    for request in ({"record": True}, {"gradient": GradientPolicy.EXIT_STEP}):
        with pytest.raises(ValueError, match="use 'immutable'"):
            static.next_chunk(part, **request)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, []),
        ({"num_inference_steps": 50, "step_indices": [0, 16, 32]}, []),  # the same noise levels, by another grid
        ({"step_indices": [0, 8, 20]}, ["step_indices"]),
        ({"shift": 5.0}, ["shift"]),
        ({"window_chunks": 3, "sink_chunks": 0}, ["sink_chunks", "window_chunks"]),
    ],
)
def test_what_a_student_has_not_been_trained_with_is_named(changes: dict, named: list[str]):
    cfg = RolloutConfig(num_inference_steps=25, step_indices=[0, 8, 16])
    trained_with = vars(cfg) | {"sink_chunks": [1], "window_chunks": [1, 2]}
    found = replace(cfg, **changes).differences(trained_with)
    assert [each.split("=")[0] for each in found] == named


def test_a_snapshot_belongs_to_its_kind_of_cache():
    dit = student(1)
    boundary = start(dit, config(), cache="static").snapshot()
    with pytest.raises(ValueError, match="other kind of cache"):
        start(dit, config()).restore(boundary)


def test_nothing_follows_a_chunk_without_cache_pass():
    part = condition(1).chunk(0, FRAMES)
    video = start(student(1), config())
    boundary = video.snapshot()
    video.next_chunk(part, update_cache=False)
    with pytest.raises(ValueError, match="update_cache=False"):
        video.next_chunk(part)
    video.restore(boundary)
    video.next_chunk(part)
    video = start(student(1), config(), cache="static")
    video.next_chunk(part, update_cache=False)
    video.rewind(0)
    video.next_chunk(part)
