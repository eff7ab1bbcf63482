"""Reading a distributed checkpoint (DCP) without trusting it.

DCP keeps an index, `.metadata`, as a pickle, and loads non-tensor values with `weights_only=False`. A checkpoint from
somebody else could run code on both ways. `SafeReader` unpickles the index through an allow-list of DCP's own record
classes, and `SafeLoadPlanner` loads values with `weights_only=True`.

    dcp.load(state, storage_reader=SafeReader(folder), planner=SafeLoadPlanner())
"""

import io
import pickle
from pathlib import Path

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from ..errors import CheckpointError

# Classes an index consists of. dtype and layout singletons pickle as attributes of torch.
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size"} | {str(v).removeprefix("torch.") for v in vars(torch).values() if isinstance(v, torch.dtype)},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
    "collections": {"OrderedDict"},
}  # fmt: skip


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in a checkpoint index")


def read_index(folder: Path) -> Metadata:
    """Reads `folder/.metadata`.

    Raises:
        CheckpointError: the file is missing, cut short, or holds anything but DCP's record classes.
    """
    path = Path(folder) / ".metadata"
    try:
        index = _IndexUnpickler(io.BytesIO(path.read_bytes())).load()
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no .metadata: not a checkpoint, or its save never finished") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise CheckpointError(f"{path} cannot be read ({error}); use another checkpoint") from None
    if not isinstance(index, Metadata):
        raise CheckpointError(f"{path} holds a {type(index).__name__}, not a checkpoint index; use another checkpoint")
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
