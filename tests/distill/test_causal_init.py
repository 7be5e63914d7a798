"""Causal initialisation: draws, what the loss counts, order of pairs, resume, golden losses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_distill import check_golden, make_batch, perturbed, setup_context, step_context, train

from distill.causal_init import CausalInit, CausalInitConfig, draw_indices, draw_mask, select_states
from distill.ode_pairs import FOLDER, OdePairs, OdePairsConfig
from distill.roles import STUDENT
from models.assemble import build_vae
from models.diffusion.noise import KeyedNoise
from models.rollout import RolloutConfig
from models.wan.checkpoint import load_dit, save_dit
from models.wan.dit import WanDiT

NUM_PAIRS = 6


@pytest.fixture(scope="module")
def pairs(model_cfg, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ode_pairs")
    stage = OdePairs(OdePairsConfig(steps=1, global_batch=NUM_PAIRS, tracks_min=3, tracks_max=5))
    stage.setup(setup_context(model_cfg, folder))
    stage.train_step(make_batch(model_cfg, list(range(NUM_PAIRS))), step_context(0, "pairs"))
    return folder / FOLDER


def build(model_cfg, pairs: Path, tmp_path: Path, **overrides) -> CausalInit:
    stage = CausalInit(CausalInitConfig(pairs=str(pairs), **overrides))
    stage.check(model_cfg)
    stage.setup(setup_context(model_cfg, tmp_path))
    return stage


def test_the_student_starts_as_the_teacher(model_cfg, pairs, tmp_path):
    stage = build(model_cfg, pairs, tmp_path)
    teacher = load_dit(model_cfg.teacher).state_dict()
    assert all(torch.equal(value, teacher[name]) for name, value in stage.student.state_dict().items())
    trained = {name for name, p in stage.student.named_parameters() if p.requires_grad}
    frozen = set(teacher) - trained
    assert frozen and all(name.startswith("track_head.") for name in frozen)


def test_a_student_can_be_gone_on_with(model_cfg, pairs, tmp_path):
    first = build(model_cfg, pairs, tmp_path / "first")
    with torch.no_grad():
        first.student.patch_embedding.bias.add_(1.0)
    first.export(tmp_path / "export", {STUDENT: first.student})
    second = build(model_cfg, pairs, tmp_path / "second", init_from=str(tmp_path / "export" / STUDENT))
    assert torch.equal(second.student.patch_embedding.bias, first.student.patch_embedding.bias)
    with pytest.raises(FileNotFoundError, match="stage.init_from=none does not exist"):
        build(model_cfg, pairs, tmp_path, init_from="none")


def test_the_student_is_of_its_teachers_latent_space_and_no_other(model_cfg, pairs, tmp_path):
    vae = build_vae(model_cfg, seed=0)
    vae.save(tmp_path / "vae")
    teacher = load_dit(model_cfg.teacher)
    teacher.latent_space = vae.latent_space
    save_dit(teacher, tmp_path / "teacher")
    without_vae = replace(model_cfg, teacher=str(tmp_path / "teacher"))
    stage = build(without_vae, pairs, tmp_path)
    stage.export(tmp_path, stage.modules())
    assert load_dit(tmp_path / STUDENT).latent_space == vae.latent_space
    vae.normalise_by([0.5] * 4, [1.0] * 4)
    vae.save(tmp_path / "vae")
    with_other = replace(without_vae, vae=replace(model_cfg.vae, path=str(tmp_path / "vae")))
    with pytest.raises(ValueError, match=r"model\.teacher=.* was made for another latent space"):
        build(with_other, pairs, tmp_path)
    with pytest.raises(ValueError, match=r"stage\.init_from=.* was made for another latent space"):
        build(with_other, pairs, tmp_path, init_from=str(tmp_path / STUDENT))


def test_states_are_drawn_per_chunk_and_include_the_clean_end():
    index = draw_indices(KeyedNoise(0), list(range(300)), step=4, num_chunks=3, num_states=4)
    assert index.shape == (300, 3)
    for state in range(4):
        assert 0.2 < (index == state).float().mean() < 0.3
    assert (index[:, 0] != index[:, 1]).float().mean() > 0.6  # independent: 3 of 4 differ
    alone = draw_indices(KeyedNoise(0), [17], step=4, num_chunks=3, num_states=4)
    assert torch.equal(alone[0], index[17])
    assert not torch.equal(index, draw_indices(KeyedNoise(0), list(range(300)), 5, 3, 4))


def test_selected_states_are_those_of_the_frames():
    states = torch.arange(2 * 4 * 3).view(2, 4, 1, 3, 1, 1).float()
    index = torch.tensor([[0, 3, 1], [2, 2, 0]])
    chosen = select_states(states, index)[:, 0, :, 0, 0]
    assert chosen.tolist() == [[0.0, 10.0, 5.0], [18.0, 19.0, 14.0]]


def test_masks_are_keyed_by_the_step_and_cover_the_lists():
    cfg = CausalInitConfig(pairs="x")
    masks = [draw_mask(KeyedNoise(0), step, cfg.sink_chunks, cfg.window_chunks, 3) for step in range(200)]
    assert masks == [draw_mask(KeyedNoise(0), step, cfg.sink_chunks, cfg.window_chunks, 3) for step in range(200)]
    assert {mask.sink_chunks for mask in masks} == {0, 1, 2}
    assert {mask.window_chunks for mask in masks} == {1, 2, 3, 6, None}


def test_the_loss_counts_noisy_generated_frames_only(model_cfg, pairs, tmp_path, monkeypatch):
    """A student that is off by 0.5 on counted frames and by 100 elsewhere has loss 0.25 per noisy frame, over the
    number expected.
    """
    stage = build(model_cfg, pairs, tmp_path)
    seen = {}

    def predict_x0(noisy_latents, sigma, condition, *, attention):
        clean = torch.stack([stage.store.read(number).states[-1] for number in seen["numbers"]]).float()
        counted = sigma > 0
        counted[:, 0] = False  # the given first frame
        seen["noisy"] = counted.sum().item() / (4 * 8 * 3 / 4)  # pairs, generated frames, three noisy states of four
        return clean + torch.where(counted, 0.5, 100.0)[:, None, :, None, None]

    next_numbers = stage._next_numbers
    remember = lambda context: seen.setdefault("numbers", next_numbers(context))  # noqa: E731
    monkeypatch.setattr(stage, "_next_numbers", remember)
    monkeypatch.setattr(stage.student, "predict_x0", predict_x0)
    output = stage.train_step(None, step_context(0, STUDENT, micro_batch=4))
    assert seen["noisy"] not in (0, 1) and output.losses.item() == pytest.approx(0.25 * seen["noisy"], rel=1e-5)
    assert output.metrics["loss"].item() == pytest.approx(0.25, rel=1e-5)
    per_step = [float(value) for name, value in output.metrics.items() if name.startswith("loss_step")]
    assert per_step == pytest.approx([0.25] * len(per_step), rel=1e-5) and per_step


def test_gradient_reaches_all_that_trains(model_cfg, pairs, tmp_path):
    stage = build(model_cfg, pairs, tmp_path)
    output = stage.train_step(None, step_context(0, STUDENT))
    output.losses.backward()
    assert all(p.grad is not None for p in stage.student.parameters() if p.requires_grad)
    assert {"loss", "seam_ratio"} < set(output.metrics)


def test_ranks_share_the_order_of_pairs(model_cfg, pairs, tmp_path):
    together = build(model_cfg, pairs, tmp_path)
    apart = [build(model_cfg, pairs, tmp_path) for _ in range(2)]
    for step in range(5):  # across the end of the epoch of 6
        numbers = together._next_numbers(step_context(step, STUDENT, micro_batch=4))
        parts = [
            stage._next_numbers(step_context(step, STUDENT, rank=rank, world=2, micro_batch=2))
            for rank, stage in enumerate(apart)
        ]
        assert [parts[0], parts[1]] == [numbers[0::2], numbers[1::2]]
        assert together.state_dict() == apart[1].state_dict()


def test_resumed_equals_uninterrupted(model_cfg, pairs, tmp_path):
    whole = build(model_cfg, pairs, tmp_path)
    losses = train(whole, range(4))
    first = build(model_cfg, pairs, tmp_path)
    assert train(first, range(2)) == losses[:2]
    second = build(model_cfg, pairs, tmp_path)
    second.student.load_state_dict(first.student.state_dict())
    second.load_state_dict(first.state_dict())
    assert train(second, range(2, 4)) == losses[2:]


def test_golden_losses(model_cfg, pairs, tmp_path):
    check_golden("causal_init", {"loss": train(build(model_cfg, pairs, tmp_path), range(3))})


def test_validation_compares_rollouts_with_the_teacher(model_cfg, pairs, tmp_path):
    output = build(model_cfg, pairs, tmp_path, validation_pairs=2).validate(0)
    assert set(output.metrics) == {"latent_std_ratio", "motion_energy_ratio", "seam_ratio"}
    assert all(value > 0 for value in output.metrics.values())


def test_the_export_is_a_student(model_cfg, pairs, tmp_path):
    stage = build(model_cfg, pairs, tmp_path)
    stage.export(tmp_path, stage.modules())
    exported = load_dit(tmp_path / STUDENT, expected=model_cfg.dit)
    torch.testing.assert_close(exported.head.head.weight, stage.student.head.head.weight)


def test_refusals_name_the_field(model_cfg, pairs, tmp_path):
    with pytest.raises(ValueError, match=r"stage\.pairs is empty"):
        CausalInit(CausalInitConfig()).check(model_cfg)
    with pytest.raises(FileNotFoundError, match="stage=ode_pairs"):
        CausalInit(CausalInitConfig(pairs=str(tmp_path / "none"))).check(model_cfg)
    with pytest.raises(ValueError, match="sigmas"):
        other = replace(model_cfg, rollout=RolloutConfig(num_inference_steps=4, step_indices=[0, 2, 3]))
        CausalInit(CausalInitConfig(pairs=str(pairs))).check(other)
    with pytest.raises(ValueError, match="window_chunks"):
        CausalInit(CausalInitConfig(window_chunks=[]))
    with pytest.raises(ValueError, match=r"stage.sink_chunks=\[0, -1\], stage.window_chunks=.* sink_chunks=-1"):
        CausalInit(CausalInitConfig(pairs=str(pairs), sink_chunks=[0, -1])).check(model_cfg)
    with pytest.raises(ValueError, match=r"has latent_shape=\[4, 9, .*, this model has \[4, 12, "):
        longer = replace(model_cfg, clip=replace(model_cfg.clip, num_frames=45))
        CausalInit(CausalInitConfig(pairs=str(pairs))).check(longer)


def test_pairs_of_another_teacher_or_guidance_are_said(model_cfg, pairs, tmp_path, caplog):
    stage = CausalInit(CausalInitConfig(pairs=str(pairs)))
    stage.check(model_cfg)
    assert not caplog.text
    save_dit(perturbed(WanDiT(model_cfg.dit), seed=9), tmp_path / "other")
    stage.check(replace(model_cfg, teacher=str(tmp_path / "other"), guidance={"text": 2.0, "motion": 1.5}))
    assert "pairs of another teacher than model.teacher=" in caplog.text and "pairs of guidance" in caplog.text


def test_a_student_that_goes_on_needs_no_teacher(model_cfg, pairs, tmp_path, caplog):
    start = CausalInitConfig(pairs=str(pairs), init_from=model_cfg.teacher)
    CausalInit(start).check(replace(model_cfg, teacher=None))
    assert not caplog.text
    CausalInit(start).check(replace(model_cfg, teacher=str(tmp_path / "gone")))
    assert "gone is not here; whether the pairs are its own is not checked" in caplog.text
