"""The lines through the measured points; the measuring itself takes minutes and is run by hand."""

import pytest

from load_tests.cost_growth import ADAPTERS, CURVES, Fit, fit, ranks_for

XS = (1, 2, 4, 8, 16, 32)


def test_the_bend_is_found_where_the_slope_changes() -> None:
    truth = Fit(0.02, 0.001, 8, 0.004)
    found = fit(XS, [truth(x) for x in XS])
    assert found.bend == 8
    assert found == pytest.approx(truth)


def test_noise_of_a_few_per_cent_moves_neither_the_bend_nor_the_slopes_far() -> None:
    truth = Fit(0.02, 0.001, 8, 0.004)
    found = fit(XS, [truth(x) * noise for x, noise in zip(XS, (1.01, 0.99, 1.02, 1, 0.98, 1.01), strict=True)])
    assert found.bend == 8
    assert found.slope == pytest.approx(truth.slope, rel=0.3)
    assert found.slope_after == pytest.approx(truth.slope_after, rel=0.1)


def test_there_are_adapters_for_every_point() -> None:
    assert list(ranks_for(CURVES["adapters"])) == [16] * ADAPTERS
    assert list(ranks_for(CURVES["rank"])) == [16, 32, 64, 128, 192, 256]
    assert list(ranks_for(CURVES["context"])) == [16]
