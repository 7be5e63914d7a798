"""The flow grid, the warp and the bell weight against the published numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.diffusion.schedule import (
    bell_weight,
    flow_grid,
    shift_sigma,
    training_sigmas,
)


def test_student_steps_are_points_of_the_teacher_grid():
    timesteps = 1000 * flow_grid(50, 6.0)
    assert timesteps.dtype == torch.float64
    assert timesteps[0] == 1000.0
    assert [round(timesteps[i].item(), 2) for i in (16, 32)] == [927.27, 771.43]
    assert timesteps[49].item() == pytest.approx(109.1, abs=0.01)


def test_grid_descends_strictly_and_stops_above_zero():
    grid = flow_grid(50, 6.0)
    assert (grid.diff() < 0).all() and grid[-1] > 0


@pytest.mark.parametrize(("shift", "last"), [(5.0, 4.98), (6.0, 5.97)])
def test_training_grid_last_timestep(shift, last):
    assert 1000 * training_sigmas(shift)[-1].item() == pytest.approx(last, abs=0.005)


@pytest.mark.parametrize(
    ("shift", "timesteps", "expected"),
    [
        (6.0, [750, 500, 250], [947.37, 857.14, 666.67]),
        (8.0, [750, 500, 250], [960.0, 888.89, 727.27]),
        (5.0, [1000, 750, 500, 250], [1000.0, 937.5, 833.33, 625.0]),
        (6.0, [0], [0.0]),
    ],
)
def test_shifts_in_use(shift, timesteps, expected):
    assert [round(1000 * shift_sigma(timestep / 1000, shift), 2) for timestep in timesteps] == expected


@pytest.mark.parametrize(
    ("timestep", "weight"), [(937.5, 0.42), (833.33, 1.09), (500, 2.21), (252, 1.56), (100, 0.67), (6, 0.04)]
)
def test_bell_weight_at_shift_six(timestep, weight):
    sigma = torch.tensor(timestep / 1000, dtype=torch.float64)
    assert bell_weight(sigma, 6.0).item() == pytest.approx(weight, abs=0.005)


@pytest.mark.parametrize("shift", [5.0, 6.0, 8.0])
def test_bell_weight_equals_its_definition_on_the_grid(shift):
    raw = [1 - i / 1000 for i in range(1000)]
    timesteps = [1000 * shift * r / (1 + (shift - 1) * r) for r in raw]
    values = [math.exp(-2 * ((t - 500) / 1000) ** 2) for t in timesteps]
    moved = [value - min(values) for value in values]
    expected = torch.tensor([value * 1000 / sum(moved) for value in moved[::37]], dtype=torch.float64)
    torch.testing.assert_close(bell_weight(training_sigmas(shift)[::37], shift), expected, atol=1e-10, rtol=0)


def test_bell_weight_is_exactly_zero_at_pure_noise_and_largest_in_the_middle():
    sigma = torch.linspace(0, 1, 1001, dtype=torch.float64)
    weight = bell_weight(sigma, 6.0)
    assert weight[-1] == 0.0 and (weight >= 0).all()
    assert weight.argmax() == 500
    assert bell_weight(torch.tensor(0.5, dtype=torch.float64), 5.0).item() == pytest.approx(2.08, abs=0.005)


@pytest.mark.parametrize("shift", [5.0, 6.0, 8.0])
def test_bell_weight_has_mean_one_over_training(shift):
    assert bell_weight(training_sigmas(shift), shift).mean().item() == pytest.approx(1.0, abs=1e-12)


def test_bell_weight_keeps_dtype_and_shape():
    assert bell_weight(torch.rand(2, 3), 6.0).dtype == torch.float32
    assert bell_weight(torch.rand(2, 3), 6.0).shape == (2, 3)


@given(st.floats(0, 1), st.floats(1, 12))
def test_shift_round_trip(r, shift):
    sigma = shift_sigma(r, shift)
    assert shift_sigma(sigma, 1 / shift) == pytest.approx(r, abs=1e-9) and 0 <= sigma <= 1 + 1e-12


@given(st.integers(1, 200), st.floats(1, 12))
def test_any_grid_starts_at_one(num_steps, shift):
    grid = flow_grid(num_steps, shift)
    assert grid.shape == (num_steps,) and grid[0] == 1.0


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: flow_grid(0, 6.0), "num_steps=0"),
        (lambda: flow_grid(4, 0.0), "shift=0"),
        (lambda: flow_grid(4, float("nan")), "shift=nan"),
        (lambda: flow_grid(4, float("inf")), "shift=inf"),
    ],
)
def test_bad_values_are_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()
