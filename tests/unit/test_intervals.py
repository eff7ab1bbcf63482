"""Intervals, against tables and by their definition."""

import numpy as np
import pytest

from torchtitan_deltaproduct.intervals import student_t, wilson


def test_student_t():
    """Against the tables (NIST handbook 1.3.6.7.2)."""
    for degrees, t in ((1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (7, 2.365), (31, 2.040), (100, 1.984)):
        assert student_t(degrees) == pytest.approx(t, abs=5e-4)


def test_wilson():
    """Against R: prop.test(8, 10, correct = FALSE), and the closed ends at 0 and n."""
    low, high = wilson([8, 0, 10], [10, 10, 10])
    assert low == pytest.approx([0.4901625, 0, 0.7224672], abs=1e-6)
    assert high == pytest.approx([0.9433178, 0.2775328, 1], abs=1e-6)
    assert low[1] == 0 and high[2] == 1
    assert np.isnan(wilson(0, 0)).all()
