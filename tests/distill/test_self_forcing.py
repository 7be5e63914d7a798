"""Self-Forcing: gradients of the two passes, what the roles see, the schedule, health."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_distill import check_golden, make_batch, perturbed, setup_context, step_context, tiny_model, train

from distill.conditions import select_samples
from distill.health import CollapseError, HealthThresholds
from distill.roles import CRITIC, STUDENT, contexts_of
from distill.self_forcing import SelfForcing, SelfForcingConfig, draw_rollout
from models.assemble import build_dit, load_role
from models.diffusion.noise import KeyedNoise
from models.rollout import draw_exit_step
from models.wan.checkpoint import save_dit

CFG = SelfForcingConfig(tracks_min=3, tracks_max=5)


def build(model_cfg, tmp_path, **overrides) -> SelfForcing:
    stage = SelfForcing(replace(CFG, **overrides))
    stage.check(model_cfg)
    stage.setup(setup_context(model_cfg, tmp_path))
    return stage


def backward(stage: SelfForcing, batch, update: str, step: int = 0) -> tuple[dict[str, torch.Tensor], dict]:
    """Gradients by parameter name, and the metrics."""
    module = stage.modules()[update]
    module.zero_grad()
    output = stage.train_step(batch, step_context(step, update))
    for loss in [output.losses] if isinstance(output.losses, torch.Tensor) else output.losses:
        loss.backward()
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return gradients, output.metrics


def flat(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.flatten() for value in gradients.values()])


def relative_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return float((flat(found) - flat(expected)).norm() / flat(expected).norm())


@pytest.mark.parametrize("step", [0, 5, 10])  # exit steps differ
def test_two_passes_equal_one(model_cfg, batch, tmp_path, step):
    stages = [build(model_cfg, tmp_path, two_pass=two_pass) for two_pass in (True, False)]
    for stage in stages:
        perturbed(stage.critic, seed=1)  # scores that differ: else g is a difference of equals
    (two, metrics_two), (one, metrics_one) = (backward(stage, batch, STUDENT, step) for stage in stages)
    assert two.keys() == one.keys()
    assert relative_error(two, one) < 1e-5
    assert float(metrics_two["loss"]) == pytest.approx(float(metrics_one["loss"]), rel=1e-5)


def test_text_projections_train_and_the_track_head_only_where_told(model_cfg, batch, tmp_path):
    frozen, _ = backward(build(model_cfg, tmp_path), batch, STUDENT)
    assert not any(name.startswith("track_head") for name in frozen)
    for name in ("text_embedding.0.weight", "blocks.0.cross_attn.k.weight", "blocks.1.cross_attn.v.weight"):
        assert frozen[name].abs().sum() > 0, name
    trained, _ = backward(build(model_cfg, tmp_path, train_track_head=True), batch, STUDENT)
    assert any(name.startswith("track_head") and value.abs().sum() > 0 for name, value in trained.items())


def test_a_chunk_gives_no_gradient_to_the_chunks_before_it(model_cfg, batch, tmp_path):
    stage = build(model_cfg, tmp_path)
    clip = stage.roll_out(batch, step_context(0, STUDENT))
    inputs = [chunk.record.noisy_latents.requires_grad_() for chunk in clip.chunks]
    losses = list(stage.chunk_losses(clip, torch.ones_like(clip.x0)))
    for index, loss in enumerate(losses):
        gradients = torch.autograd.grad(loss, inputs, allow_unused=True, retain_graph=True)
        assert [gradient is not None for gradient in gradients] == [i == index for i in range(len(inputs))]


def test_losses_are_lazy(model_cfg, batch, tmp_path):
    """One chunk's graph at a time: the second is not built before it is asked for."""
    stage = build(model_cfg, tmp_path)
    output = stage.train_step(batch, step_context(0, STUDENT))
    assert output.num_losses == model_cfg.num_chunks
    calls = []
    stage.student.register_forward_pre_hook(lambda module, args: calls.append(torch.is_grad_enabled()))
    next(output.losses).backward()
    assert calls == [True]


def test_the_exit_step_is_keyed_by_the_step(model_cfg):
    noise, cfg = KeyedNoise(7), model_cfg.rollout
    draws = [draw_exit_step(noise, cfg, STUDENT, step) for step in range(60)]
    assert draws == [draw_exit_step(KeyedNoise(7), cfg, STUDENT, step) for step in range(60)]
    assert set(draws) == {0, 1, 2}
    assert draws != [draw_exit_step(noise, cfg, CRITIC, step) for step in range(60)]


def test_all_chunks_stop_at_the_drawn_step(model_cfg, batch, tmp_path):
    stage = build(model_cfg, tmp_path)
    for step in (0, 5, 10, 15):
        drawn = draw_exit_step(stage.noise, model_cfg.rollout, STUDENT, step)
        clip = stage.roll_out(batch, step_context(step, STUDENT))
        assert {chunk.record.sigma for chunk in clip.chunks} == {model_cfg.rollout.sigmas[drawn]}


def test_the_real_score_is_guided_and_the_fake_one_is_not(model_cfg, batch, tmp_path):
    """With the critic equal to the teacher, what is left of the difference is the guidance (eq. 4)."""
    stage, context = build(model_cfg, tmp_path), step_context(0, STUDENT)
    clip = stage.roll_out(batch, context)
    noisy, _, sigma = stage._noised(clip, context)
    with torch.no_grad():
        full, no_text, no_motion = (
            stage.teacher.predict_x0(noisy, sigma, condition)
            for condition in (clip.condition, clip.condition.drop("text"), clip.condition.drop("motion"))
        )
    guided = 4.5 * full - 7 / 3 * no_text - 7 / 6 * no_motion  # weights 3 and 1.5
    found = stage.dmd_gradient(clip, context)
    gap = found.direction * found.normaliser.view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(gap[:, :, 1:], (full - guided)[:, :, 1:], rtol=1e-3, atol=1e-5)


def test_ranks_agree_on_branches_and_a_sample_does_not_depend_on_its_batch(model_cfg, tmp_path):
    """Two ranks of one sample each give the gradient of one process with both."""
    stage = build(model_cfg, tmp_path, sink_chunks=[0, 1], window_chunks=[1, None])
    perturbed(stage.critic, seed=1)
    together, _ = backward(stage, make_batch(model_cfg, [3, 8]), STUDENT)
    first, second = (backward(stage, make_batch(model_cfg, [sample]), STUDENT)[0] for sample in (3, 8))
    mean = {name: (first[name] + second[name]) / 2 for name in first}
    assert relative_error(mean, together) < 1e-5


def test_contexts_are_drawn_from_the_lists(model_cfg):
    choices = contexts_of(model_cfg.rollout, [0, 1], [1, None])
    drawn = [draw_rollout(KeyedNoise(0), choices, step) for step in range(30)]
    contexts = {(cfg.sink_chunks, cfg.window_chunks) for cfg in drawn}
    assert contexts == {(0, 1), (0, None), (1, 1), (1, None)}


def test_schedule(tmp_path):
    stage = SelfForcing(CFG)
    assert [stage.updates(step) for step in range(6)] == [
        [STUDENT, CRITIC], [CRITIC], [CRITIC], [CRITIC], [CRITIC], [STUDENT, CRITIC]
    ]  # fmt: skip


def test_critic_update_leaves_the_student_alone(model_cfg, batch, tmp_path):
    stage = build(model_cfg, tmp_path)
    gradients, metrics = backward(stage, batch, CRITIC)
    assert flat(gradients).norm() > 0 and float(metrics["loss"]) > 0
    assert all(parameter.grad is None for parameter in stage.student.parameters())
    assert all(parameter.grad is None for parameter in stage.teacher.parameters())


def test_the_critic_sees_the_whole_condition(model_cfg, batch, tmp_path):
    stage, seen = build(model_cfg, tmp_path), []
    stage.critic.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    stage.train_step(batch, step_context(0, CRITIC))
    stage.train_step(batch, step_context(0, STUDENT))
    assert len(seen) == 2
    for condition in seen:
        assert torch.equal(condition.prompt_embeds, batch.prompt_embeds)
        assert (condition.track_map != 0).any() and condition.image_latents is not None


def test_scores_are_compared_at_levels_of_their_own_shift(model_cfg, batch, tmp_path):
    """By default at those of the rollout's."""
    levels = []
    for shift in (None, model_cfg.rollout.shift, 1.0):
        stage = build(model_cfg, tmp_path, score_shift=shift)
        levels.append([float(stage.train_step(batch, step_context(s, CRITIC)).metrics["sigma"]) for s in range(4)])
    assert levels[0] == levels[1] and all(low < high for low, high in zip(levels[2], levels[0], strict=True))


def test_reuse_takes_the_students_rollout(model_cfg, batch, tmp_path):
    stage = build(model_cfg, tmp_path, reuse_rollout=True)
    backward(stage, batch, STUDENT)
    calls = []
    stage.student.register_forward_pre_hook(lambda module, args: calls.append(1))
    backward(stage, batch, CRITIC)
    assert calls == [] and stage.shared_clips == []
    backward(stage, batch, CRITIC, step=1)  # no student update in this step: its own rollout
    assert calls


def test_equal_critic_and_unguided_teacher_give_no_gradient(model_cfg, batch, tmp_path):
    stage = build(replace(model_cfg, guidance={}), tmp_path)
    _, metrics = backward(stage, batch, STUDENT)
    assert metrics["score_gap"] == 0 and float(metrics["loss"]) == 0


def test_a_step_along_the_gradient_brings_the_student_to_the_teacher(model_cfg, batch, tmp_path):
    """With the critic fixed, a small descent step lowers <x0, g>, which is what DMD asks for."""
    stage = build(model_cfg, tmp_path)
    clip = stage.roll_out(batch, step_context(0, STUDENT))
    direction = stage.dmd_gradient(clip, step_context(0, STUDENT)).direction
    before = sum(loss.item() for loss in stage.chunk_losses(clip, direction))
    gradients, _ = backward(stage, batch, STUDENT)
    with torch.no_grad():
        for name, parameter in stage.student.named_parameters():
            if name in gradients:
                parameter -= 1e-3 * gradients[name]
    assert sum(loss.item() for loss in stage.chunk_losses(clip, direction)) < before


def test_given_first_frame_is_kept_and_counts_in_no_loss(model_cfg, batch, tmp_path):
    stage = build(model_cfg, tmp_path)
    clip = stage.roll_out(batch, step_context(0, STUDENT))
    torch.testing.assert_close(clip.x0[:, :, 0], batch.latents[:, :, 0])
    assert clip.generated.tolist() == [False] + [True] * 8
    assert (stage.dmd_gradient(clip, step_context(0, STUDENT)).direction[:, :, 0] == 0).all()


def test_collapse_stops_the_run(model_cfg, batch, tmp_path):
    limits = HealthThresholds(min_motion_energy_ratio=10.0, warmup_steps=1)
    stage = build(model_cfg, tmp_path, health=limits)
    stage.train_step(batch, step_context(0, CRITIC))  # warming up
    with pytest.raises(CollapseError, match="motion_energy_ratio"):
        stage.train_step(batch, step_context(1, CRITIC))


def test_alarms_do_not_depend_on_the_accumulation(model_cfg, batch, tmp_path):
    """All micro-batches of an update stop at one step: each counted for itself, one such step would end a run."""
    split, whole = build(model_cfg, tmp_path), build(model_cfg, tmp_path)
    whole.train_step(batch, step_context(0, CRITIC))
    for micro, row in enumerate((0, 1)):
        context = replace(step_context(0, CRITIC, micro=micro), accumulation=2)
        assert not split.smoothed
        split.train_step(select_samples(batch, [row]), context)
    assert split.smoothed == pytest.approx(whole.smoothed, rel=1e-4) and not split.measured


def test_state_comes_back(model_cfg, batch, tmp_path):
    stage = build(model_cfg, tmp_path)
    stage.train_step(batch, step_context(1, CRITIC))
    restored = build(model_cfg, tmp_path)
    restored.load_state_dict(stage.state_dict())
    assert restored.state_dict() == stage.state_dict() and stage.smoothed


def test_export_is_loaded_again_as_the_start(model_cfg, batch, tmp_path):
    stage = build(model_cfg, tmp_path)
    with torch.no_grad():
        stage.student.head.head.bias += 1
    stage.export(tmp_path, stage.modules())
    again = build(model_cfg, tmp_path, init_from=str(tmp_path / STUDENT))
    torch.testing.assert_close(again.student.head.head.bias, stage.student.head.head.bias)
    torch.testing.assert_close(again.critic.head.head.bias, stage.teacher.head.head.bias)


def test_an_export_tells_what_rollout_its_student_has_seen(model_cfg, batch, tmp_path, caplog):
    stage = build(model_cfg, tmp_path, sink_chunks=[0, 1], window_chunks=[1, None])
    stage.export(tmp_path, stage.modules())
    as_trained = replace(model_cfg, student=str(tmp_path / STUDENT))
    load_role(as_trained, "student")
    load_role(replace(as_trained, rollout=replace(model_cfg.rollout, sink_chunks=0, window_chunks=None)), "student")
    assert "has not seen" not in caplog.text
    load_role(replace(as_trained, rollout=replace(model_cfg.rollout, step_indices=[0, 2], window_chunks=2)), "student")
    assert "has not seen model.rollout.window_chunks=2 (trained with [1, None]), step_indices=[0, 2] (" in caplog.text


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"student_every": 0}, "student_every=0"),
        ({"min_timestep": 990.0}, "min_timestep=990.0"),
        ({"tracks_min": 9, "tracks_max": 3}, "tracks_min=9"),
        ({"score_shift": 0.0}, r"stage.score_shift=0.0 must be > 0"),
    ],
)
def test_refused_settings_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        SelfForcing(replace(CFG, **overrides))


def test_a_context_that_is_streamed_but_not_trained_is_told(model_cfg, caplog):
    SelfForcing(replace(CFG, sink_chunks=[0, 1], window_chunks=[1, None])).check(model_cfg)
    assert "leave out" not in caplog.text
    SelfForcing(replace(CFG, window_chunks=[2, None])).check(model_cfg)
    assert (
        "sink_chunks=1 and window_chunks=1, which stage.sink_chunks=[] and stage.window_chunks=[2, None] leave out"
        in (caplog.text)
    )


def test_a_window_of_no_chunk_is_refused(model_cfg):
    with pytest.raises(ValueError, match=r"stage.window_chunks=\[0\] must be at least 1"):
        SelfForcing(replace(CFG, window_chunks=[0])).check(model_cfg)


def test_other_architectures_run(tmp_path, model_cfg, batch):
    """A model whose image is extra channels: frame 0 is generated like the others."""
    cfg = tiny_model(image_conditioning="fun_control")
    save_dit(perturbed(build_dit(cfg, 1)), tmp_path / "teacher")
    stage = build(replace(cfg, teacher=str(tmp_path / "teacher")), tmp_path)
    clip = stage.roll_out(batch, step_context(0, STUDENT))
    assert clip.generated.all()
    gradients, _ = backward(stage, batch, STUDENT)
    assert flat(gradients).norm() > 0


def test_golden_losses(model_cfg, tmp_path):
    stage = build(model_cfg, tmp_path, student_every=2)
    perturbed(stage.critic, seed=1)
    check_golden("self_forcing", {"loss_of_first_update": train(stage, range(3))})


def test_mixed_precision_gives_the_same_direction(model_cfg, batch, tmp_path):
    """Under autocast, weights cast by the rollout without gradient must not be reused by the graded pass."""
    stage = build(model_cfg, tmp_path)
    perturbed(stage.critic, seed=1)
    full, _ = backward(stage, batch, STUDENT)
    stage.student.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = stage.train_step(batch, step_context(0, STUDENT)).losses
    while True:  # as the trainer does: each loss is built under autocast, and differentiated outside
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = next(losses, None)
        if loss is None:
            break
        loss.backward()
    half = {name: p.grad for name, p in stage.student.named_parameters() if p.grad is not None}
    assert half.keys() == full.keys()
    assert torch.cosine_similarity(flat(half), flat(full), dim=0) > 0.99


def test_validation_rolls_out_the_held_out_clips(model_cfg, batch, tmp_path):
    context = setup_context(model_cfg, tmp_path)
    stage = SelfForcing(CFG)
    stage.setup(replace(context, validation_batch=batch))
    output = stage.validate(0)
    assert set(output.metrics) == {"latent_std_ratio", "motion_energy_ratio", "seam_ratio"}
    assert output.metrics == stage.validate(5).metrics  # the same noise each time
    assert build(model_cfg, tmp_path).validate(0) is None


def test_absent_weights_are_refused_before_anything_is_built(model_cfg):
    with pytest.raises(FileNotFoundError, match=r"stage\.init_from=none"):
        SelfForcing(replace(CFG, init_from="none")).check(model_cfg)
    with pytest.raises(ValueError, match=r"model\.teacher is not set"):
        SelfForcing(CFG).check(replace(model_cfg, teacher=None))
