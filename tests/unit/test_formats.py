"""Numbers as people read them."""

from torchtitan_deltaproduct.formats import amount, clock, count, duration, sparkline


def test_durations():
    assert [clock(s) for s in (0, 59.9, 61, 3725, 90000)] == ["0:00:00", "0:00:59", "0:01:01", "1:02:05", "25:00:00"]
    expected = ["0 s", "1 min 0 s", "1 h 1 min", "1 d 3 h"]
    assert [duration(s) for s in (0.2, 59.6, 3700, 100_000)] == expected


def test_counts():
    assert [count(n) for n in (614_400, 12_600_000, 6_290_000_000, 2 * 10**12)] == [
        "614,400",
        "12.6 M",
        "6.29 B",
        "2 T",
    ]
    assert [amount(v, "B") for v in (0, 999, 999.6, 1.234e9)] == ["0 B", "999 B", "1 kB", "1.23 GB"]


def test_a_sparkline_leaves_out_what_is_not_finite():
    odd = [float("nan"), float("inf"), -float("inf"), 1e308, -1e308]
    assert sparkline([*odd, 0.0, 1.0, 2.0, 7.0, *odd], 4) == "▁▂▃█" and sparkline(odd) == sparkline([]) == ""


def test_sparkline():
    assert sparkline([0.0, 1.0, 2.0, 7.0], 4) == "▁▂▃█"
    assert sparkline([5.0] * 9, 3) == "▁▁▁"
    assert sparkline([5.0, 10.0], low=0.0) == "▅█" and sparkline([1.0], low=0.0) == "█"
    assert len(sparkline(list(range(1000)))) == 60 and len(sparkline([1.0, 2.0], 48)) == 2
