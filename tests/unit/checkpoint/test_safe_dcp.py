"""A hostile `.metadata`: every way a pickle has to run code or to change what is not its own is refused."""

import enum
import pathlib
import pickle
import subprocess
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as records
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from tests.toy import REPO
from torchtitan_deltaproduct.checkpoint import safe_dcp
from torchtitan_deltaproduct.checkpoint.safe_dcp import _GLOBALS, _MAKERS, _RECORDS, read_index
from torchtitan_deltaproduct.errors import CheckpointError

DCP = b"torch.distributed.checkpoint.metadata"


def text(value: bytes) -> bytes:
    """SHORT_BINUNICODE."""
    return b"\x8c" + bytes([len(value)]) + value


def name(module: bytes, attribute: bytes) -> bytes:
    """STACK_GLOBAL."""
    return text(module) + text(attribute) + b"\x93"


def state_of_slots(key: bytes, value: bytes) -> bytes:
    """A pair (None, {key: value}), which BUILD sets attribute by attribute, on classes too."""
    return b"N}" + text(key) + text(value) + b"s\x86b"


class Returns:
    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce_ex__(self, protocol):
        return self.reduced


HOSTILE = {
    "REDUCE of a builtin": pickle.dumps(Returns(print, ("code ran",))),
    "GLOBAL of a builtin": b"cbuiltins\nprint\n(S'code ran'\ntR.",
    "a dotted name": b"\x80\x04" + name(DCP, b"Metadata.__init__.__globals__") + b".",
    "BUILD of a record class": b"\x80\x04" + name(DCP, b"Metadata") + state_of_slots(b"version", b"9") + b".",
    "BUILD of a path class": b"\x80\x04" + name(b"pathlib", b"PosixPath") + state_of_slots(b"_str", b"/tmp/x") + b".",
    "BUILD of a dtype": b"\x80\x04" + name(b"torch", b"float32") + state_of_slots(b"x", b"y") + b".",
    "BUILD of a record class with fields": b"\x80\x04" + name(DCP, b"Metadata") + b"}" + text(b"version") + b"Nsb.",
    "BUILD of a function": b"\x80\x04" + name(b"torch.serialization", b"_get_layout") + state_of_slots(b"a", b"b")[:],
    "BUILD with a foreign field": b"\x80\x04" + name(DCP, b"Metadata") + b")\x81}" + text(b"__class__") + b"Nsb.",
    "REDUCE of a record class": b"\x80\x04" + name(DCP, b"StorageMeta") + b")R.",
    "NEWOBJ of a size": b"\x80\x04" + name(b"torch", b"Size") + b")\x81.",
    "NEWOBJ with arguments": b"\x80\x04" + name(DCP, b"StorageMeta") + text(b"x") + b"\x85\x81.",
    "NEWOBJ_EX": b"\x80\x04" + name(DCP, b"StorageMeta") + b")}\x92.",
    "INST": b"(i" + DCP + b"\nStorageMeta\n.",
    "OBJ": b"\x80\x04(" + name(DCP, b"StorageMeta") + b"o.",
    "EXT1": b"\x80\x02\x82\x01.",
    "EXT2": b"\x80\x02\x83\x01\x00.",
    "PERSID": b"Pname\n.",
    "BINPERSID": b"\x80\x04" + text(b"name") + b"Q.",
    "NEXT_BUFFER": b"\x80\x05\x97.",
    "no index": pickle.dumps({"a": 1}),
    "a layout that is none": b"\x80\x04" + name(b"torch.serialization", b"_get_layout") + text(b"x") + b"\x85R.",
    "getattr of a record class": pickle.dumps(Returns(getattr, (StorageMeta, "__init__"))),
    "getattr of a class of an enum": pickle.dumps(Returns(getattr, (records._MEM_FORMAT_ENCODING, "__class__"))),
    "cut short": pickle.dumps(Metadata({}))[:-20],
    "empty": b"",
}


@pytest.fixture
def attributes():
    """What the classes and the modules of an index hold; the same after each test."""
    owners = [*_RECORDS, pathlib.PurePosixPath, pathlib.PosixPath, torch.Size, *_MAKERS, records._MEM_FORMAT_ENCODING]
    before = [dict(vars(owner)) for owner in owners]
    yield
    assert [dict(vars(owner)) for owner in owners] == before


REASONS = {"BUILD of": "state of ", "REDUCE of a record": "a call of ", "NEWOBJ of": "an object of ",
           "NEWOBJ with": "an object of ", "BUILD with": "Metadata does not have the state"}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_index_is_refused(tmp_path, capsys, attributes, name):
    (tmp_path / ".metadata").write_bytes(HOSTILE[name])
    reason = next((reason for start, reason in REASONS.items() if name.startswith(start)), "")
    with pytest.raises(CheckpointError, match=rf"\.metadata cannot be read \({reason}"):
        read_index(tmp_path)
    assert "code ran" not in capsys.readouterr().out


def test_nothing_that_an_index_may_name_runs_foreign_code():
    """Records have no code of their own that state could reach, but for one of torch's; makers are ours or torch's."""
    with_code = [cls for cls in _RECORDS if "__setstate__" in vars(cls) or "__init_subclass__" in vars(cls)]
    assert with_code == [records.TensorProperties]
    callables = {value for value in _GLOBALS.values() if callable(value)} - set(_RECORDS)
    assert callables == set(_MAKERS) and all("print" not in maker.__name__ for maker in _MAKERS)


@pytest.mark.parametrize("where", ["/etc/passwd", "../step-1/__0_0.distcp", ""])
def test_data_outside_of_the_folder_is_refused(tmp_path, where):
    index = Metadata({}, storage_data={records.MetadataIndex("x"): dcp.filesystem._StorageInfo(where, 0, 4)})
    (tmp_path / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match="data outside of its folder"):
        read_index(tmp_path)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_an_index_reads_as_it_was_written(tmp_path, protocol):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = {"w": torch.zeros(4, 3, dtype=torch.bfloat16), "t": {"a": 1, "b": [1, 2.5]}, "s": torch.zeros(())}
        dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    written = pickle.loads((tmp_path / ".metadata").read_bytes())
    written.storage_meta = StorageMeta(checkpoint_id=Path("/runs/a"), save_id="1")
    (tmp_path / ".metadata").write_bytes(pickle.dumps(written, protocol))
    found = read_index(tmp_path)
    assert found.storage_meta.checkpoint_id == "/runs/a"
    found.storage_meta = written.storage_meta
    assert found == written and found.state_dict_metadata["w"].properties.dtype is torch.bfloat16


class ByName(pickle.Pickler):
    """As Python 3.11.0 to 3.11.3 pickle enums."""

    def reducer_override(self, value):
        return (getattr, (type(value), value.name)) if isinstance(value, enum.Enum) else NotImplemented


@pytest.mark.parametrize("protocol", (2, pickle.HIGHEST_PROTOCOL))
def test_enums_of_other_pythons(tmp_path, protocol):
    properties = records.TensorProperties(memory_format=torch.channels_last)
    index = Metadata({"x": records.TensorStorageMetadata(properties, torch.Size([]), [])}, storage_data={})
    index.storage_meta = StorageMeta()
    with open(tmp_path / ".metadata", "wb") as file:
        ByName(file, protocol).dump(index)
    assert b"getattr" in (tmp_path / ".metadata").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safe_dcp, "covered", lambda *_: True)
        assert read_index(tmp_path) == index


@pytest.mark.parametrize("version", ["3.12", "3.13"])
def test_paths_of_other_pythons(tmp_path, version):
    """An index that another Python wrote names its path class otherwise."""
    python = next(Path("/root/.pyenv/versions").glob(f"{version}.*/bin/python"), None)
    if python is None:
        pytest.skip(f"there is no Python {version} on this machine")
    code = "import pathlib, pickle, sys; sys.stdout.buffer.write(pickle.dumps(pathlib.Path('/a/b')))"
    content = subprocess.run([python, "-I", "-c", code], capture_output=True, check=True, cwd=REPO).stdout
    from torchtitan_deltaproduct.checkpoint.safe_dcp import _IndexUnpickler, io

    assert _IndexUnpickler(io.BytesIO(content)).load() == "/a/b"


@pytest.mark.parametrize("change", ["none", "smaller", "twice", "outside", "not stored"])
def test_an_index_whose_parts_are_not_the_whole_tensor(tmp_path, change):
    """Else what no part covers would be whatever the memory held."""

    dcp.save({"w": torch.ones(8, 4)}, checkpoint_id=tmp_path, no_dist=True)
    path = tmp_path / ".metadata"
    index = pickle.loads(path.read_bytes())
    chunks = index.state_dict_metadata["w"].chunks
    assert read_index(tmp_path).state_dict_metadata["w"].chunks == chunks
    if change == "none":
        chunks.clear()
    elif change == "smaller":
        chunks[0].sizes = torch.Size([7, 4])
    elif change == "twice":
        chunks[0].sizes = torch.Size([4, 4])
        chunks.append(chunks[0])
    elif change == "outside":
        chunks[0].offsets = torch.Size([1, 0])
    else:
        index.storage_data.clear()
    path.write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match="parts of w do not make up"):
        read_index(tmp_path)
