"""Causal teacher: noise levels per chunk, what the loss counts, causality, golden losses, its export."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_distill import check_golden, make_batch, setup_context, step_context, train

from distill.causal_teacher import CausalTeacher, CausalTeacherConfig
from distill.roles import STUDENT
from models.wan.checkpoint import load_dit, read_provenance
from train.teacher import TEACHER


def build(model_cfg, tmp_path, **overrides) -> CausalTeacher:
    settings = {"init_from": model_cfg.teacher, "tracks_min": 2, "tracks_max": 5} | overrides
    stage = CausalTeacher(CausalTeacherConfig(**settings))
    stage.check(model_cfg)
    stage.setup(setup_context(model_cfg, tmp_path))
    return stage


def test_golden_losses(model_cfg, tmp_path):
    check_golden("causal_teacher", {"losses": train(build(model_cfg, tmp_path), range(4))})


def test_without_init_from_it_goes_on_from_the_models_teacher(model_cfg, tmp_path):
    stage = build(model_cfg, tmp_path, init_from=None)
    for name, value in load_dit(model_cfg.teacher).state_dict().items():
        assert torch.equal(stage.dit.state_dict()[name], value)
    assert f"start: {model_cfg.teacher}" in stage.describe()[0] and "no validation" in stage.describe()[-1]
    stage.export(tmp_path, stage.modules())
    assert read_provenance(tmp_path / STUDENT)["init_from"] == model_cfg.teacher
    with pytest.raises(ValueError, match=r"model\.teacher is not set"):
        build(replace(model_cfg, teacher=None), tmp_path, init_from=None)


def test_levels_are_shared_within_a_chunk_and_some_chunks_are_clean(model_cfg, tmp_path):
    stage = build(model_cfg, tmp_path)
    sigma = stage.draw_chunk_sigma(list(range(400)), 3, 9)
    chunks = sigma.view(400, 3, 3)
    assert torch.equal(chunks, chunks[:, :, :1].expand_as(chunks))
    assert 0.2 < (chunks[:, :, 0] == 0).float().mean() < 0.3
    assert (chunks[:, 0, 0] != chunks[:, 1, 0]).float().mean() > 0.8  # independent
    assert torch.equal(stage.draw_chunk_sigma([7], 3, 9)[0], sigma[7])  # keyed by the sample


def test_a_chunk_does_not_see_later_ones(model_cfg, tmp_path):
    stage = build(model_cfg, tmp_path, clean_ratio=0.0)
    seen = []
    forward = stage.dit.forward

    def keep(noisy_latents, timestep, condition, **rest):
        seen.append((noisy_latents, timestep, condition, rest["attention"]))
        return forward(noisy_latents, timestep, condition, **rest)

    stage.dit.forward = keep
    stage.train_step(make_batch(model_cfg, [0, 1]), step_context(0, TEACHER))
    noisy, timestep, condition, mask = seen[0]
    other = noisy.clone()
    other[:, :, 6:] += 1.0
    first, second = (forward(x, timestep, condition, attention=mask) for x in (noisy, other))
    assert torch.allclose(first[:, :, :6], second[:, :, :6], atol=1e-6)
    assert not torch.allclose(first[:, :, 6:], second[:, :, 6:], atol=1e-4)


def test_short_clips_are_the_first_chunks_and_the_weighting_can_be_left_out(model_cfg, tmp_path):
    stage = build(model_cfg, tmp_path, num_frames=21, bell_weighting=False, clean_ratio=0.0)  # 6 latents, 2 chunks
    stage.dit.forward = lambda noisy_latents, *_, **__: torch.zeros_like(noisy_latents)
    batch = make_batch(model_cfg, [0, 1])
    loss = stage.train_step(batch, step_context(0, TEACHER)).losses
    x0 = batch.latents[:, :, :6].float()
    eps = stage.noise.normal(x0.shape[1:], [0, 1], TEACHER, "noise", 0)
    error = (eps - x0).square().mean(dim=(1, 3, 4))[:, stage.dit.config.image_conditioning != "none" :]
    torch.testing.assert_close(loss, error.mean())


def test_the_loss_does_not_depend_on_how_a_batch_is_split(model_cfg, tmp_path):
    stage = build(model_cfg, tmp_path, clean_ratio=0.5)
    whole, *parts = (
        stage.train_step(make_batch(model_cfg, ids), step_context(0, TEACHER)).losses.detach()
        for ids in ([0, 1, 2, 3], [0, 1], [2, 3])
    )
    noisy = stage.draw_chunk_sigma([0, 1, 2, 3], 0, 9)[:, 1:] > 0
    assert noisy[:2].sum() != noisy[2:].sum()  # else a mean over the noisy frames would do as well
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"num_frames": 13},
            r"stage.num_frames=13 must be whole chunks, as stage=causal_teacher .*nearest valid: 3 \(9",
        ),
        ({"loss_buckets": 3}, "stage.loss_buckets=3 has no effect on stage=causal_teacher, .* leave it at 5"),
        ({"validation_steps": 10}, "stage.validation_steps=10 has no effect .* leave it at null"),
    ],
)
def test_what_it_cannot_do_is_refused(model_cfg, settings, message):
    with pytest.raises(ValueError, match=message):
        CausalTeacher(CausalTeacherConfig(**settings)).check(model_cfg)


def test_contexts_that_cannot_be_are_refused(model_cfg):
    with pytest.raises(ValueError, match=r"stage.sink_chunks=\[0, -1\]"):
        CausalTeacher(CausalTeacherConfig(sink_chunks=[0, -1])).check(model_cfg)


def test_the_export_is_a_student(model_cfg, tmp_path):
    stage = build(model_cfg, tmp_path)
    stage.export(tmp_path, stage.modules())
    assert load_dit(tmp_path / STUDENT, expected=model_cfg.dit).config == model_cfg.dit


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clean_ratio": 1.0}, r"stage.clean_ratio=1.0 must be in \[0, 1\)"),
        ({"sink_chunks": []}, "must each list at least one value"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CausalTeacherConfig(**settings)
