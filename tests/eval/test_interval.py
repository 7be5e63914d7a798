from __future__ import annotations

import numpy as np
import pytest

from eval.metrics.interval import bootstrap_interval, mean_over_seeds, paired_difference, seeded_interval


def test_covers_the_true_mean_about_as_often_as_promised() -> None:
    rng = np.random.default_rng(0)
    draws = rng.exponential(2.0, size=(200, 40))
    covered = 0
    for row in draws:
        interval = bootstrap_interval(row, seed=1, resamples=400)
        covered += interval.low <= 2.0 <= interval.high
    assert 170 <= covered <= 199


def test_same_seed_same_interval_and_narrower_with_more_clips() -> None:
    values = np.random.default_rng(3).normal(size=400)
    few, again, many = (bootstrap_interval(v, seed=5) for v in (values[:20], values[:20], values))
    assert few == again
    assert many.high - many.low < (few.high - few.low) / 2
    assert few.low < few.mean < few.high


def test_pairing_removes_the_variance_between_clips() -> None:
    rng = np.random.default_rng(4)
    hard = rng.uniform(0, 50, 30)
    gain = paired_difference(hard + 1 + rng.normal(0, 0.1, 30), hard, seed=0)
    assert 0.9 < gain.low < gain.high < 1.1
    with pytest.raises(ValueError, match="same clips"):
        paired_difference([1.0], [1.0, 2.0], seed=0)


def test_nothing_measured_and_one_clip() -> None:
    assert bootstrap_interval([float("nan")], seed=0).mean is None
    one = bootstrap_interval([3.0, float("nan")], seed=0)
    assert (one.mean, one.low, one.high, one.count) == (3.0, None, None, 1)
    assert str(one) == "3"
    with pytest.raises(ValueError, match="level=95"):
        bootstrap_interval([1.0, 2.0], seed=0, level=95)


def test_a_clip_is_its_mean_over_the_seeds_that_measured_it() -> None:
    nan = float("nan")
    means = mean_over_seeds([[1.0, nan, nan, 2.0], [3.0, 5.0, nan, 2.0]])
    np.testing.assert_equal(means, [2.0, 5.0, nan, 2.0])
    with pytest.raises(ValueError, match=r"the same clips in each; got \[1, 2\] values"):
        mean_over_seeds([[1.0], [1.0, 2.0]])


def test_trainings_that_differ_widen_the_interval_and_one_has_none() -> None:
    clips = np.random.default_rng(0).normal(size=40)
    same, apart = (seeded_interval([clips, clips + gap], seed=0) for gap in (0.0, 4.0))
    over_clips = bootstrap_interval(clips.tolist(), seed=0)
    assert same.high - same.low == pytest.approx(over_clips.high - over_clips.low, rel=0.1)
    assert apart.low < clips.mean() + 0.1 and apart.high > clips.mean() + 3.9 and apart.count == 40
    one = seeded_interval([clips], seed=0)
    assert one.mean == pytest.approx(clips.mean()) and (one.low, one.high) == (None, None)
    unmeasured = seeded_interval([[1.0, np.nan, np.nan], [3.0, 2.0, np.nan]], seed=0)
    assert unmeasured.count == 2 and unmeasured.mean == 2.0 and 1.0 <= unmeasured.low <= unmeasured.high <= 3.0
