"""Inputs that once were read wrongly or ended in a traceback: suffixes, damage, separators in text, unknown tokens."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models

from tests.toy import REPO
from torchtitan_deltaproduct.config.job import Data
from torchtitan_deltaproduct.data import build_loader
from torchtitan_deltaproduct.data.shards.manifest import read_manifest
from torchtitan_deltaproduct.data.shards.shards import TokenStream
from torchtitan_deltaproduct.data.text import units as tokenize_units
from torchtitan_deltaproduct.data.text.arrow import plan_dataset_units
from torchtitan_deltaproduct.data.text.documents import Unit
from torchtitan_deltaproduct.data.text.files import kind_of, list_files
from torchtitan_deltaproduct.data.text.plan import make_plan
from torchtitan_deltaproduct.data.text.prepare import Settings, main, prepare
from torchtitan_deltaproduct.data.text.sources import open_records, plan_units, read_unit
from torchtitan_deltaproduct.data.text.tokenizer import load_tokenizer
from torchtitan_deltaproduct.data.text.train_tokenizer import main as train_tokenizer
from torchtitan_deltaproduct.errors import ConfigError, DataError

from .conftest import make_jsonl
from .test_prepare import texts_of

CASES = REPO.parent / "shared/cases"
# The folder of a worktree lies elsewhere.
CASES = CASES if CASES.is_dir() else Path("/work/shared/cases")
needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason=f"the small inputs are not in {CASES}")


def made(out, tokenizer, *inputs, **options):
    how = {key: options.pop(key) for key in ("max_unknown", "max_bad_records") if key in options}
    prepare(Settings(str(out), str(tokenizer), [str(path) for path in inputs], **options), workers=1, **how)
    return out


@pytest.mark.parametrize(("name", "kind"), [
    ("a.jsonl", "json"), ("a.JSONL", "json"), ("a.jsonlines", "json"), ("a.jl", "json"), ("a.ndjson", "json"),
    ("a.jsonl-00000-of-00002", "json"), ("a.JSONL.GZ", "json"), ("a.jsonl-00000-of-00002.gz", "json"),
    ("a.jsonl.gz-00000-of-00002", "json"), ("a-00000-of-00002.parquet", "parquet"), ("a.PARQUET", "parquet"),
    ("a.parq", "parquet"), ("a.pq", "parquet"), ("a.txt", "text"), ("a", "text"), ("a.py.gz", "text"),
    ("a.parquet.gz", "unreadable"), ("a.JSONL.ZST", "json"), ("a.tar.gz", "unreadable"), ("a.csv", "csv"),
    ("a.csv.gz", "csv"), ("a.txt.zstd", "text"), ("a.zst", "text"), ("a.pq.zst", "unreadable"), ("a.xz", "unreadable"),
])  # fmt: skip
def test_one_table_of_suffixes(name, kind):
    assert kind_of(name) == (kind, "gzip" if ".gz" in name.lower() else "zstd" if ".zst" in name.lower() else "")


def test_text_that_begins_like_json_is_said(tmp_path, tokenizer, caplog):
    (tmp_path / "a.txt").write_text('{"text": "x"}\n')
    (tmp_path / "b.txt").write_text("{ a block }\n")
    made(tmp_path / "out", tokenizer, tmp_path / "a.txt", tmp_path / "b.txt")
    assert [record.args[0].name for record in caplog.records] == ["a.txt"] and ".jsonl" in caplog.text


def test_links_to_folders_are_followed_and_loops_end(tmp_path, caplog):
    for name in ("in/sub/a.txt", "elsewhere/b.txt", "elsewhere/deep/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "in/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/again").symlink_to(tmp_path / "in")
    (tmp_path / "elsewhere/up").symlink_to(tmp_path)
    (tmp_path / "in/gone.txt").symlink_to(tmp_path / "nothing")
    found = [str(path.relative_to(tmp_path / "in")) for path in list_files([tmp_path / "in"])]
    assert found == ["link/b.txt", "link/deep/c.txt", "sub/a.txt"]
    assert "in/again is a link to a folder that is read already" in caplog.text
    assert "gone.txt is no file, or a link to none" in caplog.text


def test_splits_are_obeyed_or_refused(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets")
    texts = [f"row {n}" for n in range(30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path / "disk"))
    datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": texts})}).save_to_disk(str(tmp_path / "dict"))
    with pytest.raises(ConfigError, match=r"split 'train\[:10%\]' of .*a.jsonl: only a dataset of `datasets` has that"):
        made(tmp_path / "o", tokenizer, tmp_path / "a.jsonl", split="train[:10%]")
    out = made(tmp_path / "rows", tokenizer, dataset=str(tmp_path / "a.jsonl"), split="train[:10%]")
    assert texts_of(out) == texts[:3]
    with pytest.raises(ConfigError, match=r"split 'train\[:10%\]' of .*disk"):
        made(tmp_path / "o", tokenizer, dataset=str(tmp_path / "disk"), split="train[:10%]")
    with pytest.raises(DataError, match="has no split 'train'; it has: test"):
        made(tmp_path / "o", tokenizer, dataset=str(tmp_path / "dict"))
    config = Data(kind="streaming", dataset=str(tmp_path / "a.jsonl"), split="train[:10%]")
    sizes = {"seq_len": 8, "local_batch_size": 1, "global_batch_size": 1}
    with pytest.raises(ConfigError, match="only a dataset of `datasets` has that"):
        build_loader(config, **sizes, tokenizer_path=tokenizer)


@needs_cases
@pytest.mark.parametrize(("name", "documents", "bad", "reason"), [
    ("flip.jsonl.gz", None, 1, "damaged gzip, the rest is lost"),
    ("badutfdict.parquet", 10, 5, "invalid UTF-8"),
    ("badline.jsonl", None, 1, "invalid JSON"),
    ("surrogate.jsonl", 5, 1, "a lone surrogate"),
    ("empt.jsonl", 3, 1, "is NoneType, expected text"),
])  # fmt: skip
def test_damage_is_counted_and_named(tmp_path, tokenizer, name, documents, bad, reason):
    out = made(tmp_path / "out", tokenizer, CASES / name)
    manifest = read_manifest(out)
    assert manifest.bad_records == bad and manifest.documents >= (documents or 10)
    assert documents in (None, manifest.documents)
    lines = [json.loads(line) for line in (out / "bad_records.jsonl").read_text().splitlines()]
    assert len(lines) == bad and all(reason in line["reason"] and line["file"].endswith(name) for line in lines)


@needs_cases
def test_lines_before_the_flipped_byte_are_kept(tmp_path, tokenizer):
    (unit,) = plan_units([CASES / "flip.jsonl.gz"], "text", 1 << 20)
    *documents, bad = read_unit(unit)
    assert bad.position == f"line {len(documents) + 1}" and len(documents) == len({d.text for d in documents}) > 100
    assert train_tokenizer([str(CASES / "flip.jsonl.gz"), "--out", str(tmp_path / "tok"), "--vocab-size", "300"]) == 0


@needs_cases
def test_the_reason_is_said_where_nothing_is_left(tmp_path, tokenizer):
    said = "has no documents: 0 were empty and 1 records unreadable.\n.*line 1: UTF-16 text, or no text at all"
    with pytest.raises(DataError, match=said):
        made(tmp_path / "out", tokenizer, CASES / "u16.txt")


@needs_cases
def test_a_column_with_a_dot_in_its_name(tmp_path, tokenizer):
    texts = texts_of(made(tmp_path / "out", tokenizer, CASES / "dotamb.parquet", text_field="doc.text"))
    assert texts == [f"def f{n}(): return {n}\n" for n in range(60)]


@needs_cases
def test_text_never_makes_a_separator(tmp_path):
    out = made(tmp_path / "out", CASES / "tk_nonspecial", CASES / "literal_eos.jsonl")
    manifest, stream = read_manifest(out), TokenStream(out)
    tokens = np.empty(stream.tokens, dtype=np.int64)
    stream.read(0, tokens)
    assert manifest.documents == (tokens == manifest.eos_id).sum() == 100
    first = stream.document(0).tolist()
    assert load_tokenizer(out / "tokenizer").decode(first[:-1]) == "a<|endoftext|>b"


@needs_cases
def test_unknown_tokens_are_counted_said_and_refused(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("hello world of unknown words " * 5)
    (tmp_path / "b.txt").write_text("more unknown words")
    inputs = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    with pytest.raises(DataError, match=r"of \d+ tokens \(\d+\.\d%\) are unknown.*\n.*--max-unknown"):
        main([str(tmp_path / "out"), "--input", *inputs, "--tokenizer", str(CASES / "tk_unk"), "--workers", "1"])
    assert not (tmp_path / "out/manifest.json").exists()
    command = [str(tmp_path / "out"), "--input", *inputs, "--tokenizer", str(CASES / "tk_unk"), "--workers", "1"]
    assert main([*command, "--max-unknown", "1"]) == 0
    manifest, tokenizer = read_manifest(tmp_path / "out"), load_tokenizer(CASES / "tk_unk")
    ids = [i for path in inputs for i in tokenizer.encode_batch([Path(path).read_text()])[0]]
    assert manifest.unknown_tokens == ids.count(tokenizer.unknown_id) > len(ids) / 2
    assert f"unknown: {manifest.unknown_tokens:,} tokens" in capsys.readouterr().out


@needs_cases
@pytest.mark.parametrize("locale", ["C", "POSIX"])
def test_locales_that_are_not_utf8(tmp_path, locale):
    """Read, written and printed as UTF-8 whatever the locale says."""
    (tmp_path / "日本.txt").write_text("naïve 日本\n" * 30, encoding="utf-8")
    (tmp_path / "b.txt").write_text("b", encoding="utf-8")
    command = [sys.executable, "-X", "utf8=0", "-m", "torchtitan_deltaproduct.data.prepare", str(tmp_path / "出")]
    command += ["--input", str(tmp_path / "日本.txt"), str(tmp_path / "b.txt"), "--workers", "1"]
    command += ["--tokenizer", str(CASES / "tk_fullwidth"), "--eos", "<｜end▁of▁sentence｜>"]
    environment = os.environ | {"LC_ALL": locale, "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert read_manifest(tmp_path / "出").documents == 2 and texts_of(tmp_path / "出")[0] == "naïve 日本\n" * 30


def test_file_names_that_are_not_utf8(tmp_path, tokenizer):
    name = os.fsdecode(b"caf\xe9.txt")
    for other in range(6):
        (tmp_path / f"{other}.txt").write_text("x" * other + "y")
    (tmp_path / name).write_text("bytes of Latin-1 in the name")
    (tmp_path / os.fsdecode(b"bad\xe9.txt")).write_bytes(b"\xff")
    out = tmp_path.with_name("out-" + tmp_path.name)
    made(out, tokenizer, tmp_path, validation_fraction=0.3, split_by="file")
    assert sum(read_manifest(out / part).documents for part in ("train", "validation")) == 7


def test_out_onto_a_file(tmp_path, tokenizer):
    (tmp_path / "file").write_text("x")
    (tmp_path / "in.txt").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(DataError, match="cannot be made: a file is in the way"):
            made(out, tokenizer, tmp_path / "in.txt")
        with pytest.raises(DataError, match="cannot be made: a file is in the way"):
            train_tokenizer([str(tmp_path / "in.txt"), "--out", str(out), "--vocab-size", "300"])


def test_home_is_expanded(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("at home")
    Path(tmp_path, "tok").symlink_to(tokenizer)
    assert main(["~/out", "--input", "~/a.txt", "--tokenizer", "~/tok", "--workers", "1"]) == 0
    assert texts_of(tmp_path / "out") == ["at home"]


def test_one_document_is_held_out_at_least(tmp_path, tokenizer, capsys):
    """The fraction draws none of 40: the one with the smallest draw is held out, whatever the number of workers."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"document {n}"}) + "\n" for n in range(40)))
    found = []
    for name, shard_mb in (("one", 0), ("two", 1)):
        out = made(tmp_path / name, tokenizer, tmp_path / "a.jsonl", validation_fraction=1e-9, shard_mb=shard_mb)
        found.append(texts_of(out / "validation"))
        assert sorted(found[-1] + texts_of(out / "train")) == sorted(f"document {n}" for n in range(40))
    assert found[0] == found[1] and len(found[0]) == 1
    assert "the nearest one is held out" in capsys.readouterr().err
    (tmp_path / "single.jsonl").write_text('{"text": "one\\ntwo"}\n')
    with pytest.raises(DataError, match="--split-by token holds out the end of each, --validation-input PATH"):
        made(tmp_path / "x", tokenizer, tmp_path / "single.jsonl", validation_fraction=0.5)


@pytest.mark.parametrize("split_by", ["document", "token"])
def test_the_tail_of_a_single_text(tmp_path, tokenizer, split_by):
    rng = random.Random(0)
    text = "\n".join(f"line {n} {rng.random()}" for n in range(500))
    (tmp_path / "book.txt").write_text(text)
    out = made(tmp_path / "out", tokenizer, tmp_path / "book.txt", validation_fraction=0.1, split_by=split_by)
    (train,), (held_out,) = texts_of(out / "train"), texts_of(out / "validation")
    assert train + held_out == text and train.endswith("\n") and 0.1 <= len(held_out) / len(text) < 0.11
    sizes = [read_manifest(out / part).bytes for part in ("train", "validation")]
    assert sizes == [len(train.encode()), len(held_out.encode())]


def test_validation_input(tmp_path, tokenizer):
    make_jsonl(tmp_path / "in/a.jsonl", 30), make_jsonl(tmp_path / "held/b.jsonl", 7, seed=1)
    out = made(tmp_path / "out", tokenizer, tmp_path / "in", validation_input=[str(tmp_path / "held")])
    assert [read_manifest(out / part).documents for part in ("train", "validation")] == [30, 7]
    assert not set(texts_of(out / "train")) & set(texts_of(out / "validation"))
    with pytest.raises(DataError, match="it would be trained on and held out"):
        made(tmp_path / "x", tokenizer, tmp_path / "in", validation_input=[str(tmp_path / "in/a.jsonl")])
    with pytest.raises(ConfigError, match="either --validation-input"):
        made(tmp_path / "x", tokenizer, tmp_path / "in", validation_input=["x"], validation_fraction=0.5)


def test_a_damaged_record_is_made_again(tmp_path, tokenizer, capsys):
    """Of a run that was cut off between a shard and the end, one record is torn."""
    make_jsonl(tmp_path / "a.jsonl", 30), make_jsonl(tmp_path / "b.jsonl", 30, seed=1)
    (tmp_path / "c.jsonl").write_text("{\n")
    command = [str(tmp_path / "out"), "--tokenizer", tokenizer, "--workers", "1", "--input"]
    command += [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    with pytest.raises(DataError, match="--max-bad-records"):
        main([*command, "--max-bad-records", "0"])
    records = sorted((tmp_path / "out/.prepare").glob("0*.json"))
    assert len(records) == 2
    records[0].write_text("{")
    main(command)
    assert "is damaged and is made again" in capsys.readouterr().err
    assert read_manifest(tmp_path / "out").documents == 60


@needs_cases
def test_a_tokenizer_configuration_that_is_a_list(tmp_path, tokenizer):
    (tmp_path / "tok").mkdir()
    for source in (CASES / "tk_list/tokenizer_config.json", Path(tokenizer, "tokenizer.json")):
        (tmp_path / "tok" / source.name).write_bytes(source.read_bytes())
    with pytest.raises(DataError, match="tokenizer_config.json holds a JSON list; expected an object") as caught:
        made(tmp_path / "out", tmp_path / "tok", CASES / "code.jsonl")
    assert "\n" not in str(caught.value)


def test_a_vocabulary_that_drops_what_it_cannot_write(tmp_path):
    """BPE without bytes and without an unknown token: the characters lost are counted."""
    letters = {letter: i for i, letter in enumerate("abc ")}
    folder, inner = tmp_path / "tok", Tokenizer(models.BPE(vocab=letters, merges=[]))
    inner.add_special_tokens(["</s>"])
    folder.mkdir()
    inner.save(str(folder / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("abc 日本 abc", encoding="utf-8"), (tmp_path / "b.txt").write_text("abc\ncab\n")
    with pytest.raises(DataError, match=r"2 of 14 tokens \(14.3%\) are unknown"):
        made(tmp_path / "out", folder, tmp_path / "a.txt", tmp_path / "b.txt")
    assert read_manifest(made(tmp_path / "b", folder, tmp_path / "b.txt")).unknown_tokens == 0
    words = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="[UNK]"))
    words.save(str(folder / "tokenizer.json"))
    with pytest.raises(DataError, match="the tokenizer cannot write the text: WordLevel error"):
        made(tmp_path / "c", folder, tmp_path / "b.txt", eos="</s>")


@needs_cases
@pytest.mark.parametrize(("byte", "flipped"), [(99, 0x80), (444, 2), (125, 0x80)])
def test_flipped_bits_of_parquet_are_messages(tmp_path, tokenizer, byte, flipped):
    """Not errors of the library that reads it: IndexError, ArrowNotImplementedError and UnicodeDecodeError."""
    content = bytearray((CASES / "badutfdict.parquet").read_bytes())
    content[byte] ^= flipped
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(DataError, match="Parquet"):
        made(tmp_path / "out", tokenizer, tmp_path / "x.parquet")


TEXTS = ["a text", "another", "a third", "日本"]


def not_utf8(kind):
    """The texts and one that is none, in an Arrow array of a type of text."""
    raw = pa.array([*(text.encode() for text in TEXTS), b"\xff"], pa.large_binary() if "large" in str(kind) else None)
    return pa.Array.from_buffers(kind, len(raw), raw.buffers())


@pytest.mark.parametrize("column", [
    not_utf8(pa.string()), not_utf8(pa.large_string()), not_utf8(pa.string()).dictionary_encode(),
    pa.array([*(text.encode() for text in TEXTS), b"\xff"]), pa.array([*TEXTS, None], pa.string_view()),
], ids=lambda column: str(column.type)[:10])  # fmt: skip
def test_every_type_of_text(tmp_path, column):
    """Of Parquet, of a saved dataset, and of that as a stream: a text that is not UTF-8 is one bad record."""
    datasets = pytest.importorskip("datasets")
    table = pa.table({"text": column})
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    found = [list(read_unit(unit)) for unit in plan_units([tmp_path / "a.parquet"], "text", 1 << 20)]
    if not pa.types.is_dictionary(column.type) and column.type != pa.string_view():
        datasets.Dataset(table).save_to_disk(str(tmp_path / "saved"))
        found += [list(read_unit(unit)) for unit in plan_dataset_units(str(tmp_path / "saved"), "", "train", "text")]
        found.append(list(open_records(str(tmp_path / "saved"), "", "train", "text")))
    for *documents, bad in found:
        assert [document.text for document in documents] == TEXTS
        assert bad.position == "row 5" and ("invalid UTF-8" in bad.reason or "NoneType" in bad.reason)


@pytest.mark.parametrize(("columns", "told"), [
    ({"text": pa.array([2**62], pa.timestamp("us"))}, r"Column 'text' of .* holds timestamp\[us\], expected text"),
    ({"text": pa.array([["a"]])}, "holds list<"), ({"text": pa.array([{"a": "b"}])}, "holds struct<"),
    ({"text": pa.array([1.5]).dictionary_encode()}, "holds "),
    ([("text", pa.array(["a"])), ("text", pa.array(["b"]))], "has 2 columns 'text'"),
    ({"doc": pa.array([{"text": "a"}])}, "has no column 'text'; it has: doc"),
])  # fmt: skip
def test_a_column_that_is_no_text_is_refused(tmp_path, columns, told):
    pairs = list(columns.items()) if isinstance(columns, dict) else columns
    table = pa.table([column for _, column in pairs], names=[name for name, _ in pairs])
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=told):
        plan_units([tmp_path / "a.parquet"], "text", 1 << 20)


def test_damage_of_a_saved_dataset(tmp_path, tokenizer):
    """Flipped bits of its files are bad records or one message; offsets that lead out of the file are not followed."""
    datasets = pytest.importorskip("datasets")
    saved = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": [f"row {n} " * 5 for n in range(300)]}).save_to_disk(str(saved))
    name = next(saved.glob("*.arrow"))
    whole, rng, lost = name.read_bytes(), random.Random(0), 0
    offsets = whole.index(np.arange(0, 1200, 30, dtype=np.int32)[1:4].tobytes())
    for place in [offsets, offsets + 400, *(rng.randrange(len(whole)) for _ in range(30))]:
        content = bytearray(whole)
        content[place] ^= 1 << rng.randrange(8)
        if place < offsets + 800:
            content[offsets + 3] = 0x7F
        name.write_bytes(content)
        try:
            (unit,) = plan_dataset_units(str(saved), "", "train", "text")
            lost += any("damaged" in getattr(record, "reason", "") for record in read_unit(unit))
        except DataError:
            continue
    assert lost > 3
    (saved / "state.json").write_text((saved / "state.json").read_text().replace("_format_type", "_format"))
    with pytest.raises(DataError, match="cannot be opened: '_format_type'"):
        made(tmp_path / "out", tokenizer, dataset=str(saved))


def test_a_saved_dataset_that_has_changed_is_made_again(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets")
    for texts in (["one", "two"], ["uno", "due"]):
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path / "saved"))
        settings = Settings(str(tmp_path / "out"), tokenizer, [], dataset=str(tmp_path / "saved"))
        if texts[0] == "uno":
            with pytest.raises(DataError, match="an input file has changed since"):
                prepare(settings, workers=1)
        else:
            assert prepare(settings, workers=1) and not prepare(settings, workers=1)


def test_what_is_not_to_be_read_is_said(tmp_path, tokenizer, monkeypatch):
    """A folder that may not be listed, and a file that may not be read (root may, so both are played)."""
    (tmp_path / "in/sub").mkdir(parents=True)
    (tmp_path / "in/a.txt").write_text("text")
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda top, **more: walk(f"{top}/sub/gone", **more))
    with pytest.raises(DataError, match="in/sub/gone cannot be listed: No such file or directory"):
        list_files([tmp_path / "in"])
    monkeypatch.undo()
    job = make_plan(Settings(str(tmp_path / "out"), tokenizer, [str(tmp_path / "in")])).job
    monkeypatch.setattr(tokenize_units, "_worker", {"job": job, "tokenizer": load_tokenizer(tokenizer), "limit": 0})
    with pytest.raises(DataError, match="gone.txt: No such file or directory; finished shards are kept"):
        tokenize_units._run_unit(0, Unit("text", (str(tmp_path / "gone.txt"),), 0, -1, 1, ""))


@pytest.mark.parametrize(("options", "told"), [
    ({"split_by": "token"}, "--split-by token says how to hold out --validation-fraction, which is 0"),
    ({"split_by": "file", "validation_input": ["b.txt"]}, "--split-by file says how"),
    ({"eos": "<|nothing|>"}, "no token '<|nothing|>'"),
])  # fmt: skip
def test_an_option_that_nothing_would_read_is_refused(tmp_path, tokenizer, options, told):
    (tmp_path / "a.txt").write_text("text"), (tmp_path / "b.txt").write_text("")
    with pytest.raises((ConfigError, DataError), match=re.escape(told)):
        made(tmp_path / "out", tokenizer, tmp_path / "a.txt", **options)


def test_held_out_files_without_text(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("text"), (tmp_path / "b.txt").write_text("")
    with pytest.raises(DataError, match="(?s)The validation set has no documents: 1 were empty.*Name other files with"):
        made(tmp_path / "out", tokenizer, tmp_path / "a.txt", validation_input=[str(tmp_path / "b.txt")])
