from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.dragstream.statistics import PER_CHANNEL, match, match_clean, rectifiers


def latents(seed: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    return scale * torch.randn(1, 4, 3, 6, 8, generator=torch.Generator().manual_seed(seed)) + shift


@settings(max_examples=30, deadline=None)
@given(scale=st.floats(0.1, 10), shift=st.floats(-5, 5))
def test_statistics_after_matching_are_the_references(scale: float, shift: float):
    reference = latents(1, 0.9, 0.2)
    deviation, mean = torch.std_mean(match(latents(2, scale, shift), reference), PER_CHANNEL)
    wanted_deviation, wanted_mean = torch.std_mean(reference, PER_CHANNEL)
    torch.testing.assert_close(deviation, wanted_deviation, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mean, wanted_mean, atol=1e-4, rtol=1e-4)


def test_each_kind_holds_its_own_reference():
    before, neighbours, now = latents(1), latents(2, 0.5, 1.0), latents(3, 3.0, -1.0)
    for kind, reference in (("own", before), ("neighbours", neighbours)):
        each, last = rectifiers(kind, before, neighbours)
        torch.testing.assert_close(each(now).mean(PER_CHANNEL), reference.mean(PER_CHANNEL), atol=1e-4, rtol=1e-4)
        assert torch.equal(last(now), now)
    each, last = rectifiers("compat", before, neighbours)
    torch.testing.assert_close(each(now).mean((3, 4)), before.mean((3, 4)), atol=1e-4, rtol=1e-4)
    assert last(now).mean() == pytest.approx(float(before.mean()), abs=1e-5)
    each, last = rectifiers("off", before, neighbours)
    assert torch.equal(last(each(now)), now)


def test_a_first_chunk_has_no_neighbours_and_keeps_its_own_statistics():
    before, now = latents(1), latents(3, 3.0)
    each, _ = rectifiers("neighbours", before, None)
    torch.testing.assert_close(each(now), match(now, before))


def test_clean_latents_are_matched_to_those_before_and_themselves():
    previous, x0 = latents(1, 0.5, 1.0), latents(2)
    joined = torch.cat([previous, x0], dim=2)
    found = match_clean(x0, previous)
    assert float(found.mean()) == pytest.approx(float(joined.mean()), abs=1e-5)
    assert float(found.std()) == pytest.approx(float(joined.std()), abs=1e-4)
