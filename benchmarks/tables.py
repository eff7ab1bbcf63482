"""Columns of the benchmarks' tables: numbers, one below the other.

Table("row", *columns("ms", "ratio"), title="times")
"""

from rich.table import Column


def columns(*names: str, **look) -> list[Column]:
    """One column a name, aligned on the right; look: further arguments of each `Column`."""
    return [Column(name, justify="right", **look) for name in names]
