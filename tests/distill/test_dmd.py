"""DMD's pure functions in closed form."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill.critic import critic_loss
from distill.dmd import chunk_surrogate, dmd_gradient, dmd_loss, generated_numel, score_sigma
from models.diffusion.prediction import add_noise

ALL = torch.ones(4, dtype=torch.bool)
GIVEN_FIRST = torch.tensor([False, True, True, True])


def clip(seed: int, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 2, 4, 3, 5, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shift", [1.0, 5.0, 6.0])
def test_score_sigma_is_warped_and_clamped(shift):
    index = torch.tensor([0, 1, 500, 999])
    expected = [shift * r / (1 + (shift - 1) * r) for r in (0.0, 0.001, 0.5, 0.999)]
    expected = [min(max(sigma, 0.02), 0.98) for sigma in expected]
    sigma = score_sigma(index, shift=shift, min_timestep=20, max_timestep=980)
    torch.testing.assert_close(sigma, torch.tensor(expected, dtype=torch.float64))


def test_gradient_by_hand():
    x0 = torch.tensor([0.0, 2.0]).view(1, 1, 2, 1, 1)
    real = torch.tensor([1.0, -1.0]).view(1, 1, 2, 1, 1)
    fake = torch.tensor([3.0, 0.0]).view(1, 1, 2, 1, 1)
    result = dmd_gradient(x0, real, fake, torch.ones(2, dtype=torch.bool))
    assert result.normaliser.item() == 2.0  # mean(|0 - 1|, |2 + 1|)
    assert result.score_gap.item() == 1.5
    assert result.direction.flatten().tolist() == [1.0, 0.5]


def test_normaliser_is_per_sample_and_ignores_scale():
    x0, real, fake = clip(0), clip(1), clip(2)
    scale = torch.tensor([1.0, 10.0, 0.1]).view(3, 1, 1, 1, 1)
    plain = dmd_gradient(x0, real, fake, ALL)
    scaled = dmd_gradient(x0 * scale, real * scale, fake * scale, ALL)
    torch.testing.assert_close(scaled.direction, plain.direction)
    torch.testing.assert_close(scaled.normaliser, plain.normaliser * scale.flatten())


def test_given_frames_change_nothing():
    x0, real, fake = clip(0), clip(1), clip(2)
    other = [tensor.clone() for tensor in (x0, real, fake)]
    for tensor in other:
        tensor[:, :, 0] = 100 * torch.rand_like(tensor[:, :, 0])
    plain, changed = dmd_gradient(x0, real, fake, GIVEN_FIRST), dmd_gradient(*other, GIVEN_FIRST)
    assert (changed.direction[:, :, 0] == 0).all()
    torch.testing.assert_close(changed.direction, plain.direction)
    assert dmd_loss(x0, plain.direction, GIVEN_FIRST) == dmd_loss(other[0], plain.direction, GIVEN_FIRST)


def test_a_clip_of_given_frames_is_refused():
    with pytest.raises(ValueError, match="generated="):
        dmd_gradient(clip(0), clip(1), clip(2), torch.zeros(4, dtype=torch.bool))


def test_student_equal_to_teacher_has_zero_gradient_not_nan():
    x0 = clip(0)
    assert (dmd_gradient(x0, x0, x0, ALL).direction == 0).all()


@pytest.mark.parametrize("generated", [ALL, GIVEN_FIRST])
def test_loss_gradient_is_direction_over_numel(generated):
    x0, direction = clip(0).requires_grad_(), clip(3)
    dmd_loss(x0, direction, generated).backward()
    expected = direction * generated.view(1, 1, -1, 1, 1) / generated_numel(x0, generated)
    torch.testing.assert_close(x0.grad, expected)


def test_chunk_surrogates_add_up_to_the_loss_gradient():
    x0 = clip(0).requires_grad_()
    direction = dmd_gradient(clip(0), clip(1), clip(2), GIVEN_FIRST).direction
    dmd_loss(x0, direction, GIVEN_FIRST).backward()
    whole, x0.grad = x0.grad, None
    numel = generated_numel(x0, GIVEN_FIRST)
    for frames in (slice(0, 2), slice(2, 4)):
        chunk_surrogate(x0[:, :, frames], direction[:, :, frames], numel).backward()
    torch.testing.assert_close(x0.grad, whole)


@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(0.05, 0.95))
def test_gaussian_student_moves_towards_the_teacher(student_mean, teacher_mean, sigma):
    """Unit Gaussians: the denoised estimate is known, and so is the way to go."""

    def denoise(noisy: torch.Tensor, mean: float) -> torch.Tensor:  # E[x0 | x_sigma] for x0 ~ N(mean, 1)
        gain = (1 - sigma) / ((1 - sigma) ** 2 + sigma**2)
        return mean + gain * (noisy - (1 - sigma) * mean)

    rng = torch.Generator().manual_seed(0)
    x0 = student_mean + torch.randn(4, 1, 4, 3, 3, generator=rng)
    noisy = add_noise(x0, torch.randn(x0.shape, generator=rng), sigma)
    result = dmd_gradient(x0, denoise(noisy, teacher_mean), denoise(noisy, student_mean), ALL)
    keep = 1 - (1 - sigma) ** 2 / ((1 - sigma) ** 2 + sigma**2)
    expected = keep * (student_mean - teacher_mean)  # x0_fake - x0_real, the same everywhere
    difference = (result.direction * result.normaliser.view(-1, 1, 1, 1, 1)).mean().item()
    assert difference == pytest.approx(expected, abs=1e-4)
    if abs(student_mean - teacher_mean) > 1e-2:  # every value moves towards the teacher
        assert (result.direction * (student_mean - teacher_mean) > 0).all()


@pytest.mark.parametrize("generated", [ALL, GIVEN_FIRST])
def test_critic_loss_is_least_at_the_flow(generated):
    x0, noise = clip(0), clip(1)
    velocity = (noise - x0).requires_grad_()
    loss = critic_loss(velocity, x0, noise, generated)
    loss.backward()
    assert loss.item() == 0 and (velocity.grad == 0).all()
    assert critic_loss(velocity + 0.5, x0, noise, generated).item() == pytest.approx(0.25)


def test_critic_loss_ignores_given_frames():
    x0, noise, velocity = clip(0), clip(1), clip(2)
    other = velocity.clone()
    other[:, :, 0] += 7
    assert critic_loss(velocity, x0, noise, GIVEN_FIRST) == critic_loss(other, x0, noise, GIVEN_FIRST)
    assert critic_loss(velocity, x0, noise, ALL) != critic_loss(other, x0, noise, ALL)
