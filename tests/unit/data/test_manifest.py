"""Damaged and mismatched folders are recognised, with a message that says what to do."""

import hashlib
import json
import os
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from torchtitan_deltaproduct.config.job import Data
from torchtitan_deltaproduct.data import build_loader
from torchtitan_deltaproduct.data.held_out import held_out_text
from torchtitan_deltaproduct.data.shards import manifest, verified
from torchtitan_deltaproduct.data.shards.manifest import read_manifest, write_manifest
from torchtitan_deltaproduct.data.shards.shards import TokenStream, token_dtype
from torchtitan_deltaproduct.data.show import main as show
from torchtitan_deltaproduct.data.show import verify
from torchtitan_deltaproduct.data.text.train_tokenizer import train_tokenizer
from torchtitan_deltaproduct.errors import ConfigError, DataError

from .conftest import make_corpus, make_set


@pytest.fixture
def folder(sets, tmp_path) -> Path:
    return Path(shutil.copytree(sets["a"], tmp_path / "a"))


def use(folder, **options):
    sizes = {"seq_len": 8, "local_batch_size": 1, "global_batch_size": 1}
    return build_loader(Data(paths=[str(folder)]), **sizes, **options)


def test_truncated_shard(folder):
    shard = next(folder.glob("shards/*.bin"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"{shard.name} has [\d,]+ bytes; the manifest says [\d,]+ bytes"):
        use(folder)


def test_missing_shard(folder):
    next(folder.glob("shards/*.idx")).unlink()
    with pytest.raises(DataError, match="is missing"):
        use(folder)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda text: text.replace('"tokens": ', '"tokens": 1', 1), "checksum does not match"),
        (lambda text: text[: len(text) // 2], "is damaged"),
        (lambda text: text.replace('"version": 3', '"version": 4'), "has version 4"),
        (lambda text: "[]", "is damaged"),
        (lambda text: "{}", "is not a manifest"),
    ],
)
def test_changed_manifest(folder, damage, message):
    path = folder / "manifest.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(DataError, match=message):
        use(folder)


def test_changed_table(folder):
    table = folder / "shards.npy"
    raw = bytearray(table.read_bytes())
    raw[-1] ^= 1
    table.write_bytes(raw)
    (folder / "manifest.json").touch()
    with pytest.raises(DataError, match=r"shards.npy was changed after it was written"):
        use(folder)
    table.unlink()
    with pytest.raises(DataError, match=r"shards.npy cannot be read"):
        use(folder)


def flip(shard):
    raw = bytearray(shard.read_bytes())
    raw[10] ^= 1
    shard.write_bytes(raw)


def read_all(folder):
    """Every token and every document's beginning, as training and validation read them."""
    loader, held_out = use(folder), held_out_text([str(folder)], seq_len=8, local_batch_size=4)
    rows = loader.source.bounds[-1]
    loader.source.batch(np.arange(rows))
    for _ in held_out:
        pass
    stream = TokenStream(folder)
    tokens = np.empty(stream.tokens, dtype=np.int64)
    stream.read(0, tokens)
    return tokens, stream.document_starts(0, stream.tokens)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("used", [False, True])
def test_a_flipped_token_is_found_on_first_use_and_after_every_change(folder, used, suffix):
    assert verify(folder) == 6
    if used:
        read_all(folder)
    shard = sorted(folder.glob(f"shards/*{suffix}"))[2]
    flip(shard)
    # In a folder that was compared before, files written to in place are looked at when they are opened.
    for find in (read_all, verify) if used else (read_all, verify, use):
        with pytest.raises(DataError, match=rf"1 of 6 files differ.*{shard.name}"):
            find(folder)
    flip(shard)
    read_all(folder)


def test_an_open_stream_sees_no_change_and_a_new_one_does(folder):
    read_all(folder)
    stream, tokens = TokenStream(folder), np.empty(9, dtype=np.int64)
    shard = sorted(folder.glob("shards/*.bin"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"{shard.name} has [\d,]+ bytes; the manifest says [\d,]+ bytes"):
        stream.read(0, tokens)
    shard.unlink()
    with pytest.raises(DataError, match="is missing"):
        stream.read(0, tokens)
    with pytest.raises(DataError, match="is missing"):
        use(folder)


def test_files_are_compared_once(folder, monkeypatch):
    """By one process that finds them unchanged; a copy has other inodes and is compared anew."""
    read = []

    def counted(path, compare=verified.file_sha256):
        read.append(path.name)
        return compare(path)

    monkeypatch.setattr(verified, "file_sha256", counted)
    use(folder), use(folder)
    assert len(read) == 6
    shutil.copytree(folder, folder.with_name("copy"))
    use(folder.with_name("copy")), use(folder.with_name("copy"))
    assert len(read) == 12
    shard = sorted(folder.glob("shards/*.bin"))[1]
    shard.write_bytes(shard.read_bytes())
    read_all(folder), read_all(folder)
    assert read[12:] == [shard.name]


def test_a_start_looks_at_no_shard(folder, monkeypatch):
    """The folder of the shards and the note tell; the manifest is read once for as long as it is the same file."""
    use(folder)
    looked, parsed = [], []
    for module, name, log in ((os, "stat", looked), (os, "fstat", looked), (manifest.json, "loads", parsed)):
        call = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, call=call, log=log, **k: log.append(str(a[0])) or call(*a, **k))
    loader = use(folder)
    held_out_text([str(folder)], seq_len=8, local_batch_size=4)
    assert not [path for path in looked if path.endswith((".bin", ".idx"))]
    assert not [text for text in parsed if "shards_sha256" in text]
    next(iter(loader))
    assert loader.source.streams[0]._files


def older(folder):
    """The folder as version 2 had it: an .idx was int64, where each document ends."""
    made, stream, shards = read_manifest(folder), TokenStream(folder), []
    for shard, (base, end) in zip(made.shards, pairwise(stream.bounds), strict=True):
        starts = stream.document_starts(base, end) - base
        index = np.append(starts[1:], end - base).astype("<i8").tobytes()
        (folder / f"{shard.name}.idx").write_bytes(index)
        shards.append(replace(shard, idx_sha256=hashlib.sha256(index).hexdigest()))
    write_manifest(folder, replace(made, version=2, shards=shards))


def test_prepared_folders_of_version_2(folder):
    tokens, starts = read_all(folder)
    older(folder)
    assert '"version": 2' in (folder / "manifest.json").read_text()
    assert [np.array_equal(*pair) for pair in zip(read_all(folder), (tokens, starts), strict=True)] == [True, True]
    stream = TokenStream(folder)
    ends = [*starts[1:].tolist(), stream.tokens]
    documents = [tokens[a:b].tolist() for a, b in zip(starts, ends, strict=True)]
    assert [stream.document(number).tolist() for number in range(len(ends))] == documents


def test_prepared_folders_of_version_1(folder):
    """The shards as a list in manifest.json, as it was before shards.npy: the same data, the same identity."""
    older(folder)
    expected, read = read_manifest(folder), read_all(folder)
    body = json.loads((folder / "manifest.json").read_text())
    for name in ("manifest_sha256", "shards_sha256", "content_sha256"):
        del body[name]
    body |= {"version": 1, "shards": [vars(shard) for shard in expected.shards]}
    body["manifest_sha256"] = manifest._checksum(body)
    (folder / "manifest.json").write_text(json.dumps(body))
    (folder / "shards.npy").unlink()
    assert replace(read_manifest(folder), version=2) == expected
    assert read_manifest(folder).content_sha256 == expected.content_sha256
    assert all(map(np.array_equal, read_all(folder), read))


def test_a_folder_that_cannot_be_written(folder, tmp_path, monkeypatch):
    for note in folder.glob(".verified*"):
        note.unlink()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(verified.os, "access", lambda *_: False)
    use(folder)
    (noted,) = (tmp_path / "cache/torchtitan_deltaproduct").iterdir()
    assert ".verified-" in noted.name and not list(folder.glob(".verified*"))
    read_all(folder)


def test_an_id_outside_the_vocabulary_is_named(tmp_path, tokenizer):
    """A manifest that fits its files, made with another tokenizer than it says."""
    make_set(tmp_path / "x", tokenizer, [[30], [30]])
    made = read_manifest(tmp_path / "x")
    highest = max(TokenStream(tmp_path / "x").document(1))
    write_manifest(tmp_path / "x", replace(made, vocab_size=int(highest)))
    loader = use(tmp_path / "x")
    said = rf"shards/0000\d.bin holds token {highest} at place \d+; the vocabulary ends at {highest - 1}"
    with pytest.raises(DataError, match=said):
        for _, _ in zip(range(8), loader, strict=False):
            pass


def test_wrong_tokenizer(folder, sets, tmp_path):
    other = str(tmp_path / "other")
    train_tokenizer([str(make_corpus(tmp_path / "corpus", 5, seed=9))], 300, other)
    with pytest.raises(DataError, match="is not the one .* was prepared with"):
        use(folder, tokenizer_path=other)
    shutil.copy(Path(other, "tokenizer.json"), folder / "tokenizer" / "tokenizer.json")
    with pytest.raises(DataError, match="is not the tokenizer that .* was prepared with"):
        use(folder)
    make_set(tmp_path / "c", other, [[50]])
    with pytest.raises(DataError, match="different tokenizers"):
        held_out_text([sets["a"], str(tmp_path / "c")], seq_len=8, local_batch_size=1)


def test_missing_manifest_says_what_the_folder_is(tmp_path, sets):
    with pytest.raises(DataError, match="it is not a folder made by"):
        read_manifest(tmp_path)
    (tmp_path / ".prepare").mkdir()
    with pytest.raises(DataError, match="its preparation did not finish"):
        read_manifest(tmp_path)
    shutil.copytree(sets["a"], tmp_path / "train")
    with pytest.raises(DataError, match=f"but these have: {tmp_path}/train"):
        read_manifest(tmp_path)


def test_round_trip_and_content(folder, sets):
    copy = read_manifest(folder)
    assert copy == read_manifest(sets["a"])
    assert copy.content_sha256 != read_manifest(sets["b"]).content_sha256
    for other in ({"eos_id": copy.eos_id + 1}, {"tokenizer_sha256": "0"}, {"dtype": "uint32"}):
        assert replace(copy, **other).content_sha256 != copy.content_sha256
    assert json.loads((folder / "manifest.json").read_text())["tokens"] == copy.tokens
    assert [token_dtype(n) for n in (100, 65_536, 65_537)] == ["uint16", "uint16", "uint32"]


def test_show(folder, tmp_path, tokenizer, capsys):
    documents = make_set(tmp_path / "x", tokenizer, [[4, 9], [3]])
    stream = TokenStream(tmp_path / "x")
    assert [stream.document(n).tolist() for n in range(3)] == documents
    with pytest.raises(ConfigError, match="documents 0 to 2"):
        stream.document(3)
    show([str(folder), "--verify", "--document", "5"])
    assert "all 6 files have the right checksums" in capsys.readouterr().out
