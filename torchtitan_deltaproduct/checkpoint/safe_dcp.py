"""Reading a distributed checkpoint (DCP) without trusting it.

DCP keeps an index, `.metadata`, as a pickle, and loads non-tensor values with `weights_only=False`. A checkpoint from
somebody else could run code on both ways. `SafeReader` unpickles the index with a machine that knows no more than an
index needs: it makes instances of DCP's own record classes and gives state to them alone, calls five harmless makers of
values, and has no other opcode. `SafeLoadPlanner` loads values with `weights_only=True`.

    dcp.load(state, storage_reader=SafeReader(folder), planner=SafeLoadPlanner())
"""

import io
import math
import pickle
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path, PurePosixPath

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint import metadata as records
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from ..errors import CheckpointError
from ..files import is_plain_name, read_bytes

_RECORDS = (
    records.BytesStorageMetadata, records.ChunkStorageMetadata, Metadata, records.MetadataIndex, StorageMeta,
    records.TensorProperties, records.TensorStorageMetadata, _StorageInfo,
)  # fmt: skip


def _path(*parts: str) -> str:
    return str(PurePosixPath(*map(str, parts)))


def _layout(name: str) -> torch.layout:
    return {"torch.strided": torch.strided}[name]


def _size(numbers: tuple = ()) -> torch.Size:
    return torch.Size(int(number) for number in numbers)


def _memory_format(cls: type, name: str) -> records._MEM_FORMAT_ENCODING:
    """Stands for `getattr`: Python 3.11.0 to 3.11.3 pickle a member of an enum by its name."""
    if cls is not records._MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError(f"getattr of {cls!r} does not belong in a checkpoint index")
    return cls[name]


# What stands for the names in an index. dtypes pickle as attributes of torch; a path comes back as text.
_GLOBALS = (
    {(cls.__module__, cls.__name__): cls for cls in _RECORDS}
    | {("torch", str(value).removeprefix("torch.")): value
       for value in vars(torch).values() if isinstance(value, torch.dtype)}
    | {(module, name): _path
       for module in ("pathlib", "pathlib._local") for name in ("Path", "PosixPath", "PurePosixPath")}
    | {(module, "getattr"): _memory_format for module in ("builtins", "__builtin__")}
    | {("torch", "Size"): _size, ("torch.serialization", "_get_layout"): _layout,
       (records.__name__, "_MEM_FORMAT_ENCODING"): records._MEM_FORMAT_ENCODING}
)  # fmt: skip
_MAKERS = (_path, _layout, _size, _memory_format, records._MEM_FORMAT_ENCODING)

# Numbers, texts, containers and the memo: they make built-in values and call nothing.
_PLAIN = (
    "PROTO FRAME STOP MARK POP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT SHORT_BINUNICODE BINUNICODE "
    "BINUNICODE8 SHORT_BINBYTES BINBYTES EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT "
    "SETITEM SETITEMS MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL STACK_GLOBAL"
)


class _Opcodes(dict):
    def __missing__(self, code: int):
        raise pickle.UnpicklingError(f"opcode {chr(code)!r} does not belong in a checkpoint index")


class _IndexUnpickler(pickle._Unpickler):
    """Python's own unpickler in Python, because the one in C gives state to whatever is on its stack, classes too."""

    dispatch = _Opcodes(
        {getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _PLAIN.split()}
    )

    def find_class(self, module: str, name: str):
        if (module, name) not in _GLOBALS:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong in a checkpoint index")
        return _GLOBALS[module, name]

    def load_newobj(self) -> None:
        arguments, cls = self.stack.pop(), self.stack.pop()
        if not any(cls is record for record in _RECORDS) or arguments != ():
            raise pickle.UnpicklingError(f"an object of {cls!r} does not belong in a checkpoint index")
        self.append(object.__new__(cls))

    def load_reduce(self) -> None:
        arguments, maker = self.stack.pop(), self.stack.pop()
        if not any(maker is allowed for allowed in _MAKERS):
            raise pickle.UnpicklingError(f"a call of {maker!r} does not belong in a checkpoint index")
        self.append(maker(*arguments))

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) not in _RECORDS:
            raise pickle.UnpicklingError(f"state of {target!r} does not belong in a checkpoint index")
        if type(target) is records.TensorProperties:
            target.__setstate__(state)
        elif type(state) is dict and state.keys() <= {field.name for field in fields(target)}:
            target.__dict__.update(state)
        else:
            raise pickle.UnpicklingError(f"{type(target).__name__} does not have the state that is in the index")

    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.BUILD[0]] = load_build


def covered(name: str, entry: TensorStorageMetadata, stored: Mapping) -> bool:
    """Whether the chunks of a tensor lie in it, add up to its size, and are each in a file."""
    numbers, places = 0, set()
    for chunk in entry.chunks:
        box = zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
        if any(offset < 0 or offset + size > whole for offset, size, whole in box):
            return False
        if MetadataIndex(name, chunk.offsets) not in stored:
            return False
        numbers += math.prod(chunk.sizes)
        places.add(tuple(chunk.offsets))
    return numbers == math.prod(entry.size) and len(places) == len(entry.chunks)


def read_index(folder: Path) -> Metadata:
    """Reads `folder/.metadata`; CheckpointError if it is missing, cut short, or holds anything but DCP's records."""
    path = Path(folder) / ".metadata"
    try:
        index = _IndexUnpickler(io.BytesIO(read_bytes(path))).load()
        if type(index) is not Metadata:
            raise pickle.UnpicklingError(f"it holds a {type(index).__name__}, not a checkpoint index")
        for part in index.storage_data.values():
            if type(part) is not _StorageInfo or not is_plain_name(part.relative_path):
                raise pickle.UnpicklingError(f"it names data outside of its folder: {part!r}")
        for name, entry in index.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata) and not covered(name, entry, index.storage_data):
                raise pickle.UnpicklingError(f"its parts of {name} do not make up the whole of it")
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no .metadata: not a checkpoint, or its save never finished") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise CheckpointError(f"{path} cannot be read ({error}); use another checkpoint") from None
    return index


class SafeReader(FileSystemReader):
    """`FileSystemReader` whose index passes through the allow-list."""

    def read_metadata(self, *args, **kwargs) -> Metadata:
        index = read_index(Path(self.path))
        if index.storage_meta is None:
            index.storage_meta = StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index


class SafeLoadPlanner(DefaultLoadPlanner):
    """`DefaultLoadPlanner` that loads non-tensor values with `weights_only=True`."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        # The parent unpickles without restriction: hand it what a restricted load produced, saved again.
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)
