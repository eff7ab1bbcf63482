"""Numbers as people read them: durations, counts and curves, the same in every command.

clock(3725), duration(3725)          # "1:02:05", "1 h 2 min"
count(6.29e9), amount(1.23e9, "B")   # "6.29 B" (tokens), "1.23 GB" (bytes)
sparkline([5.0, 3.0, 2.5])           # "█▂▁"
"""

BLOCKS = "▁▂▃▄▅▆▇█"
LARGEST = 1e300
"""Numbers beyond it, infinities and NaN are no measurements."""


def clock(seconds: float) -> str:
    """`3725` -> `1:02:05`."""
    minutes, seconds = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def duration(seconds: float) -> str:
    """`3 d 4 h`, `2 h 5 min`, `41 s`: two units at most."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    parts, rest = [], round(seconds)
    for name, size in units:
        if rest >= size or parts:
            parts.append(f"{rest // size} {name}")
            rest %= size
        if len(parts) == 2:
            break
    return " ".join(parts) or "0 s"


def count(number: int) -> str:
    """`6.29 B`, `12.6 M`, `614,400`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,}"


def amount(value: float, unit: str) -> str:
    """1.23e9 as `1.23 G` with its unit; bytes too are in powers of ten."""
    for prefix in ("", "k", "M", "G", "T", "P", "E", "Z"):
        if abs(value) < 999.5 or prefix == "Z":
            return f"{value:.3g} {prefix}{unit}".rstrip()
        value /= 1000
    raise AssertionError("unreachable")


def sparkline(values: list[float], width: int = 60, low: float | None = None) -> str:
    """`█▆▄▃▂▁`: means of up to `width` stretches of the values, from `low` (None: the lowest mean) to the highest.

    What is no number, and infinities, are left out.
    """
    values = [value for value in values if abs(value) < LARGEST]
    if not values:
        return ""
    width = min(width, len(values))
    bounds = [i * len(values) // width for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(bounds, bounds[1:], strict=False)]
    low, high = min(means) if low is None else low, max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)
