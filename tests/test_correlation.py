"""Figures with intervals: against scipy's own."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap, pearsonr, spearmanr

from pyiqa_clipkd.correlation import correlations


@pytest.fixture
def data() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Human scores with ties, a weak and a strong set of scores."""
    rng = np.random.default_rng(0)
    mos = rng.integers(1, 6, 150).astype(float)
    return mos, mos + rng.normal(0, 3, 150), mos + rng.normal(0, 0.5, 150)


def test_values_are_those_of_scipy(data: tuple[np.ndarray, ...]) -> None:
    mos, weak, _ = data
    figures = correlations({'after': weak}, mos)['after']
    assert figures['srcc'].value == pytest.approx(spearmanr(weak, mos).statistic)
    assert figures['plcc'].value == pytest.approx(pearsonr(weak, mos).statistic)


def test_intervals_are_those_of_scipy_s_bootstrap(
    data: tuple[np.ndarray, ...],
) -> None:
    mos, weak, _ = data
    interval = correlations({'after': weak}, mos)['after']['plcc']
    theirs = bootstrap(
        (weak, mos),
        lambda a, b: pearsonr(a, b).statistic,
        paired=True,
        vectorized=False,
        method='percentile',
        n_resamples=1000,
    ).confidence_interval
    assert interval.low == pytest.approx(theirs.low, abs=0.03)
    assert interval.high == pytest.approx(theirs.high, abs=0.03)


def test_the_change_is_paired(data: tuple[np.ndarray, ...]) -> None:
    mos, weak, strong = data
    figures = correlations({'before': weak, 'teacher': mos, 'after': strong}, mos)
    change = figures['change']['srcc']
    gain = figures['after']['srcc'].value - figures['before']['srcc'].value
    assert change.value == pytest.approx(gain)
    assert 0 < change.low < gain < change.high
    same = correlations({'before': weak, 'after': weak}, mos)['change']['srcc']
    assert same == (0, 0, 0)


def test_one_set_of_scores_has_no_change(data: tuple[np.ndarray, ...]) -> None:
    assert set(correlations({'after': data[1]}, data[0])) == {'after'}


def test_constant_scores_have_no_correlation() -> None:
    interval = correlations({'after': np.ones(9)}, np.arange(9.0))['after']['srcc']
    assert np.isnan(interval.value)
    assert (interval.low, interval.high) == (-1, 1)
