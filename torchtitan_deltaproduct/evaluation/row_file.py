"""An array [rows, length] in a .npy file, written and read piece by piece with the memory of one piece.

    with RowWriter(path, np.dtype("<u2"), rows=32, length=32_769) as file: file.write(row, start, values)
    RowFile(path).read(row, start, stop)

NumPy and everybody who reads .npy opens the whole (`np.load(path, mmap_mode="r")`). Here nothing is mapped: pages of a
map that were touched count as memory of the process. The file has its name once it is complete and on the disk.
"""

import os
from pathlib import Path

import numpy as np

from torchtitan_deltaproduct.errors import DataError


class RowWriter:
    """Writes `path`, under a temporary name until the `with` block ends without an exception.

    Args:
        path: the file to make.
        dtype: of an element.
        rows, length: the shape. Elements that are not written are zeros.
    """

    def __init__(self, path: Path, dtype: np.dtype, rows: int, length: int):
        self.path, self.dtype, self.shape = path, np.dtype(dtype), (rows, length)
        self.temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")

    def __enter__(self) -> "RowWriter":
        self.file = open(self.temporary, "wb")  # noqa: SIM115 (closed in __exit__)
        self._write_header()
        return self

    def write(self, row: int, start: int, values: np.ndarray) -> None:
        """Elements `start`, `start + 1`, ... of a row: values [n]."""
        self.file.seek(self.header + (row * self.shape[1] + start) * self.dtype.itemsize)
        self.file.write(np.ascontiguousarray(values, dtype=self.dtype).data)

    def cut(self, rows: int) -> None:
        """Leaves the first `rows` rows: for those who learn while writing how many there are."""
        self.shape, before = (rows, self.shape[1]), self.header
        self.file.seek(0)
        self._write_header()
        # NumPy pads a header so that the first axis can grow in place.
        assert self.header == before

    def _write_header(self) -> None:
        form = np.lib.format
        description = {"descr": form.dtype_to_descr(self.dtype), "fortran_order": False, "shape": self.shape}
        form.write_array_header_1_0(self.file, description)
        self.header = self.file.tell()

    def __exit__(self, kind, *exception) -> None:
        if kind is None:
            self.file.truncate(self.header + self.shape[0] * self.shape[1] * self.dtype.itemsize)
            self.file.flush()
            os.fsync(self.file.fileno())
        self.file.close()
        if kind is None:
            os.replace(self.temporary, self.path)
        else:
            self.temporary.unlink(missing_ok=True)


class RowFile:
    """Reads what `RowWriter` wrote.

    Attributes:
        shape: (rows, length).
        dtype: of an element.

    Raises:
        DataError: the file is not an array of two dimensions, or not as long as its header says.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with open(path, "rb") as file:
                if np.lib.format.read_magic(file) != (1, 0):
                    raise ValueError("of another version")
                self.shape, _, self.dtype = np.lib.format.read_array_header_1_0(file)
                self.header = file.tell()
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read as a .npy array ({error})") from None
        expected = self.header + int(np.prod(self.shape)) * self.dtype.itemsize
        if len(self.shape) != 2 or path.stat().st_size != expected:
            raise DataError(f"{path} has {path.stat().st_size:,} bytes; its header says {expected:,}")

    def read(self, row: int, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop) of a row."""
        offset = self.header + (row * self.shape[1] + start) * self.dtype.itemsize
        return np.fromfile(self.path, self.dtype, stop - start, offset=offset)
