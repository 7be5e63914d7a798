"""Keyed randomness: a name gives one value, whatever is drawn around it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.diffusion.noise import KeyedNoise

KEY = st.lists(st.one_of(st.integers(-5, 10**12), st.text(max_size=4)), max_size=4)


def test_a_sample_is_independent_of_its_batch():
    noise = KeyedNoise(7)
    batch = noise.normal((3, 5), [4, 90, 12], "rollout", 1)
    assert torch.equal(batch[1], noise.normal((3, 5), [90], "rollout", 1)[0])
    assert torch.equal(batch[[2, 0]], noise.normal((3, 5), [12, 4], "rollout", 1))


def test_draws_do_not_touch_or_read_the_global_generator():
    torch.manual_seed(0)
    first = KeyedNoise(1).normal((4,), [0], "a")
    state = torch.get_rng_state()
    torch.manual_seed(99)
    assert torch.equal(first, KeyedNoise(1).normal((4,), [0], "a"))
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state())


def test_values_are_stable_across_processes():
    # fixed numbers: a hash that changed between runs or releases would break every resume
    assert KeyedNoise(0).integers(1000, "exit_step", 3) == 619
    assert KeyedNoise(0).uniform("drop", 5) == pytest.approx(0.43401833796359846, abs=1e-15)
    drawn = KeyedNoise(0).normal((4,), [7], "rollout", 1, 0, "start")
    torch.testing.assert_close(drawn, torch.tensor([[-0.1484, 0.0874, 0.0888, 1.1120]]), atol=1e-4, rtol=0)


def test_draws_are_standard_normal_and_uncorrelated():
    noise = KeyedNoise(3).normal((10_000,), range(4), "x")
    assert noise.mean().abs() < 0.02 and (noise.std() - 1).abs() < 0.02
    assert (torch.corrcoef(noise) - torch.eye(4)).abs().max() < 0.05


def test_integers_and_uniform_cover_their_range():
    noise = KeyedNoise(2)
    draws = [noise.integers(3, "exit", step) for step in range(3000)]
    assert all(900 < draws.count(value) < 1100 for value in range(3))
    levels = [noise.uniform("u", step) for step in range(2000)]
    assert 0 <= min(levels) < 0.01 and 0.99 < max(levels) < 1


@settings(max_examples=200)
@given(KEY, KEY)
def test_other_keys_give_other_draws(first, second):
    noise = KeyedNoise(0)
    same = [(type(part), part) for part in first] == [(type(part), part) for part in second]
    assert (noise.integers(2**60, *first) == noise.integers(2**60, *second)) == same


def test_seed_and_split_of_the_key_matter():
    assert KeyedNoise(1).uniform("a", "b") != KeyedNoise(1).uniform("ab")
    assert KeyedNoise(1).uniform("1") != KeyedNoise(1).uniform(1)
    assert KeyedNoise(1).uniform("a") != KeyedNoise(2).uniform("a")


def test_dtype_is_a_cast_of_the_same_draw():
    noise = KeyedNoise(5)
    single = noise.normal((64,), [0, 1], "k")
    assert torch.equal(noise.normal((64,), [0, 1], "k", dtype=torch.bfloat16), single.bfloat16())
    assert noise.normal((64,), [], "k").shape == (0, 64)


@pytest.mark.parametrize("part", [1.5, None])
def test_a_key_part_that_is_no_name_is_refused(part):
    with pytest.raises(TypeError):
        KeyedNoise(0).uniform(part)


def test_empty_range_is_refused():
    with pytest.raises(ValueError, match="high=0"):
        KeyedNoise(0).integers(0, "x")
