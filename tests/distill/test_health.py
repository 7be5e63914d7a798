"""Collapse alarms and the measures they read."""

import math

import pytest
import torch

from distill.health import (
    CollapseError,
    HealthThresholds,
    LatentReference,
    check_health,
    motion_energy,
    seam_score,
    smooth,
)

HEALTHY = {"motion_energy_ratio": 0.9, "saturation_ratio": 0.002, "latent_std_ratio": 1.0, "score_gap": 0.2}


def test_a_healthy_run_passes_and_absent_measures_are_not_judged():
    check_health(HEALTHY, HealthThresholds())
    check_health({"loss": math.nan}, HealthThresholds())


@pytest.mark.parametrize(
    "name, value, field",
    [
        ("motion_energy_ratio", 0.01, "min_motion_energy_ratio"),
        ("saturation_ratio", 0.5, "max_saturation_ratio"),
        ("latent_std_ratio", 0.1, "min_latent_std_ratio"),
        ("latent_std_ratio", 9.0, "max_latent_std_ratio"),
        ("score_gap", 5.0, "max_score_gap"),
        ("score_gap", math.nan, "max_score_gap"),
    ],
)
def test_alarm_names_measure_value_limit_and_remedy(name, value, field):
    with pytest.raises(CollapseError, match=rf"{name}={value:.4g} must be .*{field}=.*; \w+"):
        check_health(HEALTHY | {name: value}, HealthThresholds())


def test_a_threshold_set_to_null_is_off():
    check_health(HEALTHY | {"score_gap": 5.0}, HealthThresholds(max_score_gap=None))


def test_smoothing_that_sees_nothing_new_is_refused():
    with pytest.raises(ValueError, match=r"stage.health.smoothing=1.0 must be in \[0, 1\)"):
        HealthThresholds(smoothing=1.0)


def test_smoothing_starts_at_the_first_value_and_keeps_absent_measures():
    state = smooth({}, {"a": 4.0}, 0.75)
    state = smooth(state, {"a": 0.0, "b": 1.0}, 0.75)
    assert state == {"a": 3.0, "b": 1.0}
    assert smooth(state, {}, 0.75) == state


def test_reference_compares_with_the_data():
    data = torch.randn(4, 2, 12, 16, 16, generator=torch.Generator().manual_seed(0))
    reference = LatentReference.measure([data])
    same = reference.compare(data)
    assert same["motion_energy_ratio"] == pytest.approx(1) and same["latent_std_ratio"] == pytest.approx(1)
    assert same["saturation_ratio"] == pytest.approx(0.001, abs=1e-3)
    frozen = data[:, :, :1].expand_as(data)
    assert reference.compare(frozen)["motion_energy_ratio"] == 0
    assert reference.compare(10 * data)["saturation_ratio"] > 0.5
    with pytest.raises(ValueError, match="reference_clips"):
        LatentReference.measure([])


def test_seam_score_sees_jumps_between_chunks():
    ramp = torch.arange(6.0).view(1, 1, 6, 1, 1)
    assert seam_score(ramp, 3).item() == pytest.approx(1)
    jump = ramp + 4 * (torch.arange(6) >= 3).view(1, 1, 6, 1, 1)
    assert seam_score(jump, 3).item() == pytest.approx(5)
    assert motion_energy(jump).item() == pytest.approx(9 / 5)


def test_a_measure_that_is_not_finite_is_forgotten():
    state = smooth(smooth({}, {"a": math.nan}, 0.5), {"a": 2.0}, 0.5)
    assert smooth(smooth(state, {"a": math.inf}, 0.5), {"a": 4.0}, 0.5) == {"a": 3.0}
