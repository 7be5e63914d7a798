"""The Euler solver on flows with known solutions, and the teacher sampler on a tiny DiT."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from models.condition import Condition
from models.diffusion.guidance import Guidance
from models.diffusion.noise import KeyedNoise
from models.diffusion.sampler import euler_trajectory, sample_teacher
from models.diffusion.schedule import flow_grid
from models.wan.config import WanConfig
from models.wan.dit import WanDiT

SHAPE = (4, 3, 4, 6)  # C, F, h, w


def teacher(**changes) -> WanDiT:
    torch.manual_seed(0)
    dit = WanDiT(WanConfig.tiny(num_layers=1, track_channels=4, **changes))
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return dit


def condition(image: bool = False) -> Condition:
    rng = torch.Generator().manual_seed(1)
    return Condition(
        prompt_embeds=torch.randn(2, 8, 24, generator=rng),
        null_prompt_embeds=torch.randn(1, 8, 24, generator=rng),
        track_map=torch.randn(2, 8, 9, 4, 6, generator=rng),
        image_latents=torch.randn(2, 4, 1, 4, 6, generator=rng) if image else None,
    )


def sample(dit: WanDiT, given: Condition, **changes):
    arguments = {
        "num_inference_steps": 4,
        "shift": 6.0,
        "noise": KeyedNoise(3),
        "sample_ids": [10, 11],
        "latent_shape": SHAPE,
    }
    guidance = changes.pop("guidance", Guidance({"text": 3.0, "motion": 1.5}))
    return sample_teacher(dit, given, guidance, **(arguments | changes))


def test_a_straight_flow_is_solved_exactly_by_any_grid():
    rng = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, *SHAPE, generator=rng), torch.randn(2, *SHAPE, generator=rng)
    for num_steps in (1, 3, 50):
        *_, (sigma, result) = euler_trajectory(lambda x, s: noise - x0, noise, flow_grid(num_steps, 6.0))
        assert sigma == 0.0
        torch.testing.assert_close(result, x0, atol=2e-5, rtol=0)


def test_trajectory_yields_the_input_of_each_step_at_its_level():
    grid = flow_grid(4, 6.0)
    levels = []
    pairs = list(euler_trajectory(lambda x, s: levels.append(s) or -x, torch.ones(2, 1), grid))
    assert [sigma for sigma, _ in pairs] == [*grid.tolist(), 0.0]
    assert torch.stack(levels).shape == (4, 2)
    torch.testing.assert_close(torch.stack(levels)[:, 0], grid.float())
    steps = pairwise(pairs)
    for (sigma, before), (following, after) in steps:
        torch.testing.assert_close(after, before - (following - sigma) * before)


def test_the_solver_converges_with_the_number_of_steps():
    exact = torch.tensor([[2.718281828459045]])  # dx/dsigma = -x from sigma 1 to 0
    errors = []
    for num_steps in (10, 20, 40):
        *_, (_, result) = euler_trajectory(lambda x, s: -x, torch.ones(1, 1), flow_grid(num_steps, 1.0))
        errors.append((result - exact).abs().item())
    assert errors[0] > 1.8 * errors[1] > 3.2 * errors[2]


def test_sampling_equals_the_plain_loop_over_the_dit():
    dit, given = teacher(), condition()
    guidance = Guidance({"text": 3.0, "motion": 1.5})
    latents = KeyedNoise(3).normal(SHAPE, [10, 11], "teacher", "start")
    levels = [*flow_grid(4, 6.0).tolist(), 0.0]
    with torch.no_grad():
        for sigma, following in pairwise(levels):
            timestep = torch.full((2,), 1000 * sigma)
            velocity = guidance(lambda part, x=latents, t=timestep: dit(x, t, part), given)
            latents = latents + (following - sigma) * velocity
    torch.testing.assert_close(sample(dit, given), latents, atol=1e-4, rtol=1e-4)


def test_kept_steps_are_inputs_in_the_order_asked():
    dit, given = teacher(), condition()
    x0, kept = sample(dit, given, keep_steps=[2, 0])
    assert len(kept) == 2
    assert torch.equal(kept[1], KeyedNoise(3).normal(SHAPE, [10, 11], "teacher", "start"))
    assert torch.equal(x0, sample(dit, given))
    assert not torch.equal(kept[0], x0) and kept[0].dtype == torch.float32


def test_sampling_goes_on_from_the_input_of_a_step():
    dit, given, done = teacher(), condition(), []
    x0, (kept,) = sample(dit, given, keep_steps=[2])
    found = sample(dit, given, resume=(2, kept), progress=lambda *step: done.append(step))
    assert torch.equal(found, x0) and done == [(3, 4), (4, 4)]
    (again,) = sample(dit, given, resume=(1, kept), keep_steps=[1])[1]
    assert torch.equal(again, kept)


def test_a_sample_does_not_depend_on_its_batch():
    dit, given = teacher(), condition()
    both = sample(dit, given)
    second = Condition(given.prompt_embeds[1:], given.null_prompt_embeds, given.track_map[1:])
    torch.testing.assert_close(sample(dit, second, sample_ids=[11])[0], both[1], atol=1e-5, rtol=1e-4)


def test_clean_first_frame_is_the_image_exactly_in_inputs_and_result():
    dit, given = teacher(image_conditioning="first_frame"), condition(image=True)
    x0, kept = sample(dit, given, keep_steps=[0, 1, 3])
    for latents in (x0, *kept):
        assert torch.equal(latents[:, :, :1], given.image_latents)
    assert not torch.equal(kept[0][:, :, 1:], kept[1][:, :, 1:])


def test_first_frame_model_without_an_image_denoises_all_frames():
    dit = teacher(image_conditioning="first_frame")
    _, kept = sample(dit, condition(), keep_steps=[0])
    assert torch.equal(kept[0], KeyedNoise(3).normal(SHAPE, [10, 11], "teacher", "start"))


def test_autocast_keeps_the_trajectory_in_float32():
    dit, given = teacher(), condition()
    plain = sample(dit, given)
    with torch.autocast("cpu", torch.bfloat16):
        x0, kept = sample(dit, given, keep_steps=[3])
    assert x0.dtype == kept[0].dtype == torch.float32
    assert 0 < (x0 - plain).norm() / plain.norm() < 0.1


def test_text_and_tracks_are_encoded_once_and_progress_is_reported(monkeypatch):
    dit, calls, reports = teacher(), [], []
    for name in ("prepare", "prepare_text"):
        original = getattr(dit, name)
        spy = lambda *a, name=name, original=original, **k: calls.append(name) or original(*a, **k)  # noqa: E731
        monkeypatch.setattr(dit, name, spy)
    sample(dit, condition(), progress=lambda done, total: reports.append((done, total)))
    assert calls.count("prepare") == 3  # branches
    assert calls.count("prepare_text") == 2  # the prompt and its null
    assert reports == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"sample_ids": [1]}, "sample_ids has 1"),
        ({"keep_steps": [4]}, r"keep_steps has 4; it must be in 0\.\.3"),
        ({"keep_steps": [1], "resume": (2, torch.zeros(2, *SHAPE))}, r"keep_steps has 1; it must be in 2\.\.3"),
    ],
)
def test_bad_requests_are_named(changes, match):
    with pytest.raises(ValueError, match=match):
        sample(teacher(), condition(), **changes)
