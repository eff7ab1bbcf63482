"""prepare: the same bytes for any number of workers and after any interruption; bad input named."""

import csv
import fcntl
import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from torchtitan_deltaproduct.data.shards.manifest import read_manifest
from torchtitan_deltaproduct.data.shards.shards import TokenStream
from torchtitan_deltaproduct.data.show import verify
from torchtitan_deltaproduct.data.text.documents import BadRecord, Document
from torchtitan_deltaproduct.data.text.prepare import Settings, locked, main, prepare
from torchtitan_deltaproduct.data.text.sources import plan_units, read_unit
from torchtitan_deltaproduct.data.text.tokenizer import load_tokenizer, token_bytes
from torchtitan_deltaproduct.data.text.train_tokenizer import train_tokenizer
from torchtitan_deltaproduct.errors import ConfigError, DataError

from .conftest import make_corpus, make_jsonl


def files_of(folder: Path) -> dict[str, bytes]:
    """What is in a folder; the note of when its files were written is another each time."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".verified")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def texts_of(folder: Path) -> list[str]:
    stream, tokenizer = TokenStream(folder), load_tokenizer(folder / "tokenizer")
    documents = [stream.document(number).tolist() for number in range(stream.manifest.documents)]
    assert all(tokens[-1] == 0 and 0 not in tokens[:-1] for tokens in documents)
    return [tokenizer.decode(tokens[:-1]) for tokens in documents]


def write_parquet(path: Path, texts: list, column: str = "text", rows: int = 10) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(texts)), column: texts}), path, row_group_size=rows)
    return path


def zstd(content: bytes) -> bytes:
    target = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(target, "zstd") as stream:
        stream.write(content)
    return target.getvalue().to_pybytes()


def test_every_kind_of_input_becomes_the_same_documents(tmp_path, tokenizer):
    texts = [f"text {n} " + "größe\n" * (n % 7) for n in range(200)]
    lines = "\n".join(json.dumps({"body": text}) for text in texts) + "\n"
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(lines.rstrip("\n"))
    write_parquet(tmp_path / "c.parquet", texts, "body")
    (tmp_path / "d").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "d" / f"{number:03d}.txt").write_bytes(text.encode())
    with open(tmp_path / "e.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["n", "body"], *enumerate(texts)])
    (tmp_path / "f.json").write_text(json.dumps([{"body": text} for text in texts], indent=1))
    # Two frames, as parallel packers write them.
    half = len(lines) // 2
    (tmp_path / "g.jsonl.zst").write_bytes(zstd(lines[:half].encode()) + zstd(lines[half:].encode()))
    (tmp_path / "h").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "h" / f"{number:03d}.txt.zst").write_bytes(zstd(text.encode()))
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet", "d", "e.csv", "f.json", "g.jsonl.zst", "h"):
        units = plan_units([tmp_path / name], "body", 1 << 10)
        assert [record.text for unit in units for record in read_unit(unit)] == texts, name
    for name in ("c.parquet", "h"):
        out = tmp_path / f"out_{name[0]}"
        assert prepare(Settings(str(out), tokenizer, [str(tmp_path / name)], text_field="body"), workers=1)
        assert texts_of(out) == texts, name
        manifest = read_manifest(out)
        assert manifest.bytes == sum(len(text.encode()) for text in texts)
        assert (manifest.documents, manifest.empty_documents, manifest.bad_records) == (200, 0, 0)
        stream = TokenStream(out)
        tokens = np.zeros(stream.tokens, dtype=np.int64)
        stream.read(0, tokens)
        assert token_bytes(out / "tokenizer", manifest.vocab_size)[tokens].sum() == manifest.bytes
        assert verify(out) == 2 * len(manifest.shards)


def test_local_datasets(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets")
    texts = [f"row {n}" for n in range(30)]
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path / "disk"))
    out = tmp_path / "out"
    settings = Settings(str(out), tokenizer, [], dataset=str(tmp_path / "disk"))
    assert prepare(settings, workers=1) and not prepare(settings, workers=1)
    assert texts_of(out) == texts
    with pytest.raises(DataError, match="has no column 'body'; it has: text"):
        prepare(Settings(str(tmp_path / "x"), tokenizer, [], str(tmp_path / "disk"), text_field="body"))


def command(out: Path, tokenizer: str, corpus: Path, *options: str) -> list[str]:
    start = [sys.executable, "-m", "torchtitan_deltaproduct.data.prepare", str(out), "--input", str(corpus)]
    return [*start, "--tokenizer", tokenizer, "--validation-fraction", "0.2", "--shard-mb", "1", *options]


def here(words: list[str]) -> int:
    """The exit code of a `command` in this process."""
    return main(words[3:])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """About 4 MB, so 4 shards: text files, and one JSON lines file that is cut in the middle of lines."""
    folder = make_corpus(tmp_path_factory.mktemp("corpus"), 100)
    texts = ["def f(x):\n    return x\n", "naïve 日本 ", "0123 <|endoftext|>"]
    lines = [json.dumps({"text": f"{n} {texts[n % 3] * 40}", "n": n}) + "\n" for n in range(3000)]
    (folder / "lines.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tokenizer, corpus) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert here(command(out, tokenizer, corpus, "--workers", "1")) == 0
    found = files_of(out)
    assert len([name for name in found if name.endswith(".bin")]) >= 8
    assert not any(".tmp" in name or ".prepare" in name for name in found)
    return found


def test_workers_do_not_change_a_byte(tmp_path, tokenizer, corpus, uninterrupted):
    assert here(command(tmp_path / "out", tokenizer, corpus, "--workers", "3")) == 0
    assert files_of(tmp_path / "out") == uninterrupted


def test_killed_again_and_again_then_finished_gives_the_same_bytes(tmp_path, tokenizer, corpus, uninterrupted):
    """Killed at a random moment, once before and then after each further shard."""
    out, rng, seen, kills = tmp_path / "out", random.Random(0), 0, 0
    while True:
        with open(tmp_path / "log", "a") as log:
            process = subprocess.Popen(command(out, tokenizer, corpus, "--workers", "2"), stdout=log, stderr=log)
            while process.poll() is None and kills and len(list(out.glob(".prepare/0*.json"))) <= seen:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.5 if kills == 0 else 0.15))
            process.kill()
            if process.wait() == 0:
                break
        assert process.returncode == -signal.SIGKILL, (tmp_path / "log").read_text()
        kills, seen = kills + 1, len(list(out.glob(".prepare/0*.json")))
        for path in out.rglob("manifest.json"):
            assert path.read_bytes() == uninterrupted[str(path.relative_to(out))]
    assert kills >= 2 and "shards are there already" in (tmp_path / "log").read_text()
    assert files_of(out) == uninterrupted


@pytest.mark.parametrize("options", [[], ["--verify"]])
def test_damaged_finished_shards_are_made_again(tmp_path, tokenizer, corpus, uninterrupted, options, capsys):
    """Those that were written to; with --verify those too that are as large, as old and the same file."""
    out = tmp_path / "out"
    process = subprocess.Popen(command(out, tokenizer, corpus, "--workers", "1"), stderr=subprocess.DEVNULL)
    while len(list(out.glob(".prepare/0*.json"))) < 2:
        assert process.poll() is None, "finished before it could be killed"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    shard = sorted(out.glob("train/shards/*.bin"))[0]
    before = shard.stat()
    shard.write_bytes(b"\0" * before.st_size)
    if options:
        os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert here(command(out, tokenizer, corpus, *options)) == 0
    assert "is damaged and is made again" in capsys.readouterr().err
    assert files_of(out) == uninterrupted


def test_parts_on_several_machines(tmp_path, tokenizer, corpus, uninterrupted, capsys):
    """Two at a time and one after them, then what is left: the same bytes as in one go."""
    out = tmp_path / "out"
    parts = [command(out, tokenizer, corpus, "--workers", "1", "--part", f"{number}/3") for number in (1, 2, 3)]
    together = [subprocess.Popen(words, stderr=subprocess.PIPE, text=True) for words in parts[:2]]
    for process in together:
        _, errors = process.communicate()
        assert process.returncode == 0 and "continuing" not in errors and "/3 of" in errors, errors
    whole = len(list(out.glob(".prepare/0*.json")))
    assert whole == 3 and not list(out.rglob("manifest.json"))
    assert here(parts[2]) == 0
    assert len(list(out.glob(".prepare/0*.json"))) > whole
    with locked(out, fcntl.LOCK_SH), pytest.raises(DataError, match="Another prepare is writing"):
        here(command(out, tokenizer, corpus))
    assert here(command(out, tokenizer, corpus)) == 0
    assert "shards are there already" in capsys.readouterr().err and files_of(out) == uninterrupted
    assert here(parts[0]) == 0 and capsys.readouterr().out.startswith("already prepared:")


@pytest.mark.parametrize("part, more", [((0, 4), {}), ((5, 4), {}), ((1, 4), {"overwrite": True})])
def test_a_part_that_is_none(tmp_path, tokenizer, corpus, part, more):
    with pytest.raises(ConfigError, match=f"--part {part[0]}/4: expected I/N with 1 <= I <= N"):
        prepare(Settings(str(tmp_path), tokenizer, [str(corpus)]), part=part, **more)


def test_interrupt_stops_workers_and_keeps_shards(tmp_path, tokenizer, corpus):
    # It may have finished before the signal arrives: then once more.
    for attempt in range(5):
        out = tmp_path / f"out{attempt}"
        process = subprocess.Popen(
            command(out, tokenizer, corpus, "--workers", "2"), stderr=subprocess.PIPE, text=True,
            # A suite in the background of a shell ignores SIGINT, and so would its children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        while process.poll() is None and not list(out.glob(".prepare/0*.json")):
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=20)
        if process.returncode != 0:
            break
    assert process.returncode == 130 and "the same command continues" in stderr and "Traceback" not in stderr
    assert not list(out.rglob("manifest.json")) and not list(out.rglob("*.tmp*"))


def test_held_out_documents_are_not_in_training(tmp_path, tokenizer):
    texts = [f"document {n % 300}" for n in range(600)]
    write_parquet(tmp_path / "x.parquet", texts)
    out = tmp_path / "out"
    prepare(Settings(str(out), tokenizer, [str(tmp_path / "x.parquet")], validation_fraction=0.25), workers=1)
    train, held_out = texts_of(out / "train"), texts_of(out / "validation")
    assert sorted(train + held_out) == sorted(texts) and not set(train) & set(held_out)
    assert 0.15 < len(held_out) / len(texts) < 0.35


def test_split_by_file(tmp_path, tokenizer):
    for number in range(40):
        make_jsonl(tmp_path / "in" / f"{number}.jsonl", 3, seed=number)
    out = tmp_path / "out"
    prepare(Settings(str(out), tokenizer, [str(tmp_path / "in")], validation_fraction=0.3, split_by="file"), workers=1)
    held_out = read_manifest(out / "validation").documents
    assert held_out % 3 == 0 and 0 < held_out < 120


def bad_input(folder: Path) -> Path:
    """Seven bad records and one empty document among ten good ones."""
    folder.mkdir()
    good = json.dumps({"text": "fine"}).encode()
    lines = [good, b'{"text": "cut', b'{"body": "x"}', b'{"text": 7}', b"[1]", b"", b'{"text": ""}', good]
    lines += [b'{"text": "\xff\xfe"}', b'{"text": "\\ud800"}', *[good] * 7]
    (folder / "a.jsonl").write_bytes(b"\n".join(lines))
    (folder / "b.txt").write_bytes(b"one\ntwo\n\xff")
    (folder / "c.txt").write_bytes(b"\xef\xbb\xbffine")
    return folder


def test_bad_records_are_named_counted_and_skipped(tmp_path, tokenizer, capsys):
    source, out = bad_input(tmp_path / "in"), tmp_path / "out"
    assert main([str(out), "--input", str(source), "--tokenizer", tokenizer, "--workers", "1"]) == 0
    assert texts_of(out) == ["fine"] * 10
    said = capsys.readouterr().out
    assert "1 empty documents, 7 unreadable records" in said and "a.jsonl, line 2: invalid JSON" in said
    bad = [json.loads(line) for line in (out / "bad_records.jsonl").read_text().splitlines()]
    named = [(Path(entry["file"]).name, entry["position"]) for entry in bad]
    assert named == [("a.jsonl", f"line {n}") for n in (2, 3, 4, 5, 9, 10)] + [("b.txt", "line 3")]
    reasons = ["invalid JSON", "no field 'text'; fields: body", "is int, expected", "found list", "UTF-8", "lone"]
    for entry, expected in zip(bad, reasons, strict=False):
        assert expected in entry["reason"]
    assert (read_manifest(out).bad_records, read_manifest(out).empty_documents) == (7, 1)


def test_too_many_bad_records_stop_and_a_higher_limit_continues(tmp_path, tokenizer):
    source, out = bad_input(tmp_path / "in"), tmp_path / "out"
    settings = Settings(str(out), tokenizer, [str(source)])
    with pytest.raises(DataError, match=r"More than 6 records cannot be read:\n  .*a.jsonl, line 2: invalid JSON"):
        prepare(settings, workers=1, max_bad_records=6)
    assert not (out / "manifest.json").exists()
    assert prepare(settings, workers=1, max_bad_records=7)


def test_line_numbers_in_later_units(tmp_path, tokenizer):
    """Three units of one file; the lines before are counted only where one must be named."""
    line = json.dumps({"text": "x" * 1000}).encode()
    (tmp_path / "x.jsonl").write_bytes(b"\n".join([line] * 2500 + [b"{"] + [line] * 600) + b"\n")
    settings = Settings(str(tmp_path / "out"), tokenizer, [str(tmp_path / "x.jsonl")], shard_mb=1)
    prepare(settings, workers=2)
    assert len(read_manifest(tmp_path / "out").shards) == 3
    assert read_manifest(tmp_path / "out").documents == 3100
    assert json.loads((tmp_path / "out/bad_records.jsonl").read_text())["position"] == "line 2501"


def test_damaged_gzip_and_parquet_are_reported(tmp_path, tokenizer):
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        for number in range(500):
            file.write(json.dumps({"text": f"{number} {random.random()}"}) + "\n")
    cut = (tmp_path / "a.jsonl.gz").read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(cut[: len(cut) * 2 // 3])
    write_parquet(tmp_path / "b.parquet", ["one", None, "two"])
    out = tmp_path / "out"
    prepare(Settings(str(out), tokenizer, [str(tmp_path / "a.jsonl.gz"), str(tmp_path / "b.parquet")]), workers=1)
    bad = [json.loads(line) for line in (out / "bad_records.jsonl").read_text().splitlines()]
    assert "damaged gzip, the rest is lost" in bad[0]["reason"]
    assert (bad[1]["position"], bad[1]["reason"]) == ("row 2", "field 'text' is NoneType, expected text")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        prepare(Settings(str(tmp_path / "y"), tokenizer, [str(tmp_path / "b.parquet")]))


@pytest.mark.parametrize(("name", "content", "documents", "bad"), [
    ("a.csv", b'n,text\n1,one\n2,"t\nwo"\n\n3\n4,\xff\n5,"x"y\n6,', ["one", "t\nwo"],
     [("line 6", "1 fields, and 2 columns"), ("line 7", "invalid UTF-8"), ("line 8", "invalid CSV")]),
    ("a.csv", b'text\none\n"open', ["one"], [("line 3", "invalid CSV (unexpected end of data)")]),
    ("a.json", b'[{"text": "one"}, {"body": 1}, 7, {"text": null}]', ["one"],
     [("item 2", "no field 'text'; fields: body"), ("item 3", "found int"), ("item 4", "is NoneType")]),
    ("a.json", b'\n[\n{"text": "one"},\n', [], [("item 1", "line 4: all of the list is lost")]),
    ("a.json", b'[\n{"text": "\xff"}]', [], [("item 1", "invalid UTF-8 in line 2")]),
    ("a.json", b'{"text": "one"}\n[1]\n', ["one"], [("line 2", "found list")]),
    ("a.json.gz", gzip.compress(b'[{"text": "one"}]', mtime=0)[:-9], [], [("line 1", "damaged gzip")]),
    ("a.jsonl.zst", b"no zstd", [], [("line 1", "damaged zstd, the rest is lost")]),
    ("a.txt.zst", zstd(b"one" * 99)[:-2], [], [("line 1", "is lost (Truncated compressed stream)")]),
])  # fmt: skip
def test_damage_in_every_kind_is_named(tmp_path, name, content, documents, bad):
    (tmp_path / name).write_bytes(content)
    records = [record for unit in plan_units([tmp_path / name], "text", 1 << 20) for record in read_unit(unit)]
    assert [record.text for record in records if isinstance(record, Document) and record.text] == documents
    found = [(record.position, record.reason) for record in records if isinstance(record, BadRecord)]
    assert [place for place, _ in found] == [place for place, _ in bad]
    assert all(expected in reason for (_, reason), (_, expected) in zip(found, bad, strict=True)), found


def test_rows_before_the_damage_are_kept(tmp_path):
    lines = [random.randbytes(40).hex() for _ in range(9000)]
    (tmp_path / "a.csv.zst").write_bytes(zstd("\n".join(["text", *lines]).encode())[:-9])
    (unit,) = plan_units([tmp_path / "a.csv.zst"], "text", 1 << 20)
    *documents, bad = read_unit(unit)
    assert [document.text for document in documents] == lines[: len(documents)] and len(documents) > 1000
    assert bad.position == f"line {len(documents) + 2}" and bad.reason.startswith("damaged zstd, the rest is lost")


@pytest.mark.parametrize(("content", "message"), [
    (b"n,body\n1,x\n", "has no column 'text'; it has: n, body.\nName one with --text-field"),
    (b"text,text\n1,x\n", "has 2 columns 'text'"),
    ("text\nx\n".encode("utf-16"), "cannot be read as CSV"),
])  # fmt: skip
def test_csv_files_that_cannot_be_used(tmp_path, tokenizer, content, message):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare(Settings(str(tmp_path / "out"), tokenizer, [str(tmp_path / "a.csv")]))


def test_a_csv_without_a_line_is_empty_like_a_text_without_a_letter(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"")
    (tmp_path / "b.csv").write_bytes(b"text\nhere\n")
    (unit,) = plan_units([tmp_path], "text", 1 << 20)
    assert [document.text for document in read_unit(unit)] == ["here"]


def test_neither_file_nor_folder(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe is neither a file nor a folder"):
        plan_units([tmp_path / "pipe"], "text", 1 << 20)


def test_other_datasets_are_not_overwritten(tmp_path, tokenizer):
    source, out = make_corpus(tmp_path / "in", 4), tmp_path / "out"
    settings = Settings(str(out), tokenizer, [str(source)])
    assert prepare(settings, workers=1) and not prepare(settings, workers=1)
    before = files_of(out)
    with pytest.raises(DataError, match=r"made otherwise \(eos_id: 0 there, 1 here\)"):
        prepare(Settings(str(out), tokenizer, [str(source)], eos="!"))
    (source / "0000.py").write_text("changed")
    with pytest.raises(DataError, match="an input file has changed since"):
        prepare(settings)
    assert files_of(out) == before
    # A damaged dataset can be replaced too.
    (out / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        prepare(settings)
    assert prepare(settings, workers=1, overwrite=True) and files_of(out).keys() == before.keys()
    (tmp_path / "strange" / "shards").mkdir(parents=True)
    with pytest.raises(DataError, match="was not made by prepare"):
        prepare(Settings(str(tmp_path / "strange"), tokenizer, [str(source)]))


def test_tokenizer_inside_the_output_survives_overwrite(tmp_path, tokenizer):
    source, out = make_corpus(tmp_path / "in", 4), tmp_path / "out"
    (out / "tokenizer").mkdir(parents=True)
    for path in Path(tokenizer).iterdir():
        (out / "tokenizer" / path.name).write_bytes(path.read_bytes())
    settings = Settings(str(out), str(out / "tokenizer"), [str(source)])
    assert prepare(settings, workers=1) and prepare(settings, workers=1, overwrite=True)
    assert len(texts_of(out)) == 4


def test_one_is_no_plural(tmp_path, tokenizer, capsys):
    """As docs/own_text.md shows it."""
    (tmp_path / "book.txt").write_text("words and words " * 500)
    assert here(command(tmp_path / "out", tokenizer, tmp_path / "book.txt", "--validation-fraction", "0")) == 0
    said = capsys.readouterr().out
    assert " tokens in 1 document, " in said and "in 1 shard\n" in said, said


def test_one_prepare_at_a_time(tmp_path, tokenizer):
    source, out = make_corpus(tmp_path / "in", 2), tmp_path / "out"
    with locked(out), pytest.raises(DataError, match="Another prepare is writing"):
        prepare(Settings(str(out), tokenizer, [str(source)]))
    assert prepare(Settings(str(out), tokenizer, [str(source)]), workers=1)


def test_large_vocabularies_take_four_bytes(tmp_path, tokenizer):
    description = json.loads(Path(tokenizer, "tokenizer.json").read_text())
    description["model"]["vocab"]["\u0120far"] = 70_000
    wide = tmp_path / "wide"
    wide.mkdir()
    (wide / "tokenizer.json").write_text(json.dumps(description))
    out = tmp_path / "out"
    prepare(Settings(str(out), str(wide), [str(make_corpus(tmp_path / "in", 2))]), workers=1)
    manifest = read_manifest(out)
    assert (manifest.dtype, manifest.vocab_size) == ("uint32", 70_001)
    assert [text.encode() for text in texts_of(out)] == [
        path.read_bytes() for path in sorted((tmp_path / "in").iterdir())
    ]


def test_no_output_is_its_own_input(tmp_path, tokenizer):
    """By a link, in a part of the result, in a dataset's folder, and of `train_tokenizer`: nothing is written."""
    source, raw = make_corpus(tmp_path / "in", 2), make_corpus(tmp_path / "out/train", 2)
    (source / "link").symlink_to("../out")
    before = sorted(tmp_path.rglob("*"))
    for settings in (
        Settings(str(tmp_path / "out/new"), tokenizer, [str(source)]),
        Settings(str(tmp_path / "out"), tokenizer, [str(raw)], validation_fraction=0.5),
        Settings(str(raw / "new"), tokenizer, [], dataset=str(raw)),
    ):
        with pytest.raises(DataError, match="lies in its own input .*\nChoose a folder outside"):
            prepare(settings, workers=1)
    with pytest.raises(DataError, match="in/tokenizer lies in its own input"):
        train_tokenizer([str(source)], 260, str(source / "tokenizer"))
    assert sorted(tmp_path.rglob("*")) == before
    assert train_tokenizer([str(raw)], 260, str(tmp_path / "out"))
    assert prepare(Settings(str(tmp_path / "out"), str(tmp_path / "out"), [str(raw)]), workers=1)


def test_user_errors(tmp_path, tokenizer):
    source = make_corpus(tmp_path / "in", 2)
    with pytest.raises(DataError, match="There is no file or folder"):
        prepare(Settings(str(tmp_path / "o"), tokenizer, [str(tmp_path / "none")]))
    with pytest.raises(DataError, match="lies in its own input"):
        prepare(Settings(str(source / "o"), tokenizer, [str(source)]))
    with pytest.raises(ConfigError, match="either --input"):
        Settings(str(tmp_path / "o"), tokenizer, [])
    with pytest.raises(ConfigError, match="expected 0 <= F < 1"):
        Settings(str(tmp_path / "o"), tokenizer, [str(source)], validation_fraction=1.0)
    (tmp_path / "a.jsonl.xz").write_bytes(b"")
    with pytest.raises(DataError, match="of a kind that is not read here"):
        prepare(Settings(str(tmp_path / "o"), tokenizer, [str(tmp_path / "a.jsonl.xz")]))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="has no documents: 1 were empty"):
        prepare(Settings(str(tmp_path / "o"), tokenizer, [str(tmp_path / "empty.txt")]), workers=1)


def test_a_full_disk_is_one_clear_error(tmp_path, tokenizer, monkeypatch):
    from torchtitan_deltaproduct.data.text import units
    from torchtitan_deltaproduct.data.text.sources import plan_units

    def full(*_):
        raise OSError(28, "No space left on device")

    job = units.Preparation(str(tmp_path), str(tmp_path), tokenizer, 0, "uint16", 0.0, "document")
    monkeypatch.setattr(units.ShardWriter, "add", full)
    worker = {"job": job, "limit": 0, "tokenizer": load_tokenizer(tokenizer)}
    monkeypatch.setattr(units, "_worker", worker)
    (unit,) = plan_units([make_corpus(tmp_path / "in", 2)], "text", 1 << 30)
    with pytest.raises(DataError, match=r"disk of .* is full; finished shards are kept"):
        units._run_unit(0, unit)
    assert not list(tmp_path.rglob("*.tmp*"))


def test_shards_of_an_interrupted_earlier_version_are_made_again(tmp_path, tokenizer, capsys):
    """Their .idx was int64 alone, where each document ends; the rest of the record is as it is now."""
    make_jsonl(tmp_path / "a.jsonl", 30), (tmp_path / "b.jsonl").write_text("{\n")
    words = [str(tmp_path / "out"), "--tokenizer", tokenizer, "--workers", "1", "--input"]
    words += [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    with pytest.raises(DataError, match="--max-bad-records"):
        main([*words, "--max-bad-records", "0"])
    path, index = tmp_path / "out/.prepare/00000.json", tmp_path / "out/shards/00000.idx"
    index.write_bytes(np.arange(1, 31).astype("<i8").tobytes())
    record = json.loads(path.read_text())
    record["shards"][""]["idx_sha256"] = hashlib.sha256(index.read_bytes()).hexdigest()
    record["states"][""][1] = [index.stat().st_size, index.stat().st_mtime_ns, index.stat().st_ino]
    path.write_text(json.dumps(record))
    assert main(words) == 0 and "is damaged and is made again" in capsys.readouterr().err
    assert len(texts_of(tmp_path / "out")) == 30 and verify(tmp_path / "out") == 2
